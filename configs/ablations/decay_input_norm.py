# IWD, its name taken literally: decay all but Output-Norms.
from configs.ablations.hg_dnp_or import *

out_dir = "out/ablations/decay_input_norm"
scale_weight_decay = "input_norm"
