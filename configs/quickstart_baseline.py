# The quickstart without the strategy: one γ after each norm, as in every Llama. Compare with quickstart.py.
out_dir = "out/quickstart_baseline"
dataset = "data/stdlib"  # the Python standard library's source, made on the spot
vocab_size = 257  # the 256 bytes and <|endoftext|>

# 0.92M parameters
n_layer = 4
n_head = 4
n_embd = 128
d_ff = 384
block_size = 256
init_std = 0  # 1/sqrt(n_embd): 0.02 is too small for so small a model

# 1.2M tokens
batch_size = 8
max_iters = 600
learning_rate = 2e-3  # the best of 2e-3, 4e-3, 8e-3 for this baseline; the unified strategy uses the same
warmup_iters = 30

eval_interval = 200
log_interval = 20
checkpoint_interval = 200
sample_tokens = 400
sample_prompt = "def "
