# The shape of the benchmark on a CPU: wide enough that products take most of a step.
out_dir = "out/bench"
vocab_size = 257

n_layer = 4
n_head = 4
n_embd = 128
d_ff = 384
block_size = 256
init_std = 0  # 1/sqrt(n_embd)

batch_size = 8
max_iters = 600
