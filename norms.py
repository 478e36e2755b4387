"""
Scale vectors: everything this project is about, in one file.

A normalization layer is a fixed operation Norm(x) followed by a learnable scale vector γ. This file holds

  1. the normalization                 rms_norm
  2. γ itself, and how it is written   ScaleVector; original_reparam (OR), exponential_reparam (ER), zero_centered_reparam;
                                       compute_scale_vectors, all of a model at once
  3. who gets a γ                      branch_scale_vectors (shared, or HG: one per branch)
  4. where γ sits around a linear map  input_, after_ (AP), dual_ (DP) and dual_norm_placement (DNP): see PLACEMENTS
  5. a γ no linear map follows         OutputNorm (Q/K-norm, the norm on a sub-layer's output)
  6. the module that wires 2-4         ScaledLinear
  7. making γ disappear                fold_scale_vectors

Letters: d input width of a linear map, m its output width, W (m, d) its weight, v (d,) the scale vector on its input side, the
paper's γ_b, u (m,) the one on its output side, the paper's γ_a, x (..., d) an activation, b a branch: one of the maps that read
the same x. A map may be a stack of E experts: W (E, m, d), v (d,) or (E, d), u (E, m).

Sources: equation and section numbers are those of the paper, arXiv 2605.26895v1; "ours" marks what we derived or decided.
Nothing of ours is imported here.
"""
import contextlib
import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

REPARAMS = ("none", "original", "exponential", "zero_centered")
EXECUTIONS = ("auto", "weights", "activations")
grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm  # the public name came with PyTorch 2.10


# ---------------------------------------------------------------------------------------------------------------------
# 1. the normalization

def rms_norm(x, eps=1e-6, width=None):
    """Norm(x) = √d x / ‖x‖ = x / sqrt(mean(x²)) over the last dimension (eq. 1). The paper names no ε; eps is added to mean(x²).
    width: how many entries count, where zeros were appended to x (..., d) for the hardware's sake; None: all. -> (..., d)."""
    d = x.size(-1)
    if width is None or width == d:
        return F.rms_norm(x, (d,), eps=eps)
    share = width / d  # the mean over d is share times the mean over width
    return F.rms_norm(x, (d,), eps=eps * share) * share ** 0.5


# ---------------------------------------------------------------------------------------------------------------------
# 2. the scale vector and its reparameterizations

def original_reparam(beta, alpha):
    """OR, original space (eq. 8): γ = β Norm(α) = β √d α / ‖α‖, so ‖γ‖ = |β| √d. Starts at β = 1, α = 1 (theorem 3.2).
    beta (..., 1), alpha (..., d) -> (..., d): the last dimension is one vector, those before it count experts."""
    return beta * rms_norm(alpha, eps=0.0)


def exponential_reparam(beta, alpha):
    """ER, exponential space (eq. 9): γ = e^β e^(α - mean(α)), all entries positive. The paper leaves the start open; ours is β = 0,
    α = 0, where γ = 1. beta (..., 1), alpha (..., d) -> (..., d)."""
    return beta.exp() * (alpha - alpha.mean(-1, keepdim=True)).exp()


def zero_centered_reparam(alpha):
    """γ = 1 + α, from α = 0: what Gemma and Qwen3-Next do. Weight decay on α pulls γ to 1, not to 0. Ours to compare with."""
    return 1 + alpha


def reparameterize(reparam, beta, alpha):
    """γ by the function that `reparam` names; beta is None where there is none."""
    if reparam == "original":
        return original_reparam(beta, alpha)
    return exponential_reparam(beta, alpha) if reparam == "exponential" else zero_centered_reparam(alpha)


