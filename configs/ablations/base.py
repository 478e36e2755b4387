# The common base of the study: every row below imports it and changes only what its name says.
# To run the study at another size, import another baseline here (configs.baseline_120m).
from configs.quickstart_baseline import *

scale_weight_decay = "none"
sample_tokens = 0
