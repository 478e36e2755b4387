"""
2. Decay multiplies every number by 1 − lr λ a step. With OR alone, γ_b = β Norm(α) shrinks as β
does, to 0.99^100 = 0.37 of it, and keeps its direction: α's length is of no effect. With OR and
DNP, γ_b has no β, and decay does nothing to it. γ_a has its β in both, and shrinks: hence IWD does
not decay it.
"""
import torch

from norms import ScaledLinear, weight_decay_groups


def test_or_without_dnp():
    for placement, length_of_b in (("dual", 0.99 ** 100), ("dual_norm", 1.0)):
        m = ScaledLinear((8, 16), placement, reparam="original")
        for p in m.parameters():
            torch.nn.init.normal_(p)
            p.grad = torch.zeros_like(p)
        b, a = m.scale_in().detach(), m.scale_out().detach()
        optimizer = torch.optim.AdamW(weight_decay_groups(m, 0.1, "all"), lr=0.1)
        for _ in range(100):
            optimizer.step()
        torch.testing.assert_close(m.scale_in(), length_of_b * b, rtol=1e-5, atol=0)
        torch.testing.assert_close(m.scale_out(), 0.99 ** 100 * a, rtol=1e-5, atol=0)
