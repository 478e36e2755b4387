"""
Who is decayed, who steps, and how fast: parameter groups, optimizers and learning-rate schedules.

  param_groups     every parameter in exactly one group; scale vectors by one of five weight-decay policies
  make_optimizer   AdamW, or Muon for the hidden matrices with AdamW for the rest
  cosine, wsd      the learning rate as a pure function of the step
"""
import math

import torch

from norms import ScaleVector

# policy -> is this scale vector decayed? (scale_weight_decay)
SCALE_DECAY_POLICIES = {
    "none": lambda scale: False,
    "all": lambda scale: True,
    "absorbable": lambda scale: scale.absorbable,  # IWD, its criterion taken literally
    "input_norm": lambda scale: not scale.output_norm,  # IWD, the name taken literally: whatever is no Output-Norm
    "not_absorbable": lambda scale: not scale.absorbable,  # the converse, to see it hurt
}
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd")
DECAY_SHAPES = ("linear", "cosine", "sqrt")


def param_groups(model, weight_decay, scale_weight_decay="none", decay_embeddings=True):
    """torch.optim parameter groups, each with a `name` and its `weight_decay`; empty groups are left out.

    hidden         the matrices of every layer, each expert's on its own: decayed
    router         the matrices that choose experts: decayed
    head           the output matrix (with a tied head it is the embedding): decayed
    embedding      the look-up table: decayed if decay_embeddings
    scale_decayed  scale vectors that the policy decays. Of γ = β α (OR) and γ = e^β α (ER) both parts are: with α alone,
                   β could grow without bound along their common symmetry (our reading, as DESIGN's of (γ, W))
    scale          the other scale vectors: not decayed

    scale_weight_decay: "none", "all", "absorbable" (IWD), "input_norm" (IWD, literal reading), "not_absorbable".
    Raises ValueError on another policy, and on a parameter that fits no group.
    """
    if scale_weight_decay not in SCALE_DECAY_POLICIES:
        raise ValueError(f"scale_weight_decay={scale_weight_decay!r} is unknown: "
                         f"choose one of {', '.join(SCALE_DECAY_POLICIES)}")
    scales = {}  # parameter -> the vector it belongs to
    for module in model.modules():
        if isinstance(module, ScaleVector):
            scales.update((p, module) for p in module.parameters())

    groups = {name: [] for name in ("hidden", "router", "head", "embedding", "scale_decayed", "scale")}
    for name, p in model.named_parameters():
        if p in scales:
            decayed = SCALE_DECAY_POLICIES[scale_weight_decay](scales[p])
            groups["scale_decayed" if decayed else "scale"].append(p)
        elif p is model.embedding.weight:
            groups["embedding"].append(p)
        elif name.startswith("head.") and p.ndim == 2:
            groups["head"].append(p)
        elif name.startswith("layers.") and p.ndim == 2:
            groups["router" if name.endswith(".router") else "hidden"].append(p)
        else:
            raise ValueError(f"parameter {name} of shape {tuple(p.shape)} fits no group: give it one in param_groups")
    decay = {"hidden": weight_decay, "router": weight_decay, "head": weight_decay, "embedding": weight_decay if decay_embeddings else 0.0,
             "scale_decayed": weight_decay, "scale": 0.0}
    return [{"name": name, "params": params, "weight_decay": decay[name]} for name, params in groups.items() if params]


class MuonWithAdamW:
    """torch.optim.Muon for the group "hidden", torch.optim.AdamW for all others, behind the face of one optimizer.
    adjust_lr_fn="match_rms_adamw" scales Muon's orthogonal update to AdamW's usual size, so one learning rate and one
    weight decay serve both (Moonlight, arXiv 2502.16982)."""

    def __init__(self, groups, lr, betas, momentum, fused):
        hidden = [g for g in groups if g["name"] == "hidden"]
        others = [g for g in groups if g["name"] != "hidden"]
        self.parts = [torch.optim.Muon(hidden, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw"),
                      torch.optim.AdamW(others, lr=lr, betas=betas, fused=fused)]

    @property
    def param_groups(self):
        return [g for part in self.parts for g in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self):
        return {"muon": self.parts[0].state_dict(), "adamw": self.parts[1].state_dict()}

    def load_state_dict(self, state):
        self.parts[0].load_state_dict(state["muon"])
        self.parts[1].load_state_dict(state["adamw"])


def make_optimizer(groups, optimizer="adamw", lr=1e-3, betas=(0.9, 0.95), muon_momentum=0.95, fused=False):
    """The optimizer over param_groups' groups. fused: AdamW's one-kernel step, for CUDA."""
    if optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)
    if optimizer == "muon":
        return MuonWithAdamW(groups, lr, betas, muon_momentum, fused)
    raise ValueError(f"optimizer={optimizer!r} is unknown: choose one of {', '.join(OPTIMIZERS)}")


def warmup(step, learning_rate, warmup_iters):
    """Linear from learning_rate/warmup_iters at step 0 to learning_rate at step warmup_iters - 1."""
    return learning_rate * (step + 1) / warmup_iters


def cosine(step, learning_rate, max_iters, warmup_iters=0, min_lr=0.0):
    """Warmup, then half a cosine from learning_rate at step warmup_iters to min_lr at step max_iters."""
    if step < warmup_iters:
        return warmup(step, learning_rate, warmup_iters)
    progress = min(1.0, (step - warmup_iters) / max(1, max_iters - warmup_iters))
    return min_lr + (learning_rate - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def wsd(step, learning_rate, max_iters, warmup_iters=0, min_lr=0.0, decay_share=0.2, decay_shape="linear"):
    """Warmup, stable, decay: the last decay_share of max_iters goes from learning_rate to min_lr, with s from 0 to 1,
    as 1 - s ("linear"), (1 + cos πs)/2 ("cosine") or 1 - √s ("sqrt")."""
    if step < warmup_iters:
        return warmup(step, learning_rate, warmup_iters)
    decay_iters = max(1, round(decay_share * max_iters))
    s = min(1.0, max(0.0, (step - (max_iters - decay_iters)) / decay_iters))
    if decay_shape == "linear":
        factor = 1 - s
    elif decay_shape == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * s))
    elif decay_shape == "sqrt":
        factor = 1 - math.sqrt(s)
    else:
        raise ValueError(f"decay_shape={decay_shape!r} is unknown: choose one of {', '.join(DECAY_SHAPES)}")
    return min_lr + (learning_rate - min_lr) * factor
