"""
Scale vectors: everything this project is about, in one file to copy (MIT licence).
It imports torch only.

  1. the normalization     rms_norm
  2. how γ is written      REPARAMS: OR, ER, and γ = 1 + α
  3. where γ sits          PLACEMENTS: standard, AP, DP, DNP, and two that are not the paper's
  4. one linear map        ScaledLinear
  5. what the maps read    PreNorm: with one γ for all of them, or with one in each of them (HG)
  6. no map follows γ      OutputNorm
  7. making γ disappear    fold_scale_vectors
  8. who decays            SCALE_DECAY_POLICIES (IWD), weight_decay_groups
  9. the product, fast     fused: equal up to rounding

Letters: x (..., d) an activation; W (m, d) a weight; v (d,) the scale vector before it, γ_b; u (m,)
the one after it, γ_a; W̃ the effective weight. A stack of E experts has W (E, m, d), v (d,) or
(E, d), u (E, m). Equations are those of arXiv 2605.26895v1; "ours" is what it does not say.
"""
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
    """ER, exponential space (eq. 9): γ = e^β e^(α - mean α) > 0. Weight decay pulls γ to 1."""
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


class ScaleVector(nn.Module):
    """One learnable γ, (d,), or (E, d) for E experts. Calling it returns γ.

    input_norm   a linear map follows immediately: the paper's Input-Norm (section 2.2)
    absorbable   γ can be multiplied into some map's weight, and nothing changes (ours). This is not
                 input_norm: γ_a under AP and DP, and under DNP that of the value map and of up
    length       False: a Norm after the map undoes γ's length, so β stays where it starts
    """

    def __init__(self, shape, input_norm, absorbable, reparam="none", length=True):
        super().__init__()
        if reparam not in REPARAMS:
            raise ValueError(f"scale_reparam={reparam!r} is unknown: choose {', '.join(REPARAMS)}")
        self.input_norm, self.absorbable, self.reparam = input_norm, absorbable, reparam
        self.computed = None  # γ, where fast.py has it
        _, _, beta, beta_is_length = REPARAMS[reparam]
        self.alpha = nn.Parameter(torch.empty(shape))
        self.beta = beta  # a constant, or None
        if beta is not None and (length or not beta_is_length):
            self.beta = nn.Parameter(torch.empty(*shape[:-1], 1))
        self.reset_parameters()

    def reset_parameters(self):
        """γ = 1, also where the memory is new: after the meta device, or to_empty."""
        _, alpha, beta, _ = REPARAMS[self.reparam]
        nn.init.constant_(self.alpha, alpha)
        if torch.is_tensor(self.beta):
            nn.init.constant_(self.beta, beta)

    def forward(self):
        if self.computed is not None:
            return self.computed
        function = REPARAMS[self.reparam].function
        if self.beta is None:
            return function(self.alpha)
        return function(self.beta, self.alpha)


# ---- 3. where γ sits: the effective weight, and what happens to the product ----------------------

def scale_weight(W, v=None, u=None):
    """W̃ = diag(u) W diag(v) = W ⊙ (u vᵀ) (table 1); None stands for all ones.
    W̃ x = u ⊙ W(v ⊙ x): γ adds no function that W could not express, only a way to train it."""
    if v is not None:
        W = W * v.unsqueeze(-2)  # columns: W's inputs
    if u is not None:
        W = W * u.unsqueeze(-1)  # rows: its outputs
    return W


def input_weight(W, v, u, m):
    """Standard: y = W(γ_b ⊙ x)."""
    return scale_weight(W, v=v)


def after_weight(W, v, u, m):
    """AP (eq. 5): y = γ_a ⊙ (W x)."""
    return scale_weight(W, u=u)


def dual_weight(W, v, u, m):
    """DP (eq. 6): y = γ_a ⊙ (W(γ_b ⊙ x))."""
    return scale_weight(W, v, u)


def weight_norm_weight(W, v, u, m):
    """γ_a ⊙ ((c W_i / ‖W_i‖)(γ_b ⊙ x)) for each row W_i of W, c = init_std √d (Salimans and Kingma,
    arXiv 1602.07868; not the paper's): a norm of the weight, which costs nothing for each token."""
    return scale_weight(m.init_std * rms_norm(W, eps=0.0), v, u)


def dual_norm_output(y, u, m):
    """DNP (eq. 7): γ_a ⊙ Norm(y), y = W(γ_b ⊙ x) by input_weight. Norm acts on each head of q, k,
    v, and on the whole output elsewhere. after_norm has no γ_b: SDD, arXiv 2502.15499 (ours)."""
    return scale(m.norm(y), u)


