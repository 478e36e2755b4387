# Llama-0.12B of the paper's table 4, and the recipe that every size shares (section 4, appendix B).
# 119,744,256 parameters.
out_dir = "out/baseline_120m"
# prepare_data.py's output with --encoding gpt2, or a folder of llm.c or nanoGPT shards
dataset = "data/fineweb"

n_layer = 6
n_head = 12
n_embd = 768
block_size = 1024
vocab_size = 50304  # untied; d_ff = int(8/3 n_embd) is the default

# 512 sequences a step: 16 at once x 32. Eight GPUs make 4 micro-steps each, one GPU makes 32; the
# losses are the same
batch_size = 16
gradient_accumulation_steps = 32
# 9.83B tokens, where the curves of figure 6 end; the paper says "about 100" a parameter
max_iters = 18750

# the best of {6e-4, 1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3} for the baseline; unified uses the same
learning_rate = 4e-3
schedule = "cosine"  # to learning_rate/20, train.py's default
weight_decay = 0.1
scale_weight_decay = "all"  # our reading of the paper's rows without IWD
warmup_iters = 1000  # ours: the paper does not say
init_std = 0.02  # ours: the paper does not say

eval_interval = 500
eval_windows = 1600
checkpoint_interval = 500
sample_tokens = 100
