# HG + IWD.
from configs.ablations.base import *

out_dir = "out/ablations/hg_iwd"
scale_heterogeneous = True
scale_weight_decay = "absorbable"
