"""
Proves that every scale-vector variant is its formula: each function against a plain float64 computation written another
way, gradients against autograd, and every claim of absorbability by folding.
"""
import itertools
import math

import pytest
import torch
from conftest import randomize_scales, tiny_batch, tiny_gpt

from norms import (
    EXECUTIONS,
    PLACEMENTS,
    REPARAMS,
    OutputNorm,
    Rows,
    ScaledLinear,
    ScaleVector,
    after_placement,
    branch_scale_vectors,
    dual_norm_placement,
    dual_placement,
    exponential_reparam,
    fold_scale_vectors,
    input_placement,
    linear,
    named_scale_vectors,
    original_reparam,
    output_norm,
    rms_norm,
    scale_activation,
    scale_weight,
    zero_centered_reparam,
)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_rms_norm():
    x = random(3, 5, 8)
    expected = torch.stack([row / (sum(v * v for v in row) / 8 + 1e-3) ** 0.5 for row in x.view(-1, 8)]).view_as(x)
    close(rms_norm(x, 1e-3), expected)
    close(rms_norm(x, 0.0), math.sqrt(8) * x / x.norm(dim=-1, keepdim=True))  # eq. 1
    padded = torch.nn.functional.pad(x, (0, 5))
    close(rms_norm(padded, 1e-3, width=8)[..., :8], expected, 2e-14)


def test_original_reparam():
    """OR: the value of eq. 8, the length it promises, and -P ∇γ with P = d γ̂γ̂ᵀ + ρ (I - γ̂γ̂ᵀ), ρ = β² d/‖α‖², against autograd."""
    beta, alpha = torch.tensor([0.7], dtype=torch.float64), random(6)
    gamma = original_reparam(beta, alpha)
    close(gamma, 0.7 * 6 ** 0.5 * alpha / sum(a * a for a in alpha) ** 0.5)
    close(gamma.norm(), torch.tensor(0.7 * 6 ** 0.5, dtype=torch.float64))
    close(original_reparam(beta, 5 * alpha), gamma)
    J_beta, J_alpha = torch.autograd.functional.jacobian(original_reparam, (beta, alpha))
    unit, eye = gamma / gamma.norm(), torch.eye(6, dtype=torch.float64)
    rho = 0.49 * 6 / (alpha @ alpha)
    close(J_beta @ J_beta.T + J_alpha @ J_alpha.T, 6 * torch.outer(unit, unit) + rho * (eye - torch.outer(unit, unit)))


def test_exponential_reparam():
    """ER: the value of eq. 9, positive throughout, and P = γγᵀ + D (I - 11ᵀ/d) D with D = diag(γ)."""
    beta, alpha = torch.tensor([0.3], dtype=torch.float64), random(6)
    gamma = exponential_reparam(beta, alpha)
    close(gamma, torch.tensor([math.exp(0.3 + a - sum(alpha.tolist()) / 6) for a in alpha.tolist()], dtype=torch.float64))
    close(exponential_reparam(beta, alpha + 2), gamma)
    close(gamma.log().mean(), torch.tensor(0.3, dtype=torch.float64))  # β is the mean of log γ
    J_beta, J_alpha = torch.autograd.functional.jacobian(exponential_reparam, (beta, alpha))
    D, centre = torch.diag(gamma), torch.eye(6, dtype=torch.float64) - 1 / 6
    close(J_beta @ J_beta.T + J_alpha @ J_alpha.T, torch.outer(gamma, gamma) + D @ centre @ D)


def test_zero_centered_reparam():
    close(zero_centered_reparam(random(4)), torch.tensor([1 + a for a in random(4).tolist()], dtype=torch.float64))


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
@pytest.mark.parametrize("reparam, names", [("none", {"gamma"}), ("original", {"beta", "alpha"}), ("exponential", {"beta", "alpha"}),
                                            ("zero_centered", {"alpha"})])
def test_scale_vector(reparam, names, shape):
    scale = ScaleVector(shape, input_norm=True, absorbable=True, reparam=reparam)
    assert {name for name, _ in scale.named_parameters()} == names
    assert torch.equal(scale(), torch.ones(shape))
    if "beta" in names:
        assert scale.beta.shape == (*shape[:-1], 1)
        fixed = ScaleVector(shape, True, True, reparam, magnitude=False)
        assert {name for name, _ in fixed.named_parameters()} == {"alpha"} and torch.equal(fixed(), torch.ones(shape))
    for i, p in enumerate(scale.parameters()):
        p.data += 0.3 * random(*p.shape, seed=i).to(p)
    if len(shape) == 2:  # each expert's vector stands alone
        alone = ScaleVector((5,), True, True, reparam)
        for name, p in scale.named_parameters():
            getattr(alone, name).data = p.data[1]
        close(scale()[1], alone(), 1e-7)
    plain = scale.collapse()
    assert [name for name, _ in plain.named_parameters()] == ["gamma"] and plain.absorbable and plain.input_norm
    close(plain(), scale().detach(), 0)
    with pytest.raises(ValueError, match="scale_reparam='orthodox'.*original"):
        ScaleVector((5,), True, True, "orthodox")


