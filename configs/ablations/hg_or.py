# HG + OR.
from configs.ablations.base import *

out_dir = "out/ablations/hg_or"
scale_heterogeneous = True
scale_reparam = "ordinary"
