# MoE-2B of the paper's table 5.
from configs.baseline_moe_800m import *

out_dir = "out/baseline_moe_2b"

n_layer = 15
n_head = 20
n_embd = 1280
d_shared_expert = 3413

max_iters = 29605  # 62.1B tokens, 100 an activated parameter
learning_rate = 6e-4
