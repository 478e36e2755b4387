"""
Proves each statement of theory.py in float64 against autograd, on many random shapes, and on the real GPT: velocities as the
derivative of the effective weight along the flow, rates as the derivative of the loss, traces from the whole Hessian.
"""
import hashlib
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, randomize_scales, tiny_batch, tiny_gpt

import theory
from norms import exponential_reparam, fold_scale_vectors, ordinary_reparam, scale_weight

SHAPES = [(seed, 1 + seed % 5, 1 + (3 * seed) % 7) for seed in range(25)]


def problem(seed, m, d, branches=1):
    """Random weights, vectors and a curved, coupled loss of the effective weights. All float64."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    A, B = random(3, m), random(d, 4)

    def loss(*effective):
        return sum((0.3 + k) * (A @ W @ B).tanh().square().sum() + 0.1 * (W ** 3).sum() for k, W in enumerate(effective)) \
            + sum(effective).square().sum().cos()
    return loss, [random(m, d) for _ in range(branches)], random


def along_the_flow(function, loss, params):
    """d function/dt where the parameters move by minus their gradient of loss(*function(params)): autograd's own answer."""
    def total(*p):
        out = function(*p)
        return loss(*out) if isinstance(out, tuple) else loss(out)
    velocity = tuple(-g for g in theory.gradients(total, list(params)))
    value = torch.autograd.functional.jvp(function, tuple(params), velocity)[1]
    rate = torch.autograd.functional.jvp(total, tuple(params), velocity)[1]
    return value, rate


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed, m, d", SHAPES)
def test_absorb_and_preconditioner(seed, m, d):
    loss, (W,), random = problem(seed, m, d)
    gamma, x = random(d), random(d)
    effective = theory.absorb(W, gamma)
    close(effective @ x, W @ (gamma * x))
    G = theory.gradients(loss, [effective])[0]
    moved, rate = along_the_flow(lambda W, v: W * v, loss, (W, gamma))
    close(theory.effective_velocity(W, gamma, G), moved)
    close(torch.stack([-theory.preconditioner(W[:, j], gamma[j]) @ G[:, j] for j in range(d)], 1), moved)
    close(theory.descent_rate_single(W, gamma, G), rate)
    close(theory.conserved(W, gamma), gamma ** 2 - torch.stack([W[:, j] @ W[:, j] for j in range(d)]))
    close(along_the_flow(lambda W: W, loss, (W,))[1], theory.descent_rate(theory.gradients(loss, [W])[0]))
    velocity = tuple(-g for g in theory.gradients(lambda W, v: loss(W * v), [W, gamma]))
    close(torch.autograd.functional.jvp(theory.conserved, (W, gamma), velocity)[1], torch.zeros(d, dtype=torch.float64))


@pytest.mark.parametrize("seed, m, d", SHAPES)
def test_shared_and_heterogeneous_rates(seed, m, d):
    loss, weights, random = problem(seed, m, d, branches=3)
    gammas = [random(d) for _ in range(3)]
    grads = theory.gradients(loss, [W * g for W, g in zip(weights, gammas)])
    _, rate = along_the_flow(lambda *p: tuple(W * v for W, v in zip(p[:3], p[3:])), loss, (*weights, *gammas))
    close(theory.descent_rate_heterogeneous(weights, gammas, grads), rate)
    grads = theory.gradients(loss, [W * gammas[0] for W in weights])
    _, rate = along_the_flow(lambda *p: tuple(W * p[3] for W in p[:3]), loss, (*weights, gammas[0]))
    close(theory.descent_rate_shared(weights, gammas[0], grads), rate)


