"""Ours: every strategy over the whole grid of learning rates, with every seed."""
from studies.common import CPU_MODEL, DNP, GPU, HG, NONE, OR, SEEDS, UNIFIED

title = "Learning rates"
question = "is a gain more than another best learning rate?"
rows = {"baseline": {}, "no scale vectors": NONE, "HG": HG, "HG + DNP": {**HG, **DNP},
        "HG + DNP + OR": {**HG, **DNP, **OR}, "unified": UNIFIED}
comparisons = {(row, "baseline"): {} for row in list(rows)[1:]}
picture = "learning rates"
scales = {"cpu": {"seeds": SEEDS, "tuning_seeds": SEEDS, "models": {
    "0.23M": {**CPU_MODEL, "learning_rates": (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)}}}, "gpu": GPU}
