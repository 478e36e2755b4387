# Llama-large of the paper's figure 10: the baseline with the unified strategy's parameters in its
# SwiGLU. 119,854,848.
from configs.baseline_120m import *

out_dir = "out/large_120m"

d_ff = 2056  # 8 more
