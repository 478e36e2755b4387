# The unified strategy, HG + DNP + OR + IWD, on baseline_350m.
from configs.baseline_350m import *
from configs.unified import *

out_dir = "out/unified_350m"
