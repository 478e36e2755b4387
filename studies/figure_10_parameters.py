"""The paper's figure 10: is the gain more than the parameters it costs? A baseline with as many
parameters, in its SwiGLU."""
from studies.common import CPU_MODEL, GPU, PAPER, PAPER_LOSSES, TEN_SEEDS, UNIFIED

title = "Figure 10, parameters"
question = "is the gain of the unified strategy more than its parameters' worth?"
paper_losses = PAPER_LOSSES
rows = {"baseline": {}, "unified": UNIFIED, "larger baseline": {}}
comparisons = {("unified", "baseline"): {"0.12B": -0.033}, ("larger baseline", "baseline"): {},
               ("unified", "larger baseline"): {}}
# unified has 3,174 parameters more at the cpu scale, and d_ff + 4 gives 4 layers x 3 x 64 x 4 =
# 3,072; the paper adds 8
scales = {"cpu": {"seeds": TEN_SEEDS, "rows": {"larger baseline": {"d_ff": 174}}, "models": {
              "0.23M": {**CPU_MODEL, "learning_rates": (2e-3, 4e-3, 8e-3, 16e-3)}}},
          "gpu": {**GPU, "rows": {"larger baseline": {"d_ff": 2056}}},
          "paper": {**PAPER, "rows": {"larger baseline": {"d_ff": 2056}}}}