class Placement(NamedTuple):
    vectors: str  # those that exist: "v", which is γ_b; "u", which is γ_a; or "vu"
    weight: Callable  # (W, v, u, the ScaledLinear) -> W̃; None for v or u stands for all ones
    output: Callable | None = None  # (W̃ x, u, the ScaledLinear) -> y; None: y = W̃ x
    # Claims that speed and folding rely on; a test checks each. False is never wrong, but slower,
    # and γ_a may then not fold
    ends_in_u: bool = False  # u multiplies y as the last operation, and is used for nothing else
    undoes_factor: bool = False  # c x gives the same y as x, for every c > 0
    keeps_zeros: bool = False  # zeros appended to W̃ x are zeros in y, and change nothing else
    divides_by_rms: bool = False  # y is u ⊙ m.norm(W̃ x) and nothing else: see fast.py


DNP_CLAIMS = {"ends_in_u": True, "undoes_factor": True, "keeps_zeros": True, "divides_by_rms": True}
PLACEMENTS = {
    "input": Placement("v", input_weight),
    "after": Placement("u", after_weight),
    "dual": Placement("vu", dual_weight),
    "dual_norm": Placement("vu", input_weight, dual_norm_output, **DNP_CLAIMS),
    "after_norm": Placement("u", input_weight, dual_norm_output, **DNP_CLAIMS),
    "weight_norm": Placement("vu", weight_norm_weight),
}
BARE = Placement("", input_weight)


# ---- 4. one linear map with its scale vectors ----------------------------------------------------

