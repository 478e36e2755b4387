# One γ behind each norm, not decayed.
from configs.ablations.base import *

out_dir = "out/ablations/baseline"
