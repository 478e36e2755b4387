# Unified MoE-0.5B under a warmup-stable-decay schedule (the paper's figure 9, appendix B): linear
# to 0 in the last fifth.
from configs.unified_moe_500m import *

out_dir = "out/unified_moe_500m_wsd"

schedule = "wsd"
decay_share = 0.2
decay_shape = "linear"
learning_rate = 2e-3
