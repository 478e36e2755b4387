"""The paper's figure 7: terminal losses of baseline and unified over mixtures of experts."""
from studies.common import CPU_MODEL, SEEDS, UNIFIED

title = "Figure 7, mixtures of experts over sizes"
question = "does the gain of the unified strategy hold in mixtures of experts?"
rows = {"baseline": {}, "unified": UNIFIED}
comparisons = {("unified", "baseline"): {"0.25B": -0.0306, "0.5B": -0.0209, "0.8B": -0.0499, "1B": -0.0236, "2B": -0.0207}}
picture = "scaling"
MIXTURE = {"n_expert": 8, "n_expert_active": 2}  # and a shared expert four times as wide as a routed one, the paper's 8/3 n_embd
# at the cpu scale the batch grows with the model: equal steps, and about 4.5 tokens a parameter that is active
scales = {
    "cpu": {"seeds": SEEDS, "models": {
        "0.10M": {**CPU_MODEL, "keys": {**MIXTURE, "n_layer": 3, "n_embd": 32, "n_head": 2, "d_shared_expert": 85, "batch_size": 1}},
        "0.22M": {**CPU_MODEL, "keys": {**MIXTURE, "n_layer": 3, "n_embd": 48, "n_head": 3, "d_shared_expert": 128, "batch_size": 2},
                  "learning_rates": (4e-3, 8e-3, 16e-3)},
        "0.49M": {**CPU_MODEL, "keys": {**MIXTURE, "d_shared_expert": 170}}}},
    "paper": {"seeds": (1,), "models": {
        "0.25B": {"config": "configs/baseline_moe_250m.py", "keys": {}, "learning_rates": (3e-3,)},
        "0.5B": {"config": "configs/baseline_moe_500m.py", "keys": {}, "learning_rates": (2e-3,)},
        "0.8B": {"config": "configs/baseline_moe_800m.py", "keys": {}, "learning_rates": (2e-3,)},
        "1B": {"config": "configs/baseline_moe_1b.py", "keys": {}, "learning_rates": (1e-3,)},
        "2B": {"config": "configs/baseline_moe_2b.py", "keys": {}, "learning_rates": (6e-4,)}}},
}
