# Row and column vectors on every matrix, as learnable multipliers have them (arXiv 2601.04890).
# Ours to compare with, not the paper's. A part of a config: import it after a baseline, `from
# configs.learnable_multipliers import *`.
scale_heterogeneous = True
scale_placement = "dual"
scale_placement_on = "q,k,v,gate,up,head,o,down"
