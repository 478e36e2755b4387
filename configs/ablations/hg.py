# HG: each branch its own γ.
from configs.ablations.base import *

out_dir = "out/ablations/hg"
scale_heterogeneous = True
