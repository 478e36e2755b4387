"""
Proves that every scale-vector variant is its formula: each against a plain float64 computation
written another way, gradients against autograd, and every claim of absorbability by folding.
"""
import math

import pytest
import torch
from conftest import MIXTURE, PAPER_PLACEMENTS, UNIFIED, randomize_scales, tiny_batch, tiny_gpt
from torch.nn import functional as F

from norms import (
    PLACEMENTS,
    REPARAMS,
    OutputNorm,
    Routing,
    ScaledLinear,
    ScaleVector,
    cached_scale_vectors,
    compute_scale_vectors,
    exponential_reparam,
    fold_scale_vectors,
    fused,
    named_scale_vectors,
    original_reparam,
    per_row,
    pre_norm,
    product,
    rms_norm,
    scale_weight,
    share_input_scale,
    weight_decay_groups,
    zero_centered_reparam,
)


def random(*shape, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=draw, dtype=dtype)


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
    rows = [row / (sum(v * v for v in row) / 8 + 1e-3) ** 0.5 for row in x.view(-1, 8)]
    close(rms_norm(x, 1e-3), torch.stack(rows).view_as(x))
    close(rms_norm(x, 0.0), math.sqrt(8) * x / x.norm(dim=-1, keepdim=True))  # eq. 1


def preconditioner(function, beta, alpha):
    """P of dγ/dt = -P ∇γ under gradient flow of α and β (section 3.4), by autograd."""
    J_beta, J_alpha = torch.autograd.functional.jacobian(function, (beta, alpha))
    return J_beta @ J_beta.T + J_alpha @ J_alpha.T


def test_original_reparam():
    """OR: eq. 8, the length it promises, and P = d γ̂γ̂ᵀ + ρ (I - γ̂γ̂ᵀ), ρ = β² d/‖α‖²."""
    alpha, beta = random(6), torch.tensor([0.7], dtype=torch.float64)
    gamma = original_reparam(beta, alpha)
    close(gamma, 0.7 * 6 ** 0.5 * alpha / sum(a * a for a in alpha) ** 0.5)
    close(gamma.norm().item(), 0.7 * 6 ** 0.5)
    close(original_reparam(beta, 5 * alpha), gamma)
    unit, eye = gamma / gamma.norm(), torch.eye(6, dtype=torch.float64)
    along, rho = torch.outer(unit, unit), 0.49 * 6 / (alpha @ alpha)
    close(preconditioner(original_reparam, beta, alpha), 6 * along + rho * (eye - along))


def test_exponential_reparam():
    """ER: eq. 9, positive throughout, and P = γγᵀ + D (I - 11ᵀ/d) D with D = diag(γ)."""
    alpha, beta = random(6), torch.tensor([0.3], dtype=torch.float64)
    gamma, mean = exponential_reparam(beta, alpha), sum(alpha.tolist()) / 6
    for a, found in zip(alpha.tolist(), gamma.tolist()):
        close(found, math.exp(0.3 + a - mean))
    close(exponential_reparam(beta, alpha + 2), gamma)
    close(gamma.log().mean().item(), 0.3)  # β is the mean of log γ
    D, centre = torch.diag(gamma), torch.eye(6, dtype=torch.float64) - 1 / 6
    expected = torch.outer(gamma, gamma) + D @ centre @ D
    close(preconditioner(exponential_reparam, beta, alpha), expected)


def test_zero_centered_reparam():
    close(zero_centered_reparam(random(4)), random(4) + torch.ones(4))


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
@pytest.mark.parametrize("reparam", REPARAMS)
def test_scale_vector(reparam, shape):
    """γ = 1 at the start however it is written, and each expert's vector is its own."""
    vector = ScaleVector(shape, input_norm=True, absorbable=True, reparam=reparam)
    assert torch.equal(vector(), torch.ones(shape))
    has_beta = REPARAMS[reparam].beta is not None
    names = {name: p.shape for name, p in vector.named_parameters()}
    assert names == {"alpha": shape} | ({"beta": (*shape[:-1], 1)} if has_beta else {})
    for i, p in enumerate(vector.parameters()):
        p.data += 0.3 * random(*p.shape, seed=i).to(p)
    if len(shape) == 2:
        one = ScaleVector((5,), True, True, reparam)
        one.load_state_dict({name: p[1] for name, p in vector.state_dict().items()})
        close(vector()[1], one(), 1e-7)


