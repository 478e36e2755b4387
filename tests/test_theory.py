"""
Proves theory/theorems.py in float64. Every formula that holds at a point: against autograd at
random points of a random curved loss, and on the real GPT. Every theorem: along integrated gradient
flows of many random teachers at once, with the conditions it needs, and a counterexample where they
are not met. The stochastic theorem: by simulation, against the exact identities of its proof.
"""
import math

import pytest
import torch
from conftest import ROOT, randomize_scales, tiny_batch, tiny_gpt

from norms import exponential_reparam, fold_scale_vectors, original_reparam, scale_weight
from theory import figures as theory_figures
from theory import theorems as theory
from theory.theorems import STUDENTS, gradient_flow, gradients, teacher_loss

SHAPES = [(seed, 1 + seed % 5, 1 + (3 * seed) % 7) for seed in range(7)]  # seed, m, d


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def problem(seed, m, d, branches=1):
    """(a curved, coupled loss of the effective weights; random weights; random(*shape))"""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator)
    A, B = random(3, m), random(d, 4)

    def loss(*effective):
        curved = sum((0.3 + k) * (A @ W @ B).tanh().square().sum()
                     for k, W in enumerate(effective))
        cubic = sum(0.1 * (W ** 3).sum() for W in effective)
        return curved + cubic + sum(effective).square().sum().cos()
    return loss, [random(m, d) for _ in range(branches)], random


def along_the_flow(form, loss, params):
    """Autograd's own answer where the parameters move by minus their gradient of loss(form(*p)):
    (d form/dt, dL/dt, a function that gives d/dt of any other function of the parameters)."""
    def total(*p):
        out = form(*p)
        return loss(*out) if isinstance(out, tuple) else loss(out)
    velocity = tuple(-g for g in gradients(total, list(params)))

    def change(quantity):
        return torch.autograd.functional.jvp(quantity, tuple(params), velocity)[1]
    return change(form), -sum(v.square().sum() for v in velocity), change


def close(a, b, tolerance=1e-10):
    b = torch.full_like(a, b) if isinstance(b, float) else b
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- formulas that hold at every point, for every loss -------------------------------------------

@pytest.mark.parametrize("seed, m, d", SHAPES)
def test_theorem_2_2_at_a_point(seed, m, d):
    loss, (W,), random = problem(seed, m, d)
    gamma = random(d)
    [G] = gradients(loss, [W * gamma])
    moved, rate, change = along_the_flow(STUDENTS["standard"], loss, (W, gamma))
    close(theory.effective_velocity(W, gamma, G), moved)
    columns = [-theory.preconditioner(W[:, j], gamma[j]) @ G[:, j] for j in range(d)]
    close(torch.stack(columns, 1), moved)
    close(theory.descent_rate_standard(W, gamma, G), rate)

    invariant = [gamma[j] ** 2 - W[:, j] @ W[:, j] for j in range(d)]
    close(theory.column_invariant(W, gamma), torch.stack(invariant))
    close(change(theory.column_invariant), 0.0)

    _, rate, _ = along_the_flow(STUDENTS["none"], loss, (W,))
    close(theory.descent_rate_none(gradients(loss, [W])[0]), rate)
    close(teacher_loss(W, 2 * W), 0.5 * sum(w ** 2 for w in W.flatten()))


@pytest.mark.parametrize("seed, m, d", SHAPES)
def test_shared_and_heterogeneous_rates(seed, m, d):
    loss, weights, random = problem(seed, m, d, branches=3)
    gammas = [random(d) for _ in range(3)]

    grads = gradients(loss, [W * g for W, g in zip(weights, gammas)])
    _, rate, _ = along_the_flow(
        lambda *p: tuple(W * v for W, v in zip(p[:3], p[3:])), loss, (*weights, *gammas))
    close(theory.descent_rate_heterogeneous(weights, gammas, grads), rate)

    grads = gradients(loss, [W * gammas[0] for W in weights])
    _, rate, _ = along_the_flow(
        lambda *p: tuple(W * p[3] for W in p[:3]), loss, (*weights, gammas[0]))
    close(theory.descent_rate_shared(weights, gammas[0], grads), rate)


