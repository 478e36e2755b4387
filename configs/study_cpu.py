# The studies' model for one CPU core: 0.23M parameters, a byte each token, one to three minutes a
# run. See docs/studies.md.
dataset = "data/stdlib"  # the Python standard library's source, made on the spot
vocab_size = 257  # the 256 bytes and <|endoftext|>

n_layer = 4
n_head = 4
n_embd = 64  # d_ff = int(8/3 n_embd) = 170 is the default
block_size = 128
init_std = 0  # 1/sqrt(n_embd): 0.02 is too small for so small a model

# many steps of few tokens: Adam moves a scale vector by at most a learning rate a step, however
# many tokens the step reads
batch_size = 4
max_iters = 2500
learning_rate = 4e-3  # the best of {2e-3, 4e-3, 8e-3} for the baseline
warmup_iters = 100

eval_interval = 250
eval_windows = 320
checkpoint_interval = 1250
keep_checkpoints = 1
log_interval = 250
device = "cpu"
