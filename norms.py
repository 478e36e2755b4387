"""
Scale vectors: everything this project is about, in one file to copy. It imports torch only.

  1. the normalization     rms_norm
  2. how γ is written      REPARAMS: OR, ER, and γ = 1 + α
  3. where γ sits          PLACEMENTS: standard, AP, DP, DNP
  4. one linear map        ScaledLinear
  5. who shares a γ        share_input_scale; without it each map has its own (HG)
  6. no map follows γ      OutputNorm
  7. making γ disappear    fold_scale_vectors
  8. who decays            SCALE_DECAY_POLICIES (IWD), weight_decay_groups
  9. the product, fast     fused: equal up to rounding; pre_norm: also up to its ε

Letters: x (..., d) an activation; W (m, d) a weight; v (d,) the scale vector on its input side,
the paper's γ_b; u (m,) the one on its output side, γ_a; W̃ the effective weight. A stack of E
experts has W (E, m, d), v (d,) or (E, d), u (E, m). Equations and sections are those of
arXiv 2605.26895v1; "ours" marks what the paper does not say.
"""
import contextlib
import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

# ---- 1. the normalization ------------------------------------------------------------------------

def rms_norm(x, eps=1e-6):
    """Norm(x) = √d x / ‖x‖ (eq. 1), over the last dimension. eps, added to mean(x²), is ours."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


# ---- 2. how γ is written -------------------------------------------------------------------------

def original_reparam(beta, alpha):
    """OR, original space (eq. 8): γ = β Norm(α), α not 0. β sets the length, ‖γ‖ = |β| √d."""
    return beta * rms_norm(alpha, eps=0.0)


def exponential_reparam(beta, alpha):
    """ER, exponential space (eq. 9): γ = e^β e^(α - mean α). All entries are positive. Weight decay
    pulls β and α to 0, and so γ to 1."""
    return (beta + alpha - alpha.mean(-1, keepdim=True)).exp()


def zero_centered_reparam(alpha):
    """γ = 1 + α, as Gemma and Qwen3-Next write it: weight decay pulls γ to 1, not to 0 (ours)."""
    return 1 + alpha


class Reparam(NamedTuple):
    function: Callable  # (β, α) -> γ, or α -> γ: α and γ (..., d), β (..., 1)
    alpha: float  # where every entry of α starts
    beta: float | None = None  # where β starts; None: there is no β
    beta_is_length: bool = False  # β only scales γ, so a Norm after the map undoes it


REPARAMS = {
    "none": Reparam(lambda gamma: gamma, 1.0),
    "original": Reparam(original_reparam, 1.0, 1.0, beta_is_length=True),  # theorem 3.2's start
    "exponential": Reparam(exponential_reparam, 0.0, 0.0, beta_is_length=True),  # γ = 1 (ours)
    "zero_centered": Reparam(zero_centered_reparam, 0.0),
}


def reparameterize(reparam, beta, alpha):
    function = REPARAMS[reparam].function
    return function(alpha) if beta is None else function(beta, alpha)


class ScaleVector(nn.Module):
    """One learnable γ, (d,), or (E, d) for E experts. Calling it returns γ.

    input_norm   a linear map follows immediately: the paper's Input-Norm (section 2.2)
    absorbable   a neighbouring linear map can take γ over exactly (ours). This is not input_norm:
                 γ_a under AP and DP, and under DNP on v and up, is absorbable and no Input-Norm
    length       False: a Norm after the map undoes γ's length; then OR and ER have no β
    """

    def __init__(self, shape, input_norm, absorbable, reparam="none", length=True):
        super().__init__()
        if reparam not in REPARAMS:
            raise ValueError(f"scale_reparam={reparam!r} is unknown: choose {', '.join(REPARAMS)}")
        self.shape, self.reparam = tuple(shape), reparam
        self.input_norm, self.absorbable = input_norm, absorbable
        self.cached = None  # γ, within cached_scale_vectors
        _, alpha, beta, beta_is_length = REPARAMS[reparam]
        self.alpha = nn.Parameter(torch.full(self.shape, alpha))
        # β is a parameter, a constant, or None
        trained = beta is not None and (length or not beta_is_length)
        self.beta = nn.Parameter(torch.full((*shape[:-1], 1), beta)) if trained else beta

    def forward(self):
        if self.cached is not None:
            return self.cached
        return reparameterize(self.reparam, self.beta, self.alpha)


# ---- 3. where γ sits: the effective weight, and what happens to the product ----------------------

def scale_weight(W, v=None, u=None):
    """W̃ = diag(u) W diag(v) = W ⊙ (u vᵀ) (table 1); None stands for all ones.
    W̃ x = u ⊙ W(v ⊙ x): γ adds no function that W could not express, only a way to train it."""
    W = W if v is None else W * v.unsqueeze(-2)
    return W if u is None else W * u.unsqueeze(-1)


def input_weight(W, v, u):
    """Standard: y = W(γ_b ⊙ x)."""
    return scale_weight(W, v=v)


def after_weight(W, v, u):
    """AP (eq. 5): y = γ_a ⊙ (W x)."""
    return scale_weight(W, u=u)


def dual_weight(W, v, u):
    """DP (eq. 6): y = γ_a ⊙ (W(γ_b ⊙ x))."""
    return scale_weight(W, v, u)


def dual_norm_output(y, u, m):
    """DNP (eq. 7): γ_a ⊙ Norm(y), where y = W(γ_b ⊙ x) by input_weight. Norm acts on each head
    of q, k, v, and on the whole output of any other map. x needs no Norm: see pre_norm."""
    return scale(m.norm(y), u)


class Placement(NamedTuple):
    vectors: str  # those that exist: "v", which is γ_b; "u", which is γ_a; or "vu"
    weight: Callable  # (W, v, u) -> W̃; None for v or u stands for all ones
    output: Callable | None = None  # (W̃ x, u, the ScaledLinear) -> y; None: y = W̃ x
    # Claims that speed and folding rely on; a test checks each. An entry works without them.
    factors: str = ""  # those that only multiply: "v" the input of W, "u" y, as the last operation
    undoes_factor: bool = False  # c x gives the same y as x, for every c > 0
    keeps_zeros: bool = False  # zeros appended to W̃ x are zeros in y, and change nothing else


PLACEMENTS = {
    "input": Placement("v", input_weight, factors="v"),
    "after": Placement("u", after_weight),
    "dual": Placement("vu", dual_weight, factors="v"),
    "dual_norm": Placement("vu", input_weight, dual_norm_output, factors="vu",
                           undoes_factor=True, keeps_zeros=True),
}
BARE = Placement("", input_weight)


# ---- 4. one linear map with its scale vectors ----------------------------------------------------

class ScaledLinear(nn.Module):
    """y = placement.output(W̃ x), without bias. The owner initializes the weight.

    shape        (m, d), or (E, m, d) for a stack of E experts
    placement    a name in PLACEMENTS; None: no vectors, y = W x
    vectors      False removes the scale vectors; DNP's norm stays
    norm_width   channels that DNP normalizes together: head_dim for q, k, v; None: all m
    eps          of DNP's norm
    absorbed_by  the ScaledLinear that can take over γ_a under DNP, because only channel-wise
                 operations stand between: o for v, down for up. Its weight then applies γ_a
    tied         the weight also serves elsewhere, so it cannot take over a vector
    """

    def __init__(self, shape, placement, vectors=True, reparam="none", norm_width=None, eps=1e-6,
                 absorbed_by=None, tied=False):
        super().__init__()
        if placement is not None and placement not in PLACEMENTS:
            raise ValueError(f"placement {placement!r} is unknown: choose {', '.join(PLACEMENTS)}")
        self.placement = p = PLACEMENTS[placement] if placement else BARE
        self.norm_width, self.eps, self.tied = norm_width or shape[-2], eps, tied
        self.weight = nn.Parameter(torch.empty(shape))
        self.hands_over = absorbed_by is not None and p.output is not None and "u" in p.factors
        self.takes_over = []  # the maps whose γ_a this weight applies

        self.scale_in = self.scale_out = None
        if vectors and "v" in p.vectors:
            shape_in = (*shape[:-2], shape[-1])
            self.scale_in = ScaleVector(shape_in, True, not tied, reparam, not p.undoes_factor)
        if vectors and "u" in p.vectors:
            absorbable = self.hands_over if p.output else not tied
            self.scale_out = ScaleVector(shape[:-1], False, absorbable, reparam)
            if self.hands_over:
                absorbed_by.takes_over.append(self)

    def effective_weight(self, with_v=True):
        """W̃ (..., m, d): W with the vectors that are multiplied into it, in the wider dtype."""
        v = self.scale_in() if self.scale_in and with_v else None
        u = self.scale_out() if self.scale_out else None
        W = self.placement.weight(self.weight, v, u)
        for m in self.takes_over:  # each value head may serve several query heads
            heads = m.scale_out().unflatten(-1, (-1, m.norm_width))
            heads = heads.repeat_interleave(W.size(-1) // m.weight.size(-2), dim=-2)
            W = scale_weight(W, v=heads.flatten(-2))
        return W

    def norm(self, y):
        """Norm over each norm_width channels."""
        m = self.weight.size(-2)
        if y.size(-1) == m:
            return rms_norm(y.unflatten(-1, (-1, self.norm_width)), self.eps).flatten(-2)
        if self.norm_width != m:
            raise ValueError("a norm over heads cannot read appended zeros: give pad=False")
        coverage = m / y.size(-1)  # y ends in appended zeros, which mean(y²) must not count
        return rms_norm(y, self.eps * coverage) * coverage ** 0.5

    def output(self, y, routing=None):
        """What follows the product y = W̃ x (..., m): DNP's Norm and γ_a, or nothing."""
        if self.placement.output is None:
            return y
        u = self.scale_out() if self.scale_out and not self.hands_over else None
        return self.placement.output(y, per_row(u, routing), self)

    def forward(self, x, routing=None):
        return fused(x, (self,), routing)[0]


