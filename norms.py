"""
Scale vectors: everything this project is about, in one file.

A normalization layer is a fixed operation Norm(x) followed by a learnable scale vector γ. This file holds

  1. the normalization                 rms_norm
  2. γ itself, and how it is written   ScaleVector, ordinary_reparam (OR), exponential_reparam (ER)
  3. who gets a γ                      branch_scale_vectors (shared, or HG: one per branch)
  4. where γ sits around a linear map  input_placement, dual_placement (DP), dual_norm_placement (DNP)
  5. a γ no linear map follows         OutputNorm (Q/K-norm, post-norm)
  6. the module that wires 2-4         ScaledLinear
  7. making γ disappear                fold_scale_vectors

Letters: d input width of a linear map, m its output width, W (m, d) its weight, v (d,) the scale vector on its input
side, u (m,) the one on its output side, x (..., d) an activation, b a branch: one of the maps that read the same x.

Sources: "paper" is arXiv 2605.26895; "our reading" marks what we derived or decided. Nothing of ours is imported here.
"""
import copy

import torch
from torch import nn
from torch.nn import functional as F

PLACEMENTS = ("input", "dual", "dual_norm")
REPARAMS = ("none", "ordinary", "exponential")
EXECUTIONS = ("weights", "activations")
grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm  # the public name came with PyTorch 2.10


# ---------------------------------------------------------------------------------------------------------------------
# 1. the normalization

def rms_norm(x, eps=1e-6):
    """Norm(x) = x / sqrt(mean(x²) + eps) over the last dimension, with no scale vector. x (..., d) -> (..., d)."""
    return F.rms_norm(x, (x.size(-1),), eps=eps)


# ---------------------------------------------------------------------------------------------------------------------
# 2. the scale vector and its reparameterizations

def ordinary_reparam(beta, alpha):
    """OR: γ = β α. Gradient flow on (β, α) moves γ by -(β² I + α αᵀ) ∇γ: faster along α. Starts at β = 1, α = 1.
    beta (), alpha (d,) -> (d,). Paper's magnitude-direction split; the name's expansion is our reading."""
    return beta * alpha


def exponential_reparam(beta, alpha):
    """ER: γ = e^β α. Gradient flow on (β, α) moves γ by -(e^{2β} I + γ γᵀ) ∇γ. Starts at β = 0, α = 1.
    beta (), alpha (d,) -> (d,). Paper's magnitude-direction split; the name's expansion is our reading."""
    return beta.exp() * alpha


class ScaleVector(nn.Module):
    """One learnable γ (dim,), all ones at the start whatever the reparameterization. Calling it returns γ.

    dim          its length
    absorbable   True if a linear map beside it, before or after, can take it over exactly (our reading of the paper's
                 criterion for weight decay; every claim is proved by fold_scale_vectors in the tests)
    reparam      "none": parameter `gamma`; "ordinary" (OR) and "exponential" (ER): parameters `beta` and `alpha`
    output_norm  True if it scales the output of a normalization that no linear map follows: the paper's Output-Norm,
                 read literally. False for an Input-Norm's γ.
    Raises ValueError on an unknown reparam.
    """

    def __init__(self, dim, absorbable, reparam="none", output_norm=False):
        super().__init__()
        if reparam not in REPARAMS:
            raise ValueError(f"scale_reparam={reparam!r} is unknown: choose one of {', '.join(REPARAMS)}")
        self.dim, self.absorbable, self.reparam, self.output_norm = dim, absorbable, reparam, output_norm
        if reparam == "none":
            self.gamma = nn.Parameter(torch.ones(dim))
        else:
            self.beta = nn.Parameter(torch.ones(()) if reparam == "ordinary" else torch.zeros(()))
            self.alpha = nn.Parameter(torch.ones(dim))

    def forward(self):
        if self.reparam == "ordinary":
            return ordinary_reparam(self.beta, self.alpha)
        if self.reparam == "exponential":
            return exponential_reparam(self.beta, self.alpha)
        return self.gamma

    @torch.no_grad()
    def collapse(self):
        """The plain γ with the same value: OR and ER are ways to train γ, not other functions."""
        plain = ScaleVector(self.dim, self.absorbable, "none", self.output_norm)
        plain.gamma = nn.Parameter(self().detach().clone())
        return plain

    def extra_repr(self):
        return f"{self.dim}, absorbable={self.absorbable}, reparam={self.reparam!r}, output_norm={self.output_norm}"


