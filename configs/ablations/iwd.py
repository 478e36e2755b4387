# IWD on the baseline. Untied Llamas have absorbable vectors only, so here it decays them all.
from configs.ablations.base import *

out_dir = "out/ablations/iwd"
scale_weight_decay = "absorbable"
