"""
6. IWD does not decay γ_a, so the loss itself lowers it: what the layer adds becomes 0.13 times as
loud, since attention's output is a product with γ_a of v. Columns of o times 0.13 say the same with
γ_a = 1. For q no matrix can: its γ_a scales the scores before a softmax, and the Norm undoes any
factor of W_q. Only γ_a of k can take over its length (exercise 5).
"""
import torch
from conftest import UNIFIED, randomize_scales, tiny_gpt

from norms import weight_decay_groups


def test_gamma_a_of_v():
    model = randomize_scales(tiny_gpt(torch.float64, **UNIFIED))
    groups = {g["name"]: g["params"] for g in weight_decay_groups(model, 0.1, "input_norm")}
    assert "layers.0.attn.v.scale_out.beta" in dict(groups["scale"])

    attn, x = model.layers[0].attn, torch.randn(2, 16, 32, dtype=torch.float64)
    with torch.no_grad():
        before = attn(x, model.cos, model.sin)
        attn.v.scale_out.beta *= 0.13
        quiet = attn(x, model.cos, model.sin)
        torch.testing.assert_close(quiet, 0.13 * before)
        attn.v.scale_out.beta /= 0.13
        attn.o.weight *= 0.13
        torch.testing.assert_close(attn(x, model.cos, model.sin), quiet)
        attn.o.weight /= 0.13
        attn.q.scale_out.beta *= 0.13
        flat = attn(x, model.cos, model.sin)
        attn.q.weight /= 0.13  # the Norm undoes it
        torch.testing.assert_close(attn(x, model.cos, model.sin), flat, rtol=0, atol=1e-6)
        assert (flat - before).norm() > 0.05 * before.norm()
