"""
How large a configuration is: parameters, tokens, FLOPs, and the memory that a GPU needs.

  python -m bench.table                                    the table of docs/studies.md
  python -m bench.table configs/unified_1b.py --batch_size=8    one configuration

Counts come from the model itself, on the meta device. Tokens are max_iters global batches, and
FLOPs are GPT.flops_per_token times tokens. Memory is an estimate: see memory_estimate.
"""
import sys
from pathlib import Path

from lib.config import load_config, meta_model, tokens_per_step
from norms import PLACEMENTS

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("120m", "250m", "350m", "500m", "750m", "1b",
         "moe_250m", "moe_500m", "moe_800m", "moe_1b", "moe_2b")
CARDS = (24, 40, 80)  # GB of GPU memory that people have


def memory_estimate(config, model):
    """Peak bytes of a compiled training step in bfloat16 under AdamW on one GPU.

    18 a parameter: float32 weight, gradient and two moments, and the bfloat16 copy of a step. For
    each token of a micro-batch and each layer: 2 bytes x 10 n_embd, and 6 for each channel of the
    SwiGLUs that it meets, padded to multiples of 8; a mixture keeps copies of its K inputs and
    outputs besides. 2 for each logit, and under DNP 2 more for its gradient. The formula lies
    within 3% of a simulation of the compiled step's allocations; no GPU has measured it.
    """
    m = config.model
    tokens = config.batch_size * m.block_size
    dnp = m.placed_maps and PLACEMENTS[m.scale_placement].output is not None

    def padded(width):
        return -(-width // 8) * 8

    layer = 2 * 10 * m.n_embd
    if m.n_expert:
        K, width = m.n_expert_active, padded(m.d_expert)
        layer += 6 * (K * width + padded(m.d_shared_expert)) + 4 * m.n_embd
        layer += (4 if m.scale_heterogeneous else 6) * K * m.n_embd
        layer += 4 * K * width if dnp and m.scale_heterogeneous else 0  # γ_a[expert] of gate
    else:
        layer += 6 * padded(m.d_ff)
    return 18 * model.num_params() + tokens * (m.n_layer * layer + (4 if dnp else 2) * m.vocab_size)


def describe(config):
    """Several lines on one configuration."""
    model = meta_model(config)
    total, active, scale = (model.num_params(k) for k in ("total", "active", "scale_vectors"))
    tokens = config.max_iters * tokens_per_step(config)
    memory = memory_estimate(config, model) / 1e9
    fits = [f"{card} GB" for card in CARDS if memory < 0.95 * card]
    batch = f"{config.batch_size} x {config.model.block_size}"
    return "\n".join([
        f"parameters      {total:,}" + (f", {active:,} active" if active != total else ""),
        f"scale vectors   {scale:,} ({scale / total:.3%})",
        f"tokens          {tokens:,} in {config.max_iters:,} steps",
        f"FLOPs           {model.flops_per_token() * tokens:.2e}",
        f"memory          about {memory:.1f} GB on a GPU in bfloat16, at {batch} tokens at once: "
        + (f"fits {fits[0]}" if fits else f"does not fit {CARDS[-1]} GB: lower batch_size and "
           f"raise gradient_accumulation_steps as much")])


def row(name):
    config = load_config([str(ROOT / "configs" / f"{name}.py")])
    model, m = meta_model(config), config.model
    total, active, scale = (model.num_params(k) for k in ("total", "active", "scale_vectors"))
    mlp = f"d_ff {m.d_ff}"
    if m.n_expert:
        mlp = (f"{m.n_expert} experts of {m.d_expert}, {m.n_expert_active} active, "
               f"shared {m.d_shared_expert}")
    tokens = config.max_iters * tokens_per_step(config)
    cells = [f"`{name}`", f"{m.n_layer} x {m.n_embd}, {m.n_head} heads, {mlp}", f"{total:,}",
             f"{active:,}" if active != total else "all", f"{scale:,} ({scale / total:.3%})",
             f"{config.learning_rate:g}", f"{tokens / 1e9:.1f}B",
             f"{model.flops_per_token() * tokens:.1e}",
             f"{memory_estimate(config, model) / 1e9:.0f} GB"]
    return f"| {' | '.join(cells)} |"


def table():
    heads = ("config", "shape", "parameters", "active", "scale vectors", "learning rate", "tokens",
             "FLOPs", "memory/GPU, estimated")
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    rows = [row(f"{kind}_{size}") for size in SIZES for kind in ("baseline", "unified")]
    return "\n".join(lines + rows)


def main(argv):
    if "-h" in argv or "--help" in argv:
        return print(__doc__)
    try:
        print(describe(load_config(argv)) if argv else table())
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
