"""
What the studies share: the paper's variants by name, and the scales a study can run at. Only data.

A study is a plain file of these names:
  title, question   what it is, and what it asks
  rows              {label: keys of train.py}; the first row's best learning rate is everyone's
  comparisons       {(label, the other label): {the paper's model: its difference in nats}}
  panels            [[labels] ...] of the picture; without it, one panel with all
  picture           "relative loss" (without it), "forest", "learning rates", "scaling" or
                    "matrix norms"
  matrices          (start of a name, branches): the matrices whose norms the results keep
  yours, rule       studies/track.py: the rows yours is compared with; when it counts as better
  paper_losses      {the paper's model: its baseline's loss}, for the size of a difference
  step_times        {row: time of a step over the baseline's} and "what" that is, beside a forest
  primary           comparisons named before any run; every_window: the loss on all windows counts
  costs             {where: time of a step over the baseline's}, for a compute multiplier net of it
  scales            {scale: {"seeds": ..., "models": {name: model}, and, if need be,
                     "tuning_seeds": the seeds that tune (the first), which may only tune,
                     "tuned": the rows whose rate is tuned besides the first's, in place of all,
                     "follows": {label: the label whose own rate it takes over},
                     "own_rates_only": tuned rows do not run at the first row's rate besides,
                     "rows": {label: keys at this scale only}}}
A model is {"config": file, "keys": keys, "learning_rates": grid} and, if need be, "rows": the
labels that it runs, "tuning": keys that replace the others while learning rates are tuned, and
"more_rates": {label: rates beyond the grid}.
"""
# ------------------------------------------------------------------------- the table of variants
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

# ------------------------------------------------------------------------- scales
SEEDS, TEN_SEEDS = (1, 2, 3), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
CPU_RATES = (2e-3, 4e-3, 8e-3)
CPU_MODEL = {"config": "configs/study_cpu.py", "keys": {}, "learning_rates": CPU_RATES}
CPU = {"seeds": SEEDS, "models": {"0.23M": CPU_MODEL}}


def shape(n_layer, n_embd, n_head, batch_size):
    return {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "batch_size": batch_size}


def long(n_layer, n_embd, n_head, batch_size, steps, rates=CPU_RATES, **keys):
    """A model of scale `long`: 20 tokens a parameter, steps and batch grow with the model; the rate
    is tuned on the baseline at a quarter of the steps."""
    full, quarter = ({"max_iters": s, "eval_interval": s // 6} for s in (steps, steps // 4))
    keys |= {**shape(n_layer, n_embd, n_head, batch_size), **full}
    return {**CPU_MODEL, "keys": {**keys, "eval_windows": 640, "compile": True},
            "tuning": quarter, "learning_rates": rates}


GPU_FLOAT32 = {"device": "auto", "dtype": "float32"}  # hours on a CPU, minutes on a GPU
LONG = {"0.11M": long(3, 48, 3, 4, 4200, (4e-3, 8e-3, 16e-3)),
        "0.23M": long(4, 64, 4, 6, 6000),
        "0.46M": long(5, 84, 6, 8, 9100),
        "0.93M": long(5, 120, 6, 12, 12000, (1e-3, *CPU_RATES), **GPU_FLOAT32),
        "1.9M": long(6, 160, 8, 16, 18720, **GPU_FLOAT32)}

GPU_RATES = (2e-3, 4e-3, 6e-3)
GPU_MODEL = {"config": "configs/study_gpu.py", "keys": {}, "learning_rates": GPU_RATES}
GPU = {"seeds": (1,), "models": {"0.12B": GPU_MODEL}}



def paper(config, rate, **keys):
    """A size of the paper's, at the rate that the paper found best for the baseline."""
    return {"config": f"configs/{config}.py", "keys": keys, "learning_rates": (rate,)}


PAPER_RATES = (6e-4, 1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3)
PAPER = {"seeds": (1,), "models": {"0.12B": {
    "config": "configs/baseline_120m.py", "keys": {}, "learning_rates": PAPER_RATES}}}

# the losses that the paper's differences are relative to, read off its figures 6 and 7
PAPER_LOSSES = {"0.12B": 3.0709, "0.25B": 2.7646, "0.5B": 2.5672, "0.75B": 2.4484, "1B": 2.3688}
PAPER_MOE_LOSSES = {"0.25B": 2.9280, "0.5B": 2.7552, "0.8B": 2.6052, "1B": 2.5189, "2B": 2.3896}

# time of a step of unified over the baseline's
COSTS = {"a compiled step at 0.92M on a CPU, results/bench_cpu.json": 1.112,
         "0.12B on an H200, results/gpu_B.json": 1.160,
         "1B on an H200, results/gpu_C.json": 1.017}
