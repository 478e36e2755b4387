"""The paper's figure 4, the motive of HG: the norms of W_Q, W_K and W_V over training, in one layer
of the baseline."""
from studies.common import CPU, GPU, LONG, PAPER, SEEDS

title = "Figure 4, branch dynamics"
question = "do query, key and value matrices, which share one γ, move at different rates?"
rows = {"baseline": {}}
picture = "matrix norms"
matrices = ("layers.2.attn.", ("q", "k", "v"))  # the third layer
scales = {name: {**scale, "models": {model: {**spec, "learning_rates": (4e-3,)}
                                     for model, spec in scale["models"].items()}}
          for name, scale in (("cpu", CPU), ("gpu", GPU), ("paper", PAPER))}
scales["long"] = {"seeds": SEEDS, "models": {  # figure 6's runs
    "1.9M": {**LONG["1.9M"], "tuning": {}, "learning_rates": (4e-3,)}}}
