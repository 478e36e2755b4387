"""
Draws the statements of theory/theorems.py on small problems that are integrated numerically, in
about a minute on one CPU core.

  python -m theory.figures [FOLDER]      writes docs/images/theory_*.png

docs/theory.md explains each figure. The same command draws the same files: every random number has
a seed, and one thread adds up.
"""
import argparse
import sys
import time
from pathlib import Path

import torch

from lib.output import say
from norms import ScaledLinear, PreNorm, exponential_reparam, original_reparam, rms_norm
from theory import theorems as theory
from theory.theorems import STUDENTS, gradient_flow, start, teacher_loss

GREY, BLUE, ORANGE, GREEN, RED = "#777777", "#1f77b4", "#e6750a", "#2a9d4a", "#c22f2f"
COLORS = {"none": GREY, "standard": BLUE, "dual": ORANGE, "original": ORANGE}
SYMBOLS = {"dual": r"\varphi", "original": r"\psi"}
NAMES = {
    "none": "no scale vector",
    "standard": "standard form f",
    "dual": "DP φ",
    "original": "OR ψ",
}
# teachers without (iii)'s condition: the standard form overtakes
COUNTEREXAMPLES = {"dual": [[4.0], [0.4]], "original": [[5.0, 0.02]]}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grid(plt, rows, columns, height):
    figure = plt.Figure(figsize=(8, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def finish(axis, title, x, y, columns=1, **kwargs):
    """Titles, and the legend below the axes, where it covers nothing."""
    axis.set(title=title, xlabel=x, ylabel=y, **kwargs)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncol=columns, frameon=False)


def student_flow(student, target, time_end, steps):
    """(times, losses, path) of gradient flow in the setting of the theorems."""
    def loss(*params):
        return teacher_loss(STUDENTS[student](*params), target)
    path = gradient_flow(loss, start(student, target), time_end, steps)
    return [t for t, _ in path], torch.stack([loss(*p) for _, p in path]), [p for _, p in path]


def figure_2_2(plt):
    """Theorem 2.2: the loss with and without γ, and the hyperbola on which each column moves."""
    target = random(4, 6) * torch.tensor([0.1, 0.3, 0.5, 0.8, 1.1, 1.5], dtype=torch.float64)
    figure, ((left, right),) = grid(plt, 1, 2, 3.6)
    for student in ("none", "standard"):
        times, losses, path = student_flow(student, target, 4.0, 400)
        left.semilogy(times, losses, color=COLORS[student], label=NAMES[student])
    finish(left, "Theorem 2.2: lower at every t > 0", "time t of gradient flow", "loss L(t)",
           ylim=(1e-4, 20))

    x = torch.linspace(0, 1.05 * max(p[0].norm(dim=-2).max().item() for p in path), 200)
    right.plot(x, (1 + x ** 2).sqrt(), ":", color="black", label=r"$\gamma_j^2-\|w_j\|^2=1$")
    for j in range(target.size(1)):
        lengths, gammas = [W[:, j].norm() for W, _ in path], [gamma[j] for _, gamma in path]
        right.plot(lengths, gammas, color=BLUE, linewidth=3, alpha=0.35)
        label = "columns j at t = 4" if j == 0 else None
        right.plot(lengths[-1], gammas[-1], "o", color=BLUE, label=label)
    finish(right, "The invariant: γ grows with its column", r"$\|w_j\|$", r"$\gamma_j$", columns=2)
    return figure


def figure_2_3(plt):
    """Theorem 2.3 / C.1: the stochastic flow with and without decay μ on γ, mean of 1,000 paths."""
    target, decay, noise = torch.ones(4, dtype=torch.float64), 0.1, 0.1
    one = torch.ones(1000, 4, dtype=torch.float64)
    figure, ((left, middle, right),) = grid(plt, 1, 3, 3.3)
    for mu, color in ((0.0, RED), (0.02, GREEN), (0.1, BLUE)):
        times, norms, spectra = [], [], []
        for t, w, gamma in theory.simulate_sde(0 * one, one, target, decay, mu, noise, 100.0,
                                               steps=20000, every=200):
            times.append(t)
            norms.append(gamma.square().sum(-1).mean())
            spectra.append([metric.mean() for metric in theory.sharpness(w, gamma, target)])
        left.plot(times, norms, color=color)
        if mu:
            bound = [theory.squared_norm_bound(4.0, target, mu, noise, t) for t in times]
            left.plot(times, bound, ":", color=color)
        middle.plot(times, [s[0] for s in spectra], color=color, label=f"decay μ = {mu:g} on γ")
        right.plot(times, [s[1] for s in spectra], color=color)
        right.plot(times, [s[2] for s in spectra], "--", color=color)
    left.plot([], [], color="black", label="mean over paths")
    left.plot([], [], ":", color="black", label="bound from eq. 30")
    right.plot([], [], color="black", label="trace")
    right.plot([], [], "--", color="black", label="Frobenius norm")
    finish(left, r"$\|\gamma\|^2$", "time t", "mean", ylim=(0, 50))
    finish(middle, r"Hessian's $\lambda_{max}$", "time t", "mean", ylim=(0, None))
    finish(right, "Hessian's other norms", "time t", "mean", ylim=(0, None))
    return figure


def compare(axis, student, target, time_end, steps, title):
    for name in ("standard", student):
        times, losses, _ = student_flow(name, target, time_end, steps)
        axis.semilogy(times, losses, color=COLORS[name], label=NAMES[name])
    finish(axis, title, "time t", "loss", ylim=(1e-8, 30))


def dual_rates(target, W, v, u):
    """-dL/dt of the standard form and of DP at one effective state and one v, and their difference
    by the paper's formula."""
    G = STUDENTS["dual"](W, v, u) - target
    standard = theory.descent_rate_standard(W * u.unsqueeze(-1), v, G)
    return -standard, -theory.descent_rate_dual(W, u, v, G), theory.dual_advantage(W, u, v, G)


def original_rates(target, W, beta, alpha):
    """-dL/dt of the standard form and of OR at one W and γ, and their difference by the paper's
    formula."""
    v = original_reparam(beta, alpha)
    G = W * v - target
    grad, P = (W * G).sum(0), theory.original_preconditioner(beta, alpha)
    standard = theory.descent_rate_standard(W, v, G)
    original = (v ** 2 * G.square().sum(0)).sum() + grad @ P @ grad
    return -standard, original, theory.original_advantage(beta, alpha, grad)


def three_claims(plt, student, rates, law, special, special_name):
    """The paper's figure 11: (i) and (ii) for a random teacher, (iii) for one that satisfies its
    condition."""
    figure, ((first, second, third),) = grid(plt, 1, 3, 3.5)
    target = random(4, 6) / 2
    times, _, path = student_flow(student, target, 1.5, 400)
    slower, faster, gain = zip(*(rates(target, *p) for p in path[1:]))
    first.semilogy(times[1:], faster, color=COLORS[student], label=NAMES[student])
    first.semilogy(times[1:], slower, color=BLUE, label="standard form f, same state")
    first.semilogy(times[1:], gain, "--", color=GREEN, label="difference, by the formula")
    finish(first, "(i) Faster at the same state", "time t", r"$-dL/dt$")

    times, losses, _ = student_flow(student, target, 0.02, 100)
    gap = student_flow("standard", target, 0.02, 100)[1] - losses
    theirs = torch.stack([-law(target, t) for t in times])
    second.plot(times, gap, color=COLORS[student], label=rf"$L_f - L_{{{SYMBOLS[student]}}}$")
    second.plot(times, theirs, "--", color="black", label="the law in t³")
    second.plot(times, (gap - theirs).abs(), ":", color=RED, label="what is left, order t⁴")
    finish(second, "(ii) First gain: a law in t³", "time t", "difference of losses")

    compare(third, student, special, 3.0, 600, f"(iii) {special_name}")
    return figure


def figure_3_1(plt):
    """Theorem 3.1 / D.1: DP against the standard form, the twin of the paper's figure 11."""
    matching = torch.zeros(4, 6, dtype=torch.float64)
    matching[range(4), [2, 0, 5, 3]] = torch.tensor([0.6, 1.0, 1.5, 2.0], dtype=torch.float64)
    return three_claims(
        plt, "dual", dual_rates, theory.dual_law, matching, "W*: support a matching")


def figure_3_2(plt):
    """Theorem 3.2 / D.2: OR against the standard form, the paper's figure 11."""
    balanced = random(4, 6) / random(4, 6).norm(dim=0)
    return three_claims(
        plt, "original", original_rates, theory.original_law, balanced, "W*: equal columns")


def states_off_the_flow():
    """Two states that the theorems' flows never reach. DP: (target, W̃, v) with G only in the row
    where W̃ is zero, so that only u_i² counts. OR: (target, W, alpha) at γ = 1 with ∇γ mostly
    across γ. target, W̃, W (2, d); v, alpha (d,)."""
    one = torch.ones(6, dtype=torch.float64)
    W = torch.stack((one, 0 * one))
    across = torch.tensor([1.2, -0.8] * 3, dtype=torch.float64)
    dual = torch.stack((one, across)), W, one
    original = torch.stack((one + across, 0 * one)), W, one
    return dual, original


def figure_conditions(plt):
    """Ours: where theorems 3.1 and 3.2 need their conditions."""
    figure, axes = grid(plt, 2, 2, 7.0)
    (dual_target, dual_W, v), (target, W, alpha) = states_off_the_flow()
    squares = torch.logspace(-1, 1, 100, dtype=torch.float64)
    # W̃ stays the same, and so does Norm(α)
    dual = [dual_rates(dual_target, dual_W / u, v, u.expand(2)) for u in squares.sqrt()]
    original = [original_rates(target, W, alpha[:1], alpha / rho ** 0.5) for rho in squares]

    for axis, rates, student, condition, x in (
            (axes[0, 0], dual, "dual", r"$u_i^2 \geq 1$", r"$u_i^2$, all rows alike"),
            (axes[0, 1], original, "original", "ρ ≥ 1", r"$\rho=\beta^2 d/\|\alpha\|^2$")):
        axis.loglog(squares, [r[1] for r in rates], color=COLORS[student], label=NAMES[student])
        axis.loglog(squares, [r[0] for r in rates], color=BLUE, label=NAMES["standard"])
        axis.axvspan(1, 10, color=GREEN, alpha=0.15, linewidth=0,
                     label=f"{condition}: the flow from the start")
        title = f"{NAMES[student][:2]}, one effective state: (i) can fail below 1"
        finish(axis, title, x, r"$-dL/dt$")

    for axis, student, time_end, steps, teacher in (
            (axes[1, 0], "dual", 2.0, 800, "(4, 0.4)ᵀ"),
            (axes[1, 1], "original", 3.0, 1200, "(5, 0.02)")):
        target = torch.tensor(COUNTEREXAMPLES[student], dtype=torch.float64)
        title = f"{NAMES[student][:2]}, (iii) without its condition: W* = {teacher}"
        compare(axis, student, target, time_end, steps, title)
    return figure


def sharing_problem(conflict, seed=0):
    """(loss of W̃_1 and W̃_2, start): two branches read the same features. Branch 1 must double
    half of them and halve the others. Branch 2 must do the same (they agree) or the opposite (they
    conflict)."""
    starts = [random(3, 8, seed=seed + b) / 2 for b in range(2)]
    factor = torch.tensor([2.0] * 4 + [0.5] * 4, dtype=torch.float64)
    targets = [starts[0] * factor, starts[1] * (factor.flip(0) if conflict else factor)]

    def loss(a, b):
        return 0.5 * ((a - targets[0]).square().sum() + (b - targets[1]).square().sum())
    return loss, starts


def sharing_paths(conflict):
    """(times, losses with one shared γ, losses with HG) on sharing_problem."""
    loss, (a, b) = sharing_problem(conflict)
    one = torch.ones(8, dtype=torch.float64)
    shared = gradient_flow(lambda A, B, v: loss(A * v, B * v), [a, b, one], 2.0, 200)
    own = gradient_flow(lambda A, B, v, w: loss(A * v, B * w), [a, b, one, one], 2.0, 200)
    return ([t for t, _ in shared], [loss(A * v, B * v).item() for _, (A, B, v) in shared],
            [loss(A * v, B * w).item() for _, (A, B, v, w) in own])


def figure_heterogeneity(plt):
    """HG, ours: a case where one shared γ is faster and one where a γ for each branch is."""
    figure, (axes,) = grid(plt, 1, 2, 3.4)
    for axis, conflict in zip(axes, (False, True)):
        times, shared, own = sharing_paths(conflict)
        axis.semilogy(times, shared, color=BLUE, label="one shared γ")
        axis.semilogy(times, own, color=ORANGE, label="a γ for each branch (HG)")
        verdict = "conflict: HG is faster" if conflict else "agree: sharing is faster"
        finish(axis, f"The branches {verdict}", "time t", "loss", columns=2)
    return figure


def velocity_preconditioner(name, size, direction):
    """P of OR or ER at γ = size · direction."""
    if name == "OR":
        beta = torch.tensor([size], dtype=torch.float64)
        return theory.original_preconditioner(beta, direction)
    alpha = (size * direction).log()
    beta = alpha.mean()[None]
    assert torch.allclose(exponential_reparam(beta, alpha), size * direction)
    return theory.exponential_preconditioner(beta, alpha)


def figure_reparam(plt):
    """OR and ER, the formulas: how far γ moves for a unit gradient in each direction, d = 2."""
    figure, (axes,) = grid(plt, 1, 2, 3.6)
    angle = torch.linspace(0, 2 * torch.pi, 200, dtype=torch.float64)
    circle = 0.15 * torch.stack((angle.cos(), angle.sin()))
    direction = torch.tensor([1.25, 0.66], dtype=torch.float64)
    direction = direction / direction.square().mean().sqrt()  # length √d

    for axis, name in zip(axes, ("OR", "ER")):
        for size, color in ((0.5, GREEN), (1.0, BLUE), (1.5, ORANGE)):
            gamma = size * direction
            P = velocity_preconditioner(name, size, direction)
            axis.plot(*gamma, "o", color=color, label=f"γ of length {size:g} √d")
            axis.plot(*(gamma[:, None] + P @ circle), color=color)
            axis.plot(*(gamma[:, None] + circle), ":", color=color)
        axis.plot([], [], color="black", label="γ + 0.15 P e, all unit vectors e")
        axis.plot([], [], ":", color="black", label="γ + 0.15 e: plain γ, P = I")
        ray = torch.stack((0 * direction, 1.9 * direction), 1)
        axis.plot(*ray, color=GREY, linewidth=0.7, zorder=0)
        axis.set(title=f"{name}: velocity of γ", xlabel=r"$\gamma_1$", ylabel=r"$\gamma_2$",
                 aspect="equal", xlim=(0, 3), ylim=(-0.1, 1.6))
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncol=2, frameon=False)
    return figure


