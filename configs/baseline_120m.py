# 0.12B parameters (123,587,328): a Llama-style model of GPT-2's shape, one γ behind each norm.
out_dir = "out/baseline_120m"
dataset = "data/fineweb"  # prepare_data.py's output with --encoding gpt2, or a folder of llm.c or nanoGPT shards

n_layer = 12
n_head = 12
n_embd = 768
d_ff = 2048  # about 8/3 n_embd, a multiple of 256
block_size = 1024
vocab_size = 50304
tie_embeddings = True
init_std = 0.02

# 0.5M tokens a step: 16 x 1024 x 32. Eight GPUs make 4 micro-steps each, one GPU makes 32; the losses are the same
batch_size = 16
gradient_accumulation_steps = 32
tokens_per_param = 20  # max_iters follows

# our rule, not a tuned value: 1e-3 x sqrt(123.6M / parameters)
learning_rate = 1e-3
warmup_iters = 250

eval_interval = 250
eval_iters = 200
checkpoint_interval = 500
sample_tokens = 100
