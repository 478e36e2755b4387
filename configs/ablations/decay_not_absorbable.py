# The converse of IWD: decay only what no matrix could take over.
from configs.ablations.hg_dnp_or import *

out_dir = "out/ablations/decay_not_absorbable"
scale_weight_decay = "not_absorbable"
