"""
Who is decayed, who steps, and how fast: parameter groups, optimizers and learning-rate schedules.

  param_groups       every parameter in exactly one group; scale vectors by a decay policy
  Muon               orthogonalized momentum, all matrices of one shape at once
  make_optimizer     AdamW, or Muon for the hidden matrices with AdamW for the rest
  optimizer_state    what a checkpoint keeps, by parameter name
  update_norms       how far AdamW's last step went
  learning_rate      the schedule, cosine or wsd, as a pure function of the step
"""
import math

import torch

from norms import SCALE_DECAY_POLICIES, weight_decay_groups

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd")
# the share of the way down that is still to go, for s from 0, where the decay begins, to 1
DECAY_SHAPES = {
    "linear": lambda s: 1 - s,
    "cosine": lambda s: 0.5 * (1 + math.cos(math.pi * s)),
    "sqrt": lambda s: 1 - math.sqrt(s),
}


def param_groups(model, weight_decay, scale_weight_decay="all", decay_embeddings=True,
                 scale_lr=1.0):
    """torch.optim parameter groups of (name, parameter) pairs, each with a `name`, its
    `weight_decay` and `lr_scale`. Empty groups are left out.

    hidden         the matrices of every layer, routers and stacks of experts included: decayed
    head           the output matrix (a tied head is the embedding): decayed
    embedding      the look-up table: decayed if decay_embeddings
    others         parameters of one dimension or none that are no scale vectors: not decayed
    scale_decayed  scale vectors that the policy decays. Decay on OR's α changes only how fast its
                   direction turns, Norm(cα) = Norm(α); decay on β shrinks the length
    scale          the other scale vectors: not decayed

    scale_weight_decay: a name in norms.SCALE_DECAY_POLICIES. scale_lr multiplies the learning
    rate of scale vectors (ours). Raises ValueError on another policy, and on a matrix that fits
    no group.
    """
    if scale_weight_decay not in SCALE_DECAY_POLICIES:
        raise ValueError(f"scale_weight_decay={scale_weight_decay!r} is unknown: choose one of "
                         f"{', '.join(SCALE_DECAY_POLICIES)}")
    by_decay = weight_decay_groups(model, weight_decay, scale_weight_decay)
    groups = {group["name"]: group for group in by_decay}

    # norms.py knows matrices; what they are for decides who gets Muon, and whether the table decays
    matrices = {name: [] for name in ("hidden", "head", "embedding")}
    for name, p in groups.pop("matrices")["params"]:
        if p is model.embedding.weight:
            matrices["embedding"].append((name, p))
        elif name == "head.weight":
            matrices["head"].append((name, p))
        elif name.startswith("layers."):
            matrices["hidden"].append((name, p))
        else:
            raise ValueError(f"parameter {name} of shape {tuple(p.shape)} fits no group: give it "
                             f"one in optim.param_groups")

    found = []
    for name, params in matrices.items():
        decay = weight_decay
        if name == "embedding" and not decay_embeddings:
            decay = 0.0
        if params:
            found.append({"name": name, "params": params, "weight_decay": decay, "lr_scale": 1.0})

    # scale_lr is for scale vectors alone: a fork may have other parameters of one dimension
    rates = {"scale": scale_lr, "scale_decayed": scale_lr}
    return found + [{**group, "lr_scale": rates.get(group["name"], 1.0)}
                    for group in groups.values()]


# --------------------------------------------------------------------------------------------------
# Muon

def orthogonalize(M, steps=5):
    """About U Vᵀ of M = U S Vᵀ: the quintic Newton-Schulz iteration with the coefficients of Muon's
    authors, in bfloat16 as theirs. Singular values of a fair size end between about 0.7 and 1.2,
    tiny ones stay below. M (k, m, n), k matrices at once -> (k, m, n)."""
    a, b, c = 3.4445, -4.775, 2.0315
    X = M.bfloat16()

    # X Xᵀ is the smaller product if X is wide
    tall = M.size(-2) > M.size(-1)
    if tall:
        X = X.mT

    # no singular value is above 1 then, as the iteration needs it
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)

    # each singular value s becomes a s + b s³ + c s⁵
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    if tall:
        X = X.mT
    return X


