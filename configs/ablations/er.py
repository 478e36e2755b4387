# ER: γ = e^β α.
from configs.ablations.base import *

out_dir = "out/ablations/er"
scale_reparam = "exponential"