def pre_norm_difference(size, eps, own_eps):
    """Relative difference of DNP's two forms: Norm(W Norm(x)) of eq. 7 with ε in both norms, and
    Norm(W x) with own_eps in its norm, for streams x of RMS `size` and W as a GPT starts."""
    m = ScaledLinear((256, 256), "dual_norm", vectors=False).double()
    m.weight.data.copy_(0.02 * random(256, 256))
    x = size * rms_norm(random(64, 256, seed=1), 0.0)
    m.eps = eps
    expected = m(rms_norm(x, eps))
    norm = PreNorm([m], eps=eps)  # which leaves the division out
    m.eps = own_eps
    found = m(norm(x))
    return ((found - expected).norm() / expected.norm()).item()


def figure_pre_norm(plt):
    """DNP without the Pre-Norm: the relative difference from eq. 7's form, against ε."""
    figure, (axes,) = grid(plt, 1, 2, 3.6)
    scales = [10 ** (k / 2) for k in range(-20, -5)]
    panels = zip(axes, (1, 2), ("DNP keeps its ε", "DNP has ε², as in this code"))
    for axis, power, title in panels:
        for size, style, color in ((0.02, "-", ORANGE), (1.0, "--", BLUE), (50.0, ":", GREEN)):
            difference = [pre_norm_difference(size, eps, eps ** power) for eps in scales]
            axis.loglog(scales, difference, style, color=color, label=f"RMS {size:g}")
        axis.axvline(1e-6, color=GREY, linewidth=0.7, zorder=0)
        finish(axis, title, "ε of the Pre-Norm", "relative difference", columns=3,
               ylim=(1e-13, 3))
    return figure


