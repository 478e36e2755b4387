"""
Why scale vectors help: the paper's theorems, and what we add to them, as functions to call.

  python -m theory.figures      draws docs/images/theory_*.png from them

Setting 2.1. x̂ = Norm(x) in R^d with E[x̂ x̂ᵀ] = I, a linear map W (m, d), a teacher W*. A form
writes the effective weight W̃ that the loss L = ½‖W̃ - W*‖² sees; G = ∂L/∂W̃ = W̃ - W* is (m, d).
Training is gradient flow dθ/dt = -∂L/∂θ on all parameters, from W = 0 and every scale vector 1.

Absorption (section 2.1) is norms.scale_weight: W̃ = diag(u) W diag(v). So no form can express more
than another, and they differ in how W̃ moves. Only the laws in t³ and the comparisons "for every t"
need that loss and that start. Every velocity, rate and invariant holds for any loss and any point.

Letters: w_j and G_j j-th columns, v (d,) = γ = γ_b on the input side, u (m,) = γ_a on the output
side, λ weight decay on w, μ on γ. Source of each statement: "paper" with its number (arXiv
2605.26895v1), or "ours": derived here. tests/test_theory.py proves them in float64, and
docs/theory.md shows them.
"""
import math

import torch

from norms import exponential_reparam, original_reparam, scale_weight


def outer(a, b):
    """a bᵀ. (..., n), (..., k) -> (..., n, k)."""
    return a.unsqueeze(-1) * b.unsqueeze(-2)


# ---- Setting 2.1, and gradient flow by numerical integration -------------------------------------

def teacher_loss(effective, target):
    """L = ½‖W̃ - W*‖_F² (setting 2.1).
    (..., m, d) twice -> (...): leading dimensions are independent problems."""
    return 0.5 * (effective - target).square().sum((-2, -1))


# how each student of the theorems writes W̃: parameters -> (..., m, d)
STUDENTS = {
    "none": lambda W: W,
    "standard": lambda W, v: scale_weight(W, v),
    "dual": lambda W, v, u: scale_weight(W, v, u),
    "original": lambda W, beta, alpha: scale_weight(W, original_reparam(beta, alpha)),
}


def start(student, target):
    """The theorems' start: W = 0, γ = 1 however it is written.
    target (..., m, d) -> the parameters that STUDENTS[student] takes."""
    one = torch.ones_like(target)
    v, u, beta = one[..., 0, :], one[..., :, 0], one[..., 0, :1]
    vectors = {"none": [], "standard": [v], "dual": [v, u], "original": [beta, v]}
    return [torch.zeros_like(target), *vectors[student]]


def gradients(loss, params):
    """[∂loss/∂p for p in params] by autograd. Losses of independent problems, (...), are
    differentiated each by its own."""
    params = [p.detach().requires_grad_() for p in params]
    return torch.autograd.grad(loss(*params).sum(), params)


def gradient_flow(loss, params, time_end, steps, decays=None):
    """Integrate dθ/dt = -∂L/∂θ - λθ by the classical Runge-Kutta method of order 4. loss: function
    of the params; decays: λ for each (default 0). Returns [(t, params)] for t = 0 ... time_end,
    steps + 1 entries."""
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
        params = [p + h / 6 * (a + 2 * b + 2 * c + d)
                  for p, a, b, c, d in zip(params, k1, k2, k3, k4)]
        path.append(((step + 1) * h, params))
    return path


# ---- Theorem 2.2: with γ the loss is lower, at every t > 0 ---------------------------------------

def preconditioner(w, gamma):
    """P_j = γ_j² I + w_j w_jᵀ: gradient flow on (W, γ) moves the effective column w̃_j = γ_j w_j by
    -P_j G_j, in the setting by P_j (w*_j - w̃_j). Without γ, P = I. Paper, theorem 2.2: a
    self-amplifying preconditioner.
    Because ∂L/∂w_j = γ_j G_j, ∂L/∂γ_j = <w_j, G_j> and dw̃_j = γ_j dw_j + w_j dγ_j.
    w (m,), gamma () -> (m, m)."""
    return gamma ** 2 * torch.eye(len(w), dtype=w.dtype) + outer(w, w)


def effective_velocity(W, gamma, G):
    """dW̃/dt = -[γ_j² G_j + w_j <w_j, G_j>]_j: -P_j G_j for all columns at once. Paper, theorem
    2.2.
    W (m, d), gamma (d,), G (m, d) -> (m, d)."""
    return -(gamma ** 2 * G + W * (W * G).sum(-2))


