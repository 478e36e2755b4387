# HG + DNP + OR + IWD.
from configs.ablations.base import *
from configs.unified import *

out_dir = "out/ablations/unified"
