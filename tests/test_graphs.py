"""
Proves that what was made fast is the same function as what was written plainly, in value and gradient, and counts what
torch.compile makes of it: one graph for all blocks, and no second one for a second batch, a second micro-step or a second layer.
"""
import pytest
import torch
from conftest import UNIFIED, randomize_scales, tiny_batch, tiny_gpt

import model as model_file
from norms import REPARAMS, at_hand, compute_scale_vectors, named_scale_vectors

MIXTURE = dict(n_expert=3, n_expert_active=2, d_expert=21, d_shared_expert=24, n_dense_layer=1)


def micro_steps(model, batches=2):
    """Gradients after some micro-steps with other batches, added up as in training. -> {name: gradient}"""
    model.zero_grad()
    for seed in range(batches):
        loss = model(*tiny_batch(seed))[1]
        (loss + model.auxiliary_loss()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("keys", [{}, MIXTURE, dict(qk_norm=True, post_norm=True, scale_placement="dual")],
                         ids=["dense", "mixture", "norms"])
@pytest.mark.parametrize("reparam", REPARAMS)
def test_all_scale_vectors_at_once_are_each_by_itself(reparam, keys, monkeypatch):
    """compute_scale_vectors, with and without recomputed blocks: every γ, the loss's gradients over two micro-steps to 1e-13 in
    float64, and nothing left in its place after the forward pass, also one that fails."""
    model = randomize_scales(tiny_gpt(torch.float64, **{**UNIFIED, "scale_reparam": reparam, **keys}))
    alone = {name: scale().detach() for name, scale in named_scale_vectors(model)}
    computed = compute_scale_vectors(model)
    assert len(computed) == (0 if reparam == "none" else len(alone))
    with at_hand(computed):
        for name, scale in named_scale_vectors(model):
            torch.testing.assert_close(scale().detach(), alone[name], rtol=0, atol=1e-15)
            assert reparam == "none" or any(scale() is gamma for _, gamma in computed)
    together = micro_steps(model)
    model.config.recompute = True
    recomputed = micro_steps(model)
    with monkeypatch.context() as plain:
        plain.setattr(model_file, "compute_scale_vectors", lambda model: [])
        expected = micro_steps(model)
    for name, grad in expected.items():
        torch.testing.assert_close(together[name], grad, rtol=0, atol=1e-13, msg=name)
        torch.testing.assert_close(recomputed[name], grad, rtol=0, atol=1e-13, msg=name)
    with pytest.raises(IndexError):
        model(torch.full((1, 2), 61))
    with pytest.raises(ZeroDivisionError), at_hand(computed):
        raise ZeroDivisionError
    assert all(scale.computed is None for _, scale in named_scale_vectors(model))
