# The 120m shape with 8 experts for each SwiGLU, 2 for each token: 0.5B parameters, 0.18B active.
from configs.baseline_120m import *

out_dir = "out/baseline_moe_500m"

n_expert = 8
n_expert_active = 2
d_expert = 2048

learning_rate = 8.3e-4  # 1e-3 x sqrt(123.6M / 180M active)