# ---- 5. who shares a γ ---------------------------------------------------------------------------

def share_input_scale(maps):
    """Make the maps share one γ_b: the standard form, W_q(γ ⊙ x̂), W_k(γ ⊙ x̂), ...
    Without this call each map has its own, W_q(γ_q ⊙ x̂), W_k(γ_k ⊙ x̂), ...: HG (eq. 4)."""
    readers = [m for m in maps if m.scale_in]
    if not readers:
        return
    need_length = [m for m in readers if not m.placement.undoes_factor] or readers
    shared = need_length[0].scale_in  # one with a β, if any reader needs γ's length
    for m in readers:
        if (m.scale_in.shape[-1], m.scale_in.reparam) != (shared.shape[-1], shared.reparam):
            raise ValueError("maps that share a γ must read equal widths and write γ in one way")
        del m.scale_in
        m.__dict__["scale_in"] = shared
    readers[0].scale_in = shared  # a child of the first map only, so that it has one name


# ---- 6. no linear map follows γ ------------------------------------------------------------------

class OutputNorm(nn.Module):
    """γ ⊙ Norm(z), z (..., dim): Q/K-norm, and Gemma's norms on sub-layers' outputs (sec. 2.2)."""

    def __init__(self, dim, vectors=True, reparam="none", eps=1e-6):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.scale = ScaleVector((dim,), False, False, reparam) if vectors else None

    def forward(self, z):
        appended(z, self.dim, possible=False)  # refuses another width
        return scale(rms_norm(z, self.eps), self.scale() if self.scale else None)


