# The paper's Llama-1B: 1,028,065,024 parameters, 80,640 of them in scale vectors.
from configs.baseline_120m import *

out_dir = "out/baseline_1b"

n_layer = 22
n_head = 14
n_embd = 1792
d_ff = 4778  # int(8/3 n_embd), which gives the paper's count; 4864 would suit tensor cores better
tie_embeddings = False

batch_size = 8
gradient_accumulation_steps = 64
learning_rate = 3.5e-4  # 1e-3 x sqrt(123.6M / 1028M)
warmup_iters = 1000
