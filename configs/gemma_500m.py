# Gemma-0.5B of the paper's figure 3: Llama-0.5B's shape with Q/K-norm and norms on the outputs of
# attention and FFN.
from configs.baseline_500m import *

out_dir = "out/gemma_500m"

qk_norm = True
post_norm = True

optimizer = "muon"
learning_rate = 4e-3
max_iters = 5000  # 10B tokens; the paper's other run has 25000, 50B
# figure 3's baseline; compare with --scale_weight_decay=input_norm (IWD), output_norm
scale_weight_decay = "all"
