# 0.35B, ours: in the paper's family, between its 0.25B and 0.5B. 354,681,856 parameters.
from configs.baseline_120m import *

out_dir = "out/baseline_350m"

n_layer = 20
n_head = 16
n_embd = 1024

max_iters = 67650  # 35.5B tokens, 100 a parameter
learning_rate = 2e-3  # its neighbours'
