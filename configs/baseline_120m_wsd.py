# Dense-0.12B under a warmup-stable-decay schedule (the paper's figure 9, appendix B): linear to 0
# in the last fifth.
from configs.baseline_120m import *

out_dir = "out/baseline_120m_wsd"

schedule = "wsd"
decay_share = 0.2
decay_shape = "linear"
learning_rate = 3e-3