class ScaleVector(nn.Module):
    """One learnable γ (d,), or one for each expert (E, d), all ones at the start whatever the reparameterization. Calling it gives γ.

    shape        (d,) or (E, d)
    input_norm   True: a linear map follows immediately, as after a Pre-Norm. False: none does (section 2.2)
    absorbable   True: a linear map beside it, before or after, can take it over exactly. Ours; proved by folding in the tests. It
                 differs from input_norm: AP's and DP's γ_a, and DNP's of v and up, follow no Input-Norm and can be absorbed
    reparam      "none": parameter `gamma`; "original" (OR), "exponential" (ER): `alpha` and `beta`; "zero_centered": `alpha`
    magnitude    False leaves OR's and ER's β at its start: a Norm that follows would undo it (see ScaledLinear)
    Raises ValueError on an unknown reparam.
    """

    def __init__(self, shape, input_norm, absorbable, reparam="none", magnitude=True):
        super().__init__()
        if reparam not in REPARAMS:
            raise ValueError(f"scale_reparam={reparam!r} is unknown: choose one of {', '.join(REPARAMS)}")
        self.shape, self.input_norm, self.absorbable, self.reparam = tuple(shape), input_norm, absorbable, reparam
        self.computed = None  # γ, while `at_hand` keeps it here
        if reparam == "none":
            self.gamma = nn.Parameter(torch.ones(shape))
            return
        self.alpha = nn.Parameter(torch.ones(shape) if reparam == "original" else torch.zeros(shape))
        if reparam == "zero_centered":
            self.beta = None
            return
        beta = torch.ones(*shape[:-1], 1) if reparam == "original" else torch.zeros(*shape[:-1], 1)
        if magnitude:
            self.beta = nn.Parameter(beta)
        else:
            self.register_buffer("beta", beta, persistent=False)

    def forward(self):
        if self.reparam == "none":
            return self.gamma
        return reparameterize(self.reparam, self.beta, self.alpha) if self.computed is None else self.computed

    @torch.no_grad()
    def collapse(self):
        """The plain γ with the same value: OR and ER are ways to train γ, not other functions."""
        plain = ScaleVector(self.shape, self.input_norm, self.absorbable)
        plain.gamma = nn.Parameter(self().clone())
        return plain

    def extra_repr(self):
        return f"{self.shape}, input_norm={self.input_norm}, absorbable={self.absorbable}, reparam={self.reparam!r}"


def compute_scale_vectors(model):
    """[(ScaleVector, γ)] for every one in the model that is not its own parameter; those of one shape as one batch, so that a few
    kernels make all. If γ is computed where it is used, the compiler fuses OR into kernels over activations, which then read and write
    more (ours)."""
    groups, computed = {}, []
    for module in model.modules():
        if isinstance(module, ScaleVector) and module.reparam != "none":
            groups.setdefault((module.reparam, module.shape), []).append(module)
    for (reparam, _), scales in groups.items():
        alpha = torch.stack([scale.alpha for scale in scales])
        beta = torch.stack([scale.beta for scale in scales]) if reparam != "zero_centered" else None
        computed += zip(scales, reparameterize(reparam, beta, alpha))
    return computed


@contextlib.contextmanager
def at_hand(computed):
    """Within it, the vectors of compute_scale_vectors give the γ that was computed, which must be that of their present parameters."""
    try:
        for scale, gamma in computed:
            scale.computed = gamma
        yield
    finally:
        for scale, _ in computed:
            scale.computed = None


# ---------------------------------------------------------------------------------------------------------------------
# 3. heterogeneity

def branch_scale_vectors(branches, heterogeneous, make):
    """The input-side vectors of the branches that read one norm.

    shared:       W_b (γ ⊙ x̂)    one γ for every branch b: what every Llama has
    HG (eq. 4):   W_b (γ_b ⊙ x̂)  each branch its own: γ_Q, γ_K, γ_V, γ_gate, γ_up

    branches: names; make: list of those a vector serves -> ScaleVector. Returns ({key: ScaleVector}, {branch: key}).
    """
    if heterogeneous:
        return {b: make([b]) for b in branches}, {b: b for b in branches}
    shared = "_".join(branches) if len(branches) <= 3 else "shared"
    return {shared: make(list(branches))}, {b: shared for b in branches}


# ---------------------------------------------------------------------------------------------------------------------
# 4. placement around a linear map
#
# The placements take lists, one entry a branch, because the branches that read one x run as one product. There are two ways to
# compute the same. "activations", the textbook's: multiply x by γ_b and y by γ_a. "weights": multiply W by both, in its own dtype,
# float32, on its way to the compute dtype; that cast reads W anyway, and branches with vectors of their own stay one product.
# "auto" takes, for speed alone, activations for a γ that all branches share, whose gradient then joins the norm's, and weights for
# every other (ours).

class Rows(NamedTuple):
    """Which expert each row of x meets, where x is sorted by expert: its number (N,), and where each expert's rows end (E,) int32."""
    expert: torch.Tensor
    ends: torch.Tensor


def scale_weight(W, v=None, u=None):
    """W̃ = diag(u) W diag(v) = W ⊙ (u vᵀ) (table 1). W (..., m, d), v (..., d), u (..., m); None stands for all ones.
    Absorption: W̃ x = u ⊙ W (v ⊙ x), so γ adds no function that W could not have, only another way to train it."""
    if v is not None:
        W = W * v.unsqueeze(-2)
    if u is not None:
        W = W * u.unsqueeze(-1)
    return W


