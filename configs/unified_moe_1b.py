# The unified strategy, HG + DNP + OR + IWD, on baseline_moe_1b.
from configs.baseline_moe_1b import *
from configs.unified import *

out_dir = "out/unified_moe_1b"