# ---- 7. making γ disappear -----------------------------------------------------------------------

def named_scale_vectors(model):
    """[(name, ScaleVector)] of the model, such as ("layers.3.attn.q.scale_in", ...)."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, ScaleVector)]


def check_vectors(model):
    """Raise ValueError if a map reads or applies a vector of a map that the model no longer has."""
    present = {None, *model.modules()}
    for name, m in model.named_modules():
        if isinstance(m, ScaledLinear) and not {m.scale_in, *m.takes_over} <= present:
            raise ValueError(f"{name} uses a scale vector of a map that the model does not have: if"
                             " one was replaced, make those that share a vector with it anew")


@torch.no_grad()
def fold_scale_vectors(model):
    """A copy of equal outputs in which every absorbable γ has been multiplied into a weight, and
    the others are written as plain γ (ours)."""
    check_vectors(model)
    model = copy.deepcopy(model)
    maps = [m for m in model.modules() if isinstance(m, ScaledLinear) and not m.tied]
    for m, W in zip(maps, [m.effective_weight() for m in maps]):
        m.weight = nn.Parameter(W.to(m.weight.dtype))  # one that two maps share becomes two
        m.scale_in, m.takes_over, m.placement = None, [], m.placement._replace(weight=input_weight)
        if m.placement.output is None or m.hands_over:
            m.scale_out = None
    for _, vector in named_scale_vectors(model):
        vector.alpha = nn.Parameter(vector().clone())
        vector.reparam, vector.beta = "none", None
    return model


# ---- 8. who decays -------------------------------------------------------------------------------

# does the parameter `name` of a ScaleVector decay? (the paper does not tell β from α)
SCALE_DECAY_POLICIES = {
    "all": lambda name, vector: True,  # Gemma's baseline (figure 3); our reading of rows w/o IWD
    "none": lambda name, vector: False,
    "input_norm": lambda name, vector: vector.input_norm,  # IWD (section 2.2): Input-Norms only
    "output_norm": lambda name, vector: not vector.input_norm,  # the converse (figure 3)
    "absorbable": lambda name, vector: vector.absorbable,  # ours
}


def weight_decay_groups(model, weight_decay, policy):
    """torch.optim groups of (name, parameter) pairs for any model that holds ScaleVectors. Matrices
    decay, other parameters of one dimension or none do not, and scale vectors do by the policy: a
    name in SCALE_DECAY_POLICIES, or a function as there. A parameter's name tells layer, map and
    side, γ_b or γ_a, and part: "layers.3.attn.q.scale_in.alpha"."""
    check_vectors(model)
    decays = SCALE_DECAY_POLICIES[policy] if isinstance(policy, str) else policy
    vectors = {p: m for _, m in named_scale_vectors(model) for p in m.parameters()}
    groups = {name: [] for name in ("matrices", "others", "scale_decayed", "scale")}
    for name, p in model.named_parameters():
        group = "matrices" if p.ndim > 1 else "others"
        if p in vectors:
            group = "scale_decayed" if decays(name, vectors[p]) else "scale"
        groups[group].append((name, p))
    decay = {"matrices": weight_decay, "scale_decayed": weight_decay}
    return [{"name": name, "params": params, "weight_decay": decay.get(name, 0.0)}
            for name, params in groups.items() if params]


# ---- 9. the product W̃ x, fast ------------------------------------------------------------------

# the public name came with PyTorch 2.10
grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm


class Routing(NamedTuple):
    """The expert that each row of x meets, where x (N, d) is sorted by expert."""
    expert: torch.Tensor  # (N,) its number
    ends: torch.Tensor  # (E,) int32: where each expert's rows end


def pre_norm(x, maps, eps=1e-6, normalized=None):
    """What the maps read of a residual stream x (..., d): Norm(x), or x itself where each of them
    undoes any factor. DNP does: with Norm(x) = x / r, Norm(W(γ_b ⊙ x / r)) = Norm(W(γ_b ⊙ x))
    (FlashNorm, arXiv 2407.09577). With ε in both, DNP's would have to be ε r². Give such maps ε²
    as their eps: it differs by a relative 1e-6 or so, and by nothing as ε goes to 0.
    normalized: Norm(x), where the caller has it."""
    if all(m.placement.undoes_factor for m in maps):
        return x
    return rms_norm(x, eps) if normalized is None else normalized.to(x.dtype)


def products(x, maps, routing=None, pad=False):
    """[W̃ x for each map] as one product of their stacked effective weights, in x's dtype. A γ_b
    that all of them share is multiplied into x instead, as in every Llama. pad: in bfloat16 the
    copies of W̃ get zero rows up to multiples of 8, the alignment that tensor cores need, and so
    does y. Where x ends in such channels, the copies get zero columns."""
    shared = maps[0].scale_in
    on_x = (shared is not None and len(shared.shape) == 1
            and all(m.scale_in is shared and "v" in m.placement.factors for m in maps))
    x = scale(x, shared()) if on_x else x
    pad = pad and x.dtype == torch.bfloat16 and all(
        m.placement.output is None or m.placement.keeps_zeros for m in maps)
    copies = []
    for m in maps:
        W = m.effective_weight(with_v=not on_x).to(x.dtype)  # cast before they are stacked
        rows = -W.size(-2) % 8 if pad else 0
        columns = appended(x, W.size(-1), possible=x.dtype == torch.bfloat16)
        copies.append(F.pad(W, (0, columns, 0, rows)) if rows or columns else W)
    W = torch.cat(copies, dim=-2) if len(copies) > 1 else copies[0]
    return product(x, W, routing).split([W.size(-2) for W in copies], dim=-1)


def fused(x, maps, routing=None, pad=False):
    """[m(x) for m in maps] as one product. pad: only for what a ScaledLinear reads again, after
    operations that keep zeros; see products."""
    return [m.output(y, routing) for m, y in zip(maps, products(x, maps, routing, pad))]


def product(x, W, routing=None):
    """W x, (..., d) -> (..., m). With routing, x (N, d) and W (E, m, d): each row by its expert."""
    if routing is None:
        return F.linear(x, W)
    if x.dtype == torch.bfloat16:
        return grouped_mm(x, W.mT, offs=routing.ends)
    counts = routing.ends.diff(prepend=routing.ends.new_zeros(1)).tolist()
    return torch.cat([F.linear(part, W_e) for part, W_e in zip(x.split(counts), W)])


def scale(x, gamma):
    """γ ⊙ x, in x's dtype. Where x ends in channels that `products` appended, so does γ."""
    if gamma is None:
        return x
    if columns := appended(x, gamma.size(-1)):
        gamma = F.pad(gamma, (0, columns))
    return (x * gamma).to(x.dtype)


