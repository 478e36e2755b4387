"""
3. Two lines: the formula and the entry. u starts at 1, so γ_a = u² does as well. Folding leaves
nothing. Row i of W̃ = u_i² W_i moves by −(u_i⁴ G_i + 4 u_i² W_i ⟨W_i, G_i⟩): at the start the second
part, γ_a's own, is four times AP's.
"""
import pytest
import torch

from norms import (PLACEMENTS, Placement, ScaledLinear, fold_scale_vectors, named_scale_vectors,
                   scale_weight)


def squared_after_weight(W, v, u, m):
    """γ_a ⊙ (W x), γ_a = u²."""
    return scale_weight(W, u=u if u is None else u * u)


@pytest.mark.parametrize("name, times", [("after", 1), ("squared_after", 4)])
def test_a_new_placement(name, times, monkeypatch):
    monkeypatch.setitem(PLACEMENTS, "squared_after", Placement("u", squared_after_weight))
    m = ScaledLinear((3, 8), name).double()
    torch.nn.init.normal_(m.weight)
    W, G, lr = m.weight.detach().clone(), torch.randn(3, 8, dtype=torch.float64), 1e-6
    assert torch.equal(m.effective_weight(), W)
    (m.effective_weight() * G).sum().backward()  # a loss whose gradient is G
    torch.optim.SGD(m.parameters(), lr).step()
    moved = (m.effective_weight() - W) / lr
    expected = -(G + times * W * (W * G).sum(1, keepdim=True))
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-3)

    folded, x = fold_scale_vectors(m), torch.randn(5, 8, dtype=torch.float64)
    assert not named_scale_vectors(folded)
    torch.testing.assert_close(folded(x), m(x))
