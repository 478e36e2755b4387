# Decay every scale vector.
from configs.ablations.hg_dnp_or import *

out_dir = "out/ablations/decay_all"
scale_weight_decay = "all"
