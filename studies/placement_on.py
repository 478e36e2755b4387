"""Ours: on which maps the second norm and vector should be. The paper names the output projection,
and never o or down. DP on every map is near what learnable multipliers are (arXiv 2601.04890),
and not the same: theirs also scale the embedding, the head has none on its rows, their own decay is
2e-3, and they are left out of the norm that clipping measures."""
from studies.common import CPU, DP, GPU, HG, UNIFIED

title = "Maps with a second norm"
question = "what do the output projection, o and down contribute, and what do row and "\
           "column multipliers without a norm?"
rows = {"baseline": {}, "unified": UNIFIED,
        "unified but the head": {**UNIFIED, "scale_placement_on": "q,k,v,gate,up"},
        "unified on o and down too": {**UNIFIED, "scale_placement_on": "q,k,v,gate,up,head,o,down"},
        "DP on every map": {**HG, **DP, "scale_placement_on": "q,k,v,gate,up,head,o,down"}}
comparisons = {("unified", "baseline"): {}, ("unified but the head", "unified"): {},
               ("unified on o and down too", "unified"): {},
               ("DP on every map", "baseline"): {}}
scales = {"cpu": {**CPU, "tuned": ()}, "gpu": GPU}
