"""
Looks at a model with scale vectors before it trains. Works on anybody's model, not only on GPT;
it imports torch and norms.py only, and can be copied with it.

  check      mistakes that cost a run and raise no error, each as a sentence
  idle       the parameters that get no gradient
  map_table  the maps of a layer: which vectors they have, what is normalized, what decays
"""
import contextlib

import torch

from norms import PLACEMENTS, OutputNorm, PreNorm, ScaledLinear, named_scale_vectors


def check(model, batch, loss=None):
    """What is wrong with the model, as a list of sentences; empty if nothing is.

    batch  what the model is called with: a tensor, a tuple, or a dict of arguments. A short one
           will do. It should be in float32
    loss   loss(model, batch) -> (); None: the distance of the outputs from random numbers
    """
    loss = loss or distance_from_random
    found = uninitialized(model)
    if not found:
        gammas, gradients = measure(model, batch, loss)
        found += [f"{name} gets no gradient: the loss does not depend on it, so only decay can "
                  f"move it" for name, g in gradients.items() if g is None or not g.any()]
        found += idle_lengths(model, batch, loss, gammas)
        found += double_vectors(model, gammas, gradients)
        found += wrong_absorptions(model, batch, loss)
    return found


def idle(model, batch, loss=None):
    """The names of the trainable parameters whose gradient is missing, or zero everywhere."""
    _, gradients = measure(model, batch, loss or distance_from_random)
    return [name for name, g in gradients.items() if g is None or not g.any()]


# ---- what is measured ----------------------------------------------------------------------------

def distance_from_random(model, batch):
    """Mean squared distance of all outputs from standard normal numbers -> ()."""
    if isinstance(batch, dict):
        outputs = model(**batch)
    elif isinstance(batch, (tuple, list)):
        outputs = model(*batch)
    else:
        outputs = model(batch)
    leaves, _ = torch.utils._pytree.tree_flatten(outputs)
    floats = [t for t in leaves if torch.is_tensor(t) and t.is_floating_point()]
    generator = torch.Generator().manual_seed(0)
    return sum((t - torch.randn(t.shape, generator=generator).to(t)).square().mean()
               for t in floats)


def measure(model, batch, loss):
    """({name of a ScaleVector: (γ, ∂L/∂γ)}, {name of a trainable parameter: its gradient})."""
    returned, hooks = {}, []
    for name, vector in named_scale_vectors(model):
        def keep(_, __, gamma, name=name):
            returned.setdefault(name, []).append(gamma)
        hooks.append(vector.register_forward_hook(keep))
    try:
        value = loss(model, batch)
    finally:
        for hook in hooks:
            hook.remove()

    # one backward pass, to the parameters and to every γ that was returned
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    flat = [gamma for gammas in returned.values() for gamma in gammas if gamma.requires_grad]
    found = torch.autograd.grad(value, [*params.values(), *flat], allow_unused=True)
    of_gamma = dict(zip(map(id, flat), found[len(params):]))
    gammas = {}
    for name, calls in returned.items():
        # a vector that is read twice has two gradients, unless it returns α itself
        read = dict.fromkeys(map(id, calls))
        parts = [of_gamma[i] for i in read if of_gamma.get(i) is not None]
        if parts:
            gammas[name] = calls[0].detach(), sum(parts)
    return gammas, dict(zip(params, found))


@torch.no_grad()
def value(model, batch, loss):
    """The loss as a number, with products in full float32; dropout draws the same each time."""
    devices = {p.device for p in model.parameters() if p.is_cuda}
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            return float(loss(model, batch))
    finally:
        torch.set_float32_matmul_precision(precision)


def differ(a, b):
    """Whether two losses differ by more than the rounding of float32."""
    return abs(a - b) > 3e-5 * max(abs(a), abs(b))


@contextlib.contextmanager
def changed(parameter, new):
    """Within it, the parameter has other values."""
    old = parameter.data
    try:
        parameter.data = new
        yield
    finally:
        parameter.data = old


# ---- the mistakes --------------------------------------------------------------------------------

def uninitialized(model):
    """A ScaledLinear leaves its weight to its owner: torch.empty holds anything."""
    found = []
    for name, m in model.named_modules():
        if isinstance(m, ScaledLinear):
            size = m.weight.detach().float().abs().max()
            if not 1e-20 < size < 1e10:
                found.append(f"{name}.weight was not initialized (its largest entry is {size:.1e})"
                             f": call its reset_parameters, or draw it yourself")
    return found


def idle_lengths(model, batch, loss, gammas):
    """β, the length of γ, has no effect where a Norm follows. Its gradient is ⟨γ, ∂L/∂γ⟩ / β: a
    sum that cancels to rounding, by which Adam then moves it."""
    without_effect, before = [], None
    for name, vector in named_scale_vectors(model):
        if not isinstance(vector.beta, torch.nn.Parameter) or name not in gammas:
            continue
        # a gradient that cancels is suspect: then look whether the loss changes with β at all
        terms = gammas[name][0] * gammas[name][1]
        if terms.sum().abs() > 1e-3 * terms.abs().sum():
            continue
        before = value(model, batch, loss) if before is None else before
        beta = vector.beta.data  # ER's starts at 0; the sign of OR's is that of γ
        with changed(vector.beta, torch.copysign(2 * beta.abs() + 0.5, beta)):
            if not differ(before, value(model, batch, loss)):
                without_effect.append(f"{name}.beta")
    if not without_effect:
        return []
    return [f"no effect has {', '.join(without_effect)}: a norm follows that undoes a length, so "
            f"the gradient is only rounding. Leave that norm out (as your q_norm), or the vector"]


