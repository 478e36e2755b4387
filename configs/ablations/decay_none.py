# Decay no scale vector: the row hg_dnp_or under the study's other name.
from configs.ablations.hg_dnp_or import *

out_dir = "out/ablations/decay_none"
scale_weight_decay = "none"
