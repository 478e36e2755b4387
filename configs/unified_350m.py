# The unified strategy, HG + DNP + OR + IWD, at 0.36B.
from configs.baseline_350m import *
from configs.unified import *

out_dir = "out/unified_350m"
