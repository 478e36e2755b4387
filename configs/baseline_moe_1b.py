# MoE-1B of the paper's table 5.
from configs.baseline_moe_800m import *

out_dir = "out/baseline_moe_1b"

n_layer = 12
n_head = 16
n_embd = 1024
d_shared_expert = 2730

max_iters = 18750  # 39.3B tokens, where the curves of figure 7 end
learning_rate = 1e-3
