# HG + DNP.
from configs.ablations.base import *

out_dir = "out/ablations/hg_dnp"
scale_heterogeneous = True
scale_placement = "dual_norm"
