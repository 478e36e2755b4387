# The unified strategy, HG + DNP + OR + IWD, on baseline_120m.
from configs.baseline_120m import *
from configs.unified import *

out_dir = "out/unified_120m"
