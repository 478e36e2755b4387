"""Ours: OR moves the magnitude β by up to a learning rate a step, whatever the width. Does a larger
learning rate on scale vectors give the same?"""
from studies.common import CPU, DNP, GPU, HG, IWD, UNIFIED

title = "Learning rate of scale vectors"
question = "does a larger learning rate on scale vectors give what OR gives?"
rows = {"baseline": {}, "HG + DNP + IWD": {**HG, **DNP, **IWD}, "unified": UNIFIED,
        "HG + DNP": {**HG, **DNP}}
for factor in (3.0, 10.0):
    for row in ("baseline", "HG + DNP + IWD", "unified"):
        rows[f"{row} x{factor:g}"] = {**rows[row], "scale_lr": factor}
comparisons = {(row, row.partition(" x")[0] if " x" in row else "baseline"): {}
               for row in list(rows)[1:]} | {
                   ("HG + DNP + IWD", "HG + DNP"): {}, ("HG + DNP + IWD x3", "unified"): {}}
scales = {"cpu": {**CPU, "tuned": ()}, "gpu": GPU}
