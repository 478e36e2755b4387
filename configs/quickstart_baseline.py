# The studies' model with one γ after each norm, as in every Llama: 0.23M parameters, one to three
# minutes on a core. Compare with quickstart.py. Its loss is that of seed 1 in figure 5's study.
from configs.study_cpu import *

out_dir = "out/quickstart_baseline"
seed = 1
device = "auto"

log_interval = 100
sample_tokens = 400
sample_prompt = "def "