def double_vectors(model, gammas, gradients):
    """A norm in front of maps with their own γ_b whose weight w trains, too: w ⊙ γ_b is one vector,
    so w ⊙ ∂L/∂w is the sum of γ_b ⊙ ∂L/∂γ_b over those that read it."""
    groups = {}  # maps of one parent, as q, k, v of an attention
    for name, (gamma, gradient) in gammas.items():
        if name.endswith(".scale_in") and gamma.ndim == 1:
            parent = name.rpartition(".")[0].rpartition(".")[0]
            groups.setdefault((parent, len(gamma)), []).append((name, gamma * gradient))

    # every other vector of that width whose gradient is a sum of theirs
    scales = {id(p) for _, vector in named_scale_vectors(model) for p in vector.parameters()}
    found = []
    for name, p in model.named_parameters():
        g = gradients.get(name)
        if p.ndim != 1 or id(p) in scales or g is None or not g.any():
            continue
        for (_, width), members in groups.items():
            if width != len(p):
                continue
            columns, wanted = torch.stack([c for _, c in members], dim=1), p.detach() * g
            share = torch.linalg.lstsq(columns.cpu(), wanted.cpu()[:, None]).solution[:, 0]
            missed = (columns.cpu() @ share - wanted.cpu()).norm() / wanted.cpu().norm()
            readers = [name for (name, _), s in zip(members, share) if s > 0.5]
            if len(members) < width and missed < 1e-2 and readers:
                found.append(f"{name} trains, and so does γ_b of {', '.join(readers)}, which it "
                             f"multiplies: keep it at 1 with requires_grad_(False)")
    return found


@torch.no_grad()
def wrong_absorptions(model, batch, loss):
    """o.absorb(v) lets o's weight apply γ_a of v. With a γ_a that is not 1, the outputs must be
    those of a v that applies it itself."""
    found = []
    names = {m: name for name, m in model.named_modules()}
    for m, name in names.items():
        if not isinstance(m, ScaledLinear) or not m.absorbed_by:
            continue
        [taker] = m.absorbed_by
        alpha = m.scale_out.alpha
        with changed(alpha, alpha * torch.linspace(0.5, 1.5, alpha.shape[-1]).to(alpha)):
            before, pairs = value(model, batch, loss), taker.absorbs
            try:
                taker.absorbs = [pair for pair in pairs if pair[0] is not m]
                m.absorbed_by = []
                after = value(model, batch, loss)
            finally:
                taker.absorbs, m.absorbed_by = pairs, [taker]
        if differ(before, after):
            found.append(f"{names[taker]} absorbs γ_a of {name}, but something that is not channel-"
                         f"wise stands between them: take that absorb out")
    return found


# ---- the table -----------------------------------------------------------------------------------

def map_table(model, decayed):
    """The maps and norms of the last layer, and those outside the layers, as lines of text: which
    scale vectors each has, who shares them, what is normalized, what decays. decayed: the names of
    the parameters that do."""
    modules = {name: m for name, m in model.named_modules()
               if isinstance(m, (ScaledLinear, PreNorm, OutputNorm))}
    layers = [int(name.split(".")[1]) for name in modules if name.startswith("layers.")]
    last = f"layers.{max(layers, default=0)}."
    shown = {name: m for name, m in modules.items() if name.startswith(last) or
             not name.startswith("layers.")}
    names = {m: name.removeprefix(last) for name, m in shown.items()}
    shared = {m: norm for norm in names if isinstance(norm, PreNorm) and norm.scale
              for m in norm.maps}

    rows = [("map", "placement", "γ_b", "γ_a", "normalized", "decays")]
    for full_name, m in shown.items():
        decays = [short for short, parts in DECAY_COLUMNS.items()
                  if any(f"{full_name}.{part}" in decayed for part in parts)]
        rows.append((names[m], *row_of(m, names, shared), ", ".join(decays) or "-"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


DECAY_COLUMNS = {"W": ("weight",), "γ": ("scale.alpha", "scale.beta"),
                 "γ_b": ("scale_in.alpha", "scale_in.beta"),
                 "γ_a": ("scale_out.alpha", "scale_out.beta")}


def row_of(m, names, shared):
    """(placement, γ_b, γ_a, what is normalized) of a map or a norm, in words."""
    if isinstance(m, PreNorm):
        readers = ", ".join(names[r].rpartition(".")[2] for r in m.maps)
        return ("-", f"γ of {readers}" if m.scale else "-", "-",
                "nothing: its maps undo it" if m.skips_division else "x")
    if isinstance(m, OutputNorm):
        return "-", "-", "own" if m.scale else "-", "its input"

    before = after = normalized = "-"
    if m in shared:
        before = f"{names[shared[m]]}'s"
    elif m.scale_in:
        before = "own"
    if m.scale_out:
        after = "own"
    if m.absorbed_by:
        after = f"own, in W of {names[m.absorbed_by[0]]}"
    if m.placement.undoes_factor:
        normalized = "the output"
        if m.placement.divides_by_rms and m.norm_width < m.width:
            normalized = "each head"
    placement = next((name for name, p in PLACEMENTS.items() if p == m.placement), "-")
    return placement, before, after, normalized
