"""The paper's figure 4: the norms of W_Q, W_K and W_V over training, in one layer of the baseline. The motive of HG."""
from studies.common import CPU, GPU, PAPER

title = "Figure 4, branch dynamics"
question = "do the query, key and value matrices, which share one γ, grow and decay at different rates?"
rows = {"baseline": {}}
picture = "matrix norms"
matrices = "layers.2.attn.qkv"  # the third layer
scales = {"cpu": {**CPU, "models": {"0.23M": {**CPU["models"]["0.23M"], "learning_rates": (4e-3,)}}},
          "gpu": {**GPU, "models": {"0.12B": {**GPU["models"]["0.12B"], "learning_rates": (4e-3,)}}},
          "paper": {**PAPER, "models": {"0.12B": {**PAPER["models"]["0.12B"], "learning_rates": (4e-3,)}}}}
