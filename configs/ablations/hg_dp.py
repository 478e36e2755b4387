# HG + DP: the unified strategy's first two steps without the norm in between.
from configs.ablations.base import *

out_dir = "out/ablations/hg_dp"
scale_heterogeneous = True
scale_placement = "dual"
