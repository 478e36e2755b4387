# DNP: γ on both sides, and a norm in between.
from configs.ablations.base import *

out_dir = "out/ablations/dnp"
scale_placement = "dual_norm"