def column_invariant(W, gamma):
    """γ_j² - ‖w_j‖², which gradient flow on (W, γ) conserves. Paper, theorem 2.2: from its start it
    is 1, so γ_j² ≥ 1, P_j ⪰ I, and the more a column has grown, the faster it moves.
    (..., m, d), (..., d) -> (..., d)."""
    return gamma ** 2 - W.square().sum(-2)


def descent_rate_none(G):
    """dL/dt = -‖G‖² without scale vectors. (..., m, d) -> (...)."""
    return -G.square().sum((-2, -1))


def descent_rate_standard(W, v, G):
    """dL/dt = -Σ_j [γ_j² ‖G_j‖² + <w_j, G_j>²] for W̃ = W diag(v): minus the squared gradient.
    Paper, theorem 2.2.
    (..., m, d), (..., d), (..., m, d) -> (...)."""
    return -(v ** 2 * G.square().sum(-2) + (W * G).sum(-2).square()).sum(-1)


# ---- Section 3.1: heterogeneity. The paper gives no theorem for HG; these rates are ours ---------

def descent_rate_shared(weights, gamma, grads):
    """dL/dt = -Σ_j [γ_j² Σ_b ‖G_j^b‖² + (Σ_b <w_j^b, G_j^b>)²] with one γ for all branches b: γ's
    gradient is the sum over them. Ours.
    [(m_b, d)], (d,), [(m_b, d)] -> ()."""
    return descent_rate_standard(torch.cat(weights), gamma, torch.cat(grads))


def descent_rate_heterogeneous(weights, gammas, grads):
    """dL/dt = -Σ_b Σ_j [(γ_j^b)² ‖G_j^b‖² + <w_j^b, G_j^b>²]: HG, a γ for each branch. Ours. From
    the same point it is the shared rate with Σ_b <·>² in place of (Σ_b <·>)²: sharing is faster
    where the branches agree on which features to turn up, separate vectors where they conflict.
    Neither dominates.
    [(m_b, d)], [(d,)], [(m_b, d)] -> ()."""
    return sum(descent_rate_standard(W, gamma, G) for W, gamma, G in zip(weights, gammas, grads))


# ---- Theorems 3.1 and D.1: DP against the standard form ------------------------------------------

def effective_velocity_dual(W, u, v, G):
    """dW̃/dt for W̃ = diag(u) W diag(v): -[u_i² v_j² G_ij + W_ij v_j row_i + W_ij u_i col_j], row_i
    = Σ_j W_ij v_j G_ij = ∂L/∂u_i and col_j = Σ_i W_ij u_i G_ij = ∂L/∂v_j. Paper, section 3.2:
    amplified along rows and along columns.
    W (m, d), u (m,), v (d,), G (m, d) -> (m, d)."""
    row, col = (W * v * G).sum(-1), (W * u.unsqueeze(-1) * G).sum(-2)
    return -(outer(u, v).square() * G + W * outer(row, v) + W * outer(u, col))


def descent_rate_dual(W, u, v, G):
    """dL/dt = -Σ_ij u_i² v_j² G_ij² - Σ_i (Σ_j W_ij v_j G_ij)² - Σ_j (Σ_i W_ij u_i G_ij)² for DP:
    minus the squared gradients of W, u and v. Paper, proof of D.1.
    (..., m, d), (..., m), (..., d), (..., m, d) -> (...)."""
    row, col = (W * v.unsqueeze(-2) * G).sum(-1), (W * u.unsqueeze(-1) * G).sum(-2)
    return -((outer(u, v) * G).square().sum((-2, -1)) + row.square().sum(-1) + col.square().sum(-1))


def dual_advantage(W, u, v, G):
    """dL_f/dt - dL_φ/dt = Σ_ij (u_i² - 1) v_j² G_ij² + Σ_i (Σ_j W_ij v_j G_ij)²: how much faster DP
    descends than the standard form with the same W̃ and the same v (there the weight is diag(u) W).
    Paper, proof of D.1 (i): ≥ 0 because u_i² ≥ 1 along the flow (row_invariant). At a state off
    that flow with u_i² < 1 it can be negative. Shapes as descent_rate_dual."""
    row = (W * v.unsqueeze(-2) * G).sum(-1)
    return ((u ** 2 - 1) * (v.unsqueeze(-2) * G).square().sum(-1) + row.square()).sum(-1)


def row_invariant(W, u):
    """u_i² - ‖W_i:‖², which gradient flow on DP conserves: 1 from the stated start. Paper, proof of
    D.1.
    (..., m, d), (..., m) -> (..., m)."""
    return u ** 2 - W.square().sum(-1)