def scale_activation(x, gamma=None, rows=None):
    """γ ⊙ x in x's dtype, multiplied in the wider of the two. gamma (d,), or (E, d) with each row of x by its expert's; None: all
    ones. Where zeros were appended to x, γ's are appended too. The product with a one-hot matrix is γ[expert]: its gradient is a
    product again, not a thousand additions to one address."""
    if gamma is None:
        return x
    if gamma.ndim == 2 and rows is not None:
        gamma = F.one_hot(rows.expert, gamma.size(0)).to(gamma.dtype) @ gamma
    if gamma.size(-1) < x.size(-1):
        gamma = F.pad(gamma, (0, x.size(-1) - gamma.size(-1)))
    return (x * gamma).to(x.dtype)


def linear(x, weights, rows=None, pad=False):
    """[W_b x for b] as one product: x (..., d), weights [(m_b, d)] -> [(..., m_b)], cast to x's dtype here. With rows: x (N, d) and
    weights [(E, m_b, d)], each row by its expert's matrix.
    pad: in bfloat16 the *copy* of W gets zero rows up to a multiple of 8, because tensor cores want rows of 16 bytes; y keeps the
    zeros. If x is wider than W because of such zeros, the copy gets zero columns."""
    columns = x.size(-1) - weights[0].size(-1)
    padding = [-W.size(-2) % 8 if pad and x.dtype == torch.bfloat16 else 0 for W in weights]
    copies = [W.to(x.dtype) for W in weights]
    copies = [F.pad(W, (0, columns, 0, p)) if columns or p else W for W, p in zip(copies, padding)]
    W = copies[0] if len(copies) == 1 else torch.cat(copies, dim=-2)
    if W.ndim == 2:
        y = F.linear(x, W)
    elif x.dtype == torch.bfloat16:
        y = grouped_mm(x, W.transpose(-2, -1), offs=rows.ends)
    else:
        counts = rows.ends.diff(prepend=rows.ends.new_zeros(1)).tolist()
        y = torch.cat([part @ W_e.T for part, W_e in zip(x.split(counts), W)])
    return y.split([W_b.size(-2) for W_b in copies], dim=-1)


def scaled_product(x, W, v, u, execution="auto", rows=None, pad=False):
    """[u_b ⊙ W_b (v_b ⊙ x) for b], by the route that `execution` names. Entries of v and u may be None. -> [(..., m_b)]."""
    shared = all(v_b is v[0] for v_b in v)
    x_scaled = execution == "activations" or (execution == "auto" and shared)
    y_scaled = execution == "activations"
    if not (x_scaled and y_scaled):
        W = [scale_weight(W_b, None if x_scaled else v_b, None if y_scaled else u_b) for W_b, v_b, u_b in zip(W, v, u)]
    if x_scaled and shared:
        y = linear(scale_activation(x, v[0], rows), W, rows, pad)
    elif x_scaled:
        y = [linear(scale_activation(x, v_b, rows), [W_b], rows, pad)[0] for W_b, v_b in zip(W, v)]
    else:
        y = linear(x, W, rows, pad)
    return [scale_activation(y_b, u_b, rows) for y_b, u_b in zip(y, u)] if y_scaled else list(y)


def input_placement(x, W, v, u=None, norm=None, **route):
    """The standard form: y_b = W_b (γ_b ⊙ x), a scale vector on the input side only, as an Input-Norm has it.
    x (..., d), W [(m_b, d)], v [(d,) or None] -> [(..., m_b)]; route: see scaled_product."""
    return scaled_product(x, W, v, [None] * len(W), **route)


def after_placement(x, W, v, u, norm=None, **route):
    """AP (eq. 5): y_b = γ_a ⊙ (W_b x), a scale vector on the output side only. u [(m_b,) or None]; the rest as above."""
    return scaled_product(x, W, [None] * len(W), u, **route)


def dual_placement(x, W, v, u, norm=None, **route):
    """DP (eq. 6): y_b = γ_a ⊙ (W_b (γ_b ⊙ x)), scale vectors on both sides of the map."""
    return scaled_product(x, W, v, u, **route)


