# 0.36B parameters (359,842,816): GPT-2 medium's shape in Llama's style.
from configs.baseline_120m import *

out_dir = "out/baseline_350m"

n_layer = 24
n_head = 16
n_embd = 1024
d_ff = 2816

learning_rate = 5.9e-4  # 1e-3 x sqrt(123.6M / 359.8M)
warmup_iters = 500