def dual_law(target, t):
    """L_φ - L_f = -(2/3) t³ Σ_i ‖W*_i:‖⁴ + O(t⁴), rows of W*: DP minus standard, both from the
    stated start. Paper, D.1 (ii). D.1 (iii): if W* has at most one nonzero in each row and column,
    the difference is negative for all t > 0.
    target (..., m, d), t -> (...)."""
    return -2 / 3 * t ** 3 * target.square().sum(-1).square().sum(-1)


# ---- Theorems 3.2 and D.2: OR against the standard form; ER --------------------------------------

def original_preconditioner(beta, alpha):
    """OR: γ = β Norm(α) moves by -P ∇γ, P = d γ̂γ̂ᵀ + ρ (I - γ̂γ̂ᵀ), γ̂ = γ/‖γ‖, ρ = β² d/‖α‖².
    Paper, theorem 3.2. The gradient of α is orthogonal to α, so gradient flow keeps ‖α‖; from the
    stated start ‖α‖² = d and ρ = β² ≥ 1 (magnitude_invariant).
    In units of the plain form's P = I: speed d along γ, ρ across it.
    beta (1,), alpha (d,) -> (d, d)."""
    d, along = len(alpha), outer(alpha, alpha) / alpha.square().sum()
    rho = beta ** 2 * d / alpha.square().sum()
    return d * along + rho * (torch.eye(d, dtype=alpha.dtype) - along)


def exponential_preconditioner(beta, alpha):
    """ER: γ = e^β e^(α - mean(α)) moves by -P ∇γ, P = γγᵀ + D (I - 11ᵀ/d) D, D = diag(γ). Ours:
    ∂γ/∂β = γ, ∂γ/∂α = D (I - 11ᵀ/d). At γ = 1 it is I + (1 - 1/d) 11ᵀ, with largest eigenvalue d,
    as OR's.
    beta (1,), alpha (d,) -> (d, d)."""
    gamma = exponential_reparam(beta, alpha)
    return torch.diag(gamma ** 2) + (1 - 1 / len(gamma)) * outer(gamma, gamma)


def original_advantage(beta, alpha, grad):
    """dL_f/dt - dL_ψ/dt = (d - 1) <γ̂, ∇γ>² + (ρ - 1) ‖∇γ - γ̂ <γ̂, ∇γ>‖²: how much faster OR
    descends than the standard form at the same W and γ; grad (..., d) is ∇γ = ∂L/∂γ. Paper, proof
    of D.2 (i): ≥ 0 because ρ ≥ 1 along the flow. At a state off that flow with ρ < 1, β² d < ‖α‖²,
    it can be negative.
    beta (..., 1), alpha (..., d) -> (...)."""
    d, direction = alpha.size(-1), alpha / alpha.norm(dim=-1, keepdim=True)
    along = (direction * grad).sum(-1, keepdim=True)
    rho = beta.squeeze(-1) ** 2 * d / alpha.square().sum(-1)
    across = (grad - along * direction).square().sum(-1)
    return (d - 1) * along.squeeze(-1) ** 2 + (rho - 1) * across


def magnitude_invariant(W, beta):
    """β² - ‖W‖_F², which gradient flow on OR conserves: 1 from the stated start. Paper, proof of
    D.2.
    (..., m, d), (..., 1) -> (...)."""
    return beta.squeeze(-1) ** 2 - W.square().sum((-2, -1))


def original_law(target, t):
    """L_ψ - L_f = -(2/3) (1 - 1/d) ‖W*‖_F⁴ t³ + O(t⁴): OR minus standard, both from the stated
    start. Paper, D.2 (ii), d > 1. D.2 (iii): if the columns of W* have equal norm, the difference
    is negative for all t > 0.
    target (..., m, d), t -> (...)."""
    return -2 / 3 * (1 - 1 / target.size(-1)) * t ** 3 * target.square().sum((-2, -1)).square()


# ---- Section 3.4: every row of table 1 is a preconditioner P = J Jᵀ ------------------------------

def induced_preconditioner(form, params):
    """P = J Jᵀ with J = ∂p/∂q for p = form(*params): gradient flow on q moves p by -P ∂L/∂p (eq.
    12). By autograd, exactly. Returns (n, n), n the number of entries of p, in the order of
    p.flatten()."""
    jacobians = torch.autograd.functional.jacobian(form, tuple(params))
    n = form(*params).numel()
    return sum(J.reshape(n, -1) @ J.reshape(n, -1).T for J in jacobians)