def figure_output_norm(plt):
    """Section 2.2, ours: decay on an Output-Norm costs loss; on an Input-Norm the weight grows."""
    target = torch.tensor([0.5, 1.5, 3.0], dtype=torch.float64)
    one = torch.ones(3, dtype=torch.float64)

    def output(gamma):
        return 0.5 * (gamma - target).square().sum()

    def input(gamma, w):
        return output(gamma * w)

    figure, ((left, right),) = grid(plt, 1, 2, 3.4)
    for decay, color in ((0.0, GREY), (0.05, ORANGE), (0.2, RED)):
        for axis, loss, params, decays in (
                (left, output, [one], [decay]), (right, input, [one, one], [decay, 0.0])):
            path = gradient_flow(loss, params, 40.0, 400, decays)
            axis.plot([t for t, _ in path], [loss(*p) for _, p in path], color=color,
                      label=f"decay {decay:g}")
        rest = theory.output_norm_under_decay(target, one, decay)[1]
        left.axhline(rest, color="black", linestyle=":", linewidth=1)
    left.plot([], [], ":", color="black", label="formula")
    finish(left, "Output-Norm: only γ can reach γ*", "time t", "loss", columns=2,
           ylim=(-0.01, 0.3))
    finish(right, "Input-Norm: γ w can, and only γ decays", "time t", "loss", columns=3,
           ylim=(-0.01, 0.3))
    return figure


