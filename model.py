"""
A Llama-style decoder whose scale vectors can be placed, shared, split, rewritten or left out.

  - RMSNorm before each sub-layer, rotary positions, grouped-query attention, SwiGLU, no biases
  - Output-Norms to study: Q/K-norm (qk_norm), Gemma's norms on sub-layers' outputs (post_norm)
  - dense, or with a mixture of experts (n_expert) in place of the SwiGLU: dropless
  - every linear map is a norms.ScaledLinear; the scale_* keys tell which vectors it carries
  - no autocast: weights stay float32 and are cast where they are multiplied

Letters in the shape comments: B sequences, T positions, C = n_embd, H heads, D = head_dim,
F a SwiGLU's width, V = vocab_size; N = B T tokens, E experts, K experts for a token.
"""
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fast import Routing, apply_wide, gammas_in_batches
from norms import OutputNorm, PreNorm, ScaledLinear, ScaleVector, fused

# The placement of each map that scale_placement_on does not name. Those that read a Norm have a
# γ_b, as in every Llama; o and down have no scale vector.
DEFAULT_PLACEMENTS = {"q": "input", "k": "input", "v": "input", "gate": "input", "up": "input",
                      "head": "input", "router": "input", "o": None, "down": None}


@dataclass
class GPTConfig:
    """The model's keys. lib/config.py checks them further."""
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
    init_std: float = 0.02  # of the matrices; 0: 1/sqrt(n_embd), which small models need
    n_expert: int = 0  # routed experts in each layer; 0: a dense model
    n_expert_active: int = 4  # of them, for each token
    d_expert: int = 0  # width of a routed expert's SwiGLU; 0: int(2/3 n_embd), the paper's
    d_shared_expert: int = 0  # width of one more expert that every token meets; 0: none
    n_dense_layer: int = 0  # the first layers stay dense
    load_balance_coef: float = 0.01  # weight of the load-balancing loss (Switch, eq. 4)
    router_z_coef: float = 0.001  # weight of the router z-loss (ST-MoE, eq. 5)
    scale_vectors: bool = True  # False: no scale vector anywhere; normalizations stay
    scale_heterogeneous: bool = False  # HG: each map that reads a norm has its own γ_b
    scale_vectors_on: str = "all"  # maps that may have one, such as "k,v,gate,up,head"
    scale_placement: str = "input"  # "after" (AP), "dual" (DP), "dual_norm" (DNP), ...
    scale_placement_on: str = "q,k,v,gate,up,head"  # maps with scale_placement; also o and down
    scale_reparam: str = "none"  # "original" (OR), "exponential" (ER), "zero_centered" (γ = 1 + α)
    recompute: bool = False  # run each block again in the backward pass: less memory, 1/3 slower

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.d_ff = self.d_ff or int(8 * self.n_embd / 3)
        self.d_expert = self.d_expert or int(2 * self.n_embd / 3)
        self.init_std = self.init_std or self.n_embd ** -0.5
        # two mistakes that would otherwise pass in silence; lib/config.py checks the rest
        for name in {*self.placed_maps, *self.vector_maps} - DEFAULT_PLACEMENTS.keys():
            raise ValueError(f"there is no map {name!r}: scale_placement_on and scale_vectors_on "
                             f"choose among {', '.join(DEFAULT_PLACEMENTS)}")
        if self.n_expert and self.n_dense_layer >= self.n_layer:
            raise ValueError(f"n_dense_layer={self.n_dense_layer} leaves none of n_layer="
                             f"{self.n_layer} for n_expert={self.n_expert}: lower it")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def placed_maps(self):
        return [name.strip() for name in self.scale_placement_on.split(",") if name.strip()]

    @property
    def vector_maps(self):
        if self.scale_vectors_on == "all":
            return list(DEFAULT_PLACEMENTS)
        return [name.strip() for name in self.scale_vectors_on.split(",") if name.strip()]


# ---- maps and norms as the configuration wants them ----------------------------------------------

def linear(c, name, shape, **how):
    """The map `name` of DEFAULT_PLACEMENTS, or the shared expert's; how: see ScaledLinear."""
    kind = name.removeprefix("shared_")
    placement = DEFAULT_PLACEMENTS[kind]
    if kind in c.placed_maps:
        placement = c.scale_placement

    # o and down write to the residual stream: they start small, so that it grows slowly
    std = c.init_std
    if kind in ("o", "down"):
        std /= (2 * c.n_layer) ** 0.5

    return ScaledLinear(shape, placement, vectors=c.scale_vectors and kind in c.vector_maps,
                        reparam=c.scale_reparam, eps=c.norm_eps, init_std=std, **how)


