# The unified strategy, HG + DNP + OR + IWD, on the built-in data: some two minutes on two CPU cores.
from configs.quickstart_baseline import *
from configs.unified import *

out_dir = "out/quickstart"