@pytest.mark.parametrize("seed, m, d", SHAPES)
def test_dual_at_a_point(seed, m, d):
    loss, (W,), random = problem(seed, m, d)
    u, v = random(m), random(d)
    [G] = gradients(loss, [u[:, None] * W * v])
    moved, rate, change = along_the_flow(STUDENTS["dual"], loss, (W, v, u))
    close(theory.effective_velocity_dual(W, u, v, G), moved)
    close(theory.descent_rate_dual(W, u, v, G), rate)
    close(theory.row_invariant(W, u), torch.stack([u[i] ** 2 - W[i] @ W[i] for i in range(m)]))
    close(change(lambda W, v, u: theory.row_invariant(W, u)), 0.0)

    # the same W̃ and the same v
    _, standard, _ = along_the_flow(STUDENTS["standard"], loss, (u[:, None] * W, v))
    close(theory.dual_advantage(W, u, v, G), standard - rate)


@pytest.mark.parametrize("seed, m, d", SHAPES)
def test_reparams_at_a_point(seed, m, d):
    """OR and ER: P is what moves γ. OR's advantage over the plain form, and its invariants."""
    loss, (W,), random = problem(seed, m, d)
    beta, alpha = random(1), random(d)
    for reparam, preconditioner in ((original_reparam, theory.original_preconditioner),
                                    (exponential_reparam, theory.exponential_preconditioner)):
        moved, _, _ = along_the_flow(reparam, lambda gamma: loss(W * gamma), (beta, alpha))
        [grad] = gradients(lambda gamma: loss(W * gamma), [reparam(beta, alpha)])
        close(-preconditioner(beta, alpha) @ grad, moved)
    at_one = theory.exponential_preconditioner(0 * beta, 0 * alpha)
    close(torch.linalg.eigvalsh(at_one)[-1], float(d))

    gamma = original_reparam(beta, alpha)
    grad = (W * gradients(loss, [W * gamma])[0]).sum(0)
    _, rate, change = along_the_flow(STUDENTS["original"], loss, (W, beta, alpha))
    _, standard, _ = along_the_flow(STUDENTS["standard"], loss, (W, gamma))  # the same W and γ
    close(theory.original_advantage(beta, alpha, grad), standard - rate)
    close(theory.magnitude_invariant(W, beta), beta[0] ** 2 - sum(w ** 2 for w in W.flatten()))
    close(change(lambda W, beta, alpha: theory.magnitude_invariant(W, beta)), 0.0)
    close(change(lambda W, beta, alpha: alpha.square().sum()), 0.0)

    # the theorem's reading of P: speed d along γ, ρ across it
    P, rho = theory.original_preconditioner(beta, alpha), beta ** 2 * d / (alpha @ alpha)
    across = random(d)
    across = across - gamma * (across @ gamma) / (gamma @ gamma)
    close(P @ gamma, d * gamma, 1e-9)
    close(P @ across, rho * across, 1e-9)


@pytest.mark.parametrize("row", ["standard", "HG", "AP", "DP", "OR", "ER"])
def test_table_1_as_preconditioners(row):
    """P = J Jᵀ by autograd: it is what moves W̃, it is symmetric and positive semi-definite, and it
    has the closed form, with one vector for both branches (standard, OR, ER: the branches stacked
    into one map) or one each (HG, AP, DP: no entry between branches)."""
    _, _, random = problem(0, 3, 4)
    W, v, u, beta, alpha = random(2, 3, 4), random(2, 4), random(2, 3), random(1), random(4)
    eye_v, eye_u, no_v, no_u = torch.eye(4), torch.eye(3), torch.ones(2, 4), torch.ones(2, 3)
    # the row's parameters, (v, u) as they act on each of the two branches, P_v, P_u
    params, v, u, P_v, P_u = {
        "standard": ([v[0]], v[:1].expand(2, 4), no_u, eye_v, None),
        "HG": ([v], v, no_u, eye_v, None),
        "AP": ([u], no_v, u, None, eye_u),
        "DP": ([v, u], v, u, eye_v, eye_u),
        "OR": ([beta, alpha], original_reparam(beta, alpha).expand(2, 4), no_u,
               theory.original_preconditioner(beta, alpha), None),
        "ER": ([beta, alpha], exponential_reparam(beta, alpha).expand(2, 4), no_u,
               theory.exponential_preconditioner(beta, alpha), None),
    }[row]

    def loss(A):
        return A.tanh().square().sum() + 0.2 * A.sum() ** 3
    form = theory.TABLE_1[row]
    P = theory.induced_preconditioner(form, [W, *params])
    moved, _, _ = along_the_flow(form, loss, (W, *params))
    close(-P @ gradients(loss, [form(W, *params)])[0].flatten(), moved.flatten())
    close(P, P.T)
    assert torch.linalg.eigvalsh(P)[0] > -1e-12

    if row in ("standard", "OR", "ER"):
        expected = theory.table_preconditioner(W.flatten(0, 1), v[0], u.flatten(), P_v, P_u)
    else:
        blocks = [theory.table_preconditioner(W[b], v[b], u[b], P_v, P_u) for b in range(2)]
        expected = torch.block_diag(*blocks)
    close(P, expected)


