# The unified strategy, HG + DNP + OR + IWD, on the built-in data: one to four minutes on a core.
from configs.quickstart_baseline import *
from configs.unified import *

out_dir = "out/quickstart"
