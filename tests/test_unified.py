"""
Read this first. The paper's unified strategy, HG + DNP + OR + IWD, written in bare torch on one
block, equals the model in value and in every gradient.
"""
import torch
from conftest import UNIFIED, randomize_scales, tiny_gpt
from torch.nn import functional as F

from model import apply_rope
from optim import param_groups


def norm(x):
    return x / x.square().mean(-1, keepdim=True).sqrt()  # eq. 1


def unified_block(p, x, cos, sin, heads):
    """x (B, T, C), the residual stream -> (B, T, C). p: the block's parameters by name."""
    def read(x, name, groups=1):
        gamma_b = norm(p[f"{name}.scale_in.alpha"])  # HG: its own γ_b. OR, with β = 1
        gamma_a = p[f"{name}.scale_out.beta"] * norm(p[f"{name}.scale_out.alpha"])  # OR
        y = (gamma_b * norm(x)) @ p[f"{name}.weight"].T
        return gamma_a * norm(y.unflatten(-1, (groups, -1))).flatten(-2)  # DNP

    q, k, v = (read(x, f"attn.{name}", heads).unflatten(-1, (heads, -1)) for name in "qkv")
    q, k, v = (y.transpose(1, 2) for y in (apply_rope(q, cos, sin), apply_rope(k, cos, sin), v))
    future = torch.ones(x.size(1), x.size(1)).triu(1) > 0
    scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(future, -torch.inf)
    x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2) @ p["attn.o.weight"].T
    return x + (F.silu(read(x, "mlp.gate")) * read(x, "mlp.up")) @ p["mlp.down.weight"].T


def test_unified_in_bare_torch_equals_the_model():
    model = randomize_scales(tiny_gpt(torch.float64, n_kv_head=4, norm_eps=1e-30, **UNIFIED))
    block, parameters = model.layers[0], dict(model.layers[0].named_parameters())
    x = torch.randn(2, 16, 32, dtype=torch.float64, requires_grad=True)
    wanted = [x, *parameters.values()]
    found = block(x, model.cos, model.sin)[0]
    expected = unified_block(parameters, x, model.cos, model.sin, heads=4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    probe = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(y, wanted, probe) for y in (found, expected))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_individual_weight_decay_decays_gamma_b_only():
    groups = param_groups(tiny_gpt(n_layer=1, **UNIFIED), 0.1, "input_norm")
    names = {group["name"]: {name for name, _ in group["params"]} for group in groups}
    layer = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")
    maps = [f"layers.0.{name}" for name in layer] + ["head"]
    gamma_b = {f"{name}.scale_in.alpha" for name in maps if name != "head"}
    assert names["scale_decayed"] == gamma_b | {"norm.scale.alpha"}  # the final norm has the head's
    assert names["scale"] == {f"{name}.scale_out.{p}" for name in maps for p in ("alpha", "beta")}
    decay = {group["name"]: group["weight_decay"] for group in groups}
    assert (decay["scale_decayed"], decay["scale"]) == (0.1, 0.0)