def test_table_2_a_form_sees_the_state_and_adam_the_history():
    """Two histories that end at one state: DP's P is the same there, Adam's second moments are
    not."""
    _, _, random = problem(0, 3, 4)
    form, end, found = theory.TABLE_1["DP"], [random(2, 3, 4), random(2, 4), random(2, 3)], []
    for shift in (1.0, -2.0):
        params = [p.clone().requires_grad_() for p in end]
        adam = torch.optim.Adam(params, lr=0.0)
        for distance in (2.0, 1.0, 0.0):
            for p, at in zip(params, end):
                p.data = at + distance * shift
            adam.zero_grad()
            form(*params).tanh().sum().backward()
            adam.step()
        P = theory.induced_preconditioner(form, params)
        found.append((P, [adam.state[p]["exp_avg_sq"] for p in params]))
    (first, moments), (second, others) = found
    close(first, second)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(moments, others))


@pytest.mark.parametrize("keys", [
    {},
    {"scale_heterogeneous": True, "scale_placement": "dual"},
    {"scale_heterogeneous": True, "scale_reparam": "original"},
], ids=str)
def test_the_gpts_query_weight_moves_as_stated(keys):
    """One small SGD step on the whole model. G comes from the folded model, where W̃ is the
    parameter itself."""
    model = randomize_scales(tiny_gpt(torch.float64, **keys))
    idx, targets = tiny_batch()
    folded = fold_scale_vectors(model)
    folded(idx, targets)[1].backward()
    attn, q = model.layers[0].attn, model.layers[0].attn.q
    grads = {b: getattr(folded.layers[0].attn, b).weight.grad for b in "qkv"}
    scale, G = q.scale_in, grads["q"]
    W, v = q.weight.detach().clone(), scale().detach().clone()
    if "scale_placement" in keys:
        expected = theory.effective_velocity_dual(W, q.scale_out().detach().clone(), v, G)
    elif "scale_reparam" in keys:  # W moves as ever, γ by -P ∇γ
        P = theory.original_preconditioner(scale.beta.detach(), scale.alpha.detach())
        expected = -(v ** 2 * G + W * (P @ (W * G).sum(0)))
    else:  # a shared γ also moves by the others' <w_j^b, G_j^b>
        others = sum((getattr(attn, b).weight.detach() * grads[b]).sum(0) for b in ("k", "v"))
        expected = theory.effective_velocity(W, v, G) - W * others

    before, lr = q.effective_weight().detach(), 1e-6
    model(idx, targets)[1].backward()
    torch.optim.SGD(model.parameters(), lr=lr).step()
    found = (q.effective_weight().detach() - before) / lr
    assert (found - expected).norm() < 1e-5 * expected.norm() and expected.norm() > 1e-3


# ---- the theorems, along integrated flows; leading dimension: independent teachers ---------------

def teachers(count, m, d, seed=0, largest=3.0):
    """Random teachers of many lengths, with columns and rows of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(count, m, d, generator=generator)
    W = W * torch.randn(count, 1, d, generator=generator).exp()
    W = W * torch.randn(count, m, 1, generator=generator).exp()
    return W / W.norm(dim=(1, 2), keepdim=True) * lengths(count, largest)


def lengths(count, largest):
    return torch.linspace(0.1, largest, count)[:, None, None]


def flow(student, target, time_end, steps):
    """(losses (steps + 1, teachers), path) from the theorems' start."""
    def loss(*params):
        return teacher_loss(STUDENTS[student](*params), target)
    path = [p for _, p in gradient_flow(loss, theory.start(student, target), time_end, steps)]
    return torch.stack([loss(*p) for p in path]), path


def below(first, second, floor=1e-11):
    """second < first at every t > 0, as long as rounding can tell."""
    visible = first[1:] > floor
    return bool((second[1:] < first[1:])[visible].all()) and bool(visible[0].all())


