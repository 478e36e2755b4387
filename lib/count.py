"""
What a model costs: parameters, FLOPs, and the memory that a GPU needs. Any model of nn.Linear and
norms.ScaledLinear with GPTConfig's keys in `.config` can be counted.
"""
from torch import nn

from norms import PLACEMENTS, ScaledLinear, named_scale_vectors

# dense bf16 FLOP/s of the GPUs people train on, by their makers' data sheets
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12,
              "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}


def num_params(model):
    """All parameters."""
    return sum(p.numel() for p in model.parameters())


def scale_params(model):
    """Those in scale vectors: every α and β."""
    return sum(p.numel() for _, m in named_scale_vectors(model) for p in m.parameters())


def active_params(model):
    """Those that a token meets. Each expert has its matrices, and the vectors that are stacks."""
    stacks = [m for m in linears(model) if m.weight.ndim == 3]
    routed = sum(p.numel() for m in stacks for p in m.parameters() if p.ndim > 1)
    return num_params(model) - round((1 - active_share(model.config)) * routed)


def active_share(c):
    """The share of the routed experts that a token meets."""
    return c.n_expert_active / max(1, c.n_expert)


def linears(model):
    return [m for m in model.modules() if isinstance(m, (ScaledLinear, nn.Linear))]


def flops_per_token(model, causal=False):
    """Floating-point operations to train on one token: 6 for each weight that it meets, and
    12 n_layer n_embd block_size for attention (PaLM, appendix B), or half of that for what a
    causal mask leaves to do."""
    c, weights = model.config, 0
    for m in linears(model):
        share = active_share(c) if m.weight.ndim == 3 else 1
        weights += round(share * m.weight.numel())
    attention = (6 if causal else 12) * c.n_layer * c.n_embd * c.block_size
    return 6 * weights + attention


def memory_estimate(model, tokens):
    """Peak bytes of a compiled training step in bfloat16 under AdamW on one GPU, with so many
    tokens at once. The formula lies within 3% of a simulation of the compiled step's allocations;
    no GPU has measured it.

    18 a parameter: float32 weight, gradient and two moments, and the bfloat16 copy of a step. For
    each token and layer: 2 bytes x 10 n_embd, and 6 for each channel of the SwiGLUs that it meets,
    padded to multiples of 8; a mixture keeps copies of its K inputs and outputs besides. 2 for each
    logit."""
    c = model.config

    def padded(width):
        return -(-width // 8) * 8

    layer = 2 * 10 * c.n_embd
    if c.n_expert:
        K, width = c.n_expert_active, padded(c.d_expert)
        layer += 6 * (K * width + padded(c.d_shared_expert)) + 4 * c.n_embd + 4 * K * c.n_embd
        if "gate" in c.placed_maps and PLACEMENTS[c.scale_placement].output is not None:
            layer += 4 * K * width  # γ_a[expert] of gate
    else:
        layer += 6 * padded(c.d_ff)
    return 18 * num_params(model) + tokens * (c.n_layer * layer + 2 * c.vocab_size)
