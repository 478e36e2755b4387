"""
5. A score is (γ_a,q ⊙ Norm(q)) · (γ_a,k ⊙ Norm(k)), turned by positions, and with OR it holds the
two lengths as one product, β_q β_k. So β_q ∂L/∂β_q = β_k ∂L/∂β_k. They start alike, so they get one
gradient and stay alike, under Adam too. β of gate goes through silu, which is no product.
"""
import torch
from conftest import UNIFIED, tiny_batch, tiny_gpt

from norms import weight_decay_groups


def test_beta_of_q_and_k():
    model = tiny_gpt(torch.float64, **UNIFIED)
    optimizer = torch.optim.AdamW(weight_decay_groups(model, 0.1, "input_norm"), lr=0.02)
    for step in range(10):
        optimizer.zero_grad()
        model(*tiny_batch(step))[1].backward()
        optimizer.step()
    for layer in model.layers:
        q, k = layer.attn.q.scale_out.beta, layer.attn.k.scale_out.beta
        assert abs(q - 1) > 0.01
        torch.testing.assert_close(q, k, rtol=1e-6, atol=0)
        assert abs(layer.mlp.gate.scale_out.beta - layer.mlp.up.scale_out.beta) > 1e-3