@pytest.mark.parametrize("m, d", [(1, 1), (3, 5), (4, 2)])
def test_theorem_2_2_along_the_flow(m, d):
    target = teachers(60, m, d)
    without, _ = flow("none", target, 4.0, 100)
    with_vector, path = flow("standard", target, 4.0, 100)
    assert below(without, with_vector)
    decay = torch.exp(-2 * torch.linspace(0, 4, 101))[:, None]
    close(without, teacher_loss(0 * target, target) * decay, 1e-6)

    for W, gamma in path[::20]:
        close(theory.column_invariant(W, gamma), 1.0, 1e-5)
        P = torch.stack([theory.preconditioner(w[:, j], g[j])
                         for w, g in zip(W, gamma) for j in range(d)])
        assert (torch.linalg.eigvalsh(P)[:, 0] > 1 - 1e-5).all()


@pytest.mark.parametrize("m, d", [(2, 2), (3, 5), (4, 2)])
def test_theorems_3_1_and_3_2_i_along_the_flow(m, d):
    """(i) at every state the flows pass, because u_i² ≥ 1 and ρ = β² ≥ 1 there."""
    target = teachers(60, m, d, seed=1)
    for W, v, u in flow("dual", target, 3.0, 150)[1][1::10]:
        close(theory.row_invariant(W, u), 1.0, 1e-4)
        assert (theory.dual_advantage(W, u, v, STUDENTS["dual"](W, v, u) - target) >= 0).all()

    for W, beta, alpha in flow("original", target, 3.0, 150)[1][1::10]:
        close(theory.magnitude_invariant(W, beta), 1.0, 1e-4)
        close(alpha.square().sum(-1), float(d), 1e-5)
        gamma = original_reparam(beta, alpha)
        grad = (W * (scale_weight(W, gamma) - target)).sum(-2)
        assert (theory.original_advantage(beta, alpha, grad) >= 0).all()


def test_claim_i_fails_off_the_flow():
    """At the states of the conditions' figure, by the formulas and by autograd's rates: DP with
    u_i² < 1, OR with ρ < 1 are slower."""
    (target, effective, v), (target_or, W_or, alpha) = theory_figures.states_off_the_flow()

    def rate(student, target, *params):
        return along_the_flow(STUDENTS[student], lambda A: teacher_loss(A, target), params)[1]

    for square in (0.3, 3.0):  # u_i², then ρ
        u = torch.full((2,), square ** 0.5)
        W = effective / u[:, None]
        dual, standard = rate("dual", target, W, v, u), rate("standard", target, effective, v)
        assert (dual < standard) == (square >= 1)
        found = torch.stack(theory_figures.dual_rates(target, W, v, u))
        close(found, torch.stack((-standard, -dual, standard - dual)))

        beta, scaled = torch.ones(1), alpha / square ** 0.5
        original = rate("original", target_or, W_or, beta, scaled)
        standard = rate("standard", target_or, W_or, original_reparam(beta, scaled))
        assert (original < standard) == (square >= 1)
        found = torch.stack(theory_figures.original_rates(target_or, W_or, beta, scaled))
        close(found, torch.stack((-standard, -original, standard - original)))


@pytest.mark.parametrize("student, law", [
    ("dual", theory.dual_law), ("original", theory.original_law)])
def test_claims_ii_are_the_laws_in_t_cubed(student, law):
    """2% at small t, and an error that halves with t: what is left is of order t⁴."""
    target = teachers(20, 3, 4, seed=2, largest=1.0)[5:]

    def error(t):
        gap = flow(student, target, t, 20)[0][-1] - flow("standard", target, t, 20)[0][-1]
        return (gap / law(target, t) - 1).abs()
    assert (error(4e-3) < 0.02).all()
    close(error(4e-3) / error(2e-3), 2.0, 0.05)


def test_claims_iii_under_their_conditions():
    """DP: at most one nonzero in each row and column of W*. OR: columns of equal length."""
    generator = torch.Generator().manual_seed(3)
    matching = torch.zeros(40, 4, 5)
    for k in range(40):
        entries = 1 + k % 4
        rows = torch.randperm(4, generator=generator)[:entries]
        columns = torch.randperm(5, generator=generator)[:entries]
        matching[k, rows, columns] = 1.5 * torch.randn(entries, generator=generator)
    equal = torch.randn(40, 3, 5, generator=generator)
    equal = equal / equal.norm(dim=1, keepdim=True) * lengths(40, 1.5)

    for student, target in (("dual", matching), ("original", equal)):
        assert below(flow("standard", target, 3.0, 150)[0], flow(student, target, 3.0, 150)[0])


