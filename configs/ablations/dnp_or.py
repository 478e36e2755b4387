# DNP + OR.
from configs.ablations.base import *

out_dir = "out/ablations/dnp_or"
scale_placement = "dual_norm"
scale_reparam = "ordinary"
