"""The paper's figure 8: the unified strategy under Muon."""
from studies.common import CPU_MODEL, GPU_MODEL, NO_DECAY, TEN_SEEDS, UNIFIED, paper

MUON = {"optimizer": "muon"}

title = "Figure 8, under Muon"
question = "does the gain of the unified strategy hold under another optimizer?"
# the last two are ours; the last one's runs are figure 3's
rows = {"baseline": {}, "unified": UNIFIED, "baseline without decay on γ": NO_DECAY,
        "Gemma's norms without decay on γ": {**NO_DECAY, "qk_norm": True, "post_norm": True}}
comparisons = {("unified", "baseline"): {
    "Dense-0.12B": -0.0156, "Dense-0.5B": -0.0167, "MoE-0.5B": -0.0187},
               ("baseline without decay on γ", "baseline"): {},
               ("unified", "baseline without decay on γ"): {},
               ("unified", "Gemma's norms without decay on γ"): {}}
scales = {
    "cpu": {"seeds": TEN_SEEDS, "models": {"0.23M": {
        **CPU_MODEL, "keys": MUON, "learning_rates": (2e-3, 4e-3, 8e-3, 16e-3)}}},
    "gpu": {"seeds": (1,), "models": {"0.12B": {**GPU_MODEL, "keys": MUON}}},
    "paper": {"seeds": (1,), "models": {
        "Dense-0.12B": paper("baseline_120m_muon", 5e-3),
        # the rate is Gemma-0.5B's: the paper gives none
        "Dense-0.5B": paper("baseline_500m", 4e-3, **MUON),
        "MoE-0.5B": paper("baseline_moe_500m_muon", 4e-3)}},
}