# ---------------------------------------------------------------------------------------------------------------------
# 3. heterogeneity

def branch_scale_vectors(branches, heterogeneous, make):
    """The input-side vectors of the branches that read one norm. Paper's heterogeneity (HG).

    shared:  W_b (γ ⊙ x̂)    one γ for every branch b: what every Llama has
    HG:      W_b (γ_b ⊙ x̂)  each branch its own

    branches: names; make: () -> ScaleVector. Returns ({key: ScaleVector}, {branch: key}).
    """
    if heterogeneous:
        return {b: make() for b in branches}, {b: b for b in branches}
    shared = "_".join(branches) if len(branches) <= 3 else "shared"
    return {shared: make()}, {b: shared for b in branches}


# ---------------------------------------------------------------------------------------------------------------------
# 4. placement around a linear map
#
# The three functions below take lists, one entry a branch, because the branches that read one x run as one product.
# execution="activations" is the textbook form: multiply x, then y. It works on every token, and with HG it splits the
# product. execution="weights" is the same function on another route: the weight is scaled, in its own dtype (float32
# master weights), on its way to the compute dtype. That cast reads all of W anyway, so the multiply is nearly free.
# (Our reading, section "Why it costs nothing" of the README.)

#
# Experts: W (E, m, d), v (E, d) and u (E, m) hold one map for each expert, and rows = (expert, offsets) says which expert each
# row of x meets: rows are sorted by expert, expert (N,) is its number, offsets (E,) int32 where each expert's rows end.

def scale_weight(W, v=None, u=None):
    """W̃ = diag(u) W diag(v) = W ⊙ (u vᵀ). W (..., m, d), v (..., d), u (..., m); None stands for all ones.
    Absorption: W̃ x = u ⊙ W (v ⊙ x), so γ adds no function that W could not have, only another way to train it."""
    if v is not None:
        W = W * v.unsqueeze(-2)
    if u is not None:
        W = W * u.unsqueeze(-1)
    return W


def scale_activation(x, gamma=None, rows=None):
    """γ ⊙ x in x's dtype, multiplied in the wider of the two; with rows, each row by its expert's γ. None: all ones."""
    if gamma is None:
        return x
    return (x * (gamma if rows is None else gamma[rows[0]])).to(x.dtype)


def fused_linear(x, weights, rows=None):
    """[W_b x for b] as one product: x (..., d), weights [(m_b, d)] -> [(..., m_b)]. The cast to x's dtype is here.
    With rows: x (N, d), weights [(E, m_b, d)], each row by its expert's matrix."""
    W = (weights[0] if len(weights) == 1 else torch.cat(weights, dim=-2)).to(x.dtype)
    y = F.linear(x, W) if rows is None else grouped_mm(x, W.transpose(-2, -1), offs=rows[1])
    return y.split([w.size(-2) for w in weights], dim=-1)


def input_placement(x, W, v, execution="weights", rows=None):
    """y_b = W_b diag(v_b) x: a scale vector on the input side only. This is the baseline, γ of an Input-Norm.
    x (..., d), W [(m_b, d)], v [(d,) or None] -> [(..., m_b)]."""
    if execution == "weights":
        return fused_linear(x, [scale_weight(W_b, v_b) for W_b, v_b in zip(W, v)], rows)
    if all(v_b is v[0] for v_b in v):  # one shared vector: scale x once and keep the product fused
        return fused_linear(scale_activation(x, v[0], rows), W, rows)
    return [fused_linear(scale_activation(x, v_b, rows), [W_b], rows)[0] for W_b, v_b in zip(W, v)]


