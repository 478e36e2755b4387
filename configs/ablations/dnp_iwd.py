# DNP + IWD.
from configs.ablations.base import *

out_dir = "out/ablations/dnp_iwd"
scale_placement = "dual_norm"
scale_weight_decay = "absorbable"
