# OR + IWD.
from configs.ablations.base import *

out_dir = "out/ablations/or_iwd"
scale_reparam = "ordinary"
scale_weight_decay = "absorbable"