def dual_placement(x, W, v, u, execution="weights", rows=None):
    """DP: y_b = u_b ⊙ W_b diag(v_b) x, scale vectors on both sides of the map. Paper.
    x (..., d), W [(m_b, d)], v [(d,) or None], u [(m_b,) or None] -> [(..., m_b)]."""
    if execution == "weights":
        return fused_linear(x, [scale_weight(W_b, v_b, u_b) for W_b, v_b, u_b in zip(W, v, u)], rows)
    return [scale_activation(y_b, u_b, rows) for y_b, u_b in zip(input_placement(x, W, v, execution, rows), u)]


def dual_norm_placement(x, W, v, u, width, eps=1e-6, execution="weights", rows=None):
    """DNP: y_b = u_b ⊙ Norm(W_b diag(v_b) x), a normalization between the map and its output-side vector. Paper;
    that Norm runs over groups of `width` channels (a head for q, k, v; the whole vector for gate and up) is our reading.
    x (..., d), W [(m_b, d)], v [(d,) or None], u [(m_b,) or None] -> [(..., m_b)]; width divides every m_b."""
    y = input_placement(x, W, v, execution, rows)
    normed = [rms_norm(y_b.unflatten(-1, (-1, width)), eps).flatten(-2) for y_b in y]
    return [scale_activation(n_b, u_b, rows) for n_b, u_b in zip(normed, u)]


# ---------------------------------------------------------------------------------------------------------------------
# 5. Output-Norm

class OutputNorm(nn.Module):
    """γ ⊙ Norm(z) that no linear map follows: Q/K-norm before RoPE, Gemma's post-norm before the residual add. Paper's
    Output-Norm. The output's scale is γ itself and no weight can undo its decay, so it is never absorbable."""

    def __init__(self, dim, vectors=True, reparam="none", eps=1e-6):
        super().__init__()
        self.eps = eps
        self.scale = ScaleVector(dim, absorbable=False, reparam=reparam, output_norm=True) if vectors else None

    def forward(self, z):  # (..., dim) -> (..., dim)
        return scale_activation(rms_norm(z, self.eps), None if self.scale is None else self.scale())


# ---------------------------------------------------------------------------------------------------------------------
# 6. the linear maps that read one stream, with their scale vectors

