"""
Proves that each map with its scale vectors is its formula (tests/reference.py) in float64, for one
weight and for a stack of experts; that maps share a γ or have their own; that a Pre-Norm before DNP
can be left out; and that weight decay finds the vectors of any model.
"""
import itertools

import pytest
import reference
import torch
from conftest import PAPER_PLACEMENTS

from norms import (
    PLACEMENTS, REPARAMS, OutputNorm, Routing, ScaledLinear, ScaleVector, cached_scale_vectors,
    fold_scale_vectors, fused, pre_norm, rms_norm, scale, share_input_scale, weight_decay_groups)


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


def test_rms_norm():
    x = random(3, 5, 8)
    close(rms_norm(x, 1e-3), reference.norm(x, 1e-3))
    close(rms_norm(x, 0.0), 8 ** 0.5 * x / x.norm(dim=-1, keepdim=True))  # eq. 1


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


@pytest.mark.parametrize("placement", [*PAPER_PLACEMENTS, None])
def test_placement(placement):
    """Whole and, under DNP, by heads of 4; and rows that are sorted by expert, each by its expert's
    matrix and vectors, also where one has no rows."""
    x = random(3, 6)
    for width, vectors in itertools.product((None, 4), (True, False)):
        m = scaled_linear((8, 6), placement, vectors=vectors, norm_width=width, eps=0.1)
        assert vectors or [name for name, _ in m.named_parameters()] == ["weight"]
        close(m(x), reference.linear(m, x, 0.1, width=width))
    m = scaled_linear((2, 4, 6), placement, eps=0.1)
    for counts in ((2, 1), (0, 3), (3, 0)):
        counts = torch.tensor(counts)
        routing = Routing(torch.arange(2).repeat_interleave(counts), counts.cumsum(0).int())
        rows = x.split(counts.tolist())
        parts = [reference.linear(m, part, 0.1, e) for e, part in enumerate(rows)]
        close(m(x, routing), torch.cat(parts))


@pytest.mark.parametrize("reparam", ["original", "exponential"])
def test_a_length_that_a_norm_undoes_is_not_trained(reparam):
    """Under DNP the gradient of γ_b's β is zero up to ε, and Adam would move it by rounding."""
    for placement in PLACEMENTS:
        m = ScaledLinear((4, 6), placement, reparam=reparam)
        undone = PLACEMENTS[placement].undoes_factor
        assert m.scale_in is None or torch.is_tensor(m.scale_in.beta) != undone
        assert m.scale_out is None or torch.is_tensor(m.scale_out.beta)


def test_maps_that_share_a_vector_keep_the_length_that_one_of_them_needs():
    """Who shares: test_model.test_scale_vectors_and_their_roles."""
    q, k, v = (scaled_linear((4, 6), placement, reparam="original")
               for placement in ("dual_norm", "after", "input"))
    share_input_scale([q, k, v])
    assert k.scale_in is None and q.scale_in is v.scale_in and torch.is_tensor(q.scale_in.beta)
    assert [len(m.state_dict()) for m in (q, k, v)] == [5, 3, 1]  # it has one name, q's


def test_dnp_undoes_the_pre_norm():
    """Without the Pre-Norm the model is that of eq. 7, with its ε in both norms: to a relative 1e-6
    in float64 at residual streams of three sizes, and exactly as ε goes to 0."""
    m = scaled_linear((4, 6), "dual_norm")
    for size in (0.02, 1.0, 50.0):
        x = size * random(50, 6)
        for eps, tolerance in ((1e-6, 1e-6), (1e-30, 1e-14)):
            m.eps = eps
            expected = reference.linear(m, reference.norm(x, eps), eps)
            m.eps = eps ** 2
            found = m(pre_norm(x, [m], eps))
            assert (found - expected).norm() < tolerance * expected.norm()
    for other in (name for name, p in PLACEMENTS.items() if not p.undoes_factor):
        close(pre_norm(x, [m, scaled_linear((4, 6), other)]), rms_norm(x))


