# IWD, its criterion taken literally: decay what a neighbouring matrix could take over. The same run as unified.
from configs.ablations.hg_dnp_or import *

out_dir = "out/ablations/decay_absorbable"
scale_weight_decay = "absorbable"
