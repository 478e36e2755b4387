"""The paper's figure 6: terminal losses of baseline and unified over dense sizes, and how much more compute the baseline needs."""
from studies.common import CPU_MODEL, SEEDS, UNIFIED

title = "Figure 6, dense models over sizes"
question = "does the gain of the unified strategy last as models grow?"
rows = {"baseline": {}, "unified": UNIFIED}
comparisons = {("unified", "baseline"): {"0.12B": -0.0331, "0.25B": -0.0244, "0.5B": -0.0416, "0.75B": -0.0373, "1B": -0.0148}}
picture = "scaling"
# at the cpu scale the batch grows with the model: equal steps, and about 6 tokens a parameter
scales = {
    "cpu": {"seeds": SEEDS, "models": {
        "0.05M": {**CPU_MODEL, "keys": {"n_layer": 3, "n_embd": 32, "n_head": 2, "batch_size": 1}},
        "0.11M": {**CPU_MODEL, "keys": {"n_layer": 3, "n_embd": 48, "n_head": 3, "batch_size": 2}, "learning_rates": (4e-3, 8e-3, 16e-3)},
        "0.23M": CPU_MODEL,
        "0.43M": {**CPU_MODEL, "keys": {"n_layer": 5, "n_embd": 80, "n_head": 5, "batch_size": 8}}}},
    "paper": {"seeds": (1,), "models": {
        "0.12B": {"config": "configs/baseline_120m.py", "keys": {}, "learning_rates": (4e-3,)},
        "0.25B": {"config": "configs/baseline_250m.py", "keys": {}, "learning_rates": (2e-3,)},
        "0.5B": {"config": "configs/baseline_500m.py", "keys": {}, "learning_rates": (2e-3,)},
        "0.75B": {"config": "configs/baseline_750m.py", "keys": {}, "learning_rates": (2e-3,)},
        "1B": {"config": "configs/baseline_1b.py", "keys": {}, "learning_rates": (1e-3,)}}},
}
