# HG + DNP + ER.
from configs.ablations.base import *

out_dir = "out/ablations/hg_dnp_er"
scale_heterogeneous = True
scale_placement = "dual_norm"
scale_reparam = "exponential"