def test_a_length_that_a_norm_undoes_is_not_trained():
    """Under DNP the gradient of γ_b's β is zero up to ε, and Adam would move it by rounding."""
    for placement in PLACEMENTS:
        m = ScaledLinear((4, 6), placement, reparam="original")
        undone = PLACEMENTS[placement].undoes_factor
        assert m.scale_in is None or torch.is_tensor(m.scale_in.beta) != undone
        assert m.scale_out is None or torch.is_tensor(m.scale_out.beta)
    m, x = scaled_linear((4, 6), "dual_norm", reparam="original", eps=1e-30), random(5, 6)
    m.scale_in.beta = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad((m(x) * random(5, 4)).sum(), m.scale_in.beta)
    assert gradient.abs() < 1e-14


def test_scale_weight():
    W, v, u = random(4, 6), random(6), random(4)
    close(scale_weight(W, v, u), torch.diag(u) @ W @ torch.diag(v))
    close(scale_weight(W, v, u), W * torch.outer(u, v))  # table 1
    close(scale_weight(W, v), W @ torch.diag(v))
    assert scale_weight(W) is W
    stack, V, U = random(2, 4, 6), random(2, 6), random(2, 4)
    close(scale_weight(stack, v, u)[1], torch.diag(u) @ stack[1] @ torch.diag(v))
    close(scale_weight(stack, V, U)[1], torch.diag(U[1]) @ stack[1] @ torch.diag(V[1]))


def test_input_placement():
    m, x = scaled_linear((4, 6), "input"), random(2, 3, 6)
    close(m(x), torch.einsum("md,d,btd->btm", m.weight, m.scale_in(), x))
    assert m.scale_out is None
    bare = scaled_linear((4, 6), None)
    close(bare(x), torch.einsum("md,btd->btm", bare.weight, x))


def test_after_placement():
    m, x = scaled_linear((4, 6), "after"), random(2, 3, 6)
    close(m(x), torch.einsum("m,md,btd->btm", m.scale_out(), m.weight, x))
    assert m.scale_in is None


def test_dual_placement():
    m, x = scaled_linear((4, 6), "dual"), random(2, 3, 6)
    close(m(x), torch.einsum("m,md,d,btd->btm", m.scale_out(), m.weight, m.scale_in(), x))


@pytest.mark.parametrize("width", [None, 4])
def test_dual_norm_placement(width):
    """Norm over the whole output, or over each head."""
    m, x = scaled_linear((8, 6), "dual_norm", norm_width=width, eps=0.1), random(2, 3, 6)
    z = torch.einsum("md,d,btd->btm", m.weight, m.scale_in(), x)
    u, width = m.scale_out(), width or 8
    for start in range(0, 8, width):
        part = slice(start, start + width)
        rms = (z[..., part].square().mean(-1, keepdim=True) + 0.1).sqrt()
        close(m(x)[..., part], u[part] * z[..., part] / rms)
    without = scaled_linear((8, 6), "dual_norm", vectors=False)
    assert [name for name, _ in without.named_parameters()] == ["weight"]
    close(without(x).square().mean(-1), torch.ones(2, 3, dtype=torch.float64), 1e-5)


def test_output_norm():
    norm, z = OutputNorm(6, eps=1e-3).double(), random(2, 6)
    norm.scale.alpha.data += random(6)
    close(norm(z), norm.scale() * z / (z.square().mean(-1, keepdim=True) + 1e-3).sqrt())
    assert not norm.scale.input_norm and not norm.scale.absorbable
    assert not list(OutputNorm(6, vectors=False).parameters())


