"""
A Llama-style decoder whose scale vectors can be placed, shared, split, rewritten or left out.

  - RMSNorm before each sub-layer, rotary positions, grouped-query attention, SwiGLU, no biases
  - Output-Norms to study: Q/K-norm (qk_norm), Gemma's norms on sub-layers' outputs (post_norm)
  - dense, or with a mixture of experts (n_expert) in place of the SwiGLU: dropless
  - every linear map is a norms.ScaledLinear; the scale_* keys tell which vectors it carries
  - no autocast: weights stay float32 and are cast in norms.products

Letters in the shape comments: B sequences, T positions, C = n_embd, H heads, D = head_dim,
F a SwiGLU's width, V = vocab_size; N = B T tokens, E experts, K experts for a token.
"""
import difflib
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from norms import (PLACEMENTS, REPARAMS, OutputNorm, Routing, ScaledLinear, cached_scale_vectors,
                   compute_scale_vectors, fused, named_scale_vectors, pre_norm, products, rms_norm,
                   share_input_scale)

MAPS = ("q", "k", "v", "gate", "up", "head", "o", "down")  # those that scale_placement_on can name
READS_A_NORM = ("q", "k", "v", "gate", "up", "head", "router")  # these have a γ_b by default
CHUNK_ELEMENTS = 2 ** 26  # logits that exist in float32 at a time


@dataclass
class GPTConfig:
    """The model's keys. Raises ValueError, one line, on values that cannot go together."""
    block_size: int = 1024  # the longest sequence, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 6
    n_head: int = 12
    n_kv_head: int = 0  # key/value heads of grouped-query attention; 0: n_head
    n_embd: int = 768
    d_ff: int = 0  # width of the SwiGLU; 0: int(8/3 n_embd), the paper's
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False  # one matrix for embedding and head
    qk_norm: bool = False  # normalize each query and key head: an Output-Norm
    post_norm: bool = False  # normalize each sub-layer's output, as Gemma does: an Output-Norm
    init_std: float = 0.02  # of every matrix; 0: 1/sqrt(n_embd), which small models need
    n_expert: int = 0  # routed experts in each layer; 0: a dense model
    n_expert_active: int = 4  # of them, for each token
    d_expert: int = 0  # width of a routed expert's SwiGLU; 0: int(2/3 n_embd), the paper's
    d_shared_expert: int = 0  # width of one more expert that every token meets; 0: none
    n_dense_layer: int = 0  # the first layers stay dense
    load_balance_coef: float = 0.01  # weight of the load-balancing loss (Switch, eq. 4)
    router_z_coef: float = 0.001  # weight of the router z-loss (ST-MoE, eq. 5)
    scale_vectors: bool = True  # False: no scale vector anywhere; normalizations stay
    scale_heterogeneous: bool = False  # HG: each map that reads a norm has its own γ_b
    scale_placement: str = "input"  # "after" (AP), "dual" (DP), "dual_norm" (DNP)
    scale_placement_on: str = "q,k,v,gate,up,head"  # maps with scale_placement; also o and down
    scale_reparam: str = "none"  # "original" (OR), "exponential" (ER), "zero_centered" (γ = 1 + α)
    recompute: bool = False  # run each block again in the backward pass: less memory, 1/3 slower

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.d_ff = self.d_ff or int(8 * self.n_embd / 3)
        self.d_expert = self.d_expert or int(2 * self.n_embd / 3)
        self.init_std = self.init_std or self.n_embd ** -0.5
        check_shape(self)
        check_scale_vectors(self)

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def placed_maps(self):
        return [name.strip() for name in self.scale_placement_on.split(",") if name.strip()]


