# The unified strategy, HG + DNP + OR + IWD, on baseline_250m.
from configs.baseline_250m import *
from configs.unified import *

out_dir = "out/unified_250m"
