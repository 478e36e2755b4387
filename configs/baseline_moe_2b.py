# MoE-2B of the paper's table 5.
from configs.baseline_moe_800m import *

out_dir = "out/baseline_moe_2b"

n_layer = 15
n_head = 20
n_embd = 1280
d_shared_expert = 3413

max_iters = 28125  # 59.0B tokens, where the curves of figure 7 end
learning_rate = 6e-4