def scaled_linears(c, d, shapes, norm_width=None, absorbed_by=None, tied=False):
    """The maps {name: output shape} that read one stream of width d, as a list of ScaledLinears.
    Those in scale_placement_on get scale_placement. Of the others, those that read a Norm keep
    their γ_b, and o and down have no vector."""
    maps = []
    for name, shape in shapes.items():
        kind = name.removeprefix("shared_")  # the shared expert's gate is a gate
        if kind not in {*MAPS, *READS_A_NORM}:
            raise ValueError(f"the map {name!r} is in neither MAPS nor READS_A_NORM: add it")
        placement = "input" if kind in READS_A_NORM else None
        maps.append(ScaledLinear(
            (*shape, d), c.scale_placement if kind in c.placed_maps else placement,
            c.scale_vectors, c.scale_reparam, norm_width, c.norm_eps,
            (absorbed_by or {}).get(name), tied))
        maps[-1].starts_small = kind in ("o", "down")
    readers = [m for name, m in zip(shapes, maps)
               if name.removeprefix("shared_") not in ("router", "o", "down")]
    if all(m.placement.undoes_factor for m in readers):  # their Norm is left out: see pre_norm
        for m in readers:
            m.eps = c.norm_eps ** 2
    if not c.scale_heterogeneous:
        share_input_scale(maps)
    return maps


def output_norm(c, dim, wanted):
    if not wanted:
        return nn.Identity()
    return OutputNorm(dim, c.scale_vectors, c.scale_reparam, c.norm_eps)


# ---- attention -----------------------------------------------------------------------------------

def rope_tables(c):
    """cos and sin (T, D) of rotary positions, float32, for Llama's rotate-half layout. The first
    half of sin has a minus: see apply_rope."""
    exponent = torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim
    position = torch.arange(c.block_size, dtype=torch.float32)
    angle = torch.outer(position, c.rope_theta ** -exponent).repeat(1, 2)
    sign = torch.tensor([-1.0, 1.0]).repeat_interleave(c.head_dim // 2)
    return angle.cos(), angle.sin() * sign


def apply_rope(x, cos, sin):
    """Rotate each head by its position: its halves (a, b) become (a cos - b sin, b cos + a sin).
    x (B, T, H, D), cos and sin (T, D) -> as x. A flip swaps the halves: Inductor fuses it with
    the norm before it, and a concatenation it would not."""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)  # (b, a)
    return (x * cos[:, None] + swapped * sin[:, None]).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        C, D, kv = c.n_embd, c.head_dim, c.n_kv_head * c.head_dim
        self.head_dim, self.eps = D, c.norm_eps
        [o] = scaled_linears(c, C, {"o": (C,)})
        # attention mixes positions, never channels, so o can take over what scales v's output
        q, k, v = scaled_linears(
            c, C, {"q": (C,), "k": (kv,), "v": (kv,)}, norm_width=D, absorbed_by={"v": o})
        self.k, self.q, self.v, self.o = k, q, v, o  # weights are drawn in this order
        self.q_norm, self.k_norm = output_norm(c, D, c.qk_norm), output_norm(c, D, c.qk_norm)

    def forward(self, x, cos, sin, cache=None):
        """x (B, T, C), the residual stream; cos and sin (T, D) of its positions -> (B, T, C).
        cache: a list, empty or [keys, values] (B, H, ., D) of the positions before x; x's are
        appended. Then x is a first piece, or one position."""
        B, T, C = x.size()
        maps = self.q, self.k, self.v
        q, k, v = fused(pre_norm(x, maps, self.eps), maps)
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in (q, k, v))  # (B, T, H, D)
        q, k = apply_rope(self.q_norm(q), cos, sin), apply_rope(self.k_norm(k), cos, sin)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, T, D)
        if cache is not None:
            new = (k, v)
            cache[:] = [torch.cat(pair, dim=2) for pair in zip(cache, new)] if cache else new
            k, v = cache
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T == k.size(2),
                                           enable_gqa=k.size(1) != q.size(1))
        return self.o(y.transpose(1, 2).reshape(B, T, C))


# ---- feed-forward --------------------------------------------------------------------------------

