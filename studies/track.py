"""A track for new ideas: your config, or --key=value, beside baseline and unified, on the same
seeds and data.

  python -m studies track configs/mine.py --jobs=2
  python -m studies track --scale_reparam=exponential --scale_placement=dual

The config says what differs from the baseline; configs/unified.py in front adds unified's keys. A
row's learning rate is tuned on as many rates as the baseline's. Keys that all rows must share are
refused."""
from studies.common import CPU, GPU, NO_DECAY, TEN_SEEDS, UNIFIED

title = "Track"
question = "is your idea better than the unified strategy?"
rows = {"baseline": {}, "baseline without decay on γ": NO_DECAY, "unified": UNIFIED}
picture = "forest"
comparisons = {("baseline without decay on γ", "baseline"): {}, ("unified", "baseline"): {}}
yours = ("unified", "baseline", "baseline without decay on γ")  # your row is compared with these
# stated before any run: ten seeds, the 95% interval of the difference paired by seed, at the best
# of three learning rates each
rule = {"seeds": 10, "at_least": 0.005,
        "says": "better if the whole interval is below 0 and the mean at least 0.005 nats below"}
scales = {"cpu": {**CPU, "seeds": TEN_SEEDS}, "gpu": GPU}
