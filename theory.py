"""
Why scale vectors help: the mathematics as functions that can be called, and pictures of them.

  python theory.py            writes figures/theory_*.png, in under a minute on a CPU

Setting. x̂ = Norm(x) in R^d, a linear map W (m, d), W̃ its effective weight, L the loss, G = ∂L/∂W̃ (m, d); w_j, G_j the j-th
columns. Gradient flow dθ/dt = -∂L/∂θ on the trained parameters moves W̃ in a way that depends on how W̃ is written. Each
function says whose claim its statement is: "paper" (arXiv 2605.26895; its abstract and what readers report), or "our
derivation". All of it speaks of gradient flow; what of it survives AdamW is measured in figure 7, not proved.
"""
import functools
import sys
import time
from pathlib import Path

import torch

from norms import exponential_reparam, ordinary_reparam, scale_weight

# ---------------------------------------------------------------------------------------------------------------------
# the statements


def absorb(W, gamma):
    """W (γ ⊙ x̂) = (W diag γ) x̂: a linear map behind γ can take it over, so γ adds no function. Paper's claim.
    The j-th column of W meets only x̂_j, so scaling x̂_j by γ_j or the column by γ_j is the same. (m, d), (d,) -> (m, d)."""
    return scale_weight(W, gamma)


def preconditioner(w, gamma):
    """P_j = γ_j² I + w_j w_jᵀ: gradient flow on (W, γ) moves w̃_j = γ_j w_j by -P_j G_j. w (m,), gamma () -> (m, m).
    Paper's claim: γ is a self-amplifying preconditioner; the form is our derivation. The chain rule gives
    ∂L/∂w_j = γ_j G_j and ∂L/∂γ_j = <w_j, G_j>, and d w̃_j = γ_j dw_j + w_j dγ_j. Without γ, P = I. As P_j ⪰ γ_j² I and γ_j
    grows with |w_j| (see conserved), the larger a feature's weight has become, the faster it moves."""
    return gamma ** 2 * torch.eye(len(w), dtype=w.dtype) + torch.outer(w, w)


def effective_velocity(W, gamma, G):
    """dW̃/dt = -[γ_j² G_j + w_j <w_j, G_j>]_j: preconditioner for all columns at once. Our derivation.
    W (m, d), gamma (d,), G (m, d) -> (m, d)."""
    return -(gamma ** 2 * G + W * (W * G).sum(0))


def effective_velocity_dual(W, u, v, G):
    """dW̃/dt for W̃ = diag(u) W diag(v), all three trained: -[u_i² v_j² G_ij + W̃_ij (row_i / u_i + col_j / v_j)] with
    row_i = Σ_j W_ij v_j G_ij = ∂L/∂u_i and col_j = Σ_i W_ij u_i G_ij = ∂L/∂v_j. Our derivation (product rule).
    W (m, d), u (m,), v (d,), G (m, d) -> (m, d)."""
    row, col = (W * v * G).sum(1), (W * u[:, None] * G).sum(0)
    return -((u[:, None] * v) ** 2 * G + W * v * row[:, None] + W * u[:, None] * col)


def conserved(W, gamma):
    """γ_j² - |w_j|² for each j: gradient flow on (W, γ) does not change it. Our derivation: d(γ_j²)/dt = -2 γ_j <w_j, G_j> and
    d|w_j|²/dt = -2 <w_j, γ_j G_j> are the same. So (|w_j|, γ_j) moves on a hyperbola. (m, d), (d,) -> (d,)."""
    return gamma ** 2 - W.square().sum(0)


def descent_rate(G):
    """dL/dt = -Σ G_ij² with no scale vector: W̃ = W. (m, d) -> ()."""
    return -G.square().sum()


def descent_rate_shared(weights, gamma, grads):
    """dL/dt = -Σ_j [γ_j² Σ_b |G_j^b|² + (Σ_b <w_j^b, G_j^b>)²] with one γ for all branches b. Our derivation: by the chain rule
    dL/dt is minus the squared gradient, and γ's gradient is the sum over its branches. [(m_b, d)], (d,), [(m_b, d)] -> ()."""
    common = sum((W * G).sum(0) for W, G in zip(weights, grads))
    return -(sum((gamma ** 2 * G.square()).sum() for G in grads) + common.square().sum())