class ScaledLinear(nn.Module):
    """y = placement.output(W̃ x), without bias. The owner draws the weight: reset_parameters.
    `fused` multiplies x by effective_weight, W with the vectors that only scale it; `output` does
    what is left: DNP's Norm, and γ_a.

    shape       (m, d), or (E, m, d) for a stack of E experts
    placement   a name in PLACEMENTS; None: no vectors, y = W x
    vectors     False removes γ_b and γ_a; DNP's norm stays
    norm_width  channels that DNP normalizes together: head_dim for q, k, v; None: all m
    eps         of DNP's norm
    init_std    None: 1 / √d. Under weight_norm each row of W̃ keeps the length init_std √d
    tied        the weight also serves elsewhere, so it cannot take over a vector
    """

    def __init__(self, shape, placement, vectors=True, reparam="none", norm_width=None, eps=1e-6,
                 init_std=None, tied=False):
        super().__init__()
        if placement is not None and placement not in PLACEMENTS:
            raise ValueError(f"placement {placement!r} is unknown: choose {', '.join(PLACEMENTS)}")
        self.placement = p = PLACEMENTS[placement] if placement else BARE
        self.width = shape[-2]
        self.norm_width = norm_width or self.width
        self.eps = eps
        self.init_std = init_std or shape[-1] ** -0.5
        self.tied = tied

        self.absorbs = []  # (map, head_dim) of each map whose γ_a this weight applies
        self.absorbed_by = []  # the map whose weight applies γ_a; a list, or it would be a child
        self.pad = (0, 0)  # zero columns and rows that W̃ gets: see padded_weight

        # The weight, and the vectors that the placement asks for. γ_b stands right before the
        # matrix, an Input-Norm; γ_a stands behind it, and goes into W unless a Norm stands between
        self.weight = nn.Parameter(torch.empty(shape))
        self.scale_in = self.scale_out = None
        if vectors and "v" in p.vectors:
            self.scale_in = ScaleVector(
                (*shape[:-2], shape[-1]), input_norm=True, absorbable=not tied, reparam=reparam,
                length=not p.undoes_factor)
        if vectors and "u" in p.vectors:
            self.scale_out = ScaleVector(
                shape[:-1], input_norm=False, absorbable=p.output is None and not tied,
                reparam=reparam)

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=self.init_std)

    def absorb(self, m, head_dim=None):
        """Let this weight apply γ_a of m, which saves a pass over m's output, and lets γ_a fold.
        Only operations on single channels may stand between: o.absorb(v), down.absorb(up). It does
        nothing where γ_a is in m's W̃ (AP, DP). head_dim: if a head of m serves several (GQA)."""
        channels = self.weight.size(-1)
        fits = head_dim and channels % m.width == 0 and m.width % head_dim == 0
        if channels != m.width and not fits:
            raise ValueError(f"a map of {channels} inputs cannot absorb γ_a of {m.width} channels: "
                             f"give the head_dim that divides both")
        # only a γ_a that is applied to y can move, and only if nothing comes after it
        in_output = m.scale_out is not None and m.placement.output is not None
        can_move = in_output and m.placement.ends_in_u and not self.tied
        if can_move and self not in m.absorbed_by:
            self.absorbs.append((m, head_dim or m.width))
            m.absorbed_by = [self]
            m.scale_out.absorbable = True

    def effective_weight(self):
        """W̃ (..., m, d): W with the vectors that are multiplied into it, not rounded."""
        v = u = None
        if self.scale_in:
            v = self.scale_in()
        if self.scale_out:
            u = self.scale_out()
        W = self.placement.weight(self.weight, v, u, self)

        # γ_a of the maps that this one absorbs; each value head may serve several query heads
        for m, head_dim in self.absorbs:
            heads = m.scale_out().unflatten(-1, (-1, head_dim))
            heads = heads.repeat_interleave(W.size(-1) // m.width, dim=-2)
            W = scale_weight(W, v=heads.flatten(-2))
        return W

    def norm(self, y):
        """Norm over each norm_width channels."""
        # over each head
        if self.norm_width < self.width:
            return rms_norm(y.unflatten(-1, (-1, self.norm_width)), self.eps).flatten(-2)

        # over the whole output
        if y.size(-1) == self.width:
            return rms_norm(y, self.eps)

        # over the whole output, which ends in zeros that mean(y²) must not count
        share = self.width / y.size(-1)
        return rms_norm(y, self.eps * share) * share ** 0.5

    def output(self, y, routing=None):
        """What follows the product y = W̃ x (..., m): DNP's Norm and γ_a, or nothing."""
        if self.placement.output is None:
            return y

        # γ_a, unless the next map's weight applies it; as long as y, which may end in zeros
        u = None
        if self.scale_out and not self.absorbed_by:
            u = F.pad(self.scale_out(), (0, y.size(-1) - self.width))
            if routing is not None:
                u = routing.per_row(u)
        return self.placement.output(y, u, self)

    def forward(self, x, routing=None):
        return fused(x, (self,), routing)[0]


# ---- 5. what the maps read -----------------------------------------------------------------------

class PreNorm(nn.Module):
    """What several maps read of the residual stream: fused(norm(x), maps).

    shared=True    one γ_b for all of them, and this module has it, as in every Llama:
                   W_q(γ ⊙ Norm(x)), W_k(γ ⊙ Norm(x)), ... If only one of several maps has a γ_b,
                   that map keeps it
    shared=False   each map has its own: W_q(γ_q ⊙ Norm(x)), W_k(γ_k ⊙ Norm(x)), ...: HG (eq. 4)

    If each map undoes any factor of its input, the division is left out. DNP does: with Norm(x) =
    x / r, Norm(W(γ_b ⊙ x / r)) = Norm(W(γ_b ⊙ x)) (FlashNorm, arXiv 2407.09577). DNP's ε is then
    ε², which changes outputs by 1e-6 or so (docs/theory.md).
    """

    def __init__(self, maps, shared=True, eps=1e-6):
        super().__init__()
        self.maps = list(maps)
        self.eps = eps
        self.scale = None

        # with x / r left out, ε in DNP's norm would have to be ε r²; ε² is near enough for any r
        self.skips_division = all(m.placement.undoes_factor for m in maps)
        if self.skips_division:
            for m in maps:
                m.eps = eps ** 2

        # one γ_b for all maps: it is this module's, and no longer each map's
        owners = [m for m in maps if m.scale_in]
        reparams = {m.scale_in.reparam for m in owners}
        if shared and len(owners) > 1 and (owners != self.maps or len(reparams) > 1):
            raise ValueError("of maps that share a γ_b all must have one, written in one way: give "
                             "all the same placement, or each map a γ_b of its own (HG)")
        if shared and owners == self.maps:
            self.scale = ScaleVector(
                maps[0].weight.shape[-1:], input_norm=True, reparam=reparams.pop(),
                absorbable=not any(m.tied for m in maps), length=not self.skips_division)
            for m in maps:
                m.scale_in = None

    def forward(self, x):
        if not self.skips_division:
            x = rms_norm(x, self.eps)
        if self.scale:
            x = scale(x, self.scale())
        return x


# ---- 6. no linear map follows γ ------------------------------------------------------------------

class OutputNorm(nn.Module):
    """γ ⊙ Norm(z), z (..., dim): Q/K-norm, and Gemma's norms on sub-layers' outputs (sec. 2.2)."""

    def __init__(self, dim, vectors=True, reparam="none", eps=1e-6):
        super().__init__()
        self.eps, self.scale = eps, None
        if vectors:
            self.scale = ScaleVector((dim,), input_norm=False, absorbable=False, reparam=reparam)

    def forward(self, z):
        z = rms_norm(z, self.eps)
        if self.scale:
            z = scale(z, self.scale())
        return z


# ---- 7. making γ disappear -----------------------------------------------------------------------

def named_scale_vectors(model):
    """[(name, ScaleVector)] of the model, such as ("layers.3.attn.q.scale_in", ...)."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, ScaleVector)]


def check_maps(model):
    """Raise ValueError if a norm or a map relies on a map that is gone, or two norms have one."""
    present, read = set(model.modules()), set()
    for name, m in model.named_modules():
        relies_on = []
        if isinstance(m, PreNorm):
            relies_on = m.maps
            if not read.isdisjoint(m.maps):
                raise ValueError(f"{name} has a map that another norm has: make one norm for both")
            read.update(m.maps)
        if isinstance(m, ScaledLinear):
            relies_on = [other for other, _ in m.absorbs] + m.absorbed_by
        if not present.issuperset(relies_on):
            raise ValueError(f"{name} relies on a map that was replaced: make the block anew")


@torch.no_grad()
def fold_scale_vectors(model):
    """A copy of equal outputs in which every absorbable γ has been multiplied into a weight, and
    the others are written as plain γ (ours)."""
    check_maps(model)
    model = copy.deepcopy(model)

    # a γ_b that several maps share goes into each of their weights, below
    for norm in model.modules():
        if isinstance(norm, PreNorm) and norm.scale and norm.scale.absorbable:
            for m in norm.maps:
                m.scale_in = norm.scale
            norm.scale = None

    # W becomes W̃, and what W̃ has applied is gone. All W̃ come before any W changes, because a map
    # may apply another's γ_a. A weight that two maps share becomes two
    maps = [m for m in model.modules() if isinstance(m, ScaledLinear) and not m.tied]
    for m, W in zip(maps, [m.effective_weight() for m in maps]):
        m.weight = nn.Parameter(W.to(m.weight.dtype), m.weight.requires_grad)
        m.scale_in, m.absorbs, m.placement = None, [], m.placement._replace(weight=input_weight)
        if m.placement.output is None or m.absorbed_by:
            m.scale_out = None

    # what no weight can take stays, as plain γ
    for _, vector in named_scale_vectors(model):
        vector.alpha = nn.Parameter(vector().clone(), vector.alpha.requires_grad)
        vector.reparam, vector.beta = "none", None
    return model


# ---- 8. who decays -------------------------------------------------------------------------------

# does the parameter `name` of a ScaleVector decay? (the paper treats β and α alike)
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
    name in SCALE_DECAY_POLICIES, or a function of a parameter's name and its ScaleVector."""
    check_maps(model)
    decays = policy
    if isinstance(policy, str):
        decays = SCALE_DECAY_POLICIES[policy]

    # α and β of each ScaleVector by the policy, all else by its dimensions
    vectors = {p: m for _, m in named_scale_vectors(model) for p in m.parameters()}
    groups = {name: [] for name in ("matrices", "others", "scale_decayed", "scale")}
    for name, p in model.named_parameters():
        if p in vectors:
            group = "scale_decayed" if decays(name, vectors[p]) else "scale"
        elif p.ndim > 1:
            group = "matrices"
        elif "_fsdp_wrapped_module." in name:
            raise ValueError(f"{name} may be a flat piece of a matrix: shard with fully_shard "
                             f"(FSDP2), which keeps shapes")
        else:
            group = "others"
        groups[group].append((name, p))

    decay = {"matrices": weight_decay, "scale_decayed": weight_decay}
    return [{"name": name, "params": params, "weight_decay": decay.get(name, 0.0)}
            for name, params in groups.items() if params]


# ---- 9. the product W̃ x, fast ------------------------------------------------------------------

def fused(x, maps, routing=None):
    """[m(x) for m in maps] as one product of their stacked effective weights, in x's dtype.
    routing: for stacks of experts, with products and vectors for each row: see fast.Routing."""
    # one matrix of all rows; each part is cast before it is copied
    weights = [padded_weight(m, x.dtype) for m in maps]
    W = weights[0]
    if len(weights) > 1:
        W = torch.cat(weights, dim=-2)

    # one product, by one matrix or by each row's expert
    if routing is None:
        product = F.linear(x, W)
    else:
        product = routing.product(x, W)

    # each map's share of it, and what the map does to that
    ys = product.split([W.size(-2) for W in weights], dim=-1)
    return [m.output(y, routing) for m, y in zip(maps, ys)]


def padded_weight(m, dtype):
    """W̃ in the activations' dtype, with the zeros of m.pad: tensor cores need widths that are
    multiples of 8. Float32 needs none, and autocast would change the dtype between two maps."""
    W = m.effective_weight().to(dtype)
    if m.pad == (0, 0) or dtype == torch.float32 or torch.is_autocast_enabled(W.device.type):
        return W
    columns, rows = m.pad
    return F.pad(W, (0, columns, 0, rows))


def scale(x, gamma):
    """γ ⊙ x, in x's dtype. None stands for all ones."""
    return x if gamma is None else (x * gamma).to(x.dtype)
