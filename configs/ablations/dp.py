# DP: γ on both sides of each map.
from configs.ablations.base import *

out_dir = "out/ablations/dp"
scale_placement = "dual"