def test_scaling_rounds_the_product_only():
    """Near 1 a bfloat16 is as coarse as one step of Adam."""
    x, gamma = random(4).bfloat16(), 1 + 2 ** -9 * torch.arange(4.0)
    assert torch.equal(scale(x, gamma), (x.float() * gamma).bfloat16())


def test_refusals():
    """An input of another width, of one map or of several; a γ that cannot be shared; a norm over
    heads after zeros were appended."""
    x, (a, b) = torch.ones(2, 8), (ScaledLinear((5, 6), "dual_norm") for _ in range(2))
    for read in (a, lambda x: fused(x, [a, b]), ScaledLinear((5, 6), None), OutputNorm(6)):
        for wrong in (x, x[:, :4], x[:, :7].bfloat16()):
            with pytest.raises(ValueError, match=f"has {wrong.size(-1)} channels, and 6 are"):
                read(wrong)
    for other in (ScaledLinear((5, 4), "input"), ScaledLinear((5, 6), "input", reparam="original")):
        with pytest.raises(ValueError, match="must read equal widths"):
            share_input_scale([ScaledLinear((5, 6), "input"), other])
    with pytest.raises(ValueError, match="give pad=False"):
        fused(x[:, :6].bfloat16(), [ScaledLinear((10, 6), "dual_norm", norm_width=5)], pad=True)


@pytest.mark.parametrize("replaced", ["q", "v"])
def test_a_map_that_is_replaced_leaves_no_vector_behind(replaced):
    """q has the γ that k and v read; o applies v's γ_a."""
    o = ScaledLinear((6, 6), None)
    maps = {name: ScaledLinear((6, 6), "input") for name in "qk"}
    maps |= {"v": ScaledLinear((6, 6), "dual_norm", absorbed_by=o), "o": o}
    share_input_scale([maps["q"], maps["k"]])
    model = torch.nn.ModuleDict(maps)
    weight_decay_groups(model, 0.1, "all")
    model[replaced] = ScaledLinear((6, 6), "input")
    for use in (fold_scale_vectors, lambda model: weight_decay_groups(model, 0.1, "all")):
        with pytest.raises(ValueError, match=f"^{'k' if replaced == 'q' else 'o'} uses a scale"):
            use(model)


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


def test_nothing_stays_cached_after_an_error():
    vector = ScaleVector((5,), True, True, "original")
    with pytest.raises(ZeroDivisionError), cached_scale_vectors([(vector, 2 * torch.ones(5))]):
        assert (vector() == 2).all()
        raise ZeroDivisionError
    assert (vector() == 1).all()


def test_weight_decay_groups_of_any_model():
    """A model that is not ours: matrices decay, biases do not, scale vectors by the policy."""
    model = torch.nn.ModuleDict({
        "embed": torch.nn.Embedding(5, 6), "norm": torch.nn.LayerNorm(6),
        "blocks": torch.nn.ModuleList([torch.nn.ModuleDict(
            {"proj": ScaledLinear((4, 6), "dual_norm", reparam="original")})]),
        "out": OutputNorm(4)})

    def groups(policy):
        found = weight_decay_groups(model, 0.1, policy)
        assert sum(len(group["params"]) for group in found) == len(list(model.parameters()))
        return {name: group["weight_decay"] for group in found for name, _ in group["params"]}

    rest = {"embed.weight": 0.1, "norm.weight": 0.0, "norm.bias": 0.0, "blocks.0.proj.weight": 0.1}
    vectors = ("blocks.0.proj.scale_in.alpha", "blocks.0.proj.scale_out.alpha",
               "blocks.0.proj.scale_out.beta", "out.scale.alpha")
    assert groups("input_norm") == rest | dict.fromkeys(vectors, 0.0) | {vectors[0]: 0.1}
    only_beta = groups(lambda name, vector: name.endswith("beta"))
    assert only_beta == rest | dict.fromkeys(vectors, 0.0) | {vectors[2]: 0.1}
