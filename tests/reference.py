"""
The model written a second time: one formula after the other, in bare torch, slow, and with nothing
of ours but the parameters and PLACEMENTS' names. Tests compare norms.py and model.py with it.
"""
import torch
from torch import nn
from torch.nn import functional as F

from norms import PLACEMENTS

GAMMA = {
    "none": lambda beta, alpha: alpha,
    "original": lambda beta, alpha: beta * len(alpha) ** 0.5 * alpha / alpha.norm(),  # eq. 8
    "exponential": lambda beta, alpha: torch.exp(alpha + beta) / alpha.mean().exp(),  # eq. 9
    "zero_centered": lambda beta, alpha: alpha + 1,
}


def norm(x, eps):
    """Norm(x) = x / √(mean x² + ε), over the last dimension (eq. 1)."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def gamma(vector, e=None):
    """γ (d,) of a ScaleVector, or of its expert e; 1 where there is none."""
    if vector is None:
        return torch.ones(())
    own = vector.alpha.ndim == 2
    alpha = vector.alpha[e] if own else vector.alpha
    beta = vector.beta[e] if own and torch.is_tensor(vector.beta) else vector.beta
    return GAMMA[vector.reparam](beta, alpha)


def linear(m, x, eps, e=None, width=None):
    """γ_a ⊙ W(γ_b ⊙ x), each γ where the map m has it, or its expert e (eqs. 5 and 6). Under DNP
    and SDD, γ_a ⊙ Norm(W(γ_b ⊙ x)), over each `width` channels (eq. 7). Under weight_norm each row
    of W is as long as init_std √d."""
    W = m.weight[e] if m.weight.ndim == 3 else m.weight
    if m.placement == PLACEMENTS["weight_norm"]:
        W = m.init_std * len(W[0]) ** 0.5 * W / W.norm(dim=1, keepdim=True)
    y = (gamma(m.scale_in, e) * x) @ W.T
    if m.placement in (PLACEMENTS["dual_norm"], PLACEMENTS["after_norm"]):
        y = norm(y.unflatten(-1, (-1, width or len(W))), eps).flatten(-2)
    return gamma(m.scale_out, e) * y


def pre_norm(m, x, c):
    """What the maps of the PreNorm m read; γ where they share one."""
    return gamma(m.scale) * norm(x, c.norm_eps)


def output_norm(m, z, c):
    return z if isinstance(m, nn.Identity) else gamma(m.scale) * norm(z, c.norm_eps)


def rotate(x, theta):
    """Rotary positions: entries i and i + D/2 are one complex number, and position t multiplies it
    by exp(√-1 t θ^(-2i/D)). x (B, H, T, D)."""
    T, D = x.shape[-2:]
    angle = torch.arange(T)[:, None] * theta ** -(torch.arange(0, D, 2) / D)
    turned = torch.complex(*x.chunk(2, -1)) * torch.complex(angle.cos(), angle.sin())
    return torch.cat((turned.real, turned.imag), -1)


def attention(m, x, c):
    """Query head h reads key/value head h // (H / H_kv). x (B, T, C) is the residual stream."""
    x = pre_norm(m.norm, x, c)
    q, k, v = (linear(f, x, c.norm_eps, width=c.head_dim) for f in (m.q, m.k, m.v))
    q, k, v = (y.unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for y in (q, k, v))
    q = rotate(output_norm(m.q_norm, q, c), c.rope_theta)
    k = rotate(output_norm(m.k_norm, k, c), c.rope_theta)
    heads = [h // (c.n_head // c.n_kv_head) for h in range(c.n_head)]
    future = torch.ones(x.size(1), x.size(1)).triu(1) > 0
    scores = (q @ k[:, heads].mT / c.head_dim ** 0.5).masked_fill(future, -torch.inf)
    return linear(m.o, (scores.softmax(-1) @ v[:, heads]).transpose(1, 2).flatten(-2), c.norm_eps)


def swiglu(gate, up, down, x, eps, e=None):
    return linear(down, F.silu(linear(gate, x, eps, e)) * linear(up, x, eps, e), eps, e)


def mixture(m, x, c):
    """Every expert on every token, with weight 0 where the token has not chosen it; and the
    load-balancing loss (Switch Transformer, eq. 4) with the z-loss (ST-MoE, eq. 5)."""
    x = pre_norm(m.norm, x, c)
    logits = linear(m.router, x, c.norm_eps)
    p = logits.softmax(-1)
    chosen = p >= p.topk(c.n_expert_active).values[..., -1:]
    weight = p * chosen / (p * chosen).sum(-1, keepdim=True)
    y, eps = 0, c.norm_eps
    if m.shared_down:
        y = swiglu(m.shared_gate, m.shared_up, m.shared_down, x, eps)
    for e in range(c.n_expert):
        y = y + weight[..., e, None] * swiglu(m.gate, m.up, m.down, x, eps, e)

    share = chosen.double().mean((0, 1)) / c.n_expert_active  # of all choices
    balance = c.n_expert * (share * p.mean((0, 1))).sum()
    z = logits.exp().sum(-1).log().square().mean()
    return y, torch.stack((balance, z))


def decoder(model, idx, c=None):
    """idx (B, T) -> logits (B, T, V), and [load-balancing loss, z-loss], means over mixtures. c:
    the keys, where they are not to be the model's own."""
    c, x, losses = c or model.config, model.embedding.weight[idx], [torch.zeros(2)]
    for i, layer in enumerate(model.layers):
        y = attention(layer.attn, x, c)
        x = x + output_norm(layer.attn_post_norm, y, c)
        m = layer.mlp
        if c.n_expert and i >= c.n_dense_layer:
            y, loss = mixture(m, x, c)
            losses.append(loss)
        else:
            y = swiglu(m.gate, m.up, m.down, pre_norm(m.norm, x, c), c.norm_eps)
        x = x + output_norm(layer.mlp_post_norm, y, c)
    logits = linear(model.head, pre_norm(model.norm, x, c), c.norm_eps)
    return logits, sum(losses) / max(1, len(losses) - 1)
