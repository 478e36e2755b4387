# The quickstart as a mixture of experts: 8 of a third of the width, 2 for each token, and 1 that
# all tokens share. In float32 the experts are a loop, which is slower, so it makes fewer steps.
from configs.quickstart import *

out_dir = "out/quickstart_moe"

n_expert = 8
n_expert_active = 2
d_expert = 56
d_shared_expert = 56
max_iters = 1000