def test_branch_scale_vectors():
    served = []

    def make(branches):
        served.append(branches)
        return ScaleVector((4,), True, True)
    shared, reads = branch_scale_vectors(["q", "k", "v"], False, make)
    assert list(shared) == ["q_k_v"] and reads == dict.fromkeys("qkv", "q_k_v") and served == [["q", "k", "v"]]
    own, reads = branch_scale_vectors(["q", "k", "v"], True, make)
    assert reads == {"q": "q", "k": "k", "v": "v"} and served[1:] == [["q"], ["k"], ["v"]]
    assert len({id(scale) for scale in own.values()}) == 3


def test_scale_weight_and_activation():
    W, v, u, x = random(4, 6), random(6), random(4), random(3, 6)
    close(scale_weight(W, v, u), torch.diag(u) @ W @ torch.diag(v))
    close(scale_weight(W, v, u), W * torch.outer(u, v))  # table 1
    close(scale_weight(W, v), W @ torch.diag(v))
    assert scale_weight(W) is W and scale_activation(x) is x
    close(scale_activation(x, v), x @ torch.diag(v))
    stacked = random(2, 4, 6)  # one vector serves all experts, or each has its own
    close(scale_weight(stacked, v, u)[1], torch.diag(u) @ stacked[1] @ torch.diag(v))
    V, U = random(2, 6), random(2, 4)
    close(scale_weight(stacked, V, U)[1], torch.diag(U[1]) @ stacked[1] @ torch.diag(V[1]))
    rows = Rows(torch.tensor([0, 1, 1]), torch.tensor([1, 3], dtype=torch.int32))
    V.requires_grad_()
    close(scale_activation(x, V, rows), x * V[[0, 1, 1]], 0)
    close(*(torch.autograd.grad((y * x).sum(), V)[0] for y in (scale_activation(x, V, rows), x * V[[0, 1, 1]])))


def test_linear():
    x, W = random(3, 6), [random(4, 6), random(2, 6)]
    for y, W_b in zip(linear(x, W), W):
        close(y, x @ W_b.T)
    stacks = [random(2, 4, 6), random(2, 3, 6)]
    for counts in ((2, 1), (0, 3), (3, 0)):
        rows = Rows(torch.repeat_interleave(torch.arange(2), torch.tensor(counts)), torch.tensor(counts).cumsum(0).int())
        for y, W_b in zip(linear(x, stacks, rows), stacks):
            close(y, torch.cat([x[:counts[0]] @ W_b[0].T, x[counts[0]:] @ W_b[1].T]))


def test_padded_copies_change_nothing():
    """In bfloat16 rows are padded to a multiple of 8; a product that reads them pads its columns. float64 stands in through x's width."""
    x, W = random(3, 5), random(7, 5)
    close(linear(torch.nn.functional.pad(x, (0, 3)), [W])[0], x @ W.T)
    y = linear(x.bfloat16(), [W], pad=True)[0]
    assert y.shape == (3, 8) and (y[:, 7:] == 0).all() and torch.equal(y[:, :7], linear(x.bfloat16(), [W])[0])
    u, z = random(5), torch.nn.functional.pad(x, (0, 3))
    close(output_norm(z, u, width=5, eps=1e-3), torch.nn.functional.pad(output_norm(x, u, width=5, eps=1e-3), (0, 3)), 2e-14)
    for width in range(1, 9):  # a SwiGLU of any width under DNP, in the dtype that pads
        model = tiny_gpt(scale_placement="dual_norm", d_ff=width)
        full = model(tiny_batch()[0])[0]
        model.compute_dtype = torch.bfloat16
        assert (model(tiny_batch()[0])[0].float() - full).norm() < 0.03 * full.norm(), width


