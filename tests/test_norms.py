"""
Proves that every scale-vector variant is its formula: each function against a plain float64 computation written another
way, gradients against autograd, and every claim of absorbability by folding.
"""
import itertools

import pytest
import torch
from conftest import randomize_scales, tiny_batch, tiny_gpt

from norms import (
    EXECUTIONS,
    OutputNorm,
    ScaledLinear,
    ScaleVector,
    branch_scale_vectors,
    dual_norm_placement,
    dual_placement,
    exponential_reparam,
    fold_scale_vectors,
    fused_linear,
    input_placement,
    named_scale_vectors,
    ordinary_reparam,
    rms_norm,
    scale_activation,
    scale_weight,
)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_rms_norm():
    x = random(3, 5, 8)
    expected = torch.stack([row / (sum(v * v for v in row) / 8 + 1e-3) ** 0.5 for row in x.view(-1, 8)]).view_as(x)
    close(rms_norm(x, 1e-3), expected)


@pytest.mark.parametrize("function, start", [(ordinary_reparam, 1.0), (exponential_reparam, 0.0)])
def test_reparam_starts_at_ones_and_moves_as_stated(function, start):
    """Gradient flow on (β, α) moves γ by -J Jᵀ ∇γ; J from autograd, the preconditioner from the docstring."""
    close(function(torch.tensor(start, dtype=torch.float64), torch.ones(6, dtype=torch.float64)), torch.ones(6, dtype=torch.float64))
    beta, alpha, eye = torch.tensor(0.7, dtype=torch.float64), random(6), torch.eye(6, dtype=torch.float64)
    J_beta, J_alpha = torch.autograd.functional.jacobian(function, (beta, alpha))
    if function is ordinary_reparam:
        gamma, P = 0.7 * alpha, 0.49 * eye + torch.outer(alpha, alpha)
    else:
        gamma = 2.718281828459045 ** 0.7 * alpha
        P = 2.718281828459045 ** 1.4 * eye + torch.outer(gamma, gamma)
    close(function(beta, alpha), gamma)
    close(torch.outer(J_beta, J_beta) + J_alpha @ J_alpha.T, P)


@pytest.mark.parametrize("reparam, names", [("none", {"gamma"}), ("ordinary", {"beta", "alpha"}), ("exponential", {"beta", "alpha"})])
def test_scale_vector(reparam, names):
    scale = ScaleVector(5, absorbable=True, reparam=reparam)
    assert {name for name, _ in scale.named_parameters()} == names
    assert torch.equal(scale(), torch.ones(5))
    for p in scale.parameters():
        p.data += 0.3
    plain = scale.collapse()
    assert [name for name, _ in plain.named_parameters()] == ["gamma"] and plain.absorbable
    close(plain(), scale().detach(), 0)
    with pytest.raises(ValueError, match="scale_reparam='orthodox'.*ordinary"):
        ScaleVector(5, True, "orthodox")


def test_branch_scale_vectors():
    def make():
        return ScaleVector(4, True)
    shared, reads = branch_scale_vectors(["q", "k", "v"], False, make)
    assert len(shared) == 1 and len({reads[b] for b in "qkv"}) == 1
    own, reads = branch_scale_vectors(["q", "k", "v"], True, make)
    assert len(own) == 3 and reads == {"q": "q", "k": "k", "v": "v"}
    assert len({id(scale) for scale in own.values()}) == 3


def test_scale_weight_and_activation():
    W, v, u, x = random(4, 6), random(6), random(4), random(3, 6)
    close(scale_weight(W, v, u), torch.diag(u) @ W @ torch.diag(v))
    close(scale_weight(W, v), W @ torch.diag(v))
    assert scale_weight(W) is W and scale_activation(x) is x
    close(scale_activation(x, v), x @ torch.diag(v))
    stacked = random(2, 4, 6)  # a leading axis of matrices shares the vectors
    close(scale_weight(stacked, v, u)[1], torch.diag(u) @ stacked[1] @ torch.diag(v))


def test_fused_linear():
    x, W = random(3, 6), [random(4, 6), random(2, 6)]
    for y, W_b in zip(fused_linear(x, W), W):
        close(y, x @ W_b.T)


