"""The paper's figure 3: weight decay on scale vectors by role, on a Gemma-like model under Muon.
The Llama rows are ours: their only scale vectors are Input-Norms."""
from studies.common import CPU_MODEL, GPU_MODEL, GPU_RATES, TEN_SEEDS, paper

MUON_RATES = (4e-3, 8e-3, 16e-3)
GEMMA = {"qk_norm": True, "post_norm": True, "optimizer": "muon"}

title = "Figure 3, weight decay by role"
question = "does decay help on Input-Norms and hurt on Output-Norms?"
rows = {"decay all": {}, "decay Input-Norms only": {"scale_weight_decay": "input_norm"},
        "decay Output-Norms only": {"scale_weight_decay": "output_norm"},
        "decay none": {"scale_weight_decay": "none"}}
comparisons = {
    ("decay Input-Norms only", "decay all"): {"Gemma-0.5B, 50B tokens": -0.0192,
                                              "Gemma-0.5B, 10B tokens": -0.0008},
    ("decay Output-Norms only", "decay all"): {"Gemma-0.5B, 50B tokens": 0.0018,
                                               "Gemma-0.5B, 10B tokens": 0.0036},
    ("decay none", "decay all"): {}, ("decay none", "decay Input-Norms only"): {}}
scales = {
    "cpu": {"seeds": TEN_SEEDS, "tuned": (), "models": {
        "Gemma-like": {**CPU_MODEL, "keys": GEMMA, "learning_rates": MUON_RATES},
        "Llama": {**CPU_MODEL, "rows": ("decay all", "decay none")}}},
    "gpu": {"seeds": (1,), "models": {
        "Gemma-like": {**GPU_MODEL, "keys": GEMMA, "learning_rates": GPU_RATES}}},
    "paper": {"seeds": (1,), "models": {
        "Gemma-0.5B, 10B tokens": paper("gemma_500m", 4e-3, max_iters=5000),
        "Gemma-0.5B, 50B tokens": paper("gemma_500m", 4e-3, max_iters=25000)}},
}