BRANCHES = dict(x=random(2, 3, 6), W=[random(4, 6), random(8, 6, seed=1)], v=[random(6), random(6, seed=2)],
                u=[random(4), random(8, seed=3)])


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("shared", [True, False])
def test_input_placement(execution, shared):
    x, W, v = BRANCHES["x"], BRANCHES["W"], BRANCHES["v"]
    v = [v[0], v[0]] if shared else v
    for b, y in enumerate(input_placement(x, W, v, execution=execution)):
        close(y, torch.einsum("md,d,btd->btm", W[b], v[b], x))
    for b, y in enumerate(input_placement(x, W, [None, None], execution=execution)):
        close(y, torch.einsum("md,btd->btm", W[b], x))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_after_placement(execution):
    x, W, v, u = (BRANCHES[key] for key in "xWvu")
    for b, y in enumerate(after_placement(x, W, v, u, execution=execution)):  # a vector on the input side would be left out
        close(y, torch.einsum("m,md,btd->btm", u[b], W[b], x))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_dual_placement(execution):
    x, W, v, u = (BRANCHES[key] for key in "xWvu")
    for b, y in enumerate(dual_placement(x, W, v, u, execution=execution)):
        close(y, torch.einsum("m,md,d,btd->btm", u[b], W[b], v[b], x))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_dual_norm_placement(execution):
    x, W, v, u = (BRANCHES[key] for key in "xWvu")

    for b, y in enumerate(dual_norm_placement(x, W, v, u, ([(4, 1), (4, 2)], 1e-3), execution=execution)):
        z = torch.einsum("md,d,btd->btm", W[b], v[b], x)
        for start in range(0, W[b].size(0), 4):  # group by group
            part = slice(start, start + 4)
            rms = (z[..., part].square().mean(-1, keepdim=True) + 1e-3).sqrt()
            close(y[..., part], u[b][part] * z[..., part] / rms)
    for b, y in enumerate(dual_norm_placement(x, W, v, u, None, execution=execution)):
        close(y, torch.einsum("md,d,btd->btm", W[b], v[b], x))


def test_output_norm():
    norm, z = OutputNorm(6, eps=1e-3).double(), random(2, 6)
    with torch.no_grad():
        norm.scale.gamma += random(6)
    close(norm(z), norm.scale.gamma * z / (z.square().mean(-1, keepdim=True) + 1e-3).sqrt())
    assert not norm.scale.input_norm and not norm.scale.absorbable
    assert not list(OutputNorm(6, vectors=False).parameters())


def test_scaled_linear_runs_each_branch_as_it_is_placed():
    placement = {"a": "dual", "b": "input", "c": "dual_norm", "d": None, "e": "after"}
    maps = ScaledLinear(6, {"a": (4,), "b": (3,), "c": (8,), "d": (2,), "e": (5,)}, placement, heterogeneous=True,
                        norm_width={"c": 4}, eps=1e-3).double()
    with torch.no_grad():
        for i, p in enumerate(maps.parameters()):
            p.copy_(random(*p.shape, seed=10 * i))
    x, W = random(5, 6), maps.weight
    a, b, c, d, e = maps(x)
    v, u = {n: s() for n, s in maps.scale_in.items()}, {n: s() for n, s in maps.scale_out.items()}
    assert set(v) == {"a", "b", "c"} and set(u) == {"a", "c", "e"}
    close(a, x @ (torch.diag(u["a"]) @ W["a"] @ torch.diag(v["a"])).T)
    close(b, x @ (W["b"] @ torch.diag(v["b"])).T)
    z = x @ (W["c"] @ torch.diag(v["c"])).T
    close(c, u["c"] * (z.view(5, 2, 4) / (z.view(5, 2, 4).square().mean(-1, keepdim=True) + 1e-3).sqrt()).view(5, 8))
    close(d, x @ W["d"].T)
    close(e, x @ (torch.diag(u["e"]) @ W["e"]).T)
    close(maps(x, ["d"]), d, 1e-14)
    close(maps(x, ["c"], finish=False), z)
    close(maps.finish("c", z, u["c"]), c)
    assert maps.finish("a", z) is z


def test_unknown_placement():
    with pytest.raises(ValueError, match=f"placement 'duall' of a is unknown: choose one of {', '.join(PLACEMENTS)}, or None"):
        ScaledLinear(6, {"a": (4,)}, {"a": "duall"})


