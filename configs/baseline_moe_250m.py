# MoE-0.25B of the paper's table 5: 32 routed experts, 4 active, and one that all tokens share.
from configs.baseline_120m import *

out_dir = "out/baseline_moe_250m"

n_layer = 6
n_head = 10
n_embd = 640

n_expert = 32
n_expert_active = 4  # d_expert = int(2/3 n_embd) is the default
d_shared_expert = 1706  # int(8/3 n_embd)

max_iters = 18750  # 9.83B tokens, where the curves of figure 7 end
learning_rate = 3e-3