@pytest.mark.parametrize("student", ["dual", "original"])
def test_claims_iii_fail_without_their_conditions(student):
    """Ahead at first (ii), overtaken later; half the step changes nothing."""
    target = torch.tensor(theory_figures.COUNTEREXAMPLES[student])
    standard, other = flow("standard", target, 2.0, 100)[0], flow(student, target, 2.0, 100)[0]
    assert other[12] < standard[12] and other[-1] > 1.5 * standard[-1] > 1e-12
    close(flow(student, target, 2.0, 200)[0][::2], other, 1e-4)


# ---- theorem 2.3 / C.1 ---------------------------------------------------------------------------

def test_hessian_of_the_coordinate_loss():
    _, _, random = problem(0, 3, 3)
    w, gamma, target = random(5), random(5), random(5)

    def loss(p):
        return 0.5 * (p[:5] * p[5:] - target).square().sum()
    whole = torch.autograd.functional.hessian(loss, torch.cat((w, gamma)))
    blocks = theory.hessian_block(w, gamma, target)
    for i in range(5):
        close(whole[[i, i + 5]][:, [i, i + 5]], blocks[i])
    assert whole.count_nonzero() == 20  # nothing outside the blocks
    values = torch.linalg.eigvalsh(blocks)
    close(torch.stack(theory.hessian_eigenvalues(w, gamma, target), -1), values)
    largest = torch.linalg.eigvalsh(whole)[-1]
    expected = torch.stack((largest, whole.trace(), whole.norm()))
    close(torch.stack(theory.sharpness(w, gamma, target)), expected)


def test_what_sharpness_does_to_sgds_descent():
    """Appendix C.2.2 on a quadratic loss: the mean over every noise of a finite set is exact, each
    noise term is Tr(H C) or bounds it, and the descent lemma holds."""
    _, _, random = problem(1, 3, 3)
    n, lr, sigma2 = 5, 0.03, 0.7
    A, minimum, theta = random(n, n), random(n), random(n)
    H = A @ A.T  # positive definite

    def loss(x):
        return 0.5 * (x - minimum) @ H @ (x - minimum)
    [gradient] = gradients(loss, [theta])
    half = random(n, n)
    noises = torch.cat((half, -half)) * n ** 0.5  # of mean 0 and covariance halfᵀ half
    C = half.T @ half
    mean = torch.stack([loss(theta - lr * (gradient + xi)) for xi in noises]).mean()
    close(mean - loss(theta), theory.sgd_descent(gradient, H, C, lr))

    quiet = theory.sgd_descent(gradient, H, torch.zeros(n, n), lr)
    assert quiet <= -lr * (1 - lr * torch.linalg.eigvalsh(H)[-1] / 2) * gradient.square().sum()
    for kind, covariance in (("isotropic", sigma2 * torch.eye(n)), ("aligned", sigma2 * H)):
        price = theory.sgd_descent(gradient, H, covariance, lr) - quiet
        close(price, lr ** 2 / 2 * theory.NOISE_TERMS[kind](H, sigma2))

    bound = theory.NOISE_TERMS["bounded"](H, C.trace())
    assert 0 < (H * C).sum() <= bound
    worst = torch.linalg.eigh(H)[1][:, -1]  # noise along the sharpest direction attains the bound
    close((H * C.trace() * torch.outer(worst, worst)).sum(), bound)


def test_the_simulation_without_noise_is_gradient_flow():
    """Euler's method is of order one."""
    target = torch.full((4,), 1.5)
    w, gamma = torch.zeros(1, 4), torch.ones(1, 4)

    def loss(w, gamma):
        return 0.5 * (w * gamma - target).square().sum()
    expected = gradient_flow(loss, [w, gamma], 2.0, 100, [0.1, 0.3])[-1][1]

    def error(steps):
        t, *end = list(theory.simulate_sde(w, gamma, target, 0.1, 0.3, 0.0, 2.0, steps, steps))[-1]
        assert t == pytest.approx(2.0)
        return sum((a - b).abs().max().item() for a, b in zip(end, expected))
    assert error(2000) < 1e-3
    assert error(1000) / error(2000) == pytest.approx(2, rel=0.05)