# W̃ (2, m, d) of two branches as a function of W (2, m, d) and the row's scale parameters
TABLE_1 = {
    "standard": lambda W, gamma: scale_weight(W, gamma),
    "HG": lambda W, gammas: scale_weight(W, gammas),
    "AP": lambda W, u: scale_weight(W, u=u),
    "DP": lambda W, v, u: scale_weight(W, v, u),
    "OR": lambda W, beta, alpha: scale_weight(W, original_reparam(beta, alpha)),
    "ER": lambda W, beta, alpha: scale_weight(W, exponential_reparam(beta, alpha)),
}


def table_preconditioner(W, v, u, P_v=None, P_u=None):
    """P on the entries of W̃ = W ⊙ (u vᵀ) from the P's of its two vectors:

        P_(ij),(kl) = u_i² v_j² [ij = kl] + (u W)_ij (P_v)_jl (u W)_kl + (W v)_ij (P_u)_ik (W v)_kl

    Ours: the product rule in eq. 12. P_v: I for a trained vector, OR's or ER's P, None for one that
    is not there. A vector couples entries that it scales together, as far as its own P couples it.
    Standard couples a column, over all branches; HG a column within a branch; AP a row; OR and ER
    every entry.
    W (m, d), v (d,), u (m,) -> (m d, m d)."""
    P = torch.diag(outer(u, v).square().flatten())
    m, d = W.shape
    if P_v is not None:
        uW = scale_weight(W, u=u)
        P = P + torch.einsum("ij,jl,kl->ijkl", uW, P_v, uW).reshape(m * d, m * d)
    if P_u is not None:
        Wv = scale_weight(W, v)
        P = P + torch.einsum("ij,ik,kl->ijkl", Wv, P_u, Wv).reshape(m * d, m * d)
    return P


# ---- Theorems 2.3 and C.1: weight decay on an Input-Norm's γ bounds its length and the sharpness -

def hessian_block(w, gamma, target):
    """[[γ², 2γw - w*], [2γw - w*, w²]]: the Hessian over (w_i, γ_i) of ½(γ_i w_i - w*_i)², a
    coordinate of the loss. Coordinates do not mix, so the whole Hessian is these blocks. Paper, eq.
    20.
    (...) three times -> (..., 2, 2)."""
    mixed = 2 * gamma * w - target
    return torch.stack((torch.stack((gamma ** 2, mixed), -1), torch.stack((mixed, w ** 2), -1)), -2)


def hessian_eigenvalues(w, gamma, target):
    """λ± = ½ (γ² + w² ± √((γ² - w²)² + 4 (2γw - w*)²)). Paper, eq. 21.
    (...) three times -> λ- (...), λ+ (...)."""
    trace = gamma ** 2 + w ** 2
    root = ((gamma ** 2 - w ** 2) ** 2 + 4 * (2 * gamma * w - target) ** 2).sqrt()
    return (trace - root) / 2, (trace + root) / 2


def sharpness(w, gamma, target):
    """(λ_max, trace, Frobenius norm) of the Hessian: max_i λ+, ‖γ‖² + ‖w‖², √Σ (γ⁴ + w⁴ + 2(2γw -
    w*)²). Paper, eqs. 22-24.
    (..., d) three times -> (...) three times."""
    largest = hessian_eigenvalues(w, gamma, target)[1].amax(-1)
    trace = (gamma ** 2 + w ** 2).sum(-1)
    squares = gamma ** 4 + w ** 4 + 2 * (2 * gamma * w - target) ** 2
    return largest, trace, squares.sum(-1).sqrt()


def sgd_descent(gradient, hessian, covariance, lr):
    """E[L(θ - η(∇L + ξ))] - L = -η‖∇L‖² + ½η² ∇Lᵀ H ∇L + ½η² Tr(H C), up to o(η²), for noise ξ of
    mean 0 and covariance C; exact for a quadratic loss. Paper, eq. 31: the last term is what noise
    costs, and it grows with the sharpness of H.
    gradient (n,), hessian and covariance (n, n), lr η -> ()."""
    return (-lr * gradient.square().sum() + 0.5 * lr ** 2 * gradient @ hessian @ gradient
            + 0.5 * lr ** 2 * (hessian * covariance).sum())


# Tr(H C), or a bound on it, by the kind of noise; sigma2 stands for σ². Paper, C.2.2
NOISE_TERMS = {
    # E‖ξ‖² ≤ σ²: at most σ² λ_max. So with σ₀² + σ₁²‖∇L‖² or σ² L in place of σ²
    "bounded": lambda H, sigma2: sigma2 * torch.linalg.eigvalsh(H)[-1],
    # C = σ² I
    "isotropic": lambda H, sigma2: sigma2 * H.trace(),
    # C = σ² H: σ² ‖H‖_F². Near interpolation σ² = 2 L
    "aligned": lambda H, sigma2: sigma2 * H.square().sum(),
}