BRANCHES = dict(x=random(2, 3, 6), W=[random(4, 6), random(8, 6, seed=1)], v=[random(6), random(6, seed=2)],
                u=[random(4), random(8, seed=3)])


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("shared", [True, False])
def test_input_placement(execution, shared):
    x, W, v = BRANCHES["x"], BRANCHES["W"], BRANCHES["v"]
    v = [v[0], v[0]] if shared else v
    for b, y in enumerate(input_placement(x, W, v, execution)):
        close(y, torch.einsum("md,d,btd->btm", W[b], v[b], x))
    for b, y in enumerate(input_placement(x, W, [None, None], execution)):
        close(y, torch.einsum("md,btd->btm", W[b], x))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_dual_placement(execution):
    x, W, v, u = (BRANCHES[key] for key in "xWvu")
    for b, y in enumerate(dual_placement(x, W, v, u, execution)):
        close(y, torch.einsum("m,md,d,btd->btm", u[b], W[b], v[b], x))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_dual_norm_placement(execution):
    x, W, v, u = (BRANCHES[key] for key in "xWvu")
    for b, y in enumerate(dual_norm_placement(x, W, v, u, width=4, eps=1e-3, execution=execution)):
        z = torch.einsum("md,d,btd->btm", W[b], v[b], x)
        for start in range(0, W[b].size(0), 4):  # group by group
            part = slice(start, start + 4)
            norm = (z[..., part].square().mean(-1, keepdim=True) + 1e-3).sqrt()
            close(y[..., part], u[b][part] * z[..., part] / norm)
    for y in dual_norm_placement(x, W, v, [None, None], width=4, eps=0.0, execution=execution):
        close(y.unflatten(-1, (-1, 4)).square().mean(-1), torch.ones_like(y[..., ::4]))


def test_output_norm():
    norm, z = OutputNorm(6, eps=1e-3).double(), random(2, 6)
    with torch.no_grad():
        norm.scale.gamma += random(6)
    close(norm(z), norm.scale.gamma * z / (z.square().mean(-1, keepdim=True) + 1e-3).sqrt())
    assert norm.scale.output_norm and not norm.scale.absorbable
    assert not list(OutputNorm(6, vectors=False).parameters())


def test_scaled_linear_runs_each_branch_as_it_is_placed():
    placement = {"a": "dual", "b": "input", "c": "dual_norm", "d": None}
    maps = ScaledLinear(6, {"a": 4, "b": 3, "c": 8, "d": 2}, placement, heterogeneous=True, norm_width=4, eps=1e-3).double()
    with torch.no_grad():
        for i, p in enumerate(maps.parameters()):
            p.copy_(random(*p.shape, seed=10 * i))
    x, W = random(5, 6), maps.weight
    a, b, c, d = maps(x)
    v, u = {n: s() for n, s in maps.scale_in.items()}, {n: s() for n, s in maps.scale_out.items()}
    assert set(v) == {"a", "b", "c"} and set(u) == {"a", "c"}
    close(a, x @ (torch.diag(u["a"]) @ W["a"] @ torch.diag(v["a"])).T)
    close(b, x @ (W["b"] @ torch.diag(v["b"])).T)
    z = (x @ (W["c"] @ torch.diag(v["c"])).T).view(5, 2, 4)
    close(c, u["c"] * (z / (z.square().mean(-1, keepdim=True) + 1e-3).sqrt()).view(5, 8))
    close(d, x @ W["d"].T)


VARIANTS = [dict(scale_heterogeneous=h, scale_placement=p, scale_placement_on=on, scale_reparam=r)
            for h, p, on, r in itertools.product((False, True), ("input", "dual", "dual_norm"),
                                                 ("q,k,v,gate,up", "v,up", "q,k,v,gate,up,o,down"),
                                                 ("none", "ordinary", "exponential"))]


@pytest.mark.parametrize("extra", [{}, {"tie_embeddings": True}, {"qk_norm": True, "post_norm": True}])
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
    for keys in VARIANTS:
        model = randomize_scales(tiny_gpt(**keys))
        close(fold_scale_vectors(model)(idx)[0], model(idx)[0], 1e-5)


def test_what_is_absorbable():
    """DESIGN of the criterion, spelled out for each kind of vector."""
    def kinds(**keys):
        return {name.split("layers.0.")[-1]: (s.absorbable, s.output_norm) for name, s in named_scale_vectors(tiny_gpt(n_layer=1, **keys))}
    own = {"absorbable": (True, False), "output_norm": (False, True), "both": (True, True)}
    assert kinds() == {"attn.qkv.scale_in.q_k_v": own["absorbable"], "mlp.gate_up.scale_in.gate_up": own["absorbable"],
                       "head.scale_in.head": own["absorbable"]}
    dual = kinds(scale_placement="dual", scale_placement_on="q,k,v,gate,up,o,down")
    assert len(dual) == 12 and set(dual.values()) == {own["absorbable"]}
    dnp = kinds(scale_placement="dual_norm", scale_placement_on="q,k,v,gate,up,o,down")
    outs = {name.rpartition(".")[2]: kind for name, kind in dnp.items() if "scale_out" in name}
    assert outs == {"q": own["output_norm"], "k": own["output_norm"], "gate": own["output_norm"], "o": own["output_norm"],
                    "down": own["output_norm"], "v": own["both"], "up": own["both"]}
    output_norms = {name: kind for name, kind in kinds(qk_norm=True, post_norm=True).items() if ".scale_in." not in name}
    assert len(output_norms) == 4 and set(output_norms.values()) == {own["output_norm"]}
    assert kinds(tie_embeddings=True)["head.scale_in.head"] == (False, False)  # the table cannot take γ over: it feeds layer 0 too
