"""
A Llama-style decoder whose scale vectors can be placed, shared, split, reparameterized or left out.

  - RMSNorm before each sub-layer, rotary positions, grouped-query attention, SwiGLU, no biases
  - Output-Norms to study: Q/K-norm (`qk_norm`) and Gemma's norms on each sub-layer's output (`post_norm`)
  - dense, or with a mixture of experts (`n_expert`) in place of the SwiGLU: dropless, with an optional shared expert
  - every linear map is a norms.ScaledLinear; which vectors it carries is decided there, from the `scale_*` keys
  - no autocast: weights stay float32 and are cast where they are used, activations run in `compute_dtype`

Letters in the shape comments: B sequences, T positions, C = n_embd, H heads, D = head_dim, F a SwiGLU's width, V = vocab_size;
N = B T tokens, E experts, K experts for a token.
"""
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from norms import EXECUTIONS, PLACEMENTS, REPARAMS, OutputNorm, Rows, ScaledLinear, ScaleVector, at_hand, compute_scale_vectors, rms_norm

READS_A_NORM = ("q", "k", "v", "gate", "up", "router", "head")  # these have an input-side vector where nothing else is asked for
MAPS = ("q", "k", "v", "gate", "up", "head", "o", "down")  # those that scale_placement_on can name
CHUNK_ELEMENTS = 2 ** 26  # logits that exist in float32 at a time
# How long a chain of elementwise operations Inductor computes anew for each reader. Its defaults, 4 and 30, would cut DNP's backward
# in the middle and store the piece: a float32 (N, F)
FUSION = {"realize_reads_threshold": 8, "realize_opcount_threshold": 60}


@dataclass
class GPTConfig:
    """The model's share of the configuration. Raises ValueError, one line, on values that cannot go together."""
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
    post_norm: bool = False  # normalize each sub-layer's output before the residual add, as Gemma does: an Output-Norm
    init_std: float = 0.02  # of every matrix; 0: 1/sqrt(n_embd), which small models need
    n_expert: int = 0  # routed experts in each layer; 0: a dense model
    n_expert_active: int = 4  # of them, for each token
    d_expert: int = 0  # width of a routed expert's SwiGLU; 0: int(2/3 n_embd), the paper's
    d_shared_expert: int = 0  # width of one more expert that every token meets; 0: none
    n_dense_layer: int = 0  # the first layers stay dense
    load_balance_coef: float = 0.01  # weight of the load-balancing loss (Switch Transformer, eq. 4)
    router_z_coef: float = 0.001  # weight of the router z-loss (ST-MoE, eq. 5)
    scale_vectors: bool = True  # False: no scale vector anywhere; normalizations stay
    scale_heterogeneous: bool = False  # HG: one input-side vector for each branch that reads a norm
    scale_placement: str = "input"  # "after" (AP): the map's output side; "dual" (DP): both; "dual_norm" (DNP): with a norm in between
    scale_placement_on: str = "q,k,v,gate,up,head"  # the maps that scale_placement is about; o and down can be named too
    scale_reparam: str = "none"  # "original" (OR), "exponential" (ER), "zero_centered" (γ = 1 + α)
    scale_execution: str = "auto"  # "weights" or "activations": routes to the same function, see norms.py
    recompute: bool = False  # run each block again in the backward pass instead of keeping its activations: less memory, 1/3 slower

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


