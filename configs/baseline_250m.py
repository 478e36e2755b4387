# Llama-0.25B of the paper's table 4. 254,018,560 parameters.
from configs.baseline_120m import *

out_dir = "out/baseline_250m"

n_layer = 12
n_head = 16
n_embd = 1024

max_iters = 46875  # 24.6B tokens, as in figure 6
learning_rate = 2e-3
