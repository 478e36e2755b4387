"""The paper's figure 9: the unified strategy under a warmup-stable-decay schedule."""
from studies.common import CPU_MODEL, GPU_MODEL, NO_DECAY, TEN_SEEDS, UNIFIED, paper

WSD = {"schedule": "wsd"}  # linear to 0 in the last fifth of the steps

title = "Figure 9, under warmup-stable-decay"
paper_losses = {"Dense-0.12B": 3.0703, "MoE-0.5B": 2.7652}
question = "does the gain of the unified strategy hold under another schedule?"
# the last is ours
rows = {"baseline": {}, "unified": UNIFIED, "baseline without decay on γ": NO_DECAY}
comparisons = {("unified", "baseline"): {"Dense-0.12B": -0.0269, "MoE-0.5B": -0.0187},
               ("unified", "baseline without decay on γ"): {}}
scales = {
    # on one seed the baseline's losses at 2e-3 and 4e-3 differed by 0.00001, so two seeds tune
    "cpu": {"seeds": TEN_SEEDS, "tuning_seeds": (1, 2), "models": {"0.23M": {
        **CPU_MODEL, "keys": WSD, "learning_rates": (1e-3, 2e-3, 4e-3, 8e-3)}}},
    "gpu": {"seeds": (1,), "models": {"0.12B": {**GPU_MODEL, "keys": WSD}}},
    "paper": {"seeds": (1,), "models": {
        "Dense-0.12B": paper("baseline_120m_wsd", 3e-3),
        "MoE-0.5B": paper("baseline_moe_500m_wsd", 2e-3)}},
}
