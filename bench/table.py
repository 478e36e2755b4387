"""
How large a configuration is: parameters, tokens, FLOPs, and the memory that a GPU needs.

  python -m bench.table                                    the table of docs/studies.md
  python -m bench.table configs/unified_1b.py --batch_size=8    one configuration

Counts come from the model itself, on the meta device. Tokens are max_iters global batches, and
FLOPs are flops_per_token times tokens. Memory is an estimate: see lib/count.py.
"""
import sys
from pathlib import Path

from lib.config import load_config, meta_model, tokens_per_step
from lib.count import active_params, flops_per_token, memory_estimate, num_params, scale_params
from lib.output import say

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("120m", "250m", "350m", "500m", "750m", "1b",
         "moe_250m", "moe_500m", "moe_800m", "moe_1b", "moe_2b")
CARDS = (24, 40, 80)  # GB of GPU memory that people have


def micro_batch(config):
    """Tokens at once."""
    return config.batch_size * config.model.block_size


def describe(config):
    """Several lines on one configuration."""
    model = meta_model(config)
    total, active, scale = num_params(model), active_params(model), scale_params(model)
    tokens = config.max_iters * tokens_per_step(config)
    memory = memory_estimate(model, micro_batch(config)) / 1e9
    fits = [f"{card} GB" for card in CARDS if memory < 0.95 * card]
    batch = f"{config.batch_size} x {config.model.block_size}"
    return "\n".join([
        f"parameters      {total:,}" + (f", {active:,} active" if active != total else ""),
        f"scale vectors   {scale:,} ({scale / total:.3%})",
        f"tokens          {tokens:,} in {config.max_iters:,} steps",
        f"FLOPs           {flops_per_token(model) * tokens:.2e}",
        f"memory          about {memory:.1f} GB on a GPU in bfloat16, at {batch} tokens at once: "
        + (f"fits {fits[0]}" if fits else f"does not fit {CARDS[-1]} GB: lower batch_size and "
           f"raise gradient_accumulation_steps as much")])


def row(name):
    config = load_config([str(ROOT / "configs" / f"{name}.py")])
    model, m = meta_model(config), config.model
    total, active, scale = num_params(model), active_params(model), scale_params(model)
    mlp = f"d_ff {m.d_ff}"
    if m.n_expert:
        mlp = (f"{m.n_expert} experts of {m.d_expert}, {m.n_expert_active} active, "
               f"shared {m.d_shared_expert}")
    tokens = config.max_iters * tokens_per_step(config)
    cells = [f"`{name}`", f"{m.n_layer} x {m.n_embd}, {m.n_head} heads, {mlp}", f"{total:,}",
             f"{active:,}" if active != total else "all", f"{scale:,} ({scale / total:.3%})",
             f"{config.learning_rate:g}", f"{tokens / 1e9:.1f}B",
             f"{flops_per_token(model) * tokens:.1e}",
             f"{memory_estimate(model, micro_batch(config)) / 1e9:.0f} GB"]
    return f"| {' | '.join(cells)} |"


def table():
    heads = ("config", "shape", "parameters", "active", "scale vectors", "learning rate", "tokens",
             "FLOPs", "memory/GPU, estimated")
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    rows = [row(f"{kind}_{size}") for size in SIZES for kind in ("baseline", "unified")]
    return "\n".join(lines + rows)


def main(argv):
    if "-h" in argv or "--help" in argv:
        return say(__doc__)
    try:
        say(describe(load_config(argv)) if argv else table())
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
