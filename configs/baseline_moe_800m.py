# MoE-0.8B of the paper's table 5, at a sequence of 4096.
from configs.baseline_moe_250m import *

out_dir = "out/baseline_moe_800m"

n_layer = 10
n_head = 15
n_embd = 960
d_shared_expert = 2560

block_size = 4096
batch_size = 4
gradient_accumulation_steps = 128
eval_windows = 400
max_iters = 14062  # 29.5B tokens, where the curves of figure 7 end
learning_rate = 2e-3