def descent_rate_heterogeneous(weights, gammas, grads):
    """dL/dt = -Σ_b Σ_j [γ_j^b² |G_j^b|² + <w_j^b, G_j^b>²]: HG, a γ for each branch. That it helps is the paper's claim; the rate is
    our derivation, and it says when: from the same point it is the shared rate with Σ_b <·>² in place of (Σ_b <·>)². Sharing
    wins when the branches agree on which features to turn up, separate vectors when they conflict. Neither dominates.
    [(m_b, d)], [(d,)], [(m_b, d)] -> ()."""
    return sum(descent_rate_shared([W], gamma, [G]) for W, gamma, G in zip(weights, gammas, grads))


def descent_rate_single(W, v, G):
    """dL/dt with a vector on the input side only: descent_rate_shared with one branch. (m, d), (d,), (m, d) -> ()."""
    return descent_rate_shared([W], v, [G])


def descent_rate_dual(W, u, v, G):
    """dL/dt = -Σ_ij u_i² v_j² G_ij² - Σ_i (Σ_j W_ij v_j G_ij)² - Σ_j (Σ_i W_ij u_i G_ij)² for W̃ = diag(u) W diag(v): DP. That it helps is
    the paper's claim; the rate is our derivation: minus the squared gradients of W, u and v. At u = 1 it is the single rate
    plus the row term, so never slower at that instant; later the two are at different points, and nothing is promised."""
    row, col = (W * v * G).sum(1), (W * u[:, None] * G).sum(0)
    return -((u[:, None] * v * G).square().sum() + row.square().sum() + col.square().sum())


def ordinary_preconditioner(beta, alpha):
    """OR: γ = β α moves by -(β² I + α αᵀ) ∇γ. (), (d,) -> (d, d). The split is the paper's; the form is our derivation: the
    Jacobian of γ is [α, β I], and a flow moves γ by -J Jᵀ ∇γ. Speed β² across α and β² + |α|² along it."""
    return beta ** 2 * torch.eye(len(alpha), dtype=alpha.dtype) + torch.outer(alpha, alpha)


def exponential_preconditioner(beta, alpha):
    """ER: γ = e^β α moves by -(e^{2β} I + γ γᵀ) ∇γ. (), (d,) -> (d, d). As ordinary_preconditioner, with Jacobian [γ, e^β I].
    Speed e^{2β} across α and e^{2β} (1 + |α|²) along it: the ratio does not depend on β, unlike in OR."""
    gamma = exponential_reparam(beta, alpha)
    return (2 * beta).exp() * torch.eye(len(alpha), dtype=alpha.dtype) + torch.outer(gamma, gamma)


def balance_under_decay(start, decay, t):
    """γ_j² - |w_j|² = start · e^{-2λt} when both decay at λ (dθ/dt = -∂L/∂θ - λθ): decay balances the pair. Our derivation: decay
    adds -2λγ_j² and -2λ|w_j|² to the two equal rates of `conserved`."""
    return start * torch.exp(torch.as_tensor(-2.0 * decay * t, dtype=torch.float64))


def sharpness_on_symmetry(A, B, c):
    """Trace of the Hessian at (cγ, W/c): c² A + B / c², where A and B are its traces over W and over γ at c = 1. Our derivation: the
    function does not change, and L's second derivatives are γ_j² ∂²L/∂W̃_ij² in W and w_jᵀ (∂²L/∂w̃_j²) w_j in γ (W̃ is linear
    in each, so there is no other term on the diagonal). So a γ that grows without bound is sharpness without bound, and
    decay on an Input-Norm's γ, which the next matrix can make up for, holds it down. That it helps is the paper's claim."""
    return c ** 2 * A + B / c ** 2


