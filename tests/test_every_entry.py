"""
Proves for every entry of PLACEMENTS and REPARAMS, and so for a fork's too, that training, sampling,
folding and export run one function, and that what an entry claims is true.
"""
import pytest
import torch
from conftest import (
    EVERYWHERE, FORK_KEYS, MIXTURE, in_pieces, randomize_scales, tiny_batch, tiny_gpt)
from torch.nn import functional as F

from hf.export import stock_architecture
from lib.config import TrainConfig
from lib.process import compile_model
from model import GPTConfig
from norms import (
    PLACEMENTS, REPARAMS, ScaledLinear, ScaleVector, fold_scale_vectors, named_scale_vectors)
from sample import generate


def check_one_function(**keys):
    """The loss is the cross-entropy of the logits; every parameter gets a gradient; folding keeps
    the function, leaves no absorbable vector, and does not touch the given model; cached sampling
    equals uncached; state_dict holds all that the model is; bfloat16, which pads odd widths, is
    near."""
    keys |= {"n_layer": 2, "n_dense_layer": 0, "d_ff": 45, "vocab_size": 130}
    model = randomize_scales(tiny_gpt(torch.float64, **keys))
    idx, targets = tiny_batch(batch=9)  # so many rows, and logits, that fast.by_gram has its turn
    logits = model(idx)[0]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss = model(idx, targets)[1]
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    (loss + model.auxiliary_loss()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name

    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = fold_scale_vectors(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(folded(idx)[0], logits, rtol=0, atol=1e-11)
    stays = {name for name, m in named_scale_vectors(model) if not m.absorbable}
    assert {name for name, _ in named_scale_vectors(folded)} == stays
    assert all(m.reparam == "none" for _, m in named_scale_vectors(folded))

    torch.testing.assert_close(in_pieces(model, idx), logits, rtol=0, atol=1e-12)
    cached, uncached = (torch.cat(list(generate(model, idx[:, :9], 9, temperature=0, use_cache=c)))
                        for c in (True, False))  # beyond block_size
    assert torch.equal(cached, uncached)

    again = tiny_gpt(torch.float64, seed=5, **keys)
    again.load_state_dict(before)
    assert torch.equal(again(idx)[0], logits)
    again.float().compute_dtype = torch.bfloat16
    if not model.config.n_expert:  # where rounding can change a token's experts
        assert (again(idx)[0] - logits).norm() < 0.03 * logits.norm()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def check_claims(name):
    """What speed and folding rely on: see Placement."""
    placement, shape = PLACEMENTS[name], (4, 6)
    draw = torch.Generator().manual_seed(0)
    W, v, u, x = (torch.randn(s, generator=draw, dtype=torch.float64)
                  for s in (shape, (6,), (4,), (5, 6)))
    m = ScaledLinear(shape, name, eps=1e-30)
    assert set(placement.vectors) <= set("vu")
    # no claim but a rule, since a norm may multiply v into x: v multiplies the input of W
    if "v" in placement.vectors:
        close(placement.weight(W, v, u, m), placement.weight(W, None, u, m) * v)

    # in a stack of experts each matrix is its own
    stack = torch.stack([W, 2 * W.flip(0)])
    pairs = [placement.weight(matrix, v, u, m) for matrix in stack]
    close(placement.weight(stack, v, u, m), torch.stack(pairs))
    if placement.output is None:
        return

    def output(y, u):
        return placement.output(y, u, m)

    y = x @ placement.weight(W, v, u, m).T
    assert output(y.bfloat16(), u.float()).dtype == torch.bfloat16
    if placement.ends_in_u:
        close(output(y, u), output(y, None) * u)
    if placement.undoes_factor:
        close(output(7 * y, u), output(y, u))
    if placement.divides_by_rms:
        close(output(y, u), u * y / y.square().mean(-1, keepdim=True).sqrt())
    if placement.keeps_zeros:
        m.eps = 0.1
        close(output(F.pad(y, (0, 4)), F.pad(u, (0, 4))), F.pad(output(y, u), (0, 4)))


@pytest.mark.parametrize("name", [name for name in REPARAMS if REPARAMS[name].beta_is_length])
def test_beta_is_length(name):
    """Where an entry claims it, another β gives γ the same direction."""
    alpha = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = (REPARAMS[name].function(torch.tensor([beta]), alpha) for beta in (0.5, 1.5))
    close(a / a.norm(), b / b.norm())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_claims_of_an_entry(placement):
    """And export takes the kind of folder from the entry."""
    check_claims(placement)
    folded = fold_scale_vectors(tiny_gpt(scale_placement=placement, n_layer=1))
    stock, why = stock_architecture(folded)
    assert (stock == "LlamaForCausalLM") == (PLACEMENTS[placement].output is None), why


with_forks = pytest.mark.parametrize("fork", FORK_KEYS, ids=lambda keys: "-".join(keys) or "ours")


@with_forks
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("keys", [
    {}, {"scale_heterogeneous": True, "scale_reparam": "exponential"}, MIXTURE,
    {"scale_vectors": False},
    {"scale_heterogeneous": True, **MIXTURE, "scale_placement_on": EVERYWHERE},
    {"scale_placement_on": EVERYWHERE, "scale_reparam": "original"},
    {"scale_placement_on": "q,k,up", "tie_embeddings": True},
    {"scale_placement_on": "v,up", "qk_norm": True, "post_norm": True, "scale_heterogeneous": True},
], ids=["shared", "HG", "mixture", "no vectors", "HG mixture", "everywhere", "on q, k, up",
        "output norms"])
def test_one_function_of_a_placement(keys, placement, fork):
    check_one_function(**{"scale_placement": placement, **keys, **fork})


@with_forks
@pytest.mark.parametrize("reparam", REPARAMS)
@pytest.mark.parametrize("keys", [
    {}, {"scale_placement": "after", "tie_embeddings": True},
    {"scale_placement": "dual_norm", "scale_heterogeneous": True, **MIXTURE},
], ids=["shared", "tied", "HG mixture"])
def test_one_function_of_a_reparam(keys, reparam, fork):
    check_one_function(**{"scale_reparam": reparam, **keys, **fork})


@torch.no_grad()
@with_forks
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_compiled_is_the_same_function(placement, fork):
    """Its graphs, run by PyTorch's own kernels. Their gradients: test_graphs."""
    keys = {"n_layer": 1, "scale_heterogeneous": True, "scale_placement": placement, **fork}
    model, (idx, targets) = randomize_scales(tiny_gpt(**keys)), tiny_batch()
    loss = model(idx, targets)[1]
    torch._dynamo.reset()
    compile_model(model, backend="eager", options=None)
    torch.testing.assert_close(model(idx, targets)[1], loss, rtol=0, atol=1e-6)


def test_what_an_entry_does_not_claim(monkeypatch):
    """Of docs/fork.md's LayerNorm: one map with it is enough for no zeros in a SwiGLU, and it
    normalizes all the same."""
    entry = PLACEMENTS["dual_norm"]._replace(keeps_zeros=False, divides_by_rms=False)
    monkeypatch.setitem(PLACEMENTS, "entry", entry)
    for name in ("gate", "up"):
        mlp = tiny_gpt(scale_placement="entry", scale_placement_on=name, d_ff=45).layers[0].mlp
        assert mlp.gate.pad == mlp.up.pad == mlp.down.pad == (0, 0)
    with pytest.raises(ValueError, match="qk_norm=True would normalize what scale_placement='entr"):
        TrainConfig(model=GPTConfig(scale_placement="entry", qk_norm=True))


def test_names_are_checked():
    with pytest.raises(ValueError, match="scale_reparam='orthodox' is unknown: choose none, orig"):
        ScaleVector((5,), True, True, "orthodox")
    with pytest.raises(ValueError, match="placement 'duall' is unknown: choose input, after"):
        ScaledLinear((4, 6), "duall")
