"""Ours: decay every vector that a neighbouring matrix could take over, not every Input-Norm."""
from studies.common import CPU, DNP, GPU, HG, OR

title = "Decay by absorbability"
question = "which scale vectors should decay under the unified strategy?"
rows = {"baseline": {}, "unified": {**HG, **DNP, **OR, "scale_weight_decay": "input_norm"}}
for policy in ("all", "absorbable", "output_norm", "none"):
    rows[f"decay {policy}"] = {**HG, **DNP, **OR, "scale_weight_decay": policy}
comparisons = {("unified", "baseline"): {}, **{(row, "unified"): {} for row in list(rows)[2:]}}
scales = {"cpu": {**CPU, "tuned": ()}, "gpu": GPU}