def dual_norm_placement(x, W, v, u, norm=None, rows=None, **route):
    """DNP (eq. 7): y_b = γ_a ⊙ Norm(W_b (γ_b ⊙ x)), a normalization between the map and its output-side vector. Norm acts on
    each head of q, k, v and on the whole output of any other map. norm: ([(width, groups) for each b], ε), see output_norm.
    None stops before the Norm, for a caller that goes through the output piece by piece, as the loss over the vocabulary does."""
    y = scaled_product(x, W, v, [None] * len(W), rows=rows, **route)
    if norm is None:
        return y
    heads, eps = norm
    return [output_norm(y_b, u_b, width, eps, rows, groups) for y_b, u_b, (width, groups) in zip(y, u, heads)]


class Placement(NamedTuple):
    function: Callable  # (x, W, v, u, norm, **route) -> [y_b], as the four above
    input_side: bool  # is there a γ_b?
    output_side: bool  # is there a γ_a?
    linear: bool  # is the whole a linear map, so that W can take γ_a over?


PLACEMENTS = {"input": Placement(input_placement, True, False, True),
              "after": Placement(after_placement, False, True, True),
              "dual": Placement(dual_placement, True, True, True),
              "dual_norm": Placement(dual_norm_placement, True, True, False)}


# ---------------------------------------------------------------------------------------------------------------------
# 5. Output-Norm

def output_norm(z, gamma, width, eps=1e-6, rows=None, groups=1):
    """γ ⊙ Norm(z), Norm over each of `groups` groups of `width` channels: the heads of q, k, v, else one group of all. z (..., m),
    gamma (m,), (E, m) or None -> (..., m). A single group may have zeros appended to it: z is then wider than width."""
    if groups == 1:
        return scale_activation(rms_norm(z, eps, width), gamma, rows)
    return scale_activation(rms_norm(z.unflatten(-1, (groups, width)), eps).flatten(-2), gamma, rows)


class OutputNorm(nn.Module):
    """γ ⊙ Norm(z) that no linear map follows: Q/K-norm before RoPE, Gemma's norms on the outputs of attention and FFN (section 2.2).
    No linear map follows directly, so no weight can absorb γ or undo its decay."""

    def __init__(self, dim, vectors=True, reparam="none", eps=1e-6):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.scale = ScaleVector((dim,), input_norm=False, absorbable=False, reparam=reparam) if vectors else None

    def forward(self, z):  # (..., dim) -> (..., dim)
        return output_norm(z, None if self.scale is None else self.scale(), self.dim, self.eps)


# ---------------------------------------------------------------------------------------------------------------------
# 6. the linear maps that read one stream, with their scale vectors

