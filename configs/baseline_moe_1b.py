# MoE-1B of the paper's table 5.
from configs.baseline_moe_800m import *

out_dir = "out/baseline_moe_1b"

n_layer = 12
n_head = 16
n_embd = 1024
d_shared_expert = 2730

max_iters = 16927  # 35.5B tokens, 100 an activated parameter
learning_rate = 1e-3