@pytest.mark.parametrize("seed, m, d", SHAPES)
def test_dual_rate_and_velocity(seed, m, d):
    loss, (W,), random = problem(seed, m, d)
    u, v = random(m), random(d)
    G = theory.gradients(loss, [u[:, None] * W * v])[0]
    moved, rate = along_the_flow(lambda W, u, v: u[:, None] * W * v, loss, (W, u, v))
    close(theory.effective_velocity_dual(W, u, v, G), moved)
    close(theory.descent_rate_dual(W, u, v, G), rate)
    one = torch.ones(m, dtype=torch.float64)  # at u = 1: never slower than the input side alone, by exactly the row term
    G = theory.gradients(loss, [W * v])[0]
    row = (W * v * G).sum(1)
    close(theory.descent_rate_dual(W, one, v, G), theory.descent_rate_single(W, v, G) - row @ row)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("reparam, preconditioner", [(ordinary_reparam, theory.ordinary_preconditioner),
                                                     (exponential_reparam, theory.exponential_preconditioner)])
def test_reparam_preconditioners(seed, reparam, preconditioner):
    d = 1 + seed % 6
    loss, _, random = problem(seed, 1, d)
    beta, alpha = random(1)[0], random(d)
    moved, _ = along_the_flow(lambda beta, alpha: reparam(beta, alpha)[None], loss, (beta, alpha))
    G = theory.gradients(loss, [reparam(beta, alpha)[None]])[0][0]
    close(-preconditioner(beta, alpha) @ G, moved[0])


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_balance_along_an_integrated_flow(decay):
    loss, (W,), random = problem(3, 4, 5)
    gamma = random(5)
    path = theory.gradient_flow(lambda W, v: (W * v - 1).square().sum(), [W, gamma], 1.0, 2000, [decay, decay])
    for t, (W_t, gamma_t) in path[::400]:
        close(theory.conserved(W_t, gamma_t), theory.conserved(W, gamma) * theory.balance_under_decay(1.0, decay, t))


@pytest.mark.parametrize("seed, m, d", SHAPES[:8])
def test_sharpness_on_the_symmetry(seed, m, d):
    loss, (W,), random = problem(seed, m, d)
    gamma = random(d)

    def trace_over(which, c):
        if which == "W":
            return theory.hessian_trace(lambda W: loss(W * (c * gamma)), [W / c])
        if which == "gamma":
            return theory.hessian_trace(lambda v: loss((W / c) * v), [c * gamma])
        return theory.hessian_trace(lambda W, v: loss(W * v), [W / c, c * gamma])
    A, B = trace_over("W", 1.0), trace_over("gamma", 1.0)
    for c in (0.5, 1.0, 3.0):
        close(theory.sharpness_on_symmetry(A, B, c), trace_over("both", c))


def test_hessian_trace():
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    close(theory.hessian_trace(lambda x, y: (x ** 3).sum() + 5 * y * y + x.sum() * y, [x, x[:1]]), torch.tensor(28.0, dtype=torch.float64))


def test_output_norm_under_decay_is_where_the_flow_rests():
    target, curvature = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64), torch.tensor([1.0, 3.0, 0.7], dtype=torch.float64)

    def loss(gamma):
        return 0.5 * (curvature * (gamma - target).square()).sum()
    gamma, excess = theory.output_norm_under_decay(target, curvature, 0.4)
    rest = theory.gradient_flow(loss, [torch.ones(3, dtype=torch.float64)], 40.0, 800, [0.4])[-1][1][0]
    close(gamma, rest)
    close(excess, loss(rest))
    # the same target behind a weight: the flow reaches it although γ decays
    both = theory.gradient_flow(lambda g, w: loss(g * w), [torch.ones(3, dtype=torch.float64)] * 2, 60.0, 1500, [0.4, 0.0])[-1][1]
    assert loss(both[0] * both[1]) < 0.02 * excess


def test_gradient_flow_is_of_order_four():
    def error(steps):
        end = theory.gradient_flow(lambda x: 0.5 * x.square().sum(), [torch.ones(1, dtype=torch.float64)], 1.0, steps, [0.5])[-1]
        assert end[0] == pytest.approx(1.0)
        return abs(end[1][0].item() - 2.718281828459045 ** -1.5)
    assert 14 < error(10) / error(20) < 18


