"""The paper's figure 7: terminal losses of baseline and unified over mixtures of experts."""
from studies.common import CPU_MODEL, PAPER_MOE_LOSSES, SEEDS, UNIFIED, paper

title = "Figure 7, mixtures of experts over sizes"
question = "does the gain of the unified strategy hold in mixtures of experts?"
paper_losses = PAPER_MOE_LOSSES
rows = {"baseline": {}, "unified": UNIFIED}
comparisons = {("unified", "baseline"): {"0.25B": -0.0306, "0.5B": -0.0209, "0.8B": -0.0499,
                                         "1B": -0.0236, "2B": -0.0207}}
picture = "scaling"
costs = {"MoE-0.5B on an H200 at a batch too small for the card, results/gpu_B.json": 1.419}


def cpu(rates, **shape):
    """8 experts, 2 active, and a shared one four times as wide, the paper's 8/3 n_embd."""
    return {**CPU_MODEL, "learning_rates": rates,
            "keys": {"n_expert": 8, "n_expert_active": 2, **shape}}


scales = {
    # the batch grows with the model: equal steps, and about 4.5 tokens a parameter that is active
    "cpu": {"seeds": SEEDS, "models": {
        "0.10M": cpu((2e-3, 4e-3, 8e-3, 16e-3), n_layer=3, n_embd=32, n_head=2,
                     d_shared_expert=85, batch_size=1),
        "0.22M": cpu((2e-3, 4e-3, 8e-3, 16e-3), n_layer=3, n_embd=48, n_head=3,
                     d_shared_expert=128, batch_size=2),
        "0.49M": cpu((2e-3, 4e-3, 8e-3), d_shared_expert=170)}},
    "paper": {"seeds": (1,), "models": {
        "0.25B": paper("baseline_moe_250m", 3e-3),
        "0.5B": paper("baseline_moe_500m", 2e-3),
        "0.8B": paper("baseline_moe_800m", 2e-3),
        "1B": paper("baseline_moe_1b", 1e-3),
        "2B": paper("baseline_moe_2b", 6e-4)}},
}
