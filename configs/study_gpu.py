# The studies' model for one H100: the paper's 0.12B in small batches, to make many steps, for about
# ten minutes (planned, not yet timed).
from configs.baseline_120m import *

out_dir = "out/study_gpu"

batch_size = 64  # 65,536 tokens a step
gradient_accumulation_steps = 1
max_iters = 3500
warmup_iters = 200

eval_interval = 250
