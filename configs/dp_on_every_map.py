# Row and column vectors on every matrix: DP on every map. Ours to compare with, not the paper's.
# Learnable multipliers (arXiv 2601.04890) are near it and not the same: theirs also scale the
# embedding, the head has none on its rows, their own weight decay is 2e-3, and clipping does not
# count them. A part of a config: import it after a baseline, `from configs.dp_on_every_map import
# *`.
scale_heterogeneous = True
scale_placement = "dual"
scale_placement_on = "q,k,v,gate,up,head,o,down"