def test_the_simulations_noise_has_variance_q_t_and_is_independent():
    w = gamma = torch.zeros(20000, 2)  # near zero the drift is of third order
    *_, (_, w, gamma) = theory.simulate_sde(w, gamma, torch.zeros(2), 0.0, 0.0, 0.3, 0.1, 10, 10)
    covariance = torch.cat((w, gamma), 1).T @ torch.cat((w, gamma), 1) / 20000
    close(covariance, 0.03 * torch.eye(4), 0.04 * 0.03)


def test_squared_norm_bound_solves_its_equation():
    """y' = -2 μ y + d q + ½‖w*‖², y(0) = E‖γ_0‖² (of eq. 30, by the inequality before eq. 27)."""
    target = torch.tensor([1.0, -2.0, 0.5])

    def bound(t):
        return theory.squared_norm_bound(7.0, target, 0.3, 0.2, t)
    assert bound(0.0) == pytest.approx(7.0)
    slope = (bound(1.0 + 1e-4) - bound(1.0 - 1e-4)) / 2e-4
    assert slope == pytest.approx(-0.6 * bound(1.0) + 3 * 0.2 + 0.5 * 5.25, rel=1e-6)


@pytest.mark.parametrize("paths, time_end, steps", [
    (500, 100.0, 5000), pytest.param(4000, 200.0, 40000, marks=pytest.mark.slow)])
