"""The README's first command against the same without the strategy: 0.92M parameters, 600 steps on
the built-in data."""
from studies.common import NO_DECAY, SEEDS, UNIFIED

title = "The quickstart"
question = "what does the strategy give where a newcomer looks first?"
rows = {"baseline": {}, "unified": UNIFIED, "baseline without decay on γ": NO_DECAY}
comparisons = {("unified", "baseline"): {}, ("unified", "baseline without decay on γ"): {}}
model = {"config": "configs/quickstart_baseline.py", "keys": {"sample_tokens": 0},
         "learning_rates": (1e-3, 2e-3, 4e-3, 8e-3)}
scales = {"cpu": {"seeds": SEEDS, "models": {"0.92M": model}}}