class MLP(nn.Module):
    """SwiGLU: W_down(silu(gate) ⊙ up)."""

    def __init__(self, c):
        super().__init__()
        self.eps = c.norm_eps
        [down] = scaled_linears(c, c.d_ff, {"down": (c.n_embd,)})
        # the gate multiplies channel by channel, so down can take over what scales up's output
        self.gate, self.up = scaled_linears(
            c, c.n_embd, {"gate": (c.d_ff,), "up": (c.d_ff,)}, absorbed_by={"up": down})
        self.down = down

    def forward(self, x):  # (..., C), the residual stream -> (..., C)
        maps = self.gate, self.up
        gate, up = fused(pre_norm(x, maps, self.eps), maps, pad=True)
        return self.down(F.silu(gate) * up)


def expert_load(expert, n_expert):
    """Each expert's share of all choices: expert (N, K) -> (E,) float32. Unlike bincount's, its
    shapes do not depend on the routing."""
    return F.one_hot(expert.flatten(), n_expert).float().mean(0)


def load_balance_loss(probabilities, expert):
    """E Σ_e f_e P_e: f_e is the share of all choices that went to expert e, P_e its mean
    probability. 1 when the load is even, up to E / K when it is not (Switch Transformer, eq. 4).
    probabilities (N, E), expert (N, K) -> ()."""
    E = probabilities.size(-1)
    return E * (expert_load(expert, E) * probabilities.mean(0)).sum()


def router_z_loss(logits):
    """Mean of (log Σ_e exp logit_e)²: keeps router logits small (ST-MoE, eq. 5). (N, E) -> ()."""
    return logits.logsumexp(-1).square().mean()


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


class MoE(nn.Module):
    """Σ_k p_k expert_k(x) + shared(x) over the K experts of largest probability. Each expert is a
    SwiGLU, and p sums to 1 over the K (Mixtral). Dropless: however crowded an expert, every token
    is served. Router, experts and shared expert read one Norm: they share one γ_b, or have one
    each under HG (ours: the paper does not say what HG means in a mixture)."""

    def __init__(self, c):
        super().__init__()
        C, E, F_, S = c.n_embd, c.n_expert, c.d_expert, c.d_shared_expert
        self.eps, self.n_expert, self.n_active = c.norm_eps, E, c.n_expert_active
        [self.down] = scaled_linears(c, F_, {"down": (E, C)})
        self.shared_down = scaled_linears(c, S, {"shared_down": (C,)})[0] if S else None

        shapes = {"router": (E,), "gate": (E, F_), "up": (E, F_)}
        shapes |= {"shared_gate": (S,), "shared_up": (S,)} if S else {}
        maps = scaled_linears(c, C, shapes,
                              absorbed_by={"up": self.down, "shared_up": self.shared_down})
        router, gate, up, *shared = maps
        self.gate, self.router = gate, router  # weights are drawn in this order
        self.shared_gate, self.shared_up = shared or (None, None)
        self.up = up

    def forward(self, x):
        """x (..., C), the residual stream -> (..., C), and one tensor (2 + E,): load-balancing
        loss, z-loss, load of each expert."""
        shape = x.size()
        # in float32, because rounding must not reorder experts; before x is flattened, because
        # Inductor then fuses its backward pass with the residual stream's
        normalized = rms_norm(x.to(self.router.weight.dtype), self.eps)
        x = pre_norm(x, (self.gate, self.up), normalized=normalized).flatten(0, -2)  # (N, C)
        logits = self.router(normalized.flatten(0, -2))
        probabilities = logits.softmax(-1)
        weight, expert = probabilities.topk(self.n_active, dim=-1)  # (N, K)

        y = self.routed(x, weight / weight.sum(-1, keepdim=True), expert)
        if self.shared_down:
            gate, up = fused(x, (self.shared_gate, self.shared_up), pad=True)
            y = y + self.shared_down(F.silu(gate) * up)
        losses = torch.stack((load_balance_loss(probabilities, expert), router_z_loss(logits)))
        load = expert_load(expert, self.n_expert).to(losses.dtype)
        return y.view(shape), torch.cat((losses, load))

    def routed(self, x, weight, expert):
        """Σ_k weight_k expert_k(x): rows are sorted by expert, mapped by one product for each
        projection, and put back. x (N, C), weight and expert (N, K) -> (N, C)."""
        (N, C), K = x.size(), self.n_active
        order = expert.flatten().argsort(stable=True)  # (N K,) positions, expert by expert
        inverse = order.argsort()
        sorted_expert = expert.flatten()[order]
        ends = F.one_hot(sorted_expert, self.n_expert).sum(0).cumsum(0).to(torch.int32)
        routing = Routing(sorted_expert, ends)

        copies = Permute.apply(x.unsqueeze(1).expand(N, K, C).reshape(N * K, C), order, inverse)
        gate, up = fused(copies, (self.gate, self.up), routing, pad=True)
        y = self.down(F.silu(gate) * up, routing)
        y = Permute.apply(y, inverse, order).view(N, K, C)
        return (y * weight.unsqueeze(-1)).sum(1).to(x.dtype)  # added up in float32


