# No scale vector anywhere: only the normalizations.
from configs.ablations.base import *

out_dir = "out/ablations/no_scale_vectors"
scale_vectors = False