def adamw_path(loss, params, lr, steps, weight_decay=0.0):
    """[params] after 0 ... steps updates of torch.optim.AdamW with β = (0.9, 0.95), at one learning
    rate."""
    params = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    path = [[p.detach().clone() for p in params]]
    for _ in range(steps):
        optimizer.zero_grad()
        loss(*params).backward()
        optimizer.step()
        path.append([p.detach().clone() for p in params])
    return path


def steps_to(student, targets, lr, share=1e-2, limit=400):
    """Mean over the teachers of the AdamW steps until the loss is `share` of its start. targets
    (teachers, m, d). Adam treats every coordinate by itself, so one run trains all."""
    def losses(*params):
        return teacher_loss(STUDENTS[student](*params), targets)
    path = adamw_path(lambda *p: losses(*p).sum(), start(student, targets), lr, limit)
    reached = torch.stack([losses(*p) for p in path]) < share * losses(*path[0])
    assert reached.any(0).all(), f"{student} at lr={lr} needs more than {limit} steps"
    return reached.int().argmax(0).double().mean().item()


def figure_adamw(plt):
    """AdamW, ours: steps to a loss for the theorems' students, and an Output-Norm under decay."""
    figure, ((left, right),) = grid(plt, 1, 2, 3.8)
    draw_adamw_steps(left)
    draw_adamw_output_norm(right)
    return figure


