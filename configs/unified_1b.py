# The unified strategy, HG + DNP + OR + IWD, on baseline_1b.
from configs.baseline_1b import *
from configs.unified import *

out_dir = "out/unified_1b"