def appended(x, width, possible=True):
    """How many zero channels `products` has appended to x. Raises ValueError on another width."""
    columns = x.size(-1) - width
    if columns and not (possible and columns == -width % 8):
        raise ValueError(f"the input has {x.size(-1)} channels, and {width} are expected")
    return columns


def per_row(gamma, routing):
    """γ[expert] (N, d) for a stack of experts, γ (E, d). It is a one-hot product because its
    backward pass is then a product too, not a scatter-add."""
    if gamma is None or routing is None or gamma.ndim == 1:
        return gamma
    return F.one_hot(routing.expert, len(gamma)).to(gamma.dtype) @ gamma


def compute_scale_vectors(model):
    """[(ScaleVector, γ)] of all that are not their own parameter. Equal shapes are one batch, so
    that a few kernels do the work of the whole model."""
    batches, computed = {}, []
    for _, m in named_scale_vectors(model):
        if m.reparam != "none":
            batches.setdefault((m.reparam, m.shape, torch.is_tensor(m.beta)), []).append(m)
    for (reparam, _, has_beta), batch in batches.items():
        alpha = torch.stack([m.alpha for m in batch])
        beta = torch.stack([m.beta for m in batch]) if has_beta else batch[0].beta
        computed += zip(batch, reparameterize(reparam, beta, alpha))
    return computed


@contextlib.contextmanager
def cached_scale_vectors(computed):
    """Within it, ScaleVectors return what compute_scale_vectors gave, which must be up to date."""
    try:
        for m, gamma in computed:
            m.cached = gamma
        yield
    finally:
        for m, _ in computed:
            m.cached = None