def draw_adamw_steps(axis):
    targets, lrs = random(16, 4, 6), [0.01 * 2 ** (k / 2) for k in range(15)]
    colors = {"none": GREY, "standard": BLUE, "dual": ORANGE, "original": GREEN}
    for student, color in colors.items():
        steps = [steps_to(student, targets, lr) for lr in lrs]
        label = f"{NAMES[student]}: best {min(steps):.0f}"
        axis.loglog(lrs, steps, "o-", markersize=4, color=color, label=label)
    axis.set_xticks([0.01, 0.03, 0.1, 0.3, 1.0], ["0.01", "0.03", "0.1", "0.3", "1"])
    axis.set_yticks([25, 50, 100, 200], ["25", "50", "100", "200"])
    axis.minorticks_off()
    finish(axis, "Steps to 1% of the loss, mean of 16 teachers", "learning rate", "AdamW steps",
           columns=2)


def draw_adamw_output_norm(axis):
    wanted = torch.tensor([3.0], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)

    def loss(gamma):
        return 0.5 * (gamma - wanted).square().sum()

    # the curve of decay 0.1 lies on the one without decay
    for decay, color, style, order in (
            (0.0, GREY, "-", 2), (0.1, GREEN, "--", 3), (0.5, RED, "-", 2)):
        path = adamw_path(loss, [one], 0.02, 400, decay)
        axis.plot([p[0] for p in path], style, color=color, label=f"decay {decay:g}", zorder=order)
    limit = theory.adamw_output_norm_limit(wanted, 0.5).item()
    axis.axhline(limit, linestyle=":", color="black", label="1 / 0.5, where λγ = 1")
    finish(axis, "An Output-Norm's γ that should be 3", "AdamW step", "γ", columns=2)


FIGURES = {
    "2_2_standard": figure_2_2,
    "2_3_decay": figure_2_3,
    "3_1_dual": figure_3_1,
    "3_2_original": figure_3_2,
    "conditions": figure_conditions,
    "heterogeneity": figure_heterogeneity,
    "pre_norm": figure_pre_norm,
    "reparam": figure_reparam,
    "output_norm": figure_output_norm,
    "adamw": figure_adamw,
}
STYLE = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.fontsize": 8.5,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.formatter.limits": (-3, 4),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m theory.figures", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="docs/images",
                        help="where they go (default: docs/images)")
    folder = parser.parse_args(argv).folder
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: the figures need matplotlib: pip install matplotlib")
    from matplotlib import figure
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, so the same bytes on any number of cores
    with matplotlib.rc_context():  # a notebook's settings stay as they are
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        draw_all(figure, Path(folder))
    torch.set_num_threads(threads)


def draw_all(plt, folder):
    from PIL import Image  # comes with matplotlib
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    for done, (name, draw) in enumerate(FIGURES.items(), 1):
        path = folder / f"theory_{name}.png"
        draw(plt).savefig(path)
        # a third of the bytes
        Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
        seconds = time.monotonic() - begun
        say(f"{done}/{len(FIGURES)}  {path}  {draw.__doc__}  ({seconds:.0f} s)")


if __name__ == "__main__":
    main()
