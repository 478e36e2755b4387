# The paper's unified strategy. Import it after a baseline: `from configs.unified import *`.
scale_heterogeneous = True  # HG: q, k, v, gate and up each have their own γ
scale_placement = "dual_norm"  # DNP: a norm and a second scale vector behind each of them
scale_reparam = "ordinary"  # OR: γ = β α
scale_weight_decay = "absorbable"  # IWD: decay the vectors that a neighbouring matrix could take over, not the others
