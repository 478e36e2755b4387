# The unified strategy, HG + DNP + OR + IWD, on baseline_750m.
from configs.baseline_750m import *
from configs.unified import *

out_dir = "out/unified_750m"