class ScaledLinear(nn.Module):
    """The linear maps ("branches", no biases) that read one stream x, and the scale vectors around them.

    in_features    d
    branches       {"q": m_q, "k": m_k, ...}
    placement      {"q": "dual_norm", ...}: one of PLACEMENTS for each branch, or None for a map without any vector
    vectors        False removes every scale vector; the normalizations stay, DNP's too
    heterogeneous  HG: an input-side vector for each branch instead of one for all
    reparam        how each vector is written: see ScaleVector
    execution      "weights" or "activations": two routes to the same function
    norm_width     channels that DNP normalizes together
    absorbed_by    {"v": (maps, "o")}: the ScaledLinear, and its branch, that can take over this branch's DNP output side,
                   because only channel-wise operations stand between the two
    tied           the weight serves elsewhere too (a tied head), so it cannot take over its vectors

    forward: x (..., d) -> one (..., m_b) for each branch, or for the named ones, in order. Parameters: `weight.q` (m_q, d),
    `scale_in.q` under HG or `scale_in.q_k_v` when shared (`scale_in.shared` if there are more than three), `scale_out.q`.
    """

    def __init__(self, in_features, branches, placement, *, vectors=True, heterogeneous=False, reparam="none",
                 execution="weights", norm_width=None, eps=1e-6, absorbed_by=None, tied=False):
        super().__init__()
        self.in_features, self.branches, self.placement = in_features, dict(branches), dict(placement)
        self.execution, self.norm_width, self.eps = execution, norm_width, eps
        self.absorbed_by, self.tied = absorbed_by or {}, tied
        self.weight = nn.ParameterDict({b: nn.Parameter(torch.empty(m, in_features)) for b, m in branches.items()})

        scale_in, self.reads, scale_out = {}, {}, {}
        if vectors:
            scaled = [b for b in branches if placement[b] is not None]
            if scaled:
                scale_in, self.reads = branch_scale_vectors(
                    scaled, heterogeneous, lambda: ScaleVector(in_features, absorbable=not tied, reparam=reparam))
            for b in scaled:
                if placement[b] == "dual":
                    scale_out[b] = ScaleVector(branches[b], absorbable=not tied, reparam=reparam)
                elif placement[b] == "dual_norm":
                    scale_out[b] = ScaleVector(branches[b], absorbable=b in self.absorbed_by, reparam=reparam,
                                               output_norm=True)
        self.scale_in, self.scale_out = nn.ModuleDict(scale_in), nn.ModuleDict(scale_out)

    def forward(self, x, branches=None):
        names = list(branches or self.branches)
        return self._run(x, names, [[b] for b in names], lambda tensors: tensors[0])

    def forward_experts(self, x, kinds, n_expert, rows):
        """Grouped products over the branches expert_0_KIND, expert_1_KIND, ...: x (N, d) -> one (N, m) for each kind."""
        return self._run(x, kinds, [[f"expert_{e}_{kind}" for e in range(n_expert)] for kind in kinds],
                         lambda tensors: None if tensors[0] is None else torch.stack(tensors), rows)

    def _run(self, x, names, members, join, rows=None):
        """The outputs called names; the parameters of each are its members' (a branch, or the experts') joined."""
        v = {key: self.scale_in[key]() for key in {self.reads[b]: None for bs in members for b in bs if b in self.reads}}
        y = {}
        for placement in dict.fromkeys(self.placement[bs[0]] for bs in members):  # one product for those that are placed alike
            placed = [(name, bs) for name, bs in zip(names, members) if self.placement[bs[0]] == placement]
            W = [join([self.weight[b] for b in bs]) for _, bs in placed]
            v_b = [join([v.get(self.reads.get(b)) for b in bs]) for _, bs in placed]
            u_b = [join([self.scale_out[b]() if b in self.scale_out else None for b in bs]) for _, bs in placed]
            if placement == "dual":
                out = dual_placement(x, W, v_b, u_b, self.execution, rows)
            elif placement == "dual_norm":
                out = dual_norm_placement(x, W, v_b, u_b, self.norm_width, self.eps, self.execution, rows)
            else:
                out = input_placement(x, W, v_b, self.execution, rows)
            y.update(zip([name for name, _ in placed], out))
        return [y[name] for name in names]

    @torch.no_grad()
    def fold(self):
        """Move every absorbable vector into the weight that takes it over, in place; the output stays the same."""
        if self.tied:
            return
        for b, W in self.weight.items():
            v = self.scale_in[self.reads[b]]() if b in self.reads else None
            u = self.scale_out[b]() if self.placement[b] == "dual" and b in self.scale_out else None
            W.copy_(scale_weight(W, v, u))
            if u is not None:
                del self.scale_out[b]
        self.scale_in, self.reads = nn.ModuleDict(), {}
        for b, (after, name) in self.absorbed_by.items():
            if self.placement[b] == "dual_norm" and b in self.scale_out:
                # grouped-query attention serves each value head to several query heads
                heads = self.scale_out[b]().view(-1, self.norm_width)
                u = heads.repeat_interleave(after.in_features // heads.numel(), dim=0).flatten()
                after.weight[name].copy_(scale_weight(after.weight[name], v=u))
                del self.scale_out[b]


# ---------------------------------------------------------------------------------------------------------------------
# 7. folding

def named_scale_vectors(model):
    """(name, ScaleVector) for each one in the model; the name tells layer, branch and side: layers.3.attn.qkv.scale_in.q"""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ScaleVector)]


def fold_scale_vectors(model):
    """An equal model in which every absorbable vector has gone into a neighbouring weight: W ← diag(u) W diag(v), and
    DNP's output sides of v and up into W_o and W_down. What remains is not absorbable, and is written as a plain γ.
    The given model is left as it is. Our reading of the paper's "adds no expressivity"."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if isinstance(module, ScaledLinear):
            module.fold()
    for name, scale in named_scale_vectors(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, scale.collapse())
    return model
