# The paper's unified strategy, a part of a config: import it after a baseline, `from
# configs.unified import *`. Ready to run: configs/unified_120m.py and its like.
scale_heterogeneous = True  # HG: q, k, v, gate and up each have their own γ
# DNP: a norm and a second scale vector after each of them, and after the head
scale_placement = "dual_norm"
scale_reparam = "original"  # OR: γ = β Norm(α)
# IWD: decay Input-Norms, not Output-Norms. Under DNP and OR the first have no length to lose
scale_weight_decay = "input_norm"
