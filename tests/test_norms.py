"""
Proves that each map with its scale vectors is its formula (tests/reference.py) in float64, for one
weight and for a stack of experts; that maps share a γ or have their own; that a Pre-Norm before DNP
can be left out; and that weight decay finds the vectors of any model.
"""
import itertools

import pytest
import reference
import torch
from conftest import OUR_PLACEMENTS

from fast import MeanSquare, Routing, apply_wide, by_gram, gammas_in_batches, wide_product
from norms import (
    PLACEMENTS, REPARAMS, OutputNorm, PreNorm, ScaledLinear, ScaleVector, fold_scale_vectors,
    rms_norm, scale, weight_decay_groups)


def random(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def scaled_linear(*args, **kwargs):
    """A float64 map whose weight and vectors are random."""
    m = ScaledLinear(*args, **kwargs).double()
    for i, p in enumerate(m.parameters()):
        p.data = random(*p.shape, seed=10 * i)
    return m


@pytest.mark.parametrize("reparam", REPARAMS)
def test_scale_vector(reparam):
    """γ starts at 1, is its formula, and each expert's vector is its own."""
    vector, one = (ScaleVector(shape, input_norm=True, absorbable=True, reparam=reparam).double()
                   for shape in ((3, 5), (5,)))
    assert torch.equal(vector(), torch.ones(3, 5).double())
    assert torch.equal(one(), torch.ones(5).double())
    starts = {"none": {1}, "original": {1}, "exponential": {0}, "zero_centered": {0}}  # of α and β
    found = {n for p in one.parameters() for n in p.tolist()}
    assert starts.get(reparam, found) == found  # a fork's may start elsewhere
    betas = {} if REPARAMS[reparam].beta is None else {"beta": (3, 1)}
    assert {name: p.shape for name, p in vector.named_parameters()} == {"alpha": (3, 5), **betas}
    for i, p in enumerate(vector.parameters()):
        p.data += random(*p.shape, seed=i)
    one.load_state_dict({name: p[1] for name, p in vector.state_dict().items()})
    close(vector()[1], one())
    if reparam in reference.GAMMA:
        close(one(), reference.gamma(one))


@pytest.mark.parametrize("placement", [*OUR_PLACEMENTS, None])
def test_placement(placement):
    """Whole and, under DNP, by heads of 4; and rows that go to two experts of three each, by their
    matrices and vectors, also where one has no rows."""
    x = random(3, 6)
    for width, vectors in itertools.product((None, 4), (True, False)):
        m = scaled_linear(
            (8, 6), placement, vectors=vectors, norm_width=width, eps=0.1, init_std=0.3)
        assert vectors or [name for name, _ in m.named_parameters()] == ["weight"]
        close(m(x), reference.linear(m, x, 0.1, width=width))
    m = scaled_linear((3, 4, 6), placement, eps=0.1)
    for expert in ([[2, 0], [1, 2], [0, 1]], [[0, 2]] * 3, [[1, 0]] * 3):
        routing = Routing(torch.tensor(expert), 3)
        found = routing.unsort(m(routing.sort(x), routing))
        close(found, torch.stack([torch.stack([reference.linear(m, row, 0.1, e) for e in chosen])
                                  for row, chosen in zip(x, expert)]))


@pytest.mark.parametrize("reparam", ["original", "exponential"])
def test_a_length_that_a_norm_undoes_is_not_trained(reparam):
    """Under DNP the gradient of γ_b's β is zero up to ε, and Adam would move it by rounding."""
    for placement in PLACEMENTS:
        m = ScaledLinear((4, 6), placement, reparam=reparam)
        undone = PLACEMENTS[placement].undoes_factor
        assert m.scale_in is None or torch.is_tensor(m.scale_in.beta) != undone
        assert m.scale_out is None or torch.is_tensor(m.scale_out.beta)


def test_a_shared_vector_keeps_the_length_that_one_map_needs():
    """Who shares: test_model.test_scale_vectors_and_their_roles."""
    for placements, trained in ((("dual_norm", "input"), True), (["dual_norm"] * 2, False)):
        maps = [scaled_linear((4, 6), placement, reparam="original") for placement in placements]
        norm = PreNorm(maps)
        assert torch.is_tensor(norm.scale.beta) == trained
        assert not any(m.scale_in for m in maps)


def test_dnp_undoes_the_pre_norm():
    """Without the Pre-Norm the model is that of eq. 7, with its ε in both norms: to a relative 1e-6
    in float64 at residual streams of three sizes, and exactly as ε goes to 0."""
    m = scaled_linear((4, 6), "dual_norm")
    for size in (0.02, 1.0, 50.0):
        x = size * random(50, 6)
        for eps, tolerance in ((1e-6, 1e-6), (1e-30, 1e-14)):
            m.eps = eps
            expected = reference.linear(m, reference.norm(x, eps), eps)
            found = m(PreNorm([m], shared=False, eps=eps)(x))
            assert (found - expected).norm() < tolerance * expected.norm()
    for other in (name for name, p in PLACEMENTS.items() if not p.undoes_factor):
        norm = PreNorm([m, scaled_linear((4, 6), other)], shared=False, eps=0.1)
        close(norm(x), rms_norm(x, 0.1))


def test_scaling_rounds_the_product_only():
    """Near 1 a bfloat16 is as coarse as one step of Adam."""
    x, gamma = random(4).bfloat16(), 1 + 2 ** -9 * torch.arange(4.0)
    assert torch.equal(scale(x, gamma), (x.float() * gamma).bfloat16())


def test_refusals():
    """A γ that cannot be shared; a map of two norms, of which the second would fold in again what
    the first has taken; a γ_a of fewer channels, whose heads nobody names."""
    q, k, v = (ScaledLinear((5, 6), placement) for placement in ("input", "after", "dual"))
    other = ScaledLinear((5, 6), "input", reparam="original")
    for maps in ([q, k, v], [q, other]):
        with pytest.raises(ValueError, match="share a γ_b all must have one, written in"):
            PreNorm(maps)
    assert PreNorm([q, k]).scale is None and q.scale_in and not k.scale_in
    model = torch.nn.ModuleDict({"q": q, "a": PreNorm([q]), "b": PreNorm([q])})
    with pytest.raises(ValueError, match="^b has a map that another norm has"):
        fold_scale_vectors(model)
    o, v = ScaledLinear((6, 8), None), ScaledLinear((4, 6), "dual_norm", norm_width=2)
    for head_dim in (None, 3):
        with pytest.raises(ValueError, match="8 inputs cannot absorb γ_a of 4 channels: give"):
            o.absorb(v, head_dim=head_dim)


@pytest.mark.parametrize("replaced", ["q", "v", "o"])
def test_a_map_that_is_replaced_leaves_no_vector_behind(replaced):
    """q reads a norm's γ with k; o applies v's γ_a."""
    model = torch.nn.ModuleDict({name: ScaledLinear((6, 6), "input") for name in "qk"})
    model.update({"v": ScaledLinear((6, 6), "dual_norm"), "o": ScaledLinear((6, 6), None)})
    model["norm"] = PreNorm([model["q"], model["k"]])
    model["o"].absorb(model["v"])
    weight_decay_groups(model, 0.1, "all")
    model[replaced] = ScaledLinear((6, 6), "input")
    user = {"q": "norm", "v": "o", "o": "v"}[replaced]
    for use in (fold_scale_vectors, lambda model: weight_decay_groups(model, 0.1, "all")):
        with pytest.raises(ValueError, match=f"^{user} relies on a map that was replaced"):
            use(model)


def test_who_can_absorb():
    """Nobody twice, and the last one only; not a tied weight. A norm of a tied map keeps its γ."""
    v = scaled_linear((6, 4), "dual_norm")
    old, new, tied = (scaled_linear((3, 6), None, tied=name == "tied")
                      for name in ("old", "new", "tied"))
    for o in (old, new, new, tied):
        o.absorb(v)
    x = random(5, 4)
    close(new(v(x)), reference.linear(v, x, 1e-6) @ new.weight.T)
    model = torch.nn.ModuleDict({"v": v, "new": new})
    frozen = fold_scale_vectors(model.requires_grad_(False))
    assert not any(p.requires_grad for p in frozen.parameters())
    close(frozen["new"](frozen["v"](x)), new(v(x)))
    plain, shared = scaled_linear((6, 4), "input"), scaled_linear((6, 4), "input", tied=True)
    assert plain.init_std == 0.5 and not PreNorm([plain, shared]).scale.absorbable


def test_folding_maps_that_share_a_weight():
    model = torch.nn.ModuleList([scaled_linear((4, 6), "dual"), scaled_linear((4, 6), "dual")])
    model[1].weight = model[0].weight
    model[1].scale_in.alpha.data += 1
    for folded, m in zip(fold_scale_vectors(model), model):
        close(folded(random(3, 6)), m(random(3, 6)))


def test_folding_keeps_the_weights_type():
    """Of bfloat16 weights with float32 vectors too."""
    m = scaled_linear((4, 6), "dual").float()
    m.weight.data = m.weight.data.bfloat16()
    folded, = fold_scale_vectors(torch.nn.ModuleList([m]))
    assert torch.equal(folded.weight, m.effective_weight().bfloat16())


def test_no_gamma_computed_in_a_batch_stays_after_an_error():
    """Values and gradients: test_model and test_every_entry."""
    vector = ScaleVector((5,), True, True, "original")
    with pytest.raises(ZeroDivisionError), gammas_in_batches([vector]):
        torch.nn.init.constant_(vector.beta, 2)
        assert (vector() == 1).all()
        raise ZeroDivisionError
    assert (vector() == 2).all()


# ---- the head by its Gram matrix -----------------------------------------------------------------

@pytest.mark.parametrize("placement", ["dual_norm", "after_norm"])
@pytest.mark.parametrize("reparam", REPARAMS)
def test_the_gram_way_is_the_same_function(placement, reparam):
    """In float64, in value and every gradient; few rows go the direct way, and so do heads."""
    m = scaled_linear((160, 8), placement, reparam=reparam, eps=0.1)
    x = random(2, 20, 8).requires_grad_()
    probe = random(2, 20, 160)
    found, direct = by_gram(m, x), m(x)
    close(found, direct)
    wanted = [x, *m.parameters()]
    for a, b in zip(*(torch.autograd.grad((y * probe).sum(), wanted) for y in (found, direct))):
        close(a, b, 1e-11)
    assert torch.equal(apply_wide(m, x), found) and torch.equal(apply_wide(m, x[0]), m(x[0]))
    assert not torch.equal(found, direct)  # they are two ways
    # second derivatives, and a map whose γ_a another one applies
    slopes = [torch.autograd.grad((y * probe).sum(), x, create_graph=True)[0]
              for y in (by_gram(m, x), m(x))]
    for a, b in zip(*(torch.autograd.grad((g * x).sum(), wanted) for g in slopes)):
        close(a, b, 1e-10)
    scaled_linear((3, 160), None).absorb(m)
    close(by_gram(m, x), m(x))
    m.norm_width = 16
    assert torch.equal(apply_wide(m, x), m(x))


@torch.no_grad()
@pytest.mark.parametrize("size", [0, 1, 10, 100])  # of x along a direction that W annihilates
def test_the_gram_way_rounds_like_a_llamas_head(size):
    """The worst row of logits against float64: in bfloat16 no worse than half more than that of
    W Norm(x), whose x is rounded as well. In float32 the squares that cancel show besides."""
    W, nothing = random(512, 64) / 8, torch.nn.functional.normalize(random(64, seed=1), dim=0)
    m = ScaledLinear((512, 64), "dual_norm", eps=1e-12).double()
    m.weight.data = W - torch.outer(W @ nothing, nothing)
    m.scale_out.alpha.data += random(512).tanh() / 2
    x = random(512, 64, seed=2) + size * 8 * nothing
    rounded = ScaledLinear((512, 64), "dual_norm", eps=1e-12)
    rounded.load_state_dict(m.state_dict())

    def worst(found, expected):
        return ((found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max()

    for dtype in (torch.float32, torch.bfloat16):
        plain = rms_norm(x.to(dtype)) @ rounded.effective_weight().to(dtype).T
        plain = worst(plain, rms_norm(x) @ m.effective_weight().T)
        cancelled = 2 ** -23 * size ** 2 if dtype == torch.float32 else 0
        assert worst(by_gram(rounded, x.to(dtype)), m(x)) < 1.5 * plain + cancelled


def test_the_gram_matrix_is_wide_and_its_form_never_negative():
    """Under autocast products would be bfloat16. An x that W annihilates has the length 0. float16
    would overflow without the mean."""
    x, W = random(300, 8).float(), random(160, 8, seed=3).float()
    expected = (x @ W.T).square().mean(-1, keepdim=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(MeanSquare.apply(x, W), expected, rtol=1e-5, atol=0)
    large = MeanSquare.apply((x / 100).half(), (100 * W).half())
    torch.testing.assert_close(large, expected, rtol=0.01, atol=0)
    nothing = torch.nn.functional.normalize(random(8, seed=4), dim=0).float()
    W -= torch.outer(W @ nothing, nothing)
    x = 1000 * random(300).float()[:, None] * nothing
    assert ((x @ W.T @ W) * x).sum(-1).min() < 0  # rounding alone
    assert MeanSquare.apply(x, W).min() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_wide_product_on_cuda_is_float32(dtype):
    """Also of a transposed matrix, and of an odd width: W̃ᵀW̃ under autocast."""
    W, x = random(161, 32).to(dtype), random(161, 24, seed=1).to(dtype)
    with torch.autocast("cuda", torch.bfloat16):
        found = wide_product(W.cuda().mT, x.cuda())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), W.mT.float() @ x.float(), rtol=1e-5, atol=1e-4)


def test_weight_decay_groups_of_any_model():
    """A model that is not ours: matrices decay, biases and numbers do not, scale vectors by the
    policy."""
    model = torch.nn.ModuleDict({
        "embed": torch.nn.Embedding(5, 6), "norm": torch.nn.LayerNorm(6),
        "blocks": torch.nn.ModuleList([torch.nn.ModuleDict(
            {"proj": ScaledLinear((4, 6), "dual_norm", reparam="original")})]),
        "out": OutputNorm(4)})
    model.temperature = torch.nn.Parameter(torch.ones(()))

    def groups(policy):
        found = weight_decay_groups(model, 0.1, policy)
        assert sum(len(group["params"]) for group in found) == len(list(model.parameters()))
        return {name: group["weight_decay"] for group in found for name, _ in group["params"]}

    rest = {"embed.weight": 0.1, "norm.weight": 0.0, "norm.bias": 0.0, "blocks.0.proj.weight": 0.1,
            "temperature": 0.0}
    vectors = ("blocks.0.proj.scale_in.alpha", "blocks.0.proj.scale_out.alpha",
               "blocks.0.proj.scale_out.beta", "out.scale.alpha")
    assert groups("input_norm") == rest | dict.fromkeys(vectors, 0.0) | {vectors[0]: 0.1}
    only_beta = groups(lambda name, vector: name.endswith("beta"))
    assert only_beta == rest | dict.fromkeys(vectors, 0.0) | {vectors[2]: 0.1}
