# HG + DNP + OR: the unified strategy without its weight decay. Both kinds of vectors exist here, those a matrix can
# absorb and those it cannot, so the decay_* rows are built on this one.
from configs.ablations.base import *

out_dir = "out/ablations/hg_dnp_or"
scale_heterogeneous = True
scale_placement = "dual_norm"
scale_reparam = "ordinary"