def output_norm_under_decay(target, curvature, decay):
    """(γ, excess loss) where the flow on L = Σ ½ a_i (γ_i - γ*_i)² with decay λ comes to rest: γ = γ* a/(a+λ), and the loss is
    Σ ½ a (γ* λ/(a+λ))² above its minimum. target γ* (d,), curvature a (d,) -> (d,), (). The paper's claim: decay hurts an
    Output-Norm. Our derivation of why: the scale of γ ⊙ Norm(z) is γ alone, so no weight can undo the decay. For the same
    target on an Input-Norm, γ may decay as it likes: W grows, and the loss goes to its minimum (figure 4)."""
    gamma = target * curvature / (curvature + decay)
    return gamma, (0.5 * curvature * (target * decay / (curvature + decay)) ** 2).sum()


# ---------------------------------------------------------------------------------------------------------------------
# gradient flow

def gradients(loss, params):
    params = [p.detach().requires_grad_() for p in params]
    return torch.autograd.grad(loss(*params), params)


def gradient_flow(loss, params, time_end, steps, decays=None):
    """Integrate dθ/dt = -∂L/∂θ - λθ by the classical Runge-Kutta method of order 4. loss: function of the params; decays: λ for
    each (default 0). Returns [(t, params)] for t = 0 ... time_end, steps + 1 entries."""
    decays, h = decays or [0.0] * len(params), time_end / steps

    def slope(at):
        return [-g - decay * p for g, decay, p in zip(gradients(loss, at), decays, at)]

    def moved(slopes, factor):
        return [p + factor * s for p, s in zip(params, slopes)]

    path = [(0.0, params)]
    for step in range(steps):
        k1 = slope(params)
        k2 = slope(moved(k1, h / 2))
        k3 = slope(moved(k2, h / 2))
        k4 = slope(moved(k3, h))
        params = [p + h / 6 * (a + 2 * b + 2 * c + d) for p, a, b, c, d in zip(params, k1, k2, k3, k4)]
        path.append(((step + 1) * h, params))
    return path


def hessian_trace(loss, params):
    """Sum of all second derivatives on the diagonal, by autograd. For small problems."""
    shapes, flat = [p.shape for p in params], torch.cat([p.reshape(-1) for p in params])

    def of_flat(vector):
        parts = vector.split([s.numel() for s in shapes])
        return loss(*(part.view(s) for part, s in zip(parts, shapes)))
    return torch.autograd.functional.hessian(of_flat, flat).trace()


def regression(m=6, d=8, condition=1000.0, seed=0):
    """(loss of W̃, W*, start W): ½ E|W̃ x̂ - W* x̂|² with independent inputs of variances from 1 down to 1/condition, and a target whose
    columns are the larger the rarer the input, so that every feature matters. All float64."""
    generator = torch.Generator().manual_seed(seed)
    variance = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), d, dtype=torch.float64)
    target = torch.randn(m, d, generator=generator, dtype=torch.float64) / variance.sqrt()
    start = 0.3 * torch.randn(m, d, generator=generator, dtype=torch.float64)
    return lambda W: 0.5 * ((W - target).square() * variance).sum(), target, start


WRITTEN = {  # the three ways to write W̃, each from the same W̃ at the start
    "no scale vector": (lambda W: W, lambda W: [W]),
    "input side (baseline)": (scale_weight, lambda W: [W, torch.ones(W.size(1), dtype=W.dtype)]),
    "both sides (DP)": (scale_weight, lambda W: [W, torch.ones(W.size(1), dtype=W.dtype), torch.ones(W.size(0), dtype=W.dtype)])}


# ---------------------------------------------------------------------------------------------------------------------
# the figures

def figure_placement(plt):
    """1: loss against time for no, single and dual scale vectors."""
    loss, _, start = regression()
    figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for name, (write, params) in WRITTEN.items():
        path = gradient_flow(lambda *p, write=write: loss(write(*p)), params(start), time_end=8.0, steps=800)
        axis.semilogy([t for t, _ in path], [loss(write(*p)).item() for _, p in path], label=name)
    axis.set(xlabel="time", ylabel="loss", title="Gradient flow on one ill-conditioned regression (condition 1000)")
    axis.legend()
    return figure