def simulate_sde(w, gamma, target, decay_w, decay_gamma, noise, time_end, steps, every, seed=0):
    """SGD in continuous time, dw = -(γ g + λ w) dt + √q dB, dγ = -(w g + μ γ) dt + √q dB', g = γ w
    - w* (paper, eqs. 17-18), by Euler-Maruyama. w, gamma (paths, d), target (d,), noise q. Yields
    (t, w, gamma) at t = 0 and after each `every` steps. The step h must keep h γ² well below 2, or
    Euler's method, not the equation, blows up."""
    generator, h = torch.Generator().manual_seed(seed), time_end / steps
    yield 0.0, w, gamma
    for step in range(1, steps + 1):
        g = gamma * w - target
        kick = (noise * h) ** 0.5 * torch.randn((2, *w.shape), generator=generator, dtype=w.dtype)
        drift_w = gamma * g + decay_w * w
        drift_gamma = w * g + decay_gamma * gamma
        w, gamma = w - h * drift_w + kick[0], gamma - h * drift_gamma + kick[1]
        if step % every == 0:
            yield step * h, w, gamma


def squared_norm_bound(start, target, decay, noise, t):
    """E‖γ_t‖² ≤ e^(-2μt) E‖γ_0‖² + (d q + ½‖w*‖²) (1 - e^(-2μt)) / (2μ), decay > 0, and the same
    for w with λ. Paper, eq. 28 for w; for γ it follows from eq. 30 in the same way. With μ = 0
    nothing bounds it: d/dt E[γ_i² - w_i²] = 2λ E[w_i²] > 0 (eq. 25).
    start: E‖γ_0‖², target (d,) -> float."""
    left = math.exp(-2 * decay * t)
    source = target.numel() * noise + 0.5 * target.square().sum().item()
    return left * start + source * (1 - left) / (2 * decay)


# ---- Weight decay, besides the theorem. All ours -------------------------------------------------

def balance_under_decay(start, decay, t):
    """γ_j² - ‖w_j‖² = start e^(-2λt) when both decay at λ: the pair becomes balanced. Ours: decay
    adds -2λγ_j² and -2λ‖w_j‖² to two equal rates; C.1's eq. 25 without noise and with μ = λ.
    start (d,), t -> (d,)."""
    return start * torch.exp(torch.as_tensor(-2.0 * decay * t, dtype=torch.float64))


def direction_under_decay(alpha, decay, t):
    """‖α(t)‖² = ‖α(0)‖² e^(-2λt) under OR when α decays at λ. Ours: Norm(cα) = Norm(α), so ∇α is
    orthogonal to α and only decay changes its length. γ does not feel that length; the speed of its
    direction does, ρ = β² d/‖α‖² grows by e^(2λt). Decay on α is a learning-rate schedule for the
    direction, decay on β is decay of the magnitude.
    (d,) -> ()."""
    return alpha.square().sum() * torch.exp(torch.as_tensor(-2.0 * decay * t, dtype=torch.float64))


def output_norm_under_decay(target, curvature, decay):
    """(γ, excess loss) where gradient flow on Σ ½ a_i (γ_i - γ*_i)² with decay λ rests:
    γ = γ* a/(a + λ), at Σ ½ a (γ* λ/(a + λ))² above the minimum. Ours, for the paper's claim
    (section 2.2) that decay hurts an Output-Norm: only γ sets the scale of γ ⊙ Norm(z), so no
    weight can undo its decay. Of an Input-Norm γ may decay as it likes: W grows instead.
    (d,), (d,) -> (d,), ()."""
    gamma = target * curvature / (curvature + decay)
    return gamma, (0.5 * curvature * (target * decay / (curvature + decay)) ** 2).sum()


def adamw_output_norm_limit(target, decay):
    """|γ| ≤ 1/λ: where AdamW holds an Output-Norm's γ that wants to be at γ* beyond it, min(|γ*|,
    1/λ) sign(γ*). Ours: Adam's update is at most about one learning rate whatever the gradient
    (exactly 1 for a constant one), decay's is λγ learning rates, and the two balance at λγ = 1.
    Below 1/λ the gradient wins and decay costs next to nothing.
    target (d,) -> (d,)."""
    return target.sign() * target.abs().clamp(max=1 / decay)
