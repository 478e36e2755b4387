"""The paper's figure 1: Llama-0.12B with and without scale vectors."""
from studies.common import CPU, GPU, NO_DECAY, NONE, PAPER

title = "Figure 1, are scale vectors necessary?"
question = "how much worse is a model whose normalizations have no scale vector?"
rows = {"baseline": {}, "no scale vectors": NONE, "baseline without decay on γ": NO_DECAY}
comparisons = {("no scale vectors", "baseline"): {"0.12B": 0.028, "0.12B at its own best rate": 0.015},
               ("baseline without decay on γ", "baseline"): {}, ("no scale vectors", "baseline without decay on γ"): {}}
scales = {"cpu": CPU, "gpu": GPU, "paper": PAPER}
