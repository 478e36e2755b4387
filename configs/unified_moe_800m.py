# The unified strategy, HG + DNP + OR + IWD, on baseline_moe_800m.
from configs.baseline_moe_800m import *
from configs.unified import *

out_dir = "out/unified_moe_800m"