# ---- the model -----------------------------------------------------------------------------------

class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.moe = c.n_expert > 0 and layer >= c.n_dense_layer
        self.attn, self.mlp = Attention(c), MoE(c) if self.moe else MLP(c)
        self.attn_post_norm = output_norm(c, c.n_embd, c.post_norm)
        self.mlp_post_norm = output_norm(c, c.n_embd, c.post_norm)

    def forward(self, x, cos, sin, cache=None):
        """x (B, T, C) -> (B, T, C), and what the router did (see MoE), None in a dense layer.
        attn and mlp read the residual stream: the Pre-Norm is norms.pre_norm."""
        x = x + self.attn_post_norm(self.attn(x, cos, sin, cache))
        y, router = self.mlp(x) if self.moe else (self.mlp(x), None)
        return x + self.mlp_post_norm(y), router


class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.compute_dtype = None  # of the activations; None: the parameters' own
        self.routers = None  # what the routers did in the last forward, (MoE layers, 2 + E)
        self.embedding = nn.Embedding(c.vocab_size, c.n_embd)
        self.layers = nn.ModuleList([Block(c, layer) for layer in range(c.n_layer)])
        [self.head] = scaled_linears(c, c.n_embd, {"head": (c.vocab_size,)}, tied=c.tie_embeddings)
        if c.tie_embeddings:
            self.head.weight = self.embedding.weight
        for name, table in zip(("cos", "sin"), rope_tables(c)):
            self.register_buffer(name, table, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        parameter                     start (ours: the paper does not say)
        embedding, q k v, gate up     normal(0, init_std)
        router                        normal(0, init_std)
        o, down                       normal(0, init_std / sqrt(2 n_layer)): a slow residual stream
        head                          normal(0, init_std), or the embedding if tied
        every scale vector            γ = 1: see ScaleVector

        Scale vectors draw no random numbers: at one seed, all variants of a shape start with the
        same matrices.
        """
        std, small = self.config.init_std, self.config.init_std / (2 * self.config.n_layer) ** 0.5
        nn.init.normal_(self.embedding.weight, std=std)
        for _, m in self.scaled_linears():
            if not m.tied:
                nn.init.normal_(m.weight, std=small if getattr(m, "starts_small", False) else std)

    def scaled_linears(self):
        """[(name, ScaledLinear)] of all linear maps."""
        return [(name, m) for name, m in self.named_modules() if isinstance(m, ScaledLinear)]

    def forward(self, idx, targets=None, caches=None):
        """idx (B, T) token ids; targets (B, T) the ids that follow, -1 where nothing is predicted.
        Without targets: logits (B, T, V) in the compute dtype, and None. With targets: None, and
        the mean cross-entropy in nats; a mixture's auxiliary_loss is apart.
        caches: a list for each layer, see Attention."""
        B, T = idx.size()
        start = caches[0][0].size(2) if caches and caches[0] else 0
        if start + T > self.config.block_size:
            raise ValueError(f"a sequence of {start + T} tokens is longer than "
                             f"block_size={self.config.block_size}")
        if start and T > 1:
            raise ValueError(f"after the first piece, caches take one token at a time, not {T}")
        cos, sin = self.cos[start:start + T], self.sin[start:start + T]
        x = self.embedding(idx)  # (B, T, C)
        x = x if self.compute_dtype is None else x.to(self.compute_dtype)

        routers = []
        with cached_scale_vectors(compute_scale_vectors(self)):
            for layer, cache in zip(self.layers, caches or [None] * len(self.layers)):
                if self.config.recompute and self.training:
                    x, router = self.recomputed(layer, x, cos, sin)
                else:
                    x, router = layer(x, cos, sin, cache)
                routers += [] if router is None else [router]
            self.routers = torch.stack(routers) if routers else None
            if targets is not None:
                return None, self.loss(x, targets)
            return self.logits(self.head_product(x)), None

    def head_product(self, x):
        """W̃ x of the head. (B, T, C), the residual stream -> (B, T, V)."""
        return products(pre_norm(x, [self.head], self.config.norm_eps), [self.head])[0]

    def logits(self, y):
        """What follows the head's product, for the loss and for sampling: DNP's norm and γ_a."""
        return self.head.output(y)

    def loss(self, x, targets):
        """Mean of -log softmax(logits)[target] in nats over the targets that are not -1.
        x (B, T, C), targets (B, T) -> (). Of all that is as large as the logits only W̃ x is kept
        for the backward pass, in the compute dtype."""
        y, targets = self.head_product(x).flatten(0, -2), targets.flatten()  # (N, V), (N,)
        return self.summed_loss(y, targets) / (targets != -1).sum()

    def summed_loss(self, y, targets):
        """The summed cross-entropy, from the head's product y. DNP's norm, γ_a and the softmax run
        in float32 or wider for a chunk of rows at a time, and again in the backward pass. Compiled,
        they are one loop that stores nothing, and need no chunks."""
        def cross_entropy(y, targets):
            logits = self.logits(y if y.dtype == torch.float64 else y.float())
            return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")

        if torch.compiler.is_compiling():
            return cross_entropy(y, targets)
        chunks = min(len(y), -(-y.numel() // CHUNK_ELEMENTS))
        return sum(self.recomputed(cross_entropy, *rows)
                   for rows in zip(y.chunk(chunks), targets.chunk(chunks)))

    def recomputed(self, function, *args):
        """function(*args), run again in the backward pass instead of keeping what it computes."""
        cached = [(m, m.cached) for _, m in named_scale_vectors(self) if m.cached is not None]
        return checkpoint(function, *args, use_reentrant=False,
                          context_fn=lambda: (nullcontext(), cached_scale_vectors(cached)))

    def auxiliary_loss(self):
        """What a mixture adds to the loss for the backward pass, by its last forward: the means
        over layers of load-balancing loss and z-loss, times their coefficients. () or 0.0."""
        if self.routers is None:
            return 0.0
        balance, z = self.routers[:, 0].mean(), self.routers[:, 1].mean()
        return self.config.load_balance_coef * balance + self.config.router_z_coef * z

    @property
    def router_stats(self):
        """(load-balancing loss, z-loss, each expert's load) of the last forward, detached,
        (MoE layers, 2 + E); None if dense."""
        return None if self.routers is None else self.routers.detach()

    def __getstate__(self):
        """What a copy gets: no tensors of a graph, and no compiled loss, which is this model's."""
        state = {**super().__getstate__(), "routers": None}
        state.pop("loss", None)
        return state

    def num_params(self, kind="total"):
        """Parameters: "total"; "active", those a token meets; "scale_vectors", every α and β."""
        total = sum(p.numel() for p in self.parameters())
        if kind == "total":
            return total
        if kind == "active":
            idle = 1 - self.config.n_expert_active / max(1, self.config.n_expert)
            stacks = [m for _, m in self.scaled_linears() if m.weight.ndim == 3]
            own = {p for m in stacks for p in m.parameters() if p.ndim > 1}  # for each expert
            return total - round(idle * sum(p.numel() for p in own))
        if kind == "scale_vectors":
            return sum(p.numel() for _, m in named_scale_vectors(self) for p in m.parameters())
        raise ValueError(f"num_params({kind!r}): choose total, active or scale_vectors")

    def flops_per_token(self, causal=False):
        """Floating-point operations to train on one token: 6 for each weight that it meets, and
        12 n_layer n_embd block_size for attention (PaLM, appendix B), or half of that for what a
        causal mask leaves to do."""
        c, share = self.config, self.config.n_expert_active / max(1, self.config.n_expert)
        weights = sum(m.weight.numel() * (share if m.weight.ndim == 3 else 1)
                      for _, m in self.scaled_linears())
        attention = (6 if causal else 12) * c.n_layer * c.n_embd * c.block_size
        return 6 * round(weights) + attention


# ---- checks of the configuration -----------------------------------------------------------------

def nearest(name, names):
    """"; did you mean ...?", or nothing where no name is near."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def check_choice(key, value, choices):
    """Raise ValueError, with the nearest choice, if the value is none of them."""
    if value not in choices:
        names = [str(choice) for choice in choices]
        raise ValueError(f"{key}={value!r} is unknown: choose one of {', '.join(names)}"
                         f"{nearest(str(value), names)}")


def check_shape(c):
    """Raise ValueError if no model has this shape."""
    at_least_1 = ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "d_ff",
                  "n_expert_active", "d_expert")
    at_least_0 = ("n_expert", "d_shared_expert", "n_dense_layer", "load_balance_coef",
                  "router_z_coef")
    for least, keys in enumerate((at_least_0, at_least_1)):
        for key in keys:
            if getattr(c, key) < least:
                raise ValueError(f"{key}={getattr(c, key)} must be at least {least}")
            # beyond these a model is a slip of the finger, and takes minutes to count
            if getattr(c, key) > (most := 10 ** 4 if key == "n_layer" else 10 ** 7):
                raise ValueError(f"{key}={getattr(c, key)} must be at most {most}")
    for key in ("rope_theta", "norm_eps", "init_std"):
        if not getattr(c, key) > 0:
            raise ValueError(f"{key}={getattr(c, key)} must be above 0")

    if c.n_embd % c.n_head:
        nearest = max(1, round(c.n_embd / c.n_head)) * c.n_head
        raise ValueError(f"n_embd={c.n_embd} is not divisible by n_head={c.n_head}: "
                         f"choose n_embd={nearest} or another n_head")
    if c.head_dim % 2:
        raise ValueError(f"n_embd/n_head={c.head_dim} is odd: rotary positions need it even")
    if c.n_head % c.n_kv_head:
        raise ValueError(f"n_head={c.n_head} is not divisible by n_kv_head={c.n_kv_head}: each "
                         f"key/value head serves the same number of query heads")
    if c.n_expert and c.n_expert_active > c.n_expert:
        raise ValueError(f"n_expert_active={c.n_expert_active} is more than n_expert={c.n_expert}")
    if c.n_expert and c.n_dense_layer >= c.n_layer:
        raise ValueError(f"n_dense_layer={c.n_dense_layer} leaves none of n_layer={c.n_layer} "
                         f"for n_expert={c.n_expert}: lower it")
    if c.d_shared_expert and not c.n_expert:
        raise ValueError(f"d_shared_expert={c.d_shared_expert} with n_expert=0: a shared expert "
                         f"needs routed ones beside it")


def check_scale_vectors(c):
    """Raise ValueError if the scale_* keys name something unknown, or normalize twice."""
    check_choice("scale_placement", c.scale_placement, PLACEMENTS)
    check_choice("scale_reparam", c.scale_reparam, REPARAMS)
    for name in c.placed_maps:
        check_choice("scale_placement_on", name, MAPS)
    for key, maps in (("qk_norm", ("q", "k")), ("post_norm", ("o", "down"))):
        twice = [name for name in maps if name in c.placed_maps]
        if getattr(c, key) and twice and PLACEMENTS[c.scale_placement].undoes_factor:
            raise ValueError(f"{key}=True would normalize what "
                             f"scale_placement={c.scale_placement!r} has normalized: set "
                             f"{key}=False, or take {','.join(twice)} out of scale_placement_on")
