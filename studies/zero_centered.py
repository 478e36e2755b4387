"""Ours: γ = 1 + α, as Gemma and Qwen3-Next write it, so that decay pulls γ to 1 instead of 0."""
from studies.common import CPU, DNP, GPU, HG, NO_DECAY, UNIFIED

ZERO_CENTERED = {"scale_reparam": "zero_centered"}

title = "Zero-centered scale vectors"
question = "does decay towards 1 do as well as decay by role?"
rows = {"baseline": {}, "baseline without decay on γ": NO_DECAY,
        "baseline with γ = 1 + α": ZERO_CENTERED, "unified": UNIFIED,
        "HG + DNP with γ = 1 + α": {**HG, **DNP, **ZERO_CENTERED}}
comparisons = {("baseline without decay on γ", "baseline"): {},
               ("baseline with γ = 1 + α", "baseline"): {}, ("unified", "baseline"): {},
               ("HG + DNP with γ = 1 + α", "unified"): {}}
scales = {"cpu": {**CPU, "tuned": ()}, "gpu": GPU}