def figure_hyperbola(plt):
    """2: γ_j against |w_j| while they grow together."""
    loss, _, start = regression()
    path = gradient_flow(lambda W, v: loss(scale_weight(W, v)), [start, torch.ones(start.size(1), dtype=start.dtype)], 8.0, 800)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for j in range(start.size(1)):
        norms, gammas = [p[0][:, j].norm().item() for _, p in path], [p[1][j].item() for _, p in path]
        left.plot(norms, gammas, color=plt.cm.viridis(j / start.size(1)))
        invariant = conserved(start, torch.ones(start.size(1), dtype=start.dtype))[j].item()
        ends = torch.linspace(0.3, max(norms) * 1.1, 100).square() + invariant
        left.plot(torch.linspace(0.3, max(norms) * 1.1, 100), ends.clamp(min=0).sqrt(), ":", color="gray", linewidth=0.7)
        speed = [gammas[i] ** 2 + norms[i] ** 2 for i in range(len(path))]
        right.semilogy([t for t, _ in path], speed, color=plt.cm.viridis(j / start.size(1)))
    left.set(xlabel="$\\|w_j\\|$", ylabel="$\\gamma_j$", title="Each feature moves on its hyperbola (dotted)")
    right.set(xlabel="time", ylabel="largest eigenvalue of $P_j$", title="Self-amplification; bright: rare inputs")
    return figure


