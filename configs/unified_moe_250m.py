# The unified strategy, HG + DNP + OR + IWD, on baseline_moe_250m.
from configs.baseline_moe_250m import *
from configs.unified import *

out_dir = "out/unified_moe_250m"