class Muon(torch.optim.Optimizer):
    """Muon in Moonlight's form (arXiv 2502.16982), with Nesterov's look ahead:

        B ← B + (1 - μ)(g - B)
        W ← (1 - lr λ) W - lr 0.2 √max(m, n) orthogonalize(g + μ (B - g))

    The factor gives the update AdamW's usual size, so that one learning rate and one weight decay λ
    serve both. It equals torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but all matrices of
    one shape are one batch, stacks of experts (E, m, n) too: a few dozen kernels, not thousands."""

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]

            # momentum, matrix by matrix
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    buffer = self.state[p]["momentum_buffer"]
                    buffer.lerp_(p.grad, 1 - momentum)
                    update = p.grad.lerp(buffer, momentum).bfloat16()
                    by_shape.setdefault(tuple(p.shape[-2:]), []).append((p, update))

            # all matrices of one shape as one batch, and each part back to its owner
            for (m, n), members in by_shape.items():
                stacks = [update.view(-1, m, n) for _, update in members]
                updates = orthogonalize(torch.cat(stacks)).split([len(stack) for stack in stacks])
                for (p, _), update in zip(members, updates):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(update.view_as(p), alpha=-lr * 0.2 * max(m, n) ** 0.5)


class MuonWithAdamW:
    """Muon for the group "hidden", torch.optim.AdamW for the others, used as one optimizer."""

    def __init__(self, groups, lr, betas, momentum):
        hidden = [g for g in groups if g["name"] == "hidden"]
        others = [g for g in groups if g["name"] != "hidden"]
        self.parts = [Muon(hidden, lr=lr, momentum=momentum),
                      torch.optim.AdamW(others, lr=lr, betas=betas, fused=True)]

    @property
    def param_groups(self):
        return [g for part in self.parts for g in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)


def make_optimizer(groups, optimizer="adamw", lr=1e-3, betas=(0.9, 0.95), muon_momentum=0.95):
    """The optimizer over param_groups' groups. fused is AdamW's step in one pass, on any device."""
    if optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    if optimizer == "muon":
        return MuonWithAdamW(groups, lr, betas, muon_momentum)
    raise ValueError(f"optimizer={optimizer!r} is unknown: choose one of {', '.join(OPTIMIZERS)}")


def parts_of(optimizer):
    return getattr(optimizer, "parts", [optimizer])


def optimizer_state(optimizer):
    """{parameter name: {"exp_avg": tensor, ...}}: moments and step counts. Learning rates, decays
    and the like are not in it: they are the configuration's, also after a resume."""
    return {name: dict(part.state[p]) for part in parts_of(optimizer) for group in part.param_groups
            for name, p in zip(group["param_names"], group["params"]) if p in part.state}


@torch.no_grad()
def update_norms(optimizer):
    """{parameter name: ‖η m̂ / (√v̂ + ε)‖}, the norm of AdamW's last step without its decay, by the
    moments m and v, for every parameter that AdamW has moved."""
    norms, moments = {}, optimizer_state(optimizer)
    for group in optimizer.param_groups:
        for name in group["param_names"]:
            state = moments.get(name, {})
            if "exp_avg_sq" in state:
                (beta1, beta2), steps = group["betas"], state["step"].item()
                m = state["exp_avg"] / (1 - beta1 ** steps)
                v = state["exp_avg_sq"] / (1 - beta2 ** steps)
                norms[name] = group["lr"] * (m / (v.sqrt() + group["eps"])).norm().item()
    return norms


def load_optimizer_state(optimizer, state):
    """Put back what optimizer_state gave, parameter by parameter; one that never had a gradient
    has none. The weights' names and shapes have been compared: checkpoint.load_weights."""
    owners = {name: (part, p) for part in parts_of(optimizer) for group in part.param_groups
              for name, p in zip(group["param_names"], group["params"])}
    for name, moments in state.items():
        part, p = owners[name]
        part.state[p] = {key: value.to(p.device, copy=True) for key, value in moments.items()}


def set_learning_rate(optimizer, lr):
    """Every group's learning rate: lr times its lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


# --------------------------------------------------------------------------------------------------
# schedules

def learning_rate(step, config):
    """The learning rate of a step: linear warmup, which reaches learning_rate at step
    warmup_iters - 1; learning_rate; then down to min_lr at step max_iters. "cosine" goes down as
    half a cosine from the warmup on. "wsd" goes down in the last decay_share of max_iters, by
    decay_shape ("linear" is the paper's)."""
    c = config
    if step < c.warmup_iters:
        return c.learning_rate * (step + 1) / c.warmup_iters

    # where the way down begins, and its shape
    begin, shape = c.warmup_iters, "cosine"
    if c.schedule == "wsd":
        begin = c.max_iters - max(1, round(c.decay_share * c.max_iters))
        shape = c.decay_shape

    # s goes from 0 to 1 on it
    s = min(1.0, max(0.0, (step - begin) / max(1, c.max_iters - begin)))
    return c.min_lr + (c.learning_rate - c.min_lr) * DECAY_SHAPES[shape](s)
