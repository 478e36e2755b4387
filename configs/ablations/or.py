# OR: γ = β α.
from configs.ablations.base import *

out_dir = "out/ablations/or"
scale_reparam = "ordinary"
