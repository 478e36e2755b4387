# 1.96B parameters. AdamW's state is replicated on every GPU: 16 bytes a parameter, 31 GB, leaves room on 80 GB.
from configs.baseline_120m import *

out_dir = "out/baseline_2b"

n_layer = 24
n_head = 19
n_embd = 2432
d_ff = 6528
tie_embeddings = False

batch_size = 4
gradient_accumulation_steps = 128
learning_rate = 2.5e-4  # 1e-3 x sqrt(123.6M / 1956M)
warmup_iters = 1000
