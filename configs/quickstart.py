# The unified strategy, HG + DNP + OR + IWD, on the built-in data: a minute or two on a laptop's CPU.
from configs.quickstart_baseline import *
from configs.unified import *

out_dir = "out/quickstart"
