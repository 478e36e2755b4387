"""The paper's figure 7: terminal losses of baseline and unified over mixtures of experts."""
from studies.common import CPU_RATES, SEEDS, UNIFIED

title = "Figure 7, mixtures of experts over sizes"
question = "does the gain of the unified strategy hold in mixtures of experts?"
rows = {"baseline": {}, "unified": UNIFIED}
comparisons = {("unified", "baseline"): {"0.25B": -0.0306, "0.5B": -0.0209, "0.8B": -0.0499, "1B": -0.0236, "2B": -0.0207}}
picture = "scaling"
# at the cpu scale: 8 experts, 2 active, and a shared one; experts one by one, which is slow
scales = {
    "cpu": {"seeds": SEEDS, "models": {
        "MoE 3 x 32": {"config": "configs/study_cpu.py", "learning_rates": CPU_RATES, "keys": {
            "n_layer": 3, "n_embd": 32, "n_head": 2, "batch_size": 2, "n_expert": 8, "n_expert_active": 2, "d_shared_expert": 85}},
        "MoE 4 x 64": {"config": "configs/study_cpu.py", "learning_rates": CPU_RATES, "keys": {
            "n_expert": 8, "n_expert_active": 2, "d_shared_expert": 170}}}},
    "paper": {"seeds": (1,), "models": {
        "0.25B": {"config": "configs/baseline_moe_250m.py", "keys": {}, "learning_rates": (3e-3,)},
        "0.5B": {"config": "configs/baseline_moe_500m.py", "keys": {}, "learning_rates": (2e-3,)},
        "0.8B": {"config": "configs/baseline_moe_800m.py", "keys": {}, "learning_rates": (2e-3,)},
        "1B": {"config": "configs/baseline_moe_1b.py", "keys": {}, "learning_rates": (1e-3,)},
        "2B": {"config": "configs/baseline_moe_2b.py", "keys": {}, "learning_rates": (6e-4,)}}},
}
