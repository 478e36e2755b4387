"""
Speed that the formulas of norms.py do not show. Nothing here changes a result, up to rounding.

  gammas_in_batches   every γ of a model in a few operations, in place of a few for each
  apply_wide          DNP over an output much wider than the input, such as the logits
  Routing             a mixture's experts as one product

A reader who wants to know what a dense model computes can leave this file out.
"""
import contextlib

import torch
from torch.nn import functional as F

from norms import REPARAMS, ScaleVector, scale, scale_weight

# ---- every γ at once -----------------------------------------------------------------------------

@contextlib.contextmanager
def gammas_in_batches(modules):
    """Within it, the ScaleVectors among the modules return a γ that was computed in one batch with
    all others of its shape. A model of 4 layers with HG, DNP and OR has 42, and one by one they
    take 8% of its step on a CPU. One thread at a time: the modules hold what was computed.
    A shard (DTensor) is left out, because its layer gathers it later."""
    batches = {}
    for m in modules:
        plain = isinstance(m, ScaleVector) and type(m.alpha) is torch.nn.Parameter
        if plain and m.reparam != "none":
            kind = m.reparam, m.alpha.shape, torch.is_tensor(m.beta)
            batches.setdefault(kind, []).append(m)
    try:
        for batch in batches.values():
            for m, gamma in zip(batch, gammas(batch)):
                m.computed = gamma
        yield
    finally:  # also after an error: a γ from before an update would be wrong
        for batch in batches.values():
            for m in batch:
                m.computed = None


def gammas(batch):
    """γ of each of these ScaleVectors, which have one shape and are written in one way."""
    first = batch[0]
    function = REPARAMS[first.reparam].function
    alpha = torch.stack([m.alpha for m in batch])
    if first.beta is None:
        return function(alpha)
    if not torch.is_tensor(first.beta):
        return function(first.beta, alpha)
    return function(torch.stack([m.beta for m in batch]), alpha)


# ---- the head ------------------------------------------------------------------------------------
# All that DNP's Norm needs of an output is its length, one number for each row, and ‖W̃x‖² =
# xᵀ(W̃ᵀW̃)x, where W̃ᵀW̃ is only (d, d). So γ_a ⊙ Norm(W̃x) = (γ_a ⊙ W̃)(x / RMS(W̃x)): an ordinary
# product of a rescaled x, and no norm reads the logits.

def apply_wide(m, x):
    """m(x), x (..., d) -> (..., m), by W̃ᵀW̃ if m is one such matrix, and both its output and x's
    rows are enough to pay for it."""
    d = m.weight.size(-1)
    rows = x.numel() // d
    pays = m.width >= 4 * d and rows >= 4 * d
    if pays and m.placement.divides_by_rms and m.norm_width == m.width and m.weight.ndim == 2:
        return by_gram(m, x)
    return m(x)


def by_gram(m, x):
    """m(x) for a map whose output is normalized as a whole, by W̃ᵀW̃."""
    W = m.effective_weight()
    mean_square = MeanSquare.apply(x.flatten(0, -2), W.to(x.dtype)).view(*x.shape[:-1], 1)
    x = scale(x, (mean_square + m.eps).rsqrt())
    u = None
    if m.scale_out and not m.absorbed_by:
        u = m.scale_out()
    return F.linear(x, scale_weight(W, u=u).to(x.dtype))


class MeanSquare(torch.autograd.Function):
    """mean((Wx)²) of each row of x (N, d), W (m, d), as xᵀ(WᵀW/m)x -> (N, 1), in float32 or wider
    because its terms may cancel."""

    @staticmethod
    def forward(ctx, x, W):
        gram = wide_product(W.mT, W) / len(W)  # a mean, which float16 can hold
        y = wide_product(x, gram.to(x.dtype))
        if x.dtype.itemsize == 2:  # what that cast has lost
            y += wide_product(x, (gram - gram.to(x.dtype)).to(x.dtype))
        ctx.save_for_backward(x, W, y)
        # rounding can make a sum of terms that cancel negative
        return (x * y).sum(-1, keepdim=True).clamp(min=0)

    @staticmethod
    def backward(ctx, grad):
        x, W, y = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # second derivatives need y as a function, where it is kept as a number
            y = x.to(y.dtype) @ (W.mT @ W).to(y.dtype) / len(W)
        grad = 2 * grad
        outer = x.mT @ (grad * x).to(x.dtype)
        return (grad * y).to(x.dtype), W @ outer / len(W)


def wide_product(a, b):
    """The matrix product a b, in float32 or wider, whatever autocast asks for."""
    if a.is_cuda and a.dtype.itemsize == 2:
        # it has no derivative: hence MeanSquare
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        return a.to(wide) @ b.to(wide)


# ---- the mixture ---------------------------------------------------------------------------------

# the public name came with PyTorch 2.10
grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm


class Routing:
    """N tokens go to K experts each, expert (N, K): as N K rows, sorted by expert."""

    def __init__(self, expert, n_expert):
        self.tokens, self.n_expert = expert.shape, n_expert
        self.order = expert.flatten().argsort(stable=True)
        self.inverse = self.order.argsort()
        self.expert = expert.flatten()[self.order]  # of each row
        counts = F.one_hot(self.expert, n_expert).sum(0)
        self.ends = counts.cumsum(0).to(torch.int32)  # where each expert's rows end

    def sort(self, x):
        """Tokens (N, C) -> rows (N K, C): K copies of each."""
        (N, K), C = self.tokens, x.size(-1)
        copies = x.unsqueeze(1).expand(N, K, C).reshape(N * K, C)
        return Permute.apply(copies, self.order, self.inverse)

    def unsort(self, y):
        """Rows (N K, C) -> (N, K, C)."""
        return Permute.apply(y, self.inverse, self.order).view(*self.tokens, -1)

    def product(self, x, W):
        """Each row of x (N K, d) by its expert's matrix, W (E, m, d) -> (N K, m)."""
        if x.dtype == torch.bfloat16:
            if W.size(-1) % 8 or W.size(-2) % 8:
                raise ValueError(f"experts of {W.size(-1)} inputs and {W.size(-2)} outputs: in "
                                 f"bfloat16 both must be multiples of 8; use float32")
            return grouped_mm(x, W.mT, offs=self.ends)
        counts = self.ends.diff(prepend=self.ends.new_zeros(1)).tolist()
        return torch.cat([F.linear(part, W_e) for part, W_e in zip(x.split(counts), W)])

    def per_row(self, gamma):
        """γ[expert] (N K, d) of a stack γ (E, d). It is a one-hot product because its backward pass
        is then a product too, not a scatter-add."""
        return F.one_hot(self.expert, self.n_expert).to(gamma.dtype) @ gamma


class Permute(torch.autograd.Function):
    """x[order] with the gradient grad[inverse], a gather. PyTorch's own backward adds up rows as
    if they could repeat."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.saved_tensors[0]], None, None
