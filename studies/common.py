"""
What the studies share: the paper's variants by name, and the scales a study can run at. Data only.

A study is a plain file of these names:
  title, question   what it is, and what it asks
  rows              {label: keys of train.py}; the first row is the one whose learning rate is tuned, for all
  comparisons       {(label, label it is compared with): {the paper's model: its difference of terminal validation losses, nats}}
  panels            [[labels] ...] of the picture; without it, one panel with all
  picture           "relative loss" (without it), "learning rates", "scaling" or "matrix norms"
  scales            {scale: {"seeds": ..., "models": {name: {"config": file, "keys": keys, "learning_rates": grid}}}}
"""
# ------------------------------------------------------------------------------------------------ the table of variants
NONE = {"scale_vectors": False}
HG = {"scale_heterogeneous": True}
AP = {"scale_placement": "after"}
DP = {"scale_placement": "dual"}
DNP = {"scale_placement": "dual_norm"}
OR = {"scale_reparam": "original"}
ER = {"scale_reparam": "exponential"}
IWD = {"scale_weight_decay": "input_norm"}
NO_DECAY = {"scale_weight_decay": "none"}
UNIFIED = {**HG, **DNP, **OR, **IWD}

# ------------------------------------------------------------------------------------------------ scales
SEEDS, FIVE_SEEDS = (1, 2, 3), (1, 2, 3, 4, 5)
CPU_RATES = (2e-3, 4e-3, 8e-3)
CPU_MODEL = {"config": "configs/study_cpu.py", "keys": {}, "learning_rates": CPU_RATES}
CPU = {"seeds": SEEDS, "models": {"0.23M": CPU_MODEL}}

GPU_RATES = (2e-3, 4e-3, 6e-3)
GPU_MODEL = {"config": "configs/study_gpu.py", "keys": {}, "learning_rates": GPU_RATES}
GPU = {"seeds": (1,), "models": {"0.12B": GPU_MODEL}}

PAPER_RATES = (6e-4, 1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3)
PAPER = {"seeds": (1,), "models": {"0.12B": {"config": "configs/baseline_120m.py", "keys": {}, "learning_rates": PAPER_RATES}}}
