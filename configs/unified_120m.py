# The unified strategy, HG + DNP + OR + IWD, at 0.12B.
from configs.baseline_120m import *
from configs.unified import *

out_dir = "out/unified_120m"