def test_theorem_c1_by_simulation(paths, time_end, steps):
    """Four coordinates from w = 0, γ = 1, with λ = q = 0.1 and w* = 1. μ = 0.1: the mean of ‖γ‖² is
    below its bound, and every sharpness stays level. μ = 0: all keep growing."""
    target, one, means = torch.ones(4), torch.ones(paths, 4), {}
    for mu in (0.0, 0.1):
        path = list(theory.simulate_sde(0 * one, one, target, 0.1, mu, 0.1, time_end, steps,
                                        every=steps // 100))
        check_balance_and_bounds(path, target, mu, time_end / 100)
        means[mu] = torch.stack([
            torch.stack([gamma.square().sum(-1).mean(),
                         *(m.mean() for m in theory.sharpness(w, gamma, target))])
            for _, w, gamma in path])  # (101, 4): ‖γ‖², λ_max, trace, Frobenius

    early, middle, late = (
        {mu: m[part].mean(0) for mu, m in means.items()}
        for part in (slice(20, 30), slice(45, 55), slice(90, 101)))
    assert (middle[0.0] > 1.15 * early[0.0]).all()
    assert (late[0.0] > 1.15 * middle[0.0]).all()
    assert ((late[0.1] / early[0.1] - 1).abs() < 0.1).all()
    assert (late[0.0] > 3 * late[0.1]).all()


def check_balance_and_bounds(path, target, mu, dt):
    """‖γ‖² - ‖w‖² changes by ∫(2λ‖w‖² - 2μ‖γ‖²) dt in the mean (eq. 25): the rest has mean zero.
    The mean of ‖w‖² is below its bound, and so is that of ‖γ‖² if μ > 0."""
    weights = torch.stack([w.square().sum(-1) for _, w, _ in path])  # (101, paths)
    gammas = torch.stack([gamma.square().sum(-1) for _, _, gamma in path])
    difference, drift = gammas - weights, 0.2 * weights - 2 * mu * gammas
    martingale = difference[-1] - difference[10] - torch.trapezoid(drift[10:], dx=dt, dim=0)
    assert abs(martingale.mean()) < 4 * martingale.std() / len(martingale) ** 0.5 < 8.0
    for k in range(1, len(path)):
        assert weights[k].mean() < theory.squared_norm_bound(0.0, target, 0.1, 0.1, k * dt)
        if mu:
            assert gammas[k].mean() < theory.squared_norm_bound(4.0, target, mu, 0.1, k * dt)


# ---- decay, ours ---------------------------------------------------------------------------------

def test_balance_under_decay():
    _, (W,), random = problem(3, 4, 5)
    gamma = random(5)
    start = theory.column_invariant(W, gamma)
    path = gradient_flow(
        lambda W, v: (W * v - 1).square().sum(), [W, gamma], 1.0, 400, [0.3, 0.3])
    for t, params in path[::100]:
        expected = theory.balance_under_decay(start, 0.3, t)
        close(theory.column_invariant(*params), expected, 1e-7)
    close(expected, start * math.exp(-0.6))


def test_direction_under_decay():
    """Decay only on α: its length as stated. The same decay on a plain γ would have pulled γ."""
    loss, (W,), random = problem(4, 3, 5)
    beta, alpha = random(1), random(5)
    path = gradient_flow(lambda beta, alpha: loss(W * original_reparam(beta, alpha)),
                         [beta, alpha], 1.0, 400, [0.0, 0.4])
    for t, (_, alpha_t) in path[::100]:
        close(alpha_t.square().sum(), theory.direction_under_decay(alpha, 0.4, t), 1e-7)


def test_output_norm_under_decay_is_where_the_flow_rests():
    """After an Input-Norm there is a weight: the flow reaches the same target although γ decays."""
    target, curvature = torch.tensor([0.5, 2.0, -1.0]), torch.tensor([1.0, 3.0, 0.7])
    one = torch.ones(3)

    def loss(gamma, w=one):
        return 0.5 * (curvature * (gamma * w - target).square()).sum()
    gamma, excess = theory.output_norm_under_decay(target, curvature, 0.4)
    [rest] = gradient_flow(loss, [one], 40.0, 200, [0.4])[-1][1]
    close(gamma, rest)
    close(excess, loss(rest))
    both = gradient_flow(loss, [one, one], 30.0, 600, [0.4, 0.0])[-1][1]
    assert loss(*both) < 0.05 * excess


def test_adamw_output_norm_limit():
    """Below 1/λ decay costs AdamW next to nothing, above it γ stays at 1/λ."""
    target = torch.tensor([3.0, -5.0, 0.5])

    def loss(gamma):
        return 0.5 * (gamma - target).square().sum()
    for decay, limit in ((0.1, [3.0, -5.0, 0.5]), (0.5, [2.0, -2.0, 0.5])):
        close(theory.adamw_output_norm_limit(target, decay), torch.tensor(limit))
        path = theory_figures.adamw_path(loss, [target.sign()], 0.02, 600, decay)
        close(path[-1][0], torch.tensor(limit), 0.02)


# ---- the figures ---------------------------------------------------------------------------------

def test_sharing_wins_in_agreement_and_heterogeneity_in_conflict():
    """At the start, by the formulas; over the figure's time, by the flow."""
    one = torch.ones(8)
    for conflict in (False, True):
        loss, weights = theory_figures.sharing_problem(conflict)
        grads = gradients(loss, weights)
        shared = theory.descent_rate_shared(weights, one, grads)
        own = theory.descent_rate_heterogeneous(weights, [one, one], grads)
        assert (own < shared) == conflict
        _, shared, own = theory_figures.sharing_paths(conflict)
        assert all((b < a) == conflict for a, b in zip(shared[1:], own[1:]))


def test_pre_norm_difference():
    """ε/(2 s²) with ε² in DNP's norm, for every stream that is large beside √ε; s² is the mean
    square of W Norm(x). With ε in both norms it is exact at RMS 1 up to ε²."""
    eps, s_squared = 1e-6, 256 * 0.02 ** 2
    for size in (0.02, 1.0, 50.0):
        difference = theory_figures.pre_norm_difference(size, eps, eps ** 2)
        assert difference == pytest.approx(eps / (2 * s_squared), rel=0.1)
    assert theory_figures.pre_norm_difference(1.0, eps, eps) < 1e-11
    assert theory_figures.pre_norm_difference(0.02, eps, eps) > 0.01


@pytest.mark.parametrize("names", [
    ["reparam"], pytest.param(list(theory_figures.FIGURES), marks=pytest.mark.slow)],
    ids=["one", "all"])
def test_figures_are_drawn_the_same_each_time(names, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the optional package matplotlib")
    torch.set_default_dtype(torch.float32)  # as where the command is run
    drawers = {name: theory_figures.FIGURES[name] for name in names}
    monkeypatch.setattr(theory_figures, "FIGURES", drawers)
    drawn = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        theory_figures.main([str(folder)])
        drawn.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert drawn[0] == drawn[1] and set(drawn[0]) == {f"theory_{name}.png" for name in names}


def test_each_figure_has_a_drawer_a_place_and_a_small_file():
    files = {path.name: path.stat().st_size for path in (ROOT / "figures").glob("theory_*.png")}
    assert set(files) == {f"theory_{name}.png" for name in theory_figures.FIGURES}
    assert max(files.values()) < 100_000
    page = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    assert all(f"../figures/{name}" in page for name in files)
