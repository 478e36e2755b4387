# Llama-0.75B of the paper's table 4.
from configs.baseline_500m import *

out_dir = "out/baseline_750m"

n_layer = 21
n_head = 24
n_embd = 1536

max_iters = 35156  # 73.7B tokens, as in figure 6