def test_halving_the_figures_step_changes_nothing_visible():
    loss, _, start = theory.regression()
    for write, params in theory.WRITTEN.values():
        ends = [theory.gradient_flow(lambda *p, write=write: loss(write(*p)), params(start), 8.0, steps)[-1][1] for steps in (800, 1600)]
        values = [loss(write(*p)).item() for p in ends]
        assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_sharing_wins_in_agreement_and_heterogeneity_in_conflict():
    """At the start, by the formulas; over figure 5's time, by the flow."""
    one = torch.ones(8, dtype=torch.float64)
    for conflict in (False, True):
        loss, weights = theory.sharing_problem(conflict)
        grads = theory.gradients(loss, weights)
        shared, own = theory.descent_rate_shared(weights, one, grads), theory.descent_rate_heterogeneous(weights, [one, one], grads)
        assert (own < shared) == conflict
        shared = theory.gradient_flow(lambda A, B, v, loss=loss: loss(A * v, B * v), [*weights, one], 2.0, 100)[20::20]
        own = theory.gradient_flow(lambda A, B, v, w, loss=loss: loss(A * v, B * w), [*weights, one, one], 2.0, 100)[20::20]
        for (_, (A, B, v)), (_, (C, D, w, z)) in zip(shared, own):
            assert (loss(C * w, D * z) < loss(A * v, B * v)) == conflict


@pytest.mark.parametrize("keys", [{}, {"scale_heterogeneous": True}, {"scale_heterogeneous": True, "scale_placement": "dual"}], ids=str)
def test_the_gpts_query_weight_moves_as_stated(keys):
    """One small SGD step on the whole model. G comes from the folded model, where W̃ is the parameter itself."""
    model = randomize_scales(tiny_gpt(torch.float64, **keys))
    idx, targets = tiny_batch()
    folded = fold_scale_vectors(model)
    folded(idx, targets)[1].backward()
    qkv = model.layers[0].attn.qkv
    grads = {b: W.grad for b, W in folded.layers[0].attn.qkv.weight.items()}
    W, v = qkv.weight["q"].detach().clone(), qkv.scale_in[qkv.reads["q"]]().detach().clone()
    if "scale_placement" in keys:
        expected = theory.effective_velocity_dual(W, qkv.scale_out["q"]().detach().clone(), v, grads["q"])
    elif keys:
        expected = theory.effective_velocity(W, v, grads["q"])
    else:  # a shared γ moves by what all its branches want: P_j G_j^q, and w_j^q times the others' <w_j^b, G_j^b>
        others = sum((qkv.weight[b].detach() * grads[b]).sum(0) for b in ("k", "v"))
        expected = theory.effective_velocity(W, v, grads["q"]) - W * others

    def effective():
        u = qkv.scale_out["q"]() if "q" in qkv.scale_out else None
        return scale_weight(qkv.weight["q"], qkv.scale_in[qkv.reads["q"]](), u).detach()
    before, lr = effective(), 1e-6
    model(idx, targets)[1].backward()
    torch.optim.SGD(model.parameters(), lr=lr).step()
    found = (effective() - before) / lr
    assert (found - expected).norm() < 1e-5 * expected.norm() and expected.norm() > 1e-3


def test_figures_are_remade_the_same(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the optional package matplotlib")
    from matplotlib import pyplot as plt
    for name in ("5_heterogeneity", "6_reparam"):
        digests = []
        for i in range(2):
            theory.FIGURES[name](plt).savefig(tmp_path / f"{i}.png")
            plt.close("all")
            digests.append(hashlib.sha256((tmp_path / f"{i}.png").read_bytes()).hexdigest())
        assert digests[0] == digests[1]


def test_without_matplotlib_it_says_what_to_do():
    script = "import sys; sys.modules['matplotlib'] = None; sys.argv = ['theory.py']; import theory; theory.main()"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: the figures need matplotlib: pip install matplotlib\n"