class ScaledLinear(nn.Module):
    """The linear maps ("branches", no biases) that read one stream x, and the scale vectors around them. x comes normalized: the Norm of
    a Pre-Norm is not in here. The matrices are not initialized: whoever makes this gives each weight[b] its values.

    in_features    d
    branches       {"q": (m_q,), ...}; (E, m) for a stack of E experts
    placement      {"q": "dual_norm", ...}: a name from PLACEMENTS for each branch, or None for a map without any vector
    vectors        False removes every scale vector; the normalizations stay, DNP's too
    heterogeneous  HG: an input-side vector for each branch instead of one for all
    reparam        how each vector is written: see ScaleVector. An input-side vector that only DNP branches read has no magnitude β:
                   the Norm that follows undoes it, its gradient is zero, and Adam would move it by rounding errors (ours)
    execution      "auto", "weights" or "activations": routes to the same function
    norm_width     {branch: channels that DNP normalizes together}, where it is not the whole output
    absorbed_by    {"v": (maps, "o")}: the ScaledLinear, and its branch, that can take over this branch's DNP output side,
                   because only channel-wise operations stand between the two. In a plain dict: it is registered elsewhere
    tied           the weight serves elsewhere too (a tied head), so it cannot take over its vectors
    pad            outputs may keep the zeros that `linear` appends: what reads them is a ScaledLinear again

    forward: x (..., d) -> (..., m), or a list of them for several branches. Parameters: `weight.q` (m_q, d), `scale_in.q` under HG
    or `scale_in.q_k_v` when shared (`scale_in.shared` if there are more than three), `scale_out.q`.
    Raises ValueError on an unknown placement.
    """

    def __init__(self, in_features, branches, placement, *, vectors=True, heterogeneous=False, reparam="none", execution="auto",
                 norm_width=None, eps=1e-6, absorbed_by=None, tied=False, pad=False):
        super().__init__()
        self.in_features, self.branches, self.tied, self.eps = in_features, dict(branches), tied, eps
        for b in branches:
            if placement[b] is not None and placement[b] not in PLACEMENTS:
                raise ValueError(f"placement {placement[b]!r} of {b} is unknown: choose one of {', '.join(PLACEMENTS)}, or None")
        self.placement = {b: PLACEMENTS[placement[b]] if placement[b] else Placement(input_placement, False, False, True) for b in branches}
        widths = {b: (norm_width or {}).get(b, shape[-1]) for b, shape in branches.items()}
        self.heads = {b: (widths[b], shape[-1] // widths[b]) for b, shape in branches.items()}  # what DNP normalizes: (width, groups)
        self.absorbed_by, self.route = absorbed_by or {}, {"execution": execution, "pad": pad}
        self.weight = nn.ParameterDict({b: nn.Parameter(torch.empty(*shape, in_features)) for b, shape in branches.items()})
        normalized = [b for b, p in self.placement.items() if p.function is dual_norm_placement]

        def make_input(serves):
            stack = branches[serves[0]][:-1] if heterogeneous else ()  # under HG each expert has its own
            return ScaleVector((*stack, in_features), True, not tied, reparam, magnitude=any(b not in normalized for b in serves))

        def make_output(b):
            return ScaleVector(branches[b], False, not tied if self.placement[b].linear else b in self.absorbed_by, reparam)

        scale_in, self.reads = {}, {}
        inputs = [b for b in branches if vectors and self.placement[b].input_side]
        outputs = [b for b in branches if vectors and self.placement[b].output_side]
        if inputs:
            scale_in, self.reads = branch_scale_vectors(inputs, heterogeneous, make_input)
        self.scale_in = nn.ModuleDict(scale_in)
        self.scale_out = nn.ModuleDict({b: make_output(b) for b in outputs})

    def forward(self, x, branches=None, rows=None, finish=True):
        """The named branches, or all. rows: see Rows, for stacks of experts. finish=False leaves DNP's norm and γ_a to `finish`."""
        names = list(branches or self.branches)
        v = {key: self.scale_in[key]() for key in dict.fromkeys(self.reads[b] for b in names if b in self.reads)}
        u = {b: self.scale_out[b]() for b in names if b in self.scale_out}
        y = {}
        for function in dict.fromkeys(self.placement[b].function for b in names):  # one product for those that are placed alike
            group = [b for b in names if self.placement[b].function is function]
            norm = ([self.heads[b] for b in group], self.eps) if finish else None
            y.update(zip(group, function(x, [self.weight[b] for b in group], [v.get(self.reads.get(b)) for b in group],
                                         [u.get(b) for b in group], norm=norm, rows=rows, **self.route)))
        return y[names[0]] if len(names) == 1 else [y[b] for b in names]

    def finish(self, b, z, u=None):
        """What forward(finish=False) has left undone for branch b, whose γ_a is u: DNP's γ_a ⊙ Norm(z), or nothing."""
        width, groups = self.heads[b]
        return output_norm(z, u, width, self.eps, groups=groups) if self.placement[b].function is dual_norm_placement else z

    @torch.no_grad()
    def fold(self):
        """Move every absorbable vector into the weight that takes it over, in place; the output stays the same."""
        if self.tied:
            return
        for b, W in self.weight.items():
            v = self.scale_in[self.reads[b]]() if b in self.reads else None
            u = self.scale_out[b]() if b in self.scale_out and self.placement[b].linear else None
            W.copy_(scale_weight(W, v, u))
            if u is not None:
                del self.scale_out[b]
        self.scale_in, self.reads = nn.ModuleDict(), {}
        for b, (after, name) in self.absorbed_by.items():
            if b in self.scale_out:  # grouped-query attention serves each value head to several query heads
                u, (width, _) = self.scale_out[b](), self.heads[b]
                heads = u.unflatten(-1, (-1, width)).repeat_interleave(after.in_features // u.size(-1), dim=-2)
                after.weight[name].copy_(scale_weight(after.weight[name], v=heads.flatten(-2)))
                del self.scale_out[b]


# ---------------------------------------------------------------------------------------------------------------------
# 7. folding

def named_scale_vectors(model):
    """(name, ScaleVector) for each one in the model; the name tells layer, branch and side: layers.3.attn.qkv.scale_in.q"""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ScaleVector)]


def fold_scale_vectors(model):
    """An equal model in which every absorbable vector has gone into a neighbouring weight: W ← diag(u) W diag(v), and DNP's output
    sides of v and up into W_o and W_down. What remains is not absorbable, and is written as a plain γ. The given model is left as
    it is. This is what the paper calls negligible expressivity, made executable (ours)."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if isinstance(module, ScaledLinear):
            module.fold()
    for name, scale in named_scale_vectors(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, scale.collapse())
    return model
