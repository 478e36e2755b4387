# The 350m shape with 16 experts for each SwiGLU, 2 for each token: 2.0B parameters, 0.38B active.
from configs.baseline_350m import *

out_dir = "out/baseline_moe_2b"

n_expert = 16
n_expert_active = 2
d_expert = 1536

batch_size = 8
gradient_accumulation_steps = 64
learning_rate = 5.7e-4  # 1e-3 x sqrt(123.6M / 379M active)
