# Llama-1B of the paper's table 4: 1,028,065,024 parameters, 80,640 of them in scale vectors.
from configs.baseline_500m import *

out_dir = "out/baseline_1b"

n_layer = 22
n_head = 28
n_embd = 1792

max_iters = 46875  # 98.3B tokens, as in figure 6
learning_rate = 1e-3