def test_sharing_a_scale_vector_is_the_difference_to_hg():
    """The standard form has one γ for all maps that read a Norm, HG (eq. 4) one for each."""
    def maps(*placements):
        return [scaled_linear((4, 6), p, reparam="original") for p in placements]
    q, k, v = maps("input", "input", "input")
    x = random(5, 6)
    own = [m.scale_in for m in (q, k, v)]
    assert len(set(own)) == 3
    share_input_scale([q, k, v])
    assert q.scale_in is k.scale_in is v.scale_in is own[0]
    for m, y in zip((q, k, v), fused(x, (q, k, v))):
        close(y, (own[0]() * x) @ m.weight.T)
    assert len({name for m in (q, k, v) for name in m.state_dict()}) == 3  # weight, alpha, beta
    assert [len(m.state_dict()) for m in (q, k, v)] == [3, 1, 1]

    q, k, v = maps("dual_norm", "after", "input")  # one that needs γ's length keeps it for all
    share_input_scale([q, k, v])
    assert k.scale_in is None and q.scale_in is v.scale_in
    assert torch.is_tensor(q.scale_in.beta)


@pytest.mark.parametrize("shared", [True, False])
def test_fused_is_each_map_by_itself(shared):
    maps = [scaled_linear((m, 6), p) for m in (4, 3) for p in (*PLACEMENTS, None)]
    if shared:
        share_input_scale(maps)
    x = random(5, 6)
    for m, y in zip(maps, fused(x, maps)):
        close(y, m.output(x @ m.effective_weight().T))


def test_stacks_of_experts():
    """Rows sorted by expert meet their expert's matrix and vectors, also where one has no rows."""
    x, U = random(3, 6), random(2, 4).requires_grad_()
    for counts in ((2, 1), (0, 3), (3, 0)):
        expert = torch.arange(2).repeat_interleave(torch.tensor(counts))
        routing = Routing(expert, torch.tensor(counts).cumsum(0).int())
        W = random(2, 4, 6)
        first, second = x[:counts[0]] @ W[0].T, x[counts[0]:] @ W[1].T
        close(product(x, W, routing), torch.cat([first, second]))
        for placement in PAPER_PLACEMENTS:
            m = scaled_linear((2, 4, 6), placement)
            v = m.scale_in() if m.scale_in else torch.ones(2, 6)
            y = torch.einsum("nmd,nd,nd->nm", m.weight[expert], v[expert], x)
            y = rms_norm(y) if placement == "dual_norm" else y
            close(m(x, routing), y * (m.scale_out()[expert] if m.scale_out else 1))
        close(per_row(U, routing), U[expert], 0)
    found, expected = ((gamma * random(3, 4)).sum() for gamma in (per_row(U, routing), U[expert]))
    close(*(torch.autograd.grad(y, U)[0] for y in (found, expected)))


def test_padded_copies_change_nothing():
    """A product in bfloat16 may append zero channels; the map that reads them ignores them."""
    m, x = scaled_linear((7, 6), "input"), random(3, 6).bfloat16()
    [y] = fused(x, [m], pad=True)
    assert y.shape == (3, 8) and (y[:, 7:] == 0).all()
    torch.testing.assert_close(y[:, :7], m(x))
    reader = scaled_linear((4, 7), "input")
    torch.testing.assert_close(reader(y), reader(y[:, :7]))
    m, z = scaled_linear((7, 6), "dual_norm"), random(3, 7)
    close(m.output(F.pad(z, (0, 1))), F.pad(m.output(z), (0, 1)), 2e-14)


def test_dnp_undoes_the_pre_norm():
    """Without the Pre-Norm the model is that of eq. 7, with its ε in both norms: to a relative 1e-6
    in float64 at residual streams of three sizes, and exactly as ε goes to 0."""
    m = scaled_linear((4, 6), "dual_norm")
    for size in (0.02, 1.0, 50.0):
        x = size * random(50, 6)
        for eps, tolerance in ((1e-6, 1e-6), (1e-30, 1e-14)):
            m.eps = eps ** 2
            found, y = m(pre_norm(x, [m], eps)), rms_norm(x, eps) @ m.effective_weight().T
            expected = m.scale_out() * rms_norm(y, eps)
            assert (found - expected).norm() < tolerance * expected.norm()
    others = [scaled_linear((4, 6), name) for name, p in PLACEMENTS.items() if not p.undoes_factor]
    for m in others:
        close(pre_norm(x, [m, scaled_linear((4, 6), "dual_norm")]), rms_norm(x))


