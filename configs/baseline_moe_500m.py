# MoE-0.5B of the paper's table 5, whose width of 748 is a misprint: it gives neither 0.48B nor
# whole heads, 768 does.
from configs.baseline_moe_250m import *

out_dir = "out/baseline_moe_500m"

n_layer = 9
n_head = 12
n_embd = 768
d_shared_expert = 2048

max_iters = 28125  # 14.7B tokens, where the curves of figure 7 end
learning_rate = 2e-3
