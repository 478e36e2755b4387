# The unified strategy, HG + DNP + OR + IWD, on baseline_500m.
from configs.baseline_500m import *
from configs.unified import *

out_dir = "out/unified_500m"
