# Llama-0.5B of the paper's table 4, at a sequence of 4096.
from configs.baseline_120m import *

out_dir = "out/baseline_500m"

n_layer = 18
n_head = 20
n_embd = 1280

block_size = 4096
batch_size = 4
gradient_accumulation_steps = 128
eval_windows = 400
max_iters = 23438  # 49.2B tokens, as in figure 6
learning_rate = 2e-3
