"""The paper's figure 5: from the baseline to the unified strategy, one step at a time. Its four
panels: HG, then a placement, then a reparameterization, then decay by role."""
from studies.common import (
    AP, CPU, DNP, DP, ER, GPU, HG, IWD, NO_DECAY, OR, PAPER, PAPER_LOSSES, TEN_SEEDS)

title = "Figure 5, step by step"
question = "what does each part of the unified strategy add?"
paper_losses = PAPER_LOSSES
rows = {
    "baseline": {},
    "HG": HG,
    "HG + DNP": {**HG, **DNP},
    "HG + DNP + OR": {**HG, **DNP, **OR},
    "unified": {**HG, **DNP, **OR, **IWD},
    "HG + AP": {**HG, **AP},
    "HG + DP": {**HG, **DP},
    "HG + DNP + ER": {**HG, **DNP, **ER},
    "HG + DNP + ER + IWD": {**HG, **DNP, **ER, **IWD},
    "HG + DP + OR": {**HG, **DP, **OR},
    "HG + DP + ER": {**HG, **DP, **ER},
    "baseline without decay on γ": NO_DECAY,  # ours: decay is part of its tuning
}
comparisons = {
    ("HG", "baseline"): {"0.12B": -0.0044},
    ("HG + AP", "HG"): {"0.12B": 0.0099},
    ("HG + DP", "HG"): {"0.12B": -0.0032},
    ("HG + DNP", "HG"): {"0.12B": 0.0341},
    ("HG + DP + OR", "HG + DP"): {"0.12B": -0.0063},
    ("HG + DP + ER", "HG + DP"): {"0.12B": 0.0027},
    ("HG + DNP + OR", "HG + DP"): {"0.12B": -0.0245},
    ("HG + DNP + ER", "HG + DP"): {"0.12B": -0.0237},
    ("unified", "HG + DNP + OR"): {"0.12B": -0.0009},
    ("HG + DNP + ER + IWD", "HG + DNP + OR"): {"0.12B": -0.0004},
    ("unified", "baseline"): {"0.12B": -0.0331},
    # ours
    ("baseline without decay on γ", "baseline"): {}, ("unified", "baseline without decay on γ"): {},
    ("HG + DNP + OR", "HG + DNP"): {}, ("HG + DNP + ER", "HG + DNP + OR"): {},
    ("HG + DNP + ER + IWD", "HG + DNP + ER"): {}, ("HG + DNP + ER + IWD", "unified"): {},
    # each part against the stronger baseline, too
    **{(row, "baseline without decay on γ"): {} for row in (
        "HG", "HG + DP + OR", "HG + DP + ER", "HG + DNP", "HG + DNP + OR", "HG + DNP + ER",
        "HG + DNP + ER + IWD")},
}
# the paper draws unified in the last panel only
panels = [["baseline", "HG", "unified"], ["HG", "HG + AP", "HG + DP", "HG + DNP"],
          ["HG + DP", "HG + DNP", "HG + DP + OR", "HG + DP + ER", "HG + DNP + OR", "HG + DNP + ER"],
          ["HG + DNP + OR", "HG + DNP + ER", "unified", "HG + DNP + ER + IWD"]]
scales = {"cpu": {**CPU, "seeds": TEN_SEEDS}, "gpu": GPU, "paper": PAPER}
