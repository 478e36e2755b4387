# The unified strategy, HG + DNP + OR + IWD, on the built-in data: a minute or two on a laptop's CPU.
from configs.quickstart_baseline import *
from configs.unified import *

out_dir = "out/quickstart"
learning_rate = 4e-3  # its best of 2e-3, 4e-3, 6e-3, 8e-3 on the validation split; the baseline's is 2e-3