def test_a_magnitude_that_a_norm_undoes_is_not_trained():
    """Under DNP the gradient of the input side's β is zero, but for the Norm's ε: Adam would move it by rounding. Where one branch
    of a shared vector has no Norm after it, β stays."""
    branches, x = {"a": (4,), "b": (8,)}, random(5, 6)
    for heterogeneous, placement, trained in ((True, "dual_norm", set()), (False, "dual_norm", set()), (True, "dual", {"a", "b"})):
        maps = ScaledLinear(6, branches, dict.fromkeys(branches, placement), heterogeneous=heterogeneous, reparam="original")
        assert {key for key, scale in maps.scale_in.items() if "beta" in dict(scale.named_parameters())} == trained
        assert all("beta" in dict(scale.named_parameters()) for scale in maps.scale_out.values())
    mixed = ScaledLinear(6, branches, {"a": "input", "b": "dual_norm"}, reparam="original")
    assert "beta" in dict(mixed.scale_in["a_b"].named_parameters())
    maps = ScaledLinear(6, {"a": (4,)}, {"a": "dual_norm"}, reparam="original", eps=0.0).double()
    with torch.no_grad():
        maps.weight["a"].copy_(random(4, 6))
        maps.scale_in["a"].alpha.copy_(random(6))
    beta = maps.scale_in["a"].beta.requires_grad_()
    assert torch.autograd.grad((maps(x) * random(5, 4)).sum(), beta)[0].abs() < 1e-14


VARIANTS = [dict(scale_heterogeneous=h, scale_placement=p, scale_placement_on=on, scale_reparam=r)
            for h, p, on, r in itertools.product((False, True), PLACEMENTS, ("q,k,v,gate,up,head", "v,up", "q,k,v,gate,up,head,o,down"),
                                                 REPARAMS)]


@pytest.mark.parametrize("extra", [{}, {"tie_embeddings": True}, {"qk_norm": True, "post_norm": True}], ids=str)
def test_folding_every_absorbable_vector_changes_nothing(extra):
    """The proof of each ScaleVector.absorbable: what claims it is gone after folding, and the logits have not moved."""
    idx = tiny_batch()[0]
    for keys in VARIANTS:
        if extra.get("qk_norm") and keys["scale_placement"] == "dual_norm":
            continue  # refused: see test_model
        model = randomize_scales(tiny_gpt(torch.float64, **keys, **extra))
        before = {name: p.clone() for name, p in model.named_parameters()}
        folded = fold_scale_vectors(model)
        close(folded(idx)[0], model(idx)[0], 1e-11)
        stays = {name for name, scale in named_scale_vectors(model) if not scale.absorbable}
        assert {name for name, _ in named_scale_vectors(folded)} == stays, keys
        assert all(scale.reparam == "none" for _, scale in named_scale_vectors(folded))
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_folding_is_exact_to_1e_5_in_float32():
    idx = tiny_batch()[0]
    for keys in VARIANTS[::3]:
        model = randomize_scales(tiny_gpt(**keys))
        close(fold_scale_vectors(model)(idx)[0], model(idx)[0], 1e-5)


def test_roles():
    """(absorbable, input_norm) of each kind of vector, spelled out: the paper's Input-Norm and Output-Norm, and our criterion."""
    def kinds(**keys):
        return {name.split("layers.0.")[-1]: (s.absorbable, s.input_norm) for name, s in named_scale_vectors(tiny_gpt(n_layer=1, **keys))}
    both, output, neither = (True, True), (True, False), (False, False)
    assert kinds() == {"attn.qkv.scale_in.q_k_v": both, "mlp.gate_up.scale_in.gate_up": both, "head.scale_in.head": both}
    for placement in ("after", "dual"):
        found = kinds(scale_placement=placement, scale_placement_on="q,k,v,gate,up,head,o,down")
        inputs = {name: kind for name, kind in found.items() if ".scale_in." in name}
        assert len(found) - len(inputs) == 8 and set(inputs.values()) == ({both} if placement == "dual" else set())
        assert {kind for name, kind in found.items() if ".scale_out." in name} == {output}
    dnp = kinds(scale_placement="dual_norm", scale_placement_on="q,k,v,gate,up,head,o,down")
    outs = {name.rpartition(".")[2]: kind for name, kind in dnp.items() if "scale_out" in name}
    assert outs == {**dict.fromkeys(("q", "k", "gate", "head", "o", "down"), neither), "v": output, "up": output}
    assert {kind for name, kind in dnp.items() if ".scale_in." in name} == {both}
    some = kinds(scale_placement="dual", scale_placement_on="q,o", scale_heterogeneous=True)  # the others that read a norm keep theirs
    sides = {name.rpartition("scale_")[2] for name in some}
    assert sides == {"in.q", "in.k", "in.v", "in.o", "out.q", "out.o", "in.gate", "in.up", "in.head"}
    norms = {name: kind for name, kind in kinds(qk_norm=True, post_norm=True).items() if ".scale_in." not in name}
    assert len(norms) == 4 and set(norms.values()) == {neither}
    assert kinds(tie_embeddings=True)["head.scale_in.head"] == (False, True)  # the table cannot take γ over: it feeds layer 0 too
