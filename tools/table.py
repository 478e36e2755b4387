"""
The README's table of configs, as Markdown.

  python tools/table.py

Counts come from the model itself, on the meta device. Tokens are max_iters global batches. FLOPs are GPT.flops_per_token times tokens.
Memory is for one GPU under AdamW, and an estimate (our formula, not a measurement): 16 bytes a parameter (float32 weight, gradient and two
moments), 2 for the bfloat16 copy a step makes, and per token of a micro-batch 2 bytes x (14 n_embd + 6 x the SwiGLU widths it meets) a
layer, and 4 bytes a logit.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train import load_config, meta_model, tokens_per_step  # noqa: E402

SIZES = ("120m", "350m", "1b", "2b", "moe_500m", "moe_2b")


def memory_estimate(config, model):
    """Bytes of one GPU under AdamW, by the formula above."""
    met = config.n_expert_active + config.n_shared_expert
    width = config.d_expert * met if config.n_expert else config.d_ff
    activations = config.n_layer * 2 * (14 * config.n_embd + 6 * width) + 4 * config.vocab_size
    return 18 * model.num_params() + config.batch_size * config.block_size * activations


def row(path):
    config = load_config([path])
    model = meta_model(config)
    total, active, scale = (model.num_params(kind) for kind in ("total", "active", "scale_vectors"))
    mlp = f"{config.n_expert} experts of {config.d_expert}, {config.n_expert_active} active" if config.n_expert else f"d_ff {config.d_ff}"
    tokens = config.max_iters * tokens_per_step(config)
    return (f"| `{Path(path).stem}` | {config.n_layer} x {config.n_embd}, {config.n_head} heads, {mlp} | {total:,} | "
            f"{f'{active:,}' if active != total else 'all'} | {scale:,} ({scale / total:.3%}) | {config.learning_rate:g} | "
            f"{tokens / 1e9:.1f}B | {model.flops_per_token() * tokens:.1e} | {memory_estimate(config, model) / 1e9:.0f} GB |")


def table():
    lines = ["| config | shape | parameters | active | scale vectors | learning rate | tokens | FLOPs | memory/GPU, estimated |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    return "\n".join(lines + [row(f"configs/{kind}_{size}.py") for size in SIZES for kind in ("baseline", "unified")])


if __name__ == "__main__":
    print(table())
