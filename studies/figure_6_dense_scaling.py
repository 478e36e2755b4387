"""The paper's figure 6: terminal losses of baseline and unified over dense sizes, and how much more
compute the baseline needs."""
from studies.common import (
    COSTS, CPU_MODEL, LONG, NO_DECAY, PAPER_LOSSES, SEEDS, UNIFIED, paper, shape)

title = "Figure 6, dense models over sizes"
question = "does the gain of the unified strategy last as models grow?"
paper_losses = PAPER_LOSSES
rows = {"baseline": {}, "unified": UNIFIED, "baseline without decay on γ": NO_DECAY}  # ours
comparisons = {
    ("unified", "baseline"): {"0.12B": -0.0331, "0.25B": -0.0244, "0.5B": -0.0416,
                              "0.75B": -0.0373, "1B": -0.0148},
    ("baseline without decay on γ", "baseline"): {},
    ("unified", "baseline without decay on γ"): {}}
picture = "scaling"
costs = COSTS
TWO_ROWS = ("baseline", "unified")


def cpu(rates=CPU_MODEL["learning_rates"], **keys):
    return {**CPU_MODEL, "rows": TWO_ROWS, "keys": keys, "learning_rates": rates}


scales = {
    # the batch grows with the model: equal steps, and about 6 tokens a parameter
    "cpu": {"seeds": SEEDS, "tuned": (), "models": {
        "0.05M": cpu(**shape(3, 32, 2, 1)),
        "0.11M": cpu((4e-3, 8e-3, 16e-3), **shape(3, 48, 3, 2)),
        "0.23M": cpu(),
        "0.43M": cpu(**shape(5, 80, 5, 8))}},
    "long": {"seeds": SEEDS, "tuned": (), "models": LONG},
    # does the dtype of large runs change a conclusion?
    "long_bfloat16": {"seeds": SEEDS, "tuned": (), "models": {"0.23M": {
        **LONG["0.23M"], "keys": {**LONG["0.23M"]["keys"], "dtype": "bfloat16"},
        "rows": TWO_ROWS, "tuning": {}, "learning_rates": (4e-3,)}}},
    "paper": {"seeds": (1,), "models": {
        "0.12B": {**paper("baseline_120m", 4e-3), "rows": TWO_ROWS},
        "0.25B": {**paper("baseline_250m", 2e-3), "rows": TWO_ROWS},
        "0.5B": {**paper("baseline_500m", 2e-3), "rows": TWO_ROWS},
        "0.75B": {**paper("baseline_750m", 2e-3), "rows": TWO_ROWS},
        "1B": {**paper("baseline_1b", 1e-3), "rows": TWO_ROWS}}},
}