def figure_sharpness(plt):
    """3: sharpness with and without weight decay on an Input-Norm's γ (and its matrix)."""
    loss, _, start = regression(m=3, d=4, condition=10.0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for decay, color in ((0.0, "C3"), (0.02, "C1"), (0.1, "C0")):
        def both(W, v):
            return loss(scale_weight(W, v))
        path = gradient_flow(both, [start / 6, 6 * torch.ones(4, dtype=start.dtype)], 20.0, 2000, [decay, decay])[::20]
        label = f"decay {decay:g}"
        left.semilogy([t for t, _ in path], [hessian_trace(both, p).item() for _, p in path], color=color, label=label)
        balance = [conserved(*p).mean().item() for _, p in path]
        right.semilogy([t for t, _ in path], balance, color=color, label=label)
        expected = [balance_under_decay(balance[0], decay, t).item() for t, _ in path]
        right.semilogy([t for t, _ in path], expected, ":", color="black", linewidth=1)
    left.set(xlabel="time", ylabel="trace of the Hessian", title="Sharpness, from a start at γ = 6")
    right.set(xlabel="time", ylabel="mean of $\\gamma_j^2 - \\|w_j\\|^2$", title="Balance; dotted: the formula")
    left.legend()
    return figure


def figure_output_norm(plt):
    """4: the same target scale on an Output-Norm and on an Input-Norm, γ decayed in both."""
    target, curvature = torch.tensor([0.5, 1.5, 3.0], dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    one = torch.ones(3, dtype=torch.float64)

    def output(gamma):
        return 0.5 * (curvature * (gamma - target).square()).sum()
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for decay, color in ((0.0, "C7"), (0.05, "C1"), (0.2, "C3")):
        path = gradient_flow(output, [one], 40.0, 400, [decay])
        both = gradient_flow(lambda gamma, w: output(gamma * w), [one, one], 40.0, 400, [decay, 0.0])
        times = [t for t, _ in path]
        for i in range(3):
            axes[0].plot(times, [p[0][i] for _, p in path], color=color, label=f"decay {decay:g}" if i == 0 else None)
        axes[1].plot(times, [output(p[0]).item() for _, p in path], color=color)
        axes[1].axhline(output_norm_under_decay(target, curvature, decay)[1].item(), color="black", linestyle=":", linewidth=1)
        axes[2].plot(times, [output(p[0] * p[1]).item() for _, p in both], color=color)
    for t in target:
        axes[0].axhline(t, color="black", linestyle="--", linewidth=0.7)
    axes[0].set(xlabel="time", ylabel="γ", title="Output-Norm: γ and its targets (dashed)")
    axes[1].set(xlabel="time", ylabel="loss", ylim=(0, 0.3), title="the loss this costs (dotted: the formula)")
    axes[2].set(xlabel="time", ylabel="loss", ylim=(0, 0.3), title="Input-Norm: the next weight makes up for it")
    axes[0].legend()
    return figure


def sharing_problem(conflict, seed=0):
    """(loss of W̃_1 and W̃_2, start): two branches read the same features. Branch 1 must double half of them and halve the others.
    Branch 2 must do the same (they agree) or the opposite (they conflict)."""
    generator = torch.Generator().manual_seed(seed)
    starts = [torch.randn(3, 8, generator=generator, dtype=torch.float64) / 2 for _ in range(2)]
    factor = torch.tensor([2.0] * 4 + [0.5] * 4, dtype=torch.float64)
    targets = [starts[0] * factor, starts[1] * (factor.flip(0) if conflict else factor)]
    return lambda a, b: 0.5 * ((a - targets[0]).square().sum() + (b - targets[1]).square().sum()), starts


def figure_heterogeneity(plt):
    """5: a case where sharing wins and one where heterogeneity wins."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    one = torch.ones(8, dtype=torch.float64)
    for axis, conflict in zip(axes, (False, True)):
        loss, (a, b) = sharing_problem(conflict)
        shared = gradient_flow(lambda A, B, v, loss=loss: loss(A * v, B * v), [a, b, one], 2.0, 200)
        own = gradient_flow(lambda A, B, v, w, loss=loss: loss(A * v, B * w), [a, b, one, one], 2.0, 200)
        axis.semilogy([t for t, _ in shared], [loss(A * v, B * v).item() for _, (A, B, v) in shared], label="one shared γ")
        axis.semilogy([t for t, _ in own], [loss(A * v, B * w).item() for _, (A, B, v, w) in own], label="a γ each (HG)")
        axis.set(xlabel="time", ylabel="loss", title="the branches " + ("conflict" if conflict else "agree"))
        axis.legend()
    return figure


def figure_reparam(plt):
    """6: how fast γ moves, for a unit gradient in each direction, under OR and ER."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
    angle = torch.linspace(0, 2 * torch.pi, 200, dtype=torch.float64)
    circle, alpha = torch.stack((angle.cos(), angle.sin())), torch.tensor([0.9, 0.5], dtype=torch.float64)
    cases = ((axes[0], ordinary_preconditioner, ordinary_reparam, (0.5, 1.0, 1.5), "OR: γ = β α"),
             (axes[1], exponential_preconditioner, exponential_reparam, (-0.7, 0.0, 0.4), "ER: γ = e^β α"))
    for axis, precondition, reparam, betas, title in cases:
        for color, beta in enumerate(betas):
            beta = torch.tensor(beta, dtype=torch.float64)
            moved = precondition(beta, alpha) @ circle
            axis.plot(*moved, color=f"C{color}", label=f"β = {beta:g}, |γ| = {reparam(beta, alpha).norm():.2f}")
        axis.plot(*circle, ":", color="gray", label="γ itself")
        axis.annotate("", 2 * alpha.numpy(), (0, 0), arrowprops={"arrowstyle": "->"})
        axis.set(title=title + " (arrow: α)", aspect="equal", xlim=(-4.2, 4.2), ylim=(-4.2, 4.2))
        axis.legend(fontsize=7, loc="lower right")
    return figure


def adamw_path(loss, params, lr, steps, weight_decay=0.0):
    """[params] after 0 ... steps updates of torch.optim.AdamW (β = 0.9, 0.95), the learning rate falling linearly to 0."""
    params = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    path = [[p.detach().clone() for p in params]]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss(*params).backward()
        optimizer.step()
        path.append([p.detach().clone() for p in params])
    return path


@functools.cache
def adamw_measurements(seeds=range(5), lrs=(0.1, 0.2, 0.4, 0.8, 1.6), steps=200):
    """Figure 1's problem under AdamW: {way of writing W̃: [best final loss over lrs, for each seed]}, and, for the input side at lr 0.1,
    the drift of the conserved quantity as a share of γ² + |w|² at the end, for each seed."""
    finals, drift = {name: [] for name in WRITTEN}, []
    for seed in seeds:
        loss, _, start = regression(seed=seed)
        for name, (write, params) in WRITTEN.items():
            def of(*p, write=write, loss=loss):
                return loss(write(*p))
            finals[name].append(min(of(*adamw_path(of, params(start), lr, steps)[-1]).item() for lr in lrs))
            if name.startswith("input"):
                (W0, v0), (W, v) = (path := adamw_path(of, params(start), lrs[0], steps))[0], path[-1]
                drift.append(((conserved(W, v) - conserved(W0, v0)).abs() / (v ** 2 + W.square().sum(0))).mean().item())
    return finals, drift


def figure_adamw(plt):
    """7: the problems of figures 1 and 4 under AdamW."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    loss, _, start = regression()
    for color, (name, (write, params)) in enumerate(WRITTEN.items()):
        for lr, style in ((0.1, ":"), (0.4, "-")):
            path = adamw_path(lambda *p, write=write: loss(write(*p)), params(start), lr, 200)
            axes[0].semilogy([loss(write(*p)).item() for p in path], style, color=f"C{color}", label=f"{name}, lr {lr:g}")
    axes[0].set(xlabel="step", ylabel="loss", title="figure 1's problem under AdamW")
    axes[0].legend(fontsize=7)
    finals, _ = adamw_measurements()
    for i, values in enumerate(finals.values()):
        axes[1].semilogy([i] * len(values), values, "o", color=f"C{i}")
    axes[1].set_xticks(range(3), ["none", "input", "dual"])
    axes[1].set(ylabel="final loss", title="best of five learning rates, five seeds")
    target = torch.tensor([0.5, 1.5, 3.0], dtype=torch.float64)
    for decay, color in ((0.0, "C7"), (0.1, "C1"), (0.5, "C3")):
        def output(gamma):
            return 0.5 * (gamma - target).square().sum()
        path = adamw_path(output, [torch.ones(3, dtype=torch.float64)], 0.05, 400, decay)
        axes[2].plot([output(p[0]).item() for p in path], color=color, label=f"decay {decay:g}")
    axes[2].set(xlabel="step", ylabel="loss", ylim=(0, 0.6), title="figure 4's Output-Norm under AdamW")
    axes[2].legend()
    return figure


FIGURES = {"1_placement": figure_placement, "2_hyperbola": figure_hyperbola, "3_sharpness": figure_sharpness,
           "4_output_norm": figure_output_norm, "5_heterogeneity": figure_heterogeneity, "6_reparam": figure_reparam,
           "7_adamw": figure_adamw}


def main(folder="figures"):
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: the figures need matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update({"figure.dpi": 100, "axes.titlesize": 10, "axes.grid": True, "grid.alpha": 0.3})
    Path(folder).mkdir(exist_ok=True)
    started = time.time()
    for name, draw in FIGURES.items():
        path = Path(folder) / f"theory_{name}.png"
        draw(plt).savefig(path)
        plt.close("all")
        print(f"{path}  {draw.__doc__}  ({time.time() - started:.0f} s)", flush=True)
    finals, drift = adamw_measurements()
    print("under AdamW, final loss on figure 1's problem, best of five learning rates, mean over five seeds:")
    for name, values in finals.items():
        print(f"  {name:<24} {sum(values) / len(values):.3g}   each: {', '.join(f'{v:.2g}' for v in values)}")
    print(f"  the quantity that gradient flow conserves moved by {sum(drift) / len(drift):.0%} of γ² + |w|² on average")


if __name__ == "__main__":
    main(*sys.argv[1:2])
