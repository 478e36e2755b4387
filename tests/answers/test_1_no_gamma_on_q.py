"""
1. The logits are the same at the start, where γ = 1, and differ after a step: column j of q moves
by −(γ_j² I + w_j w_jᵀ) G_j with γ and by −G_j without, and the second part is missing. One number a
channel and layer is gone, 256 in 4 layers of 64. Every function remains: the weight can take over
any γ.
"""
import torch
from conftest import tiny_batch, tiny_gpt


def test_no_gamma_on_q():
    models = [tiny_gpt(torch.float64, scale_heterogeneous=True, scale_vectors_on=on)
              for on in ("all", "k,v,gate,up,head")]
    x, y = tiny_batch()
    a, b = (model(x)[0] for model in models)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    count, fewer = (sum(p.numel() for p in model.parameters()) for model in models)
    assert count - fewer == 2 * 32  # layers × channels

    moved, lr = [], 1e-6
    for model in models:
        q = model.layers[0].attn.q
        W = q.weight.detach().clone()  # and W̃ too, since γ = 1
        model(x, y)[1].backward()
        torch.optim.SGD(model.parameters(), lr).step()
        moved.append((q.effective_weight().detach() - W) / lr)
    G = -moved[1]
    torch.testing.assert_close(moved[0], -(G + W * (W * G).sum(0)), rtol=0, atol=1e-7)
