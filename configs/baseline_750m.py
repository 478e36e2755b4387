# Llama-0.75B of the paper's table 4.
from configs.baseline_500m import *

out_dir = "out/baseline_750m"

n_layer = 21
n_head = 24
n_embd = 1536
