# The unified strategy, HG + DNP + OR + IWD, on baseline_2b.
from configs.baseline_2b import *
from configs.unified import *

out_dir = "out/unified_2b"