def check_shape(c):
    """Raise ValueError if no model has this shape."""
    for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "d_ff", "n_expert_active", "d_expert"):
        if getattr(c, key) < 1:
            raise ValueError(f"{key}={getattr(c, key)} must be at least 1")
    for key in ("n_expert", "d_shared_expert", "n_dense_layer", "load_balance_coef", "router_z_coef"):
        if getattr(c, key) < 0:
            raise ValueError(f"{key}={getattr(c, key)} cannot be negative")
    for key in ("rope_theta", "norm_eps", "init_std"):
        if not getattr(c, key) > 0:
            raise ValueError(f"{key}={getattr(c, key)} must be above 0")
    if c.n_expert and c.n_expert_active > c.n_expert:
        raise ValueError(f"n_expert_active={c.n_expert_active} is more than n_expert={c.n_expert}: a token meets at most all")
    if c.n_expert and c.n_dense_layer >= c.n_layer:
        raise ValueError(f"n_dense_layer={c.n_dense_layer} leaves none of n_layer={c.n_layer} for n_expert={c.n_expert}: lower it")
    if c.d_shared_expert and not c.n_expert:
        raise ValueError(f"d_shared_expert={c.d_shared_expert} with n_expert=0: a shared expert stands beside routed ones")
    if c.n_embd % c.n_head:
        raise ValueError(f"n_embd={c.n_embd} is not divisible by n_head={c.n_head}: "
                         f"choose n_embd={max(1, round(c.n_embd / c.n_head)) * c.n_head} or another n_head")
    if c.head_dim % 2:
        raise ValueError(f"n_embd/n_head={c.head_dim} is odd: rotary positions need an even head size")
    if c.n_head % c.n_kv_head:
        raise ValueError(f"n_head={c.n_head} is not divisible by n_kv_head={c.n_kv_head}: "
                         f"each key/value head serves the same number of query heads")


def check_scale_vectors(c):
    """Raise ValueError if the scale_* keys name something unknown, or normalize twice."""
    for key, allowed in (("scale_placement", tuple(PLACEMENTS)), ("scale_reparam", REPARAMS), ("scale_execution", EXECUTIONS)):
        if getattr(c, key) not in allowed:
            raise ValueError(f"{key}={getattr(c, key)!r} is unknown: choose one of {', '.join(allowed)}")
    for name in c.placed_maps:
        if name not in MAPS:
            raise ValueError(f"scale_placement_on={c.scale_placement_on!r} names {name!r}: choose among {','.join(MAPS)}")
    for key, maps in (("qk_norm", ("q", "k")), ("post_norm", ("o", "down"))):
        twice = [name for name in maps if name in c.placed_maps]
        if getattr(c, key) and twice and c.scale_placement == "dual_norm":
            raise ValueError(f"{key}=True would normalize what scale_placement='dual_norm' has normalized: "
                             f"set {key}=False, or take {','.join(twice)} out of scale_placement_on")


def scaled_linear(config, in_features, branches, **kwargs):
    """A ScaledLinear as the configuration wants it. Maps in scale_placement_on get scale_placement; of the others those
    that read a norm keep the input side, and o and down have no vector."""
    placement = {}
    for b in branches:
        kind = b.removeprefix("shared_")  # the shared expert's gate is a gate
        placement[b] = config.scale_placement if kind in config.placed_maps else "input" if kind in READS_A_NORM else None
    return ScaledLinear(in_features, branches, placement, **{
        "vectors": config.scale_vectors, "heterogeneous": config.scale_heterogeneous, "reparam": config.scale_reparam,
        "execution": config.scale_execution, "eps": config.norm_eps, **kwargs})


