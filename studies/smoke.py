"""Does the tool work here? Four tiny runs, a few seconds each. Their losses mean nothing."""
from studies.common import UNIFIED

title = "Smoke"
question = "does the study tool run, interrupt, resume and report?"
rows = {"baseline": {}, "unified": UNIFIED}
comparisons = {("unified", "baseline"): {}}
model = {"config": "configs/study_cpu.py", "learning_rates": (4e-3,), "keys": {
    "n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 32, "batch_size": 2, "max_iters": 60,
    "warmup_iters": 5, "eval_interval": 20, "eval_iters": 1, "checkpoint_interval": 10}}
scales = {"cpu": {"seeds": (1, 2), "models": {"tiny": model}}}
