"""
The table of model sizes in docs/studies.md, as Markdown: tables 4 and 5 of the paper, counted.

  python -m bench.table

Counts come from the model itself, on the meta device. Tokens are max_iters global batches. FLOPs are GPT.flops_per_token times tokens.
Memory is for one GPU under AdamW, and an estimate (our formula, not a measurement): 16 bytes a parameter (float32 weight, gradient and two
moments), 2 for the bfloat16 copy a step makes, and per token of a micro-batch 2 bytes x (14 n_embd + 6 x the SwiGLU widths it meets) a
layer, 4 for each logit (the head's bfloat16 product and its gradient), and 4 more for each logit of the chunk that exists in float32.
"""
from pathlib import Path

from lib.config import load_config, meta_model, tokens_per_step
from model import CHUNK_ELEMENTS

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("120m", "250m", "350m", "500m", "750m", "1b", "moe_250m", "moe_500m", "moe_800m", "moe_1b", "moe_2b")


def memory_estimate(config, model):
    """Bytes of one GPU under AdamW, by the formula above."""
    m = config.model
    width = m.d_expert * m.n_expert_active + m.d_shared_expert if m.n_expert else m.d_ff
    activations = config.batch_size * m.block_size * m.n_layer * 2 * (14 * m.n_embd + 6 * width)
    logits = config.batch_size * m.block_size * m.vocab_size
    return 18 * model.num_params() + activations + 4 * logits + 4 * min(CHUNK_ELEMENTS, logits)


def row(name):
    config = load_config([str(ROOT / "configs" / f"{name}.py")])
    model, m = meta_model(config), config.model
    total, active, scale = (model.num_params(kind) for kind in ("total", "active", "scale_vectors"))
    mlp = f"d_ff {m.d_ff}"
    if m.n_expert:
        mlp = f"{m.n_expert} experts of {m.d_expert}, {m.n_expert_active} active, shared {m.d_shared_expert}"
    tokens = config.max_iters * tokens_per_step(config)
    return (f"| `{name}` | {m.n_layer} x {m.n_embd}, {m.n_head} heads, {mlp} | {total:,} | {f'{active:,}' if active != total else 'all'} | "
            f"{scale:,} ({scale / total:.3%}) | {config.learning_rate:g} | {tokens / 1e9:.1f}B | {model.flops_per_token() * tokens:.1e} | "
            f"{memory_estimate(config, model) / 1e9:.0f} GB |")


def table():
    lines = ["| config | shape | parameters | active | scale vectors | learning rate | tokens | FLOPs | memory/GPU, estimated |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    return "\n".join(lines + [row(f"{kind}_{size}") for size in SIZES for kind in ("baseline", "unified")])


if __name__ == "__main__":
    print(table())