def output_norm(c, dim, wanted):
    if not wanted:
        return nn.Identity()
    return OutputNorm(dim, vectors=c.scale_vectors, reparam=c.scale_reparam, eps=c.norm_eps)


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
    x (B, T, H, D), cos and sin (T, D) -> as x. A flip swaps the halves, because
    Inductor fuses it with the norm before it, unlike torch.cat."""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)  # (b, a)
    return (x * cos[:, None] + swapped * sin[:, None]).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        C, D, kv = c.n_embd, c.head_dim, c.n_kv_head * c.head_dim
        self.head_dim = D
        # k before q: weights are drawn in the order of these lines, and a seed keeps its weights
        self.k = linear(c, "k", (kv, C), norm_width=D)
        self.q = linear(c, "q", (C, C), norm_width=D)
        self.v = linear(c, "v", (kv, C), norm_width=D)
        self.o = linear(c, "o", (C, C))
        self.norm = PreNorm([self.q, self.k, self.v], shared=not c.scale_heterogeneous,
                            eps=c.norm_eps)
        # attention mixes positions, never channels, so W_o can apply v's γ_a
        self.o.absorb(self.v, head_dim=D)
        self.q_norm = output_norm(c, D, c.qk_norm)
        self.k_norm = output_norm(c, D, c.qk_norm)

    def forward(self, x, cos, sin, cache=None):
        """x (B, T, C), the residual stream; cos and sin (T, D) of its positions -> (B, T, C).
        cache: a list, empty or [keys, values] (B, H, ., D) of the positions before x; x's are
        appended. With an empty one x is the whole prompt, with a full one the next position."""
        B, T, C = x.size()

        # Pre-Norm, then q, k and v as one product, and each split into heads (B, T, H, D)
        q, k, v = fused(self.norm(x), (self.q, self.k, self.v))
        q = q.view(B, T, -1, self.head_dim)
        k = k.view(B, T, -1, self.head_dim)
        v = v.view(B, T, -1, self.head_dim)

        # Q/K-norm, where it is wanted, and positions; then heads go before positions (B, H, T, D)
        q = apply_rope(self.q_norm(q), cos, sin).transpose(1, 2)
        k = apply_rope(self.k_norm(k), cos, sin).transpose(1, 2)
        v = v.transpose(1, 2)

        # Sampling: the keys and values of the positions before. A single new position sees all of
        # them; without any, attention is causal
        causal = not cache
        if cache:
            k = torch.cat((cache[0], k), dim=2)
            v = torch.cat((cache[1], v), dim=2)
        if cache is not None:
            cache[:] = k, v

        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal,
                                           enable_gqa=k.size(1) != q.size(1))
        return self.o(y.transpose(1, 2).reshape(B, T, C))


# ---- feed-forward --------------------------------------------------------------------------------

def swiglu(gate, up, down, x, routing=None):
    """W_down(silu(W_gate x) ⊙ W_up x), x (..., C) -> (..., C). routing: of a stack of experts."""
    gate, up = fused(x, (gate, up), routing)
    return down(F.silu(gate) * up, routing)


def join_swiglu(gate, up, down):
    """Only operations on single channels stand between these maps. So W_down can apply up's γ_a.
    And zeros may stand between them, if what follows each product keeps zeros: they round an odd
    width up to a multiple of 8, which tensor cores need."""
    down.absorb(up)
    if all(m.placement.output is None or m.placement.keeps_zeros for m in (gate, up)):
        zeros = -up.width % 8
        gate.pad = up.pad = (0, zeros)
        down.pad = (zeros, 0)


class MLP(nn.Module):
    """The SwiGLU of a dense layer, with its Pre-Norm."""

    def __init__(self, c):
        super().__init__()
        self.gate = linear(c, "gate", (c.d_ff, c.n_embd))
        self.up = linear(c, "up", (c.d_ff, c.n_embd))
        self.down = linear(c, "down", (c.n_embd, c.d_ff))
        self.norm = PreNorm([self.gate, self.up], shared=not c.scale_heterogeneous, eps=c.norm_eps)
        join_swiglu(self.gate, self.up, self.down)

    def forward(self, x):  # (..., C), the residual stream -> (..., C)
        return swiglu(self.gate, self.up, self.down, self.norm(x))


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


class MoE(nn.Module):
    """Σ_k p_k expert_k(x) + shared(x) over the K experts of largest probability. Each expert is a
    SwiGLU, and p sums to 1 over the K (Mixtral). Dropless: however crowded an expert, every token
    is served. Router, experts and shared expert read one Norm: they share one γ_b, or have one
    each under HG (ours: the paper does not say what HG means in a mixture)."""

    def __init__(self, c):
        super().__init__()
        C, E, F_, S = c.n_embd, c.n_expert, c.d_expert, c.d_shared_expert
        self.n_expert, self.n_active = E, c.n_expert_active

        # weights are drawn in the order of these lines, and a seed keeps its weights
        self.down = linear(c, "down", (E, C, F_))
        self.shared_down = linear(c, "shared_down", (C, S)) if S else None
        self.gate = linear(c, "gate", (E, F_, C))
        self.router = linear(c, "router", (E, C))
        self.shared_gate = linear(c, "shared_gate", (S, C)) if S else None
        self.shared_up = linear(c, "shared_up", (S, C)) if S else None
        self.up = linear(c, "up", (E, F_, C))

        # all but down read one Norm. Under AP only the router has a γ_b, and keeps it
        maps = [self.router, self.gate, self.up]
        join_swiglu(self.gate, self.up, self.down)
        if S:
            maps += [self.shared_gate, self.shared_up]
            join_swiglu(self.shared_gate, self.shared_up, self.shared_down)
        self.norm = PreNorm(maps, shared=not c.scale_heterogeneous, eps=c.norm_eps)

    def forward(self, x):
        """x (..., C), the residual stream -> (..., C), and one tensor (2 + E,): load-balancing
        loss, z-loss, load of each expert."""
        # The router reads float32, because rounding must not reorder experts. Norm and cast come
        # before x is flattened: Inductor then fuses their backward with that of the sum before them
        shape = x.size()
        wide = self.norm(x.to(self.router.weight.dtype))
        x = wide.to(x.dtype).flatten(0, -2)  # (N, C)

        # each token's K experts, and their weights
        logits = self.router(wide.flatten(0, -2))
        probabilities = logits.softmax(-1)
        weight, expert = probabilities.topk(self.n_active, dim=-1)  # (N, K)
        weight = weight / weight.sum(-1, keepdim=True)

        # Each token's copies go to its experts, sorted so that all experts are one product for each
        # projection, and come back. They are added up in float32
        routing = Routing(expert, self.n_expert)
        y = swiglu(self.gate, self.up, self.down, routing.sort(x), routing)
        y = (routing.unsort(y) * weight.unsqueeze(-1)).sum(1).to(x.dtype)  # (N, K, C) -> (N, C)

        # the expert that every token meets
        if self.shared_down:
            y = y + swiglu(self.shared_gate, self.shared_up, self.shared_down, x)

        # what the router did
        losses = torch.stack((load_balance_loss(probabilities, expert), router_z_loss(logits)))
        load = expert_load(expert, self.n_expert).to(losses.dtype)
        return y.view(shape), torch.cat((losses, load))


# ---- the model -----------------------------------------------------------------------------------

class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.moe = c.n_expert > 0 and layer >= c.n_dense_layer
        self.attn = Attention(c)
        self.mlp = MoE(c) if self.moe else MLP(c)
        self.attn_post_norm = output_norm(c, c.n_embd, c.post_norm)
        self.mlp_post_norm = output_norm(c, c.n_embd, c.post_norm)

    def forward(self, x, cos, sin, cache=None):
        """x (B, T, C) -> (B, T, C), and what the router did (see MoE), None in a dense layer. The
        Pre-Norms are attn.norm and mlp.norm."""
        x = x + self.attn_post_norm(self.attn(x, cos, sin, cache))
        router = None
        if self.moe:
            y, router = self.mlp(x)
        else:
            y = self.mlp(x)
        return x + self.mlp_post_norm(y), router


class CrossEntropy(nn.Module):
    """Mean of -log softmax(logits(x))[target] in nats over the targets that are not -1. It is a
    module, and calls the model's `logits` itself, so that both can be compiled as one part."""

    def forward(self, model, x, targets):  # GPT, (B, T, C), (B, T) -> ()
        logits = model.logits(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.compute_dtype = None  # of the activations; None: the parameters' own
        self.compiled = False  # in parts, by lib.process.compile_model
        self.routers = None  # what the routers did in the last forward, (MoE layers, 2 + E)
        self.embedding = nn.Embedding(c.vocab_size, c.n_embd)
        self.layers = nn.ModuleList([Block(c, layer) for layer in range(c.n_layer)])
        self.head = linear(c, "head", (c.vocab_size, c.n_embd), tied=c.tie_embeddings)
        self.norm = PreNorm([self.head], eps=c.norm_eps)  # of one map: the same with and without HG
        self.cross_entropy = CrossEntropy()
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(c.block_size, c.head_dim), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        parameter                     start (ours: the paper does not say)
        embedding, q k v, gate up     normal(0, init_std), and so does the router
        o, down                       normal(0, init_std / sqrt(2 n_layer)): see `linear`
        head                          normal(0, init_std), or the embedding if tied
        every scale vector            γ = 1: see ScaleVector
        rotary positions' tables      see rope_tables

        That is all that the model has: after the meta device or to_empty it makes a whole one.
        Scale vectors draw no random numbers: at one seed, all variants of a shape start with the
        same matrices.
        """
        if self.config.tie_embeddings:  # again, because to_empty makes two of them
            self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=self.config.init_std)
        known = {self.embedding.weight}
        for m in self.modules():
            if isinstance(m, ScaleVector) or (isinstance(m, ScaledLinear) and not m.tied):
                m.reset_parameters()
                known.update(m.parameters())
        for table, start in zip((self.cos, self.sin), rope_tables(self.config)):
            table.copy_(start)
        for name, p in self.named_parameters():
            if p not in known:
                raise ValueError(f"init_weights does not know {name}: give it its start there")

    def forward(self, idx, targets=None, caches=None):
        """idx (B, T) token ids; targets (B, T) the ids that follow, -1 where nothing is predicted.
        Without targets: logits (B, T, V) in the compute dtype, and None. With targets: None, and
        the mean cross-entropy in nats, without a mixture's auxiliary_loss.
        caches: a list for each layer, see Attention."""
        B, T = idx.size()
        start = 0
        if caches and caches[0]:
            start = caches[0][0].size(2)
        if start + T > self.config.block_size:
            raise ValueError(f"a sequence of {start + T} tokens is longer than "
                             f"block_size={self.config.block_size}")
        if start and T > 1:
            raise ValueError(f"after the first piece, caches take one token at a time, not {T}")

        # the residual stream (B, T, C), and the tables of its positions
        cos, sin = self.cos[start:start + T], self.sin[start:start + T]
        x = self.embedding(idx)
        if self.compute_dtype:
            x = x.to(self.compute_dtype)

        # All γ in a few batches, unless a block is run again in the backward pass and needs its
        # own, or is compiled, which makes its γ cheap
        recompute = self.config.recompute and self.training and caches is None
        batched = self.modules()
        if recompute or self.compiled:
            batched = []
        with gammas_in_batches(batched):
            routers = []
            for layer, cache in zip(self.layers, caches or [None] * len(self.layers)):
                if recompute:
                    x, router = checkpoint(layer, x, cos, sin, use_reentrant=False)
                else:
                    x, router = layer(x, cos, sin, cache)
                if router is not None:
                    routers.append(router)
            self.routers = torch.stack(routers) if routers else None

            # final norm and head, alone or as one part with the loss
            if targets is None:
                return self.logits(x), None
            return None, self.cross_entropy(self, x, targets)

    def logits(self, x):
        """The residual stream (B, T, C) -> (B, T, V), for the loss and for sampling."""
        return apply_wide(self.head, self.norm(x))

    def auxiliary_loss(self):
        """What a mixture adds to the loss for the backward pass, by its last forward: the means
        over layers of load-balancing loss and z-loss, times their coefficients. 0.0 if dense."""
        if self.routers is None:
            return 0.0
        balance, z = self.routers[:, 0].mean(), self.routers[:, 1].mean()
        return self.config.load_balance_coef * balance + self.config.router_z_coef * z

    def __getstate__(self):  # for copies: a tensor of a graph cannot be copied
        return {**super().__getstate__(), "routers": None}