def rope_tables(config):
    """cos and sin (T, D) of rotary positions, in float32, for the rotate-half layout that Llama's weights use; the first half of sin
    with a minus: see apply_rope."""
    frequency = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    angle = torch.outer(torch.arange(config.block_size, dtype=torch.float32), frequency).repeat(1, 2)
    sign = torch.tensor([-1.0, 1.0]).repeat_interleave(config.head_dim // 2)
    return angle.cos(), angle.sin() * sign


def apply_rope(x, cos, sin):
    """Rotate each head by its position: its halves (a, b) become (a cos - b sin, b cos + a sin). A flip swaps them, not a
    concatenation, which would keep Inductor from fusing this with the norm before it. x (B, T, H, D), cos and sin (T, D) -> x's."""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)  # (b, a)
    return (x * cos[:, None] + swapped * sin[:, None]).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, D, kv = config.n_embd, config.head_dim, config.n_kv_head * config.head_dim
        self.head_dim = D
        self.o = scaled_linear(config, C, {"o": (C,)})
        # attention mixes positions, never channels: what scales v's output can move into o
        self.qkv = scaled_linear(config, C, {"q": (C,), "k": (kv,), "v": (kv,)}, norm_width={"q": D, "k": D, "v": D},
                                 absorbed_by={"v": (self.o, "o")})
        self.q_norm, self.k_norm = (OutputNorm(D, config.scale_vectors, config.scale_reparam, config.norm_eps)
                                    if config.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x, cos, sin, cache=None):
        """x (B, T, C), normalized; cos and sin (T, D) of its positions. cache: a list, empty or [keys, values] of the positions
        before x, (B, H, ., D) each, to which x's are appended; then x is a first piece, or one position. -> (B, T, C)."""
        B, T, C = x.size()
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in self.qkv(x))  # (B, T, H, D)
        q, k = apply_rope(self.q_norm(q), cos, sin), apply_rope(self.k_norm(k), cos, sin)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, T, D)
        if cache is not None:
            cache[:] = [k, v] if not cache else [torch.cat((old, new), dim=2) for old, new in zip(cache, (k, v))]
            k, v = cache
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T == k.size(2), enable_gqa=k.size(1) != q.size(1))
        return self.o(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """SwiGLU: W_down(silu(gate) ⊙ up)."""

    def __init__(self, config):
        super().__init__()
        self.down = scaled_linear(config, config.d_ff, {"down": (config.n_embd,)})
        # the gate multiplies channel by channel: what scales up's output can move into down
        self.gate_up = scaled_linear(config, config.n_embd, {"gate": (config.d_ff,), "up": (config.d_ff,)}, pad=True,
                                     absorbed_by={"up": (self.down, "down")})

    def forward(self, x):  # (..., C), normalized -> (..., C)
        gate, up = self.gate_up(x)
        return self.down(F.silu(gate) * up)


def expert_load(expert, n_expert):
    """Each expert's share of all choices. expert (N, K) -> (E,) in float32. No shape depends on the routing, unlike bincount's."""
    return F.one_hot(expert.flatten(), n_expert).float().mean(0)


def load_balance_loss(probabilities, expert):
    """E Σ_e f_e P_e: f_e the share of all choices that went to expert e, P_e its mean probability. 1 when the load is even, up to
    E / K when it is not (Switch Transformer, eq. 4). probabilities (N, E), expert (N, K) -> ()."""
    E = probabilities.size(-1)
    return E * (expert_load(expert, E) * probabilities.mean(0)).sum()


def router_z_loss(logits):
    """Mean of (log Σ_e exp logit_e)²: keeps router logits small (ST-MoE, eq. 5). (N, E) -> ()."""
    return logits.logsumexp(-1).square().mean()


class Permute(torch.autograd.Function):
    """x[order], whose gradient is grad[inverse]: a gather, where PyTorch's own backward adds up as if rows could repeat."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.saved_tensors[0]], None, None


class MoE(nn.Module):
    """Σ_k p_k expert_k(x) + shared(x) over the K experts of largest probability; each expert a SwiGLU, p renormalized over the K
    (Mixtral). Dropless: however crowded an expert, every token is served. Every map that reads the norm is a branch of one
    ScaledLinear, the router, the experts' gate and up, the shared expert's: one shared γ, or under HG one for each (ours: the paper
    does not say what HG means in a mixture)."""

    def __init__(self, config):
        super().__init__()
        C, E, width, shared = config.n_embd, config.n_expert, config.d_expert, config.d_shared_expert
        self.n_expert, self.n_active = E, config.n_expert_active
        branches = {"router": (E,), "gate": (E, width), "up": (E, width)}
        self.down = scaled_linear(config, width, {"down": (E, C)}, heterogeneous=True)
        absorbed_by, self.shared_down = {"up": (self.down, "down")}, None
        if shared:
            branches |= {"shared_gate": (shared,), "shared_up": (shared,)}
            self.shared_down = scaled_linear(config, shared, {"shared_down": (C,)})
            absorbed_by["shared_up"] = (self.shared_down, "shared_down")
        self.maps = scaled_linear(config, C, branches, pad=True, absorbed_by=absorbed_by)

    def forward(self, x):
        """x (..., C), normalized -> (..., C), and (load-balancing loss, z-loss, load of each expert) as one tensor (2 + E,)."""
        shape, x = x.size(), x.flatten(0, -2)  # (N, C)
        # the router's product and softmax run in float32: rounding must not reorder experts
        logits = self.maps(x.to(self.maps.weight["router"].dtype), ["router"])
        probabilities = logits.softmax(-1)
        weight, expert = probabilities.topk(self.n_active, dim=-1)  # (N, K)
        y = self.routed(x, weight / weight.sum(-1, keepdim=True), expert)
        if self.shared_down:
            gate, up = self.maps(x, ["shared_gate", "shared_up"])
            y = y + self.shared_down(F.silu(gate) * up)
        stats = torch.stack((load_balance_loss(probabilities, expert), router_z_loss(logits)))
        return y.view(shape), torch.cat((stats, expert_load(expert, self.n_expert).to(stats.dtype)))

    def routed(self, x, weight, expert):
        """Σ_k weight_k expert_k(x): tokens sorted by expert, a product for each projection, and back. No shape depends on the
        routing. x (N, C), weight and expert (N, K) -> (N, C)."""
        (N, C), K = x.size(), self.n_active
        order = expert.flatten().argsort(stable=True)  # (N K,) positions, expert by expert
        inverse = order.argsort()
        sorted_expert = expert.flatten()[order]
        rows = Rows(sorted_expert, F.one_hot(sorted_expert, self.n_expert).sum(0).cumsum(0).to(torch.int32))
        copies = x.unsqueeze(1).expand(N, K, C).reshape(N * K, C)
        gate, up = self.maps(Permute.apply(copies, order, inverse), ["gate", "up"], rows)
        out = self.down(F.silu(gate) * up, rows=rows)
        out = Permute.apply(out, inverse, order).view(N, K, C)
        return (out * weight.unsqueeze(-1)).sum(1).to(x.dtype)  # added up in float32


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.eps, self.moe = config.norm_eps, config.n_expert > 0 and layer >= config.n_dense_layer
        self.attn, self.mlp = Attention(config), MoE(config) if self.moe else MLP(config)
        self.attn_post_norm, self.mlp_post_norm = (OutputNorm(config.n_embd, config.scale_vectors, config.scale_reparam, config.norm_eps)
                                                   if config.post_norm else nn.Identity() for _ in range(2))

    def forward(self, x, cos, sin, cache=None):
        """x (B, T, C) -> (B, T, C), and what the router did (see MoE), or None in a dense layer. A Pre-Norm's γ is in the maps."""
        x = x + self.attn_post_norm(self.attn(rms_norm(x, self.eps), cos, sin, cache))
        y, router = self.mlp(rms_norm(x, self.eps)) if self.moe else (self.mlp(rms_norm(x, self.eps)), None)
        return x + self.mlp_post_norm(y), router


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.compute_dtype = None  # of the activations; None: the parameters' own
        self.routers = None  # what the routers did in the last forward, (MoE layers, 2 + E)
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.head = scaled_linear(config, config.n_embd, {"head": (config.vocab_size,)}, tied=config.tie_embeddings)
        if config.tie_embeddings:
            self.head.weight["head"] = self.embedding.weight
        for name, table in zip(("cos", "sin"), rope_tables(config)):
            self.register_buffer(name, table, persistent=False)
        self.init_weights()

    def __getstate__(self):
        return {**self.__dict__, "routers": None}  # tensors of a graph cannot be copied

    @torch.no_grad()
    def init_weights(self):
        """
        parameter                     start (ours: the paper does not say)
        embedding, q k v, gate up     normal(0, init_std)
        router                        normal(0, init_std)
        o, down                       normal(0, init_std / sqrt(2 n_layer)), so the residual stream grows with depth slowly
        head                          normal(0, init_std), or the embedding if tied
        every scale vector            γ = 1: see ScaleVector

        Scale vectors draw no random numbers: at one seed, all variants of a shape start with the same matrices.
        """
        std = self.config.init_std
        nn.init.normal_(self.embedding.weight, std=std)
        for layer in self.layers:
            mlp = layer.mlp.children() if layer.moe else (layer.mlp.gate_up, layer.mlp.down)
            for maps in (layer.attn.qkv, layer.attn.o, *mlp):
                for name, W in maps.weight.items():
                    last = name in ("o", "down", "shared_down")
                    nn.init.normal_(W, std=std / (2 * self.config.n_layer) ** 0.5 if last else std)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.head.weight["head"], std=std)

    def forward(self, idx, targets=None, caches=None):
        """idx (B, T) token ids, targets (B, T) the ids that follow, -1 where there is nothing to predict.
        Without targets: logits (B, T, V) in the compute dtype, and None. With targets: None, and the mean cross-entropy in nats.
        A mixture's auxiliary losses are apart: see auxiliary_loss. caches: a list for each layer, see Attention."""
        B, T = idx.size()
        start = caches[0][0].size(2) if caches and caches[0] else 0
        if start + T > self.config.block_size:
            raise ValueError(f"a sequence of {start + T} tokens is longer than block_size={self.config.block_size}")
        cos, sin = self.cos[start:start + T], self.sin[start:start + T]
        x = self.embedding(idx)  # (B, T, C)
        x = x if self.compute_dtype is None else x.to(self.compute_dtype)
        routers, scales = [], compute_scale_vectors(self)
        with at_hand(scales):
            for layer, cache in zip(self.layers, caches or [None] * len(self.layers)):
                if self.config.recompute and self.training:
                    x, router = checkpoint(layer, x, cos, sin, use_reentrant=False, context_fn=lambda: (nullcontext(), at_hand(scales)))
                else:
                    x, router = layer(x, cos, sin, cache)
                routers += [] if router is None else [router]
            self.routers = torch.stack(routers) if routers else None
            if targets is None:
                return self.head(rms_norm(x, self.config.norm_eps)), None
            return None, self.loss(x, targets)

    def loss(self, x, targets):
        """Mean of -log softmax(logits)[target] over the targets that are not -1, in nats. x (B, T, C), targets (B, T) -> ().

        Of all that is as large as the logits only the product W(γ_b ⊙ Norm(x)) is kept, in the compute dtype: see chunked_loss."""
        y, targets = self.head_product(x).flatten(0, -2), targets.flatten()  # (N, V)
        u = self.head.scale_out["head"]() if "head" in self.head.scale_out else None
        return self.chunked_loss(y, targets, u) / (targets != -1).sum()

    def head_product(self, x):
        """W(γ_b ⊙ Norm(x)) of the head, before DNP's norm if there is one. (B, T, C) -> (B, T, V)."""
        return self.head(rms_norm(x, self.config.norm_eps), finish=False)

    def summed_loss(self, y, targets, u):
        """Summed cross-entropy of some rows of head_product, in float32 or wider. y (n, V), targets (n,), u the head's γ_a -> ()."""
        logits = self.head.finish("head", y if y.dtype == torch.float64 else y.float(), u)
        return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")

    def chunked_loss(self, y, targets, u):
        """summed_loss of all rows in little memory. What follows y, DNP's norm over the vocabulary and γ_a and the softmax, exists in
        float32 for one chunk of rows at a time; the backward pass makes it again (activation checkpointing)."""
        chunks = min(len(y), -(-y.numel() // CHUNK_ELEMENTS))
        return sum(checkpoint(self.summed_loss, y_c, t_c, u, use_reentrant=False)
                   for y_c, t_c in zip(y.chunk(chunks), targets.chunk(chunks)))

    def auxiliary_loss(self):
        """load_balance_coef x the load-balancing losses + router_z_coef x the z-losses, each the mean over layers, of the last
        forward: to be added to the loss for the backward pass. () or 0.0 for a dense model."""
        if self.routers is None:
            return 0.0
        return self.config.load_balance_coef * self.routers[:, 0].mean() + self.config.router_z_coef * self.routers[:, 1].mean()

    @property
    def router_stats(self):
        """(load-balancing loss, z-loss, each expert's load) of the last forward, (MoE layers, 2 + E), detached; None if dense."""
        return None if self.routers is None else self.routers.detach()

    def compile_parts(self, **how):
        """torch.compile for each block and for the loss, instead of for the whole: one graph serves all layers, so the time to
        compile does not grow with depth. Experts in float32 are a loop whose shapes follow the routing: they stay eager.
        how: arguments of torch.compile, in place of ours."""
        how = {"dynamic": False, "options": FUSION, **how}
        for layer in self.layers:
            (layer.attn if layer.moe and self.compute_dtype != torch.bfloat16 else layer).compile(**how)
        self.head_product = torch.compile(self.head_product, **how)
        self.chunked_loss = torch.compile(self.summed_loss, **how)  # one loop over the rows, which stores nothing of y's size: no chunks

    def num_params(self, kind="total"):
        """Parameters by kind. "total"; "active": those a token meets; "non_embedding": without the look-up table, as
        nanoGPT counts (a tied table is the head too, and stays); "scale_vectors": every γ, or its β and α."""
        total = sum(p.numel() for p in self.parameters())
        if kind == "total":
            return total
        if kind == "active":
            idle = self.config.n_expert - self.config.n_expert_active
            return total - sum(p.numel() // self.config.n_expert * idle for p in self.expert_parameters())
        if kind == "non_embedding":
            return total - (0 if self.config.tie_embeddings else self.embedding.weight.numel())
        if kind == "scale_vectors":
            return sum(p.numel() for m in self.modules() if isinstance(m, ScaleVector) for p in m.parameters())
        raise ValueError(f"num_params({kind!r}): choose total, active, non_embedding or scale_vectors")

    def expert_parameters(self):
        """The parameters that hold one part for each routed expert: stacked matrices (E, m, d) and vectors (E, d) of their own."""
        stacks = [(m, b) for m in self.modules() if isinstance(m, ScaledLinear) for b, shape in m.branches.items() if len(shape) == 2]
        own = [vectors[b] for m, b in stacks for vectors in (m.scale_in, m.scale_out) if b in vectors]
        return [m.weight[b] for m, b in stacks] + [p for scale in own if len(scale.shape) == 2 for p in scale.parameters()]

    def flops_per_token(self, causal=False):
        """Floating-point operations to train on one token: 6 for each parameter of a product, and 12 n_layer n_embd block_size for
        attention (PaLM, appendix B), or half of that for what a causal mask leaves to do."""
        matrices = self.num_params("active") - (0 if self.config.tie_embeddings else self.embedding.weight.numel())
        stacks, idle = {id(p) for p in self.expert_parameters()}, self.config.n_expert_active / max(1, self.config.n_expert)
        vectors = [p for m in self.modules() if isinstance(m, ScaleVector) for p in m.parameters()]
        matrices -= sum(round(p.numel() * (idle if id(p) in stacks else 1)) for p in vectors)
        return 6 * matrices + (6 if causal else 12) * self.config.n_layer * self.config.n_embd * self.config.block_size

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None, use_cache=True):
        """Yield max_new_tokens ids (B, 1), one at a time, that continue idx (B, T). temperature 0 takes the likeliest. Keys and values
        are cached. When block_size tokens are full, the newer half is read once more and stays as the context; use_cache=False
        gives the same tokens by reading the whole context for each."""
        size, caches = self.config.block_size, None
        context = idx[:, -size:]
        for _ in range(max_new_tokens):
            if context.size(1) > size:
                context, caches = context[:, -(size // 2 or 1):], None
            if caches is None or not use_cache:
                caches, new = [[] for _ in self.layers], context
            with torch.compiler.set_stance("force_eager"):  # each length would compile anew
                logits = self(new, caches=caches)[0][:, -1].float()
            if top_k:
                logits[logits < logits.topk(min(top_k, logits.size(-1)))[0][:, -1:]] = -float("inf")
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            context = torch.cat((context, new), dim=1)
            yield new
