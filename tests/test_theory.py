"""
Proves theory/theorems.py in float64: each formula against autograd at random points of a curved
loss (on the real GPT: tests/answers/test_1_no_gamma_on_q.py); each theorem along the gradient flows
of many random teachers, with a counterexample where its conditions are not met; the stochastic one
by simulation, against exact identities of its proof.
"""
import re

import pytest
import torch
from conftest import ROOT

from norms import exponential_reparam, original_reparam, scale_weight
from theory import figures as theory_figures
from theory import theorems as theory
from theory.figures import student_flow
from theory.theorems import STUDENTS, TABLE_1, gradient_flow, gradients, teacher_loss

SHAPES = [(seed, 1 + seed % 5, 1 + (3 * seed) % 7) for seed in range(7)]  # seed, m, d


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def draw(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def curved_loss(effective):
    """Of the effective weight. It couples all entries."""
    return effective.tanh().square().sum() + effective.sum().cos()


def along_the_flow(form, params, loss=curved_loss):
    """Autograd's own answer where the parameters move by minus their gradient of loss(form(*p)):
    (d form/dt, dL/dt, a function that gives d/dt of any other function of the parameters)."""
    velocity = tuple(-g for g in gradients(lambda *p: loss(form(*p)), params))

    def change(quantity):
        return torch.autograd.functional.jvp(quantity, tuple(params), velocity)[1]
    return change(form), -sum(v.square().sum() for v in velocity), change


def close(a, b, tolerance=1e-10):
    b = torch.full_like(a, b) if isinstance(b, float) else b
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- formulas that hold at every point, for every loss -------------------------------------------

@pytest.mark.parametrize("seed, m, d", SHAPES)
def test_the_standard_form_and_dp_at_a_point(seed, m, d):
    W, u, v = draw((m, d), (m,), (d,), seed=seed)
    [G] = gradients(curved_loss, [W])
    close(theory.descent_rate_none(G), along_the_flow(STUDENTS["none"], [W])[1])

    [G] = gradients(curved_loss, [W * v])
    moved, rate, change = along_the_flow(STUDENTS["standard"], [W, v])
    close(theory.effective_velocity(W, v, G), moved)
    columns = [-theory.preconditioner(W[:, j], v[j]) @ G[:, j] for j in range(d)]
    close(torch.stack(columns, 1), moved)
    close(theory.descent_rate_standard(W, v, G), rate)
    close(theory.column_invariant(W, v), v ** 2 - (W.T @ W).diagonal())
    close(change(theory.column_invariant), 0.0)

    [G] = gradients(curved_loss, [u[:, None] * W * v])
    moved, rate, change = along_the_flow(STUDENTS["dual"], [W, v, u])
    close(theory.effective_velocity_dual(W, u, v, G), moved)
    close(theory.descent_rate_dual(W, u, v, G), rate)
    close(theory.row_invariant(W, u), u ** 2 - (W @ W.T).diagonal())
    close(change(lambda W, v, u: theory.row_invariant(W, u)), 0.0)
    # the standard form at the same W̃ and the same v
    _, standard, _ = along_the_flow(STUDENTS["standard"], [u[:, None] * W, v])
    close(theory.dual_advantage(W, u, v, G), standard - rate)


@pytest.mark.parametrize("seed, m, d", SHAPES)
def test_or_at_a_point(seed, m, d):
    """The advantage has the theorem's reading of P: speed d along γ, ρ across it."""
    W, beta, alpha = draw((m, d), (1,), (d,), seed=seed)
    gamma = original_reparam(beta, alpha)
    grad = (W * gradients(curved_loss, [W * gamma])[0]).sum(0)
    _, rate, change = along_the_flow(STUDENTS["original"], [W, beta, alpha])
    _, standard, _ = along_the_flow(STUDENTS["standard"], [W, gamma])  # the same W and γ
    close(theory.original_advantage(beta, alpha, grad), standard - rate)
    close(theory.magnitude_invariant(W, beta), beta[0] ** 2 - (W.T @ W).trace())
    close(change(lambda W, beta, alpha: theory.magnitude_invariant(W, beta)), 0.0)
    close(change(lambda W, beta, alpha: alpha.square().sum()), 0.0)


@pytest.mark.parametrize("row", ["standard", "HG", "AP", "DP", "OR", "ER"])
def test_table_1_as_preconditioners(row):
    """P = J Jᵀ by autograd: it is what moves W̃, it is symmetric and positive semi-definite, and it
    has the closed form, with one vector for both branches (standard, OR, ER: the branches stacked
    into one map) or one each (HG, AP, DP: no entry between branches)."""
    W, v, u, beta, alpha = draw((2, 3, 4), (2, 4), (2, 3), (1,), (4,))
    I_v, I_u, no_v, no_u = torch.eye(4), torch.eye(3), torch.ones(2, 4), torch.ones(2, 3)

    def stacked(*args):
        return theory.table_preconditioner(W.flatten(0, 1), *args)

    def each(v, u, *args):
        return torch.block_diag(*(
            theory.table_preconditioner(W[b], v[b], u[b], *args) for b in range(2)))
    params, expected = {
        "standard": ([v[0]], stacked(v[0], no_u.flatten(), I_v)),
        "HG": ([v], each(v, no_u, I_v)),
        "AP": ([u], each(no_v, u, None, I_u)),
        "DP": ([v, u], each(v, u, I_v, I_u)),
        "OR": ([beta, alpha], stacked(original_reparam(beta, alpha), no_u.flatten(),
                                      theory.original_preconditioner(beta, alpha))),
        "ER": ([beta, alpha], stacked(exponential_reparam(beta, alpha), no_u.flatten(),
                                      theory.exponential_preconditioner(beta, alpha))),
    }[row]
    P = theory.induced_preconditioner(TABLE_1[row], [W, *params])
    close(P, expected)
    close(P, P.T)
    assert torch.linalg.eigvalsh(P)[0] > -1e-12

    moved, rate, _ = along_the_flow(TABLE_1[row], [W, *params])
    [G] = gradients(curved_loss, [TABLE_1[row](W, *params)])
    close(-P @ G.flatten(), moved.flatten())
    if row == "standard":
        close(theory.descent_rate_shared(list(W), v[0], list(G)), rate)
    if row == "HG":
        close(theory.descent_rate_heterogeneous(W, v, G), rate)


# ---- the theorems, along integrated flows; leading dimension: independent teachers ---------------

def with_lengths(W, largest):
    """The teachers W (n, m, d), rescaled to many lengths."""
    lengths = torch.linspace(0.1, largest, len(W))[:, None, None]
    return W / W.norm(dim=(1, 2), keepdim=True) * lengths


def teachers(count, m, d, seed=0, largest=3.0):
    """Random teachers of many lengths, with columns and rows of unequal size."""
    W, columns, rows = draw((count, m, d), (count, 1, d), (count, m, 1), seed=seed)
    return with_lengths(W * columns.exp() * rows.exp(), largest)


def below(first, second, floor=1e-11):
    """second < first at every t > 0, as long as rounding can tell."""
    visible = first[1:] > floor
    return bool((second[1:] < first[1:])[visible].all()) and bool(visible[0].all())


@pytest.mark.parametrize("m, d", [(1, 1), (3, 5), (4, 2)])
def test_theorem_2_2_along_the_flow(m, d):
    """By column_invariant γ² ≥ 1, so that every preconditioner is at least I."""
    target = teachers(60, m, d)
    _, without, _ = student_flow("none", target, 4.0, 100)
    times, with_vector, path = student_flow("standard", target, 4.0, 100)
    assert below(without, with_vector)
    close(without, without[0] * torch.exp(-2 * torch.tensor(times))[:, None], 1e-6)

    for W, gamma in path[::20]:
        close(theory.column_invariant(W, gamma), 1.0, 1e-5)


def test_claim_i_fails_off_the_flow():
    """Claim (i): DP is faster where u_i² ≥ 1, OR where ρ = β² ≥ 1, as along the flow from the
    start, by row_invariant and magnitude_invariant. At the figure's states, by formula and
    autograd, slower are DP at u_i² < 1, OR at ρ < 1."""
    (target_dp, effective, v), (target_or, W, alpha) = theory_figures.states_off_the_flow()
    one = torch.ones(1)
    for square in (0.3, 3.0):  # u_i², then ρ
        u, scaled = torch.full((2,), square ** 0.5), alpha / square ** 0.5
        for student, formulas, target, plain, params in (
                ("dual", theory_figures.dual_rates, target_dp, (effective, v),
                 (effective / u[:, None], v, u)),
                ("original", theory_figures.original_rates, target_or,
                 (W, original_reparam(one, scaled)), (W, one, scaled))):
            standard, other = (
                along_the_flow(STUDENTS[name], p, lambda A, t=target: teacher_loss(A, t))[1]
                for name, p in (("standard", plain), (student, params)))
            assert (other < standard) == (square >= 1)
            found = torch.stack(formulas(target, *params))
            close(found, torch.stack((-standard, -other, standard - other)))


@pytest.mark.parametrize("student, law", [
    ("dual", theory.dual_law), ("original", theory.original_law)])
def test_claims_ii_are_the_laws_in_t_cubed(student, law):
    """2% at small t, and an error that halves with t: what is left is of order t⁴."""
    target = teachers(20, 3, 4, seed=2, largest=1.0)[5:]

    def error(t):
        gap = student_flow(student, target, t, 20)[1] - student_flow("standard", target, t, 20)[1]
        return (gap[-1] / law(target, t) - 1).abs()
    assert (error(4e-3) < 0.02).all()
    close(error(4e-3) / error(2e-3), 2.0, 0.05)


@pytest.mark.parametrize("student", ["dual", "original"])
def test_claims_iii_need_their_conditions(student):
    """DP: at most one nonzero in each row and column of W*. OR: columns of equal length. Without
    them ahead at first (ii), overtaken later; half the step changes nothing."""
    entries, equal = draw((40, 4), (40, 3, 5), seed=3)
    matching = torch.zeros(40, 4, 5)
    matching[:, range(4), [2, 0, 4, 1]] = 1.5 * entries
    for k in range(1, 4):
        matching[k::4, k:] = 0.0  # so many rows only
    equal = with_lengths(equal / equal.norm(dim=1, keepdim=True), 3.0)
    target = {"dual": matching, "original": equal}[student]
    assert below(*(student_flow(name, target, 3.0, 150)[1] for name in ("standard", student)))

    target = torch.tensor(theory_figures.COUNTEREXAMPLES[student])
    standard, other = (student_flow(name, target, 2.0, 100)[1] for name in ("standard", student))
    assert other[12] < standard[12] and other[-1] > 1.5 * standard[-1] > 1e-12
    close(student_flow(student, target, 2.0, 200)[1][::2], other, 1e-4)


# ---- theorem 2.3 / C.1 ---------------------------------------------------------------------------

def test_hessian_of_the_coordinate_loss():
    w, gamma, target = draw((5,), (5,), (5,))

    def loss(p):
        return 0.5 * (p[:5] * p[5:] - target).square().sum()
    whole = torch.autograd.functional.hessian(loss, torch.cat((w, gamma)))
    blocks = theory.hessian_block(w, gamma, target)
    for i in range(5):
        close(whole[[i, i + 5]][:, [i, i + 5]], blocks[i])
    assert whole.count_nonzero() == 20  # nothing outside the blocks
    values = torch.linalg.eigvalsh(blocks)
    close(torch.stack(theory.hessian_eigenvalues(w, gamma, target), -1), values)
    expected = torch.stack((values.max(), whole.trace(), whole.norm()))
    close(torch.stack(theory.sharpness(w, gamma, target)), expected)


def test_what_sharpness_does_to_sgds_descent():
    """Appendix C.2.2 on ½xᵀHx: the mean over every noise of a finite set is exact, and each noise
    term is Tr(H C) or bounds it."""
    n, lr, sigma2 = 5, 0.03, 0.7
    A, half, x = draw((n, n), (n, n), (n,), seed=1)
    H, C = A @ A.T, half.T @ half
    noises = torch.cat((half, -half)) * n ** 0.5  # of mean 0 and covariance C
    after = x - lr * (H @ x + noises)
    change = 0.5 * ((after @ H) * after).sum(-1).mean() - 0.5 * x @ H @ x
    close(change, theory.sgd_descent(H @ x, H, C, lr))

    quiet = theory.sgd_descent(H @ x, H, 0 * C, lr)
    for kind, covariance in (("isotropic", sigma2 * torch.eye(n)), ("aligned", sigma2 * H)):
        price = theory.sgd_descent(H @ x, H, covariance, lr) - quiet
        close(price, lr ** 2 / 2 * theory.NOISE_TERMS[kind](H, sigma2))

    bound = theory.NOISE_TERMS["bounded"](H, C.trace())
    assert 0 < (H * C).sum() <= bound
    worst = torch.linalg.eigh(H)[1][:, -1]  # noise along the sharpest direction attains the bound
    close((H * C.trace() * torch.outer(worst, worst)).sum(), bound)


def test_the_simulation():
    """Gradient flow, to Euler's order of one, and independent noise of variance q t."""
    start, target = [torch.zeros(1, 4), torch.ones(1, 4)], torch.full((4,), 1.5)
    expected = gradient_flow(lambda w, gamma: 0.5 * (w * gamma - target).square().sum(),
                             start, 2.0, 100, [0.1, 0.3])[-1][1]

    def error(steps):
        *_, (t, *end) = theory.simulate_sde(*start, target, 0.1, 0.3, 0.0, 2.0, steps, steps)
        assert t == pytest.approx(2.0)
        return sum((a - b).abs().max().item() for a, b in zip(end, expected))
    assert error(2000) < 1e-3
    assert error(1000) / error(2000) == pytest.approx(2, rel=0.05)

    zero = torch.zeros(20000, 2)  # near it the drift is of third order
    *_, (_, *end) = theory.simulate_sde(zero, zero, torch.zeros(2), 0, 0, 0.3, 0.1, 10, 10)
    noise = torch.cat(end, 1)
    close(noise.T @ noise / 20000, 0.03 * torch.eye(4), 0.04 * 0.03)


def test_squared_norm_bound_solves_its_equation():
    """y' = -2 μ y + d q + ½‖w*‖², y(0) = E‖γ_0‖² (of eq. 30, by the inequality before eq. 27)."""
    target = torch.tensor([1.0, -2.0, 0.5])
    start, before, at, after = (theory.squared_norm_bound(7.0, target, 0.3, 0.2, t)
                                for t in (0.0, 1.0 - 1e-4, 1.0, 1.0 + 1e-4))
    assert start == pytest.approx(7.0)
    assert (after - before) / 2e-4 == pytest.approx(-0.6 * at + 3 * 0.2 + 0.5 * 5.25, rel=1e-6)


@pytest.mark.parametrize("paths, time_end, steps", [
    (500, 100.0, 5000), pytest.param(4000, 200.0, 40000, marks=pytest.mark.slow)])
def test_theorem_c1_by_simulation(paths, time_end, steps):
    """From w = 0, γ = 1, with λ = q = 0.1 and w* = 1. μ = 0.1: the means of ‖w‖² and ‖γ‖² are below
    their bounds, and every sharpness stays level. μ = 0: all but ‖w‖² keep growing. ‖γ‖² - ‖w‖²
    changes by ∫(2λ‖w‖² - 2μ‖γ‖²) dt in the mean (eq. 25): the rest has mean zero."""
    target, one, means = torch.ones(4), torch.ones(paths, 4), {}
    for mu in (0.0, 0.1):
        path = list(theory.simulate_sde(0 * one, one, target, 0.1, mu, 0.1, time_end, steps,
                                        every=steps // 100))
        w, gamma = (torch.stack(side) for side in list(zip(*path))[1:])  # (101, paths, 4)
        weights, gammas = w.square().sum(-1), gamma.square().sum(-1)
        means[mu] = torch.stack([gammas, *theory.sharpness(w, gamma, target)], -1).mean(1)

        difference, drift = gammas - weights, 0.2 * weights - 2 * mu * gammas
        drifted = torch.trapezoid(drift[10:], dx=time_end / 100, dim=0)
        martingale = difference[-1] - difference[10] - drifted
        assert abs(martingale.mean()) < 4 * martingale.std() / paths ** 0.5 < 8.0
        for k, (t, _, _) in enumerate(path[1:], 1):
            assert weights[k].mean() < theory.squared_norm_bound(0.0, target, 0.1, 0.1, t)
            if mu:
                assert gammas[k].mean() < theory.squared_norm_bound(4.0, target, mu, 0.1, t)

    early, middle, late = ({mu: m[part].mean(0) for mu, m in means.items()}
                           for part in (slice(20, 30), slice(45, 55), slice(90, 101)))
    assert (middle[0.0] > 1.15 * early[0.0]).all()
    assert (late[0.0] > 1.15 * middle[0.0]).all()
    assert ((late[0.1] / early[0.1] - 1).abs() < 0.1).all()
    assert (late[0.0] > 3 * late[0.1]).all()


# ---- decay, ours ---------------------------------------------------------------------------------

def test_what_flow_conserves_under_decay():
    """γ_j² - ‖w_j‖² where both decay; ‖α‖² under OR where only α does."""
    W, gamma, beta, alpha = draw((4, 5), (5,), (1,), (5,), seed=3)
    start = theory.column_invariant(W, gamma)
    path = gradient_flow(lambda *p: curved_loss(scale_weight(*p)), [W, gamma], 1.0, 400, [0.3, 0.3])
    for t, params in path[::100]:
        expected = theory.balance_under_decay(start, 0.3, t)
        close(theory.column_invariant(*params), expected, 1e-7)

    path = gradient_flow(lambda *p: curved_loss(W * original_reparam(*p)), [beta, alpha], 1.0, 400,
                         [0.0, 0.4])
    for t, (_, moved) in path[::100]:
        close(moved.square().sum(), theory.direction_under_decay(alpha, 0.4, t), 1e-7)


def test_an_output_norm_under_decay():
    """Where gradient flow rests. Below 1/λ decay costs AdamW next to nothing, above it γ stays at
    1/λ."""
    one, target, curvature = torch.ones(3), torch.tensor([0.5, 2, -1.0]), torch.tensor([1, 3, 0.7])

    def loss(gamma):
        return 0.5 * (curvature * (gamma - target).square()).sum()
    gamma, excess = theory.output_norm_under_decay(target, curvature, 0.4)
    [rest] = gradient_flow(loss, [one], 40.0, 200, [0.4])[-1][1]
    close(torch.stack((*gamma, excess)), torch.stack((*rest, loss(rest))))

    target = torch.tensor([3.0, -5.0, 0.5])
    for decay, limit in ((0.1, target), (0.5, torch.tensor([2.0, -2.0, 0.5]))):
        close(theory.adamw_output_norm_limit(target, decay), limit)
        path = theory_figures.adamw_path(loss, [target.sign()], 0.02, 600, decay)
        close(path[-1][0], limit, 0.02)


# ---- the figures ---------------------------------------------------------------------------------

def test_steps_that_the_page_names():
    """At each form's best rate of the figure's; a teacher that is never met is no step 0."""
    targets, lrs = theory_figures.random(16, 4, 6), [0.01 * 2 ** (k / 2) for k in range(8, 13)]
    best = [min(theory_figures.steps_to(student, targets, lr, limit=100) for lr in lrs)
            for student in ("none", "standard", "dual", "original")]
    page = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    assert "{:.0f} steps (none), {:.0f} (standard), {:.0f} (DP), {:.0f} (OR)".format(*best) in page
    with pytest.raises(AssertionError, match="more than 20 steps"):
        theory_figures.steps_to("none", targets, 1e-4, limit=20)


@pytest.mark.parametrize("conflict", [False, True])
def test_sharing_wins_in_agreement_and_heterogeneity_in_conflict(conflict):
    """At the start, by the formulas; over the figure's time, by the flow."""
    one, (loss, weights) = torch.ones(8), theory_figures.sharing_problem(conflict)
    grads = gradients(loss, weights)
    shared = theory.descent_rate_shared(weights, one, grads)
    assert (theory.descent_rate_heterogeneous(weights, [one, one], grads) < shared) == conflict
    _, shared, own = theory_figures.sharing_paths(conflict)
    assert all((b < a) == conflict for a, b in zip(shared[1:], own[1:]))


@pytest.mark.parametrize("names", [
    ["reparam"], pytest.param([*theory_figures.FIGURES], marks=pytest.mark.slow)], ids=len)
def test_the_figures_of_the_page_are_drawn(names, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    assert set(re.findall(r"images/theory_(\w+).png", page)) == set(theory_figures.FIGURES)
    pytest.importorskip("matplotlib", reason="needs the optional package matplotlib")
    torch.set_default_dtype(torch.float32)  # as where the command is run
    drawers = {name: theory_figures.FIGURES[name] for name in names}
    monkeypatch.setattr(theory_figures, "FIGURES", drawers)
    theory_figures.main([str(tmp_path)])
    assert {path.stem for path in tmp_path.iterdir()} == {f"theory_{name}" for name in names}
