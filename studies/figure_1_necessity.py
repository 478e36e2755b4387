"""The paper's figure 1: Llama-0.12B with and without scale vectors, and without them for longer,
until the losses meet."""
from studies.common import (
    CPU_MODEL, GPU, LONG, NO_DECAY, NONE, PAPER, PAPER_LOSSES, SEEDS, TEN_SEEDS)

SHORT = ("baseline", "no scale vectors", "baseline without decay on γ")

title = "Figure 1, are scale vectors necessary?"
question = "how much worse is a model whose normalizations have no scale vector?"
paper_losses = PAPER_LOSSES
rows = {"baseline": {}, "no scale vectors": NONE, "baseline without decay on γ": NO_DECAY,
        "no scale vectors for 1.4 x the steps": NONE,
        "no scale vectors for 1.2 x the steps": NONE}
comparisons = {
    ("no scale vectors", "baseline"): {"0.12B": 0.028, "0.12B at its own best rate": 0.015},
    ("baseline without decay on γ", "baseline"): {},
    ("no scale vectors", "baseline without decay on γ"): {},
    # the paper: equal, at the baseline's rate and at its own best rate
    ("no scale vectors for 1.4 x the steps", "baseline"): {},
    ("no scale vectors for 1.2 x the steps", "baseline"): {}}
longer = {"paper": (26250, 22500), "gpu": (4900, 4200)}


def long(size, twice):
    """A size at its tuned rate, and at twice that rate."""
    at_twice = {**LONG[size], "rows": SHORT[:2], "tuning": {}, "learning_rates": (twice,)}
    return {"seeds": SEEDS, "tuned": (), "models": {
        size: {**LONG[size], "rows": SHORT}, f"{size} at twice the rate": at_twice}}


scales = {"cpu": {"seeds": TEN_SEEDS, "models": {"0.23M": {**CPU_MODEL, "rows": SHORT}}},
          "long": long("0.46M", 8e-3),
          "long_gpu": long("1.9M", 8e-3)}  # some twenty hours on a CPU's core
for scale, spec in (("gpu", GPU), ("paper", PAPER)):
    scales[scale] = {**spec, "rows": {row: {"max_iters": steps} for row, steps in
                                      zip(list(rows)[3:], longer[scale])}}