def test_folding():
    """γ_b goes into the weight, and DNP's γ_a into the map that takes it over: up's into down, that
    of a value head into every column of o that its query heads fill."""
    up, down = scaled_linear((4, 6), "input"), scaled_linear((6, 4), None)
    close(fold_scale_vectors(up).weight, up.weight * up.scale_in())
    up = scaled_linear((4, 6), "dual_norm", absorbed_by=down, reparam="original")
    folded = fold_scale_vectors(torch.nn.ModuleList([up, down]))
    close(folded[1].weight, down.weight * up.scale_out())
    x = random(3, 6)
    close(folded[0](x), rms_norm(x @ (up.weight * up.scale_in()).T))
    assert not named_scale_vectors(folded)

    o = scaled_linear((8, 8), None)  # four query heads of width 2, two value heads
    v = scaled_linear((4, 6), "dual_norm", norm_width=2, absorbed_by=o)
    a, b, c, d = v.scale_out().tolist()
    repeated = torch.tensor([a, b, a, b, c, d, c, d], dtype=torch.float64)
    close(o.effective_weight(), o.weight * repeated)


def test_roles():
    """(absorbable, input_norm) of each kind of vector: the paper's roles, and our criterion."""
    both, output, neither = (True, True), (True, False), (False, False)
    reads_a_norm = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up", "head")
    maps = (*reads_a_norm, "attn.o", "mlp.down")
    everywhere = {"scale_placement_on": "q,k,v,gate,up,head,o,down"}
    hg = {"scale_heterogeneous": True}

    def kinds(**keys):
        vectors = named_scale_vectors(tiny_gpt(n_layer=1, **keys))
        return {name.removeprefix("layers.0."): (vector.absorbable, vector.input_norm)
                for name, vector in vectors}

    def inputs(names, kind):
        return {f"{name}.scale_in": kind for name in names}

    def outputs(names, kind):
        return {f"{name}.scale_out": kind for name in names}

    assert kinds() == inputs(("attn.q", "mlp.gate", "head"), both)
    assert kinds(scale_placement="after", **everywhere) == outputs(maps, output)
    dual = kinds(scale_placement="dual", **everywhere, **hg)
    assert dual == inputs(maps, both) | outputs(maps, output)
    dnp = kinds(scale_placement="dual_norm", **hg)
    absorbed = outputs(("attn.v", "mlp.up"), output)
    assert dnp == inputs(reads_a_norm, both) | outputs(reads_a_norm, neither) | absorbed
    some = kinds(scale_placement="dual", scale_placement_on="q,o", **hg)
    dual_on = outputs(("attn.q", "attn.o"), output)
    assert some == inputs((*reads_a_norm, "attn.o"), both) | dual_on
    found = kinds(qk_norm=True, post_norm=True)
    norms = ("attn.q_norm", "attn.k_norm", "attn_post_norm", "mlp_post_norm")
    assert found == kinds() | {f"{name}.scale": neither for name in norms}
    assert kinds(tie_embeddings=True)["head.scale_in"] == (False, True)  # the table feeds layer 0


@pytest.mark.parametrize("keys", [UNIFIED, {**UNIFIED, **MIXTURE, "scale_reparam": "exponential"}],
                         ids=["dense", "mixture"])
def test_all_scale_vectors_at_once_are_each_by_itself(keys, monkeypatch):
    """compute_scale_vectors, with and without recomputed blocks, in value and gradient; nothing
    stays cached after the forward pass, also after one that fails."""
    def gradients(model):
        model.zero_grad()
        (model(*tiny_batch())[1] + model.auxiliary_loss()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    model = randomize_scales(tiny_gpt(torch.float64, **keys))
    vectors = [vector for _, vector in named_scale_vectors(model)]
    alone, computed = [vector().detach() for vector in vectors], compute_scale_vectors(model)
    with cached_scale_vectors(computed):
        for vector, gamma in zip(vectors, alone):
            close(vector(), gamma, 1e-15)
            assert any(vector() is gamma for _, gamma in computed)
    together, model.config.recompute = gradients(model), True
    recomputed = gradients(model)
    monkeypatch.setattr("model.compute_scale_vectors", lambda model: [])
    for name, gradient in gradients(model).items():
        close(together[name], gradient, 1e-13)
        close(recomputed[name], gradient, 1e-13)
    with pytest.raises(ZeroDivisionError), cached_scale_vectors(computed):
        raise ZeroDivisionError
    assert all(vector.cached is None for vector in vectors)


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
