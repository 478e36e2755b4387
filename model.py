"""
A Llama-style decoder whose scale vectors can be placed, shared, split, reparameterized or left out.

  - RMSNorm before each sub-layer, rotary positions, grouped-query attention, SwiGLU, no biases
  - optional Output-Norms to study: Q/K-norm (`qk_norm`) and Gemma's post-norms (`post_norm`)
  - every linear map is a norms.ScaledLinear; which vectors it carries is decided there, from the `scale_*` keys
  - no autocast: weights stay float32 and are cast where they are used, activations run in `compute_dtype`

  - dense, or with a mixture of experts (`n_expert`) in place of the SwiGLU: dropless, with optional shared experts

Letters in the shape comments: B sequences, T positions, C = n_embd, H heads, D = head_dim; N tokens, E experts, K experts for a token.
"""
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from norms import EXECUTIONS, PLACEMENTS, REPARAMS, OutputNorm, ScaledLinear, ScaleVector, rms_norm

READS_A_NORM = ("q", "k", "v", "gate", "up", "router")  # these maps have an input-side vector whatever the placement
MAPS = ("q", "k", "v", "gate", "up", "o", "down")  # those that scale_placement_on can name


@dataclass
class GPTConfig:
    """The model's share of the configuration. Raises ValueError, one line, on values that cannot go together."""
    block_size: int = 1024  # the longest sequence, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0  # key/value heads of grouped-query attention; 0: n_head
    n_embd: int = 768
    d_ff: int = 0  # width of the SwiGLU; 0: int(8/3 n_embd), about the parameters of a 4x GELU layer
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False  # one matrix for embedding and head
    qk_norm: bool = False  # normalize each query and key head: an Output-Norm
    post_norm: bool = False  # normalize each sub-layer's output before the residual add: an Output-Norm
    init_std: float = 0.02  # of every matrix; 0: 1/sqrt(n_embd), which small models need
    n_expert: int = 0  # routed experts in each layer; 0: a dense model
    n_expert_active: int = 2  # of them, for each token
    n_shared_expert: int = 0  # experts that every token meets besides
    d_expert: int = 0  # width of an expert's SwiGLU; 0: d_ff
    n_dense_layer: int = 0  # the first layers stay dense
    load_balance_coef: float = 0.01  # weight of the load-balancing loss (Switch Transformer, eq. 4)
    router_z_coef: float = 0.001  # weight of the router z-loss (ST-MoE, eq. 5)
    scale_vectors: bool = True  # False: no scale vector anywhere; normalizations stay
    scale_heterogeneous: bool = False  # HG: one input-side vector for each branch that reads a norm
    scale_placement: str = "input"  # "dual" (DP): on both sides of the map; "dual_norm" (DNP): with a norm in between
    scale_placement_on: str = "q,k,v,gate,up"  # the maps that scale_placement is about; o and down can be named too
    scale_reparam: str = "none"  # "ordinary" (OR): γ = β α; "exponential" (ER): γ = e^β α
    scale_execution: str = "weights"  # or "activations", the textbook form: the same function, slower

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.d_ff = self.d_ff or int(8 / 3 * self.n_embd)
        self.d_expert = self.d_expert or self.d_ff
        self.init_std = self.init_std or self.n_embd ** -0.5
        for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "d_ff", "n_expert_active", "d_expert"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        for key in ("n_expert", "n_shared_expert", "n_dense_layer", "load_balance_coef", "router_z_coef"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)} cannot be negative")
        if self.n_expert and self.n_expert_active > self.n_expert:
            raise ValueError(f"n_expert_active={self.n_expert_active} is more than n_expert={self.n_expert}: a token meets at most all")
        if self.n_shared_expert and not self.n_expert:
            raise ValueError(f"n_shared_expert={self.n_shared_expert} with n_expert=0: shared experts stand beside routed ones")
        for key in ("rope_theta", "norm_eps", "init_std"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key}={getattr(self, key)} must be above 0")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: "
                             f"choose n_embd={_nearest_multiple(self.n_embd, self.n_head)} or another n_head")
        if self.head_dim % 2:
            raise ValueError(f"n_embd/n_head={self.head_dim} is odd: rotary positions need an even head size")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}: "
                             f"each key/value head serves the same number of query heads")
        for key, allowed in (("scale_placement", PLACEMENTS), ("scale_reparam", REPARAMS),
                             ("scale_execution", EXECUTIONS)):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}={getattr(self, key)!r} is unknown: choose one of {', '.join(allowed)}")
        for name in self.placed_maps:
            if name not in MAPS:
                raise ValueError(f"scale_placement_on={self.scale_placement_on!r} names {name!r}: "
                                 f"choose among {','.join(MAPS)}")
        if self.scale_placement == "dual_norm":
            for key, maps in (("qk_norm", ("q", "k")), ("post_norm", ("o", "down"))):
                twice = [name for name in maps if name in self.placed_maps]
                if getattr(self, key) and twice:
                    raise ValueError(f"{key}=True would normalize what scale_placement='dual_norm' has normalized: "
                                     f"set {key}=False, or take {','.join(twice)} out of scale_placement_on")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def placed_maps(self):
        return [name.strip() for name in self.scale_placement_on.split(",") if name.strip()]


def _nearest_multiple(n, k):
    return max(1, round(n / k)) * k


def scaled_linear(config, in_features, branches, **kwargs):
    """A ScaledLinear as the configuration wants it. Maps in scale_placement_on get scale_placement; of the others those
    that read a norm keep the input side, and o and down have no vector."""
    placement = {}
    for b in branches:
        kind = b.rpartition("_")[2]  # expert_3_gate is a gate
        placement[b] = config.scale_placement if kind in config.placed_maps else "input" if kind in READS_A_NORM else None
    return ScaledLinear(in_features, branches, placement, **{
        "vectors": config.scale_vectors, "heterogeneous": config.scale_heterogeneous, "reparam": config.scale_reparam,
        "execution": config.scale_execution, "eps": config.norm_eps, **kwargs})


def rope_tables(config):
    """cos and sin (T, D) of rotary positions, in float32, for the rotate-half layout that Llama's weights use."""
    frequency = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    angle = torch.outer(torch.arange(config.block_size, dtype=torch.float32), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """Rotate each head by its position. x (B, T, H, D), cos and sin (T, D) -> (B, T, H, D)."""
    cos, sin = cos[:x.size(1), None], sin[:x.size(1), None]
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, D = config.n_embd, config.head_dim
        self.head_dim, self.n_kv_head, self.eps = D, config.n_kv_head, config.norm_eps
        self.o = scaled_linear(config, C, {"o": C}, norm_width=C)
        # attention mixes positions, never channels: what scales v's output can move into o
        self.qkv = scaled_linear(config, C, {"q": C, "k": config.n_kv_head * D, "v": config.n_kv_head * D},
                                 norm_width=D, absorbed_by={"v": (self.o, "o")})
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm, self.k_norm = (OutputNorm(D, config.scale_vectors, config.scale_reparam, config.norm_eps)
                                        for _ in range(2))

    def forward(self, x, cos, sin):
        B, T, C = x.size()
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in self.qkv(rms_norm(x, self.eps)))  # (B, T, H, D)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True,
                                           enable_gqa=self.n_kv_head != q.size(2))  # (B, H, T, D)
        return self.o(y.transpose(1, 2).reshape(B, T, C))[0]


class MLP(nn.Module):
    """SwiGLU: W_down(silu(gate) ⊙ up)."""

    def __init__(self, config):
        super().__init__()
        self.eps = config.norm_eps
        self.down = scaled_linear(config, config.d_ff, {"down": config.n_embd}, norm_width=config.n_embd)
        # the gate multiplies channel by channel: what scales up's output can move into down
        self.gate_up = scaled_linear(config, config.n_embd, {"gate": config.d_ff, "up": config.d_ff},
                                     norm_width=config.d_ff, absorbed_by={"up": (self.down, "down")})

    def forward(self, x):
        gate, up = self.gate_up(rms_norm(x, self.eps))
        return self.down(F.silu(gate) * up)[0]


def expert_load(expert, n_expert):
    """Each expert's share of all choices. expert (N, K) -> (E,) in float32. No shape depends on the routing, unlike bincount's."""
    return F.one_hot(expert.flatten(), n_expert).float().mean(0)


def load_balance_loss(probabilities, expert):
    """E Σ_e f_e P_e: f_e the share of all choices that went to expert e, P_e its mean probability. 1 when the load is even, up to E
    when it is not (Switch Transformer, eq. 4). probabilities (N, E), expert (N, K) -> ()."""
    E = probabilities.size(-1)
    return E * (expert_load(expert, E) * probabilities.mean(0)).sum()


def router_z_loss(logits):
    """Mean of (log Σ_e exp logit_e)²: keeps router logits small (ST-MoE, eq. 5). (N, E) -> ()."""
    return logits.logsumexp(-1).square().mean()


class MoE(nn.Module):
    """Σ_k p_k expert_k(x) + Σ_s shared_s(x) over the K experts of largest probability; each expert a SwiGLU, p renormalized over the K
    (Mixtral). Dropless: however crowded an expert, every token is served. Every map that reads the norm is a branch of one
    ScaledLinear, the router and each expert's gate and up: one shared γ, or under HG one for each."""

    def __init__(self, config):
        super().__init__()
        self.eps, self.n_expert, self.n_active = config.norm_eps, config.n_expert, config.n_expert_active
        self.shared = [f"shared_{s}" for s in range(config.n_shared_expert)]
        experts, C, F_ = [f"expert_{e}" for e in range(config.n_expert)] + self.shared, config.n_embd, config.d_expert
        # each expert's down reads its own stream, so a vector on its input side is never shared
        self.down = scaled_linear(config, F_, {f"{e}_down": C for e in experts}, norm_width=C, heterogeneous=True)
        self.maps = scaled_linear(config, C, {"router": config.n_expert, **{f"{e}_{kind}": F_ for e in experts for kind in ("gate", "up")}},
                                  norm_width=F_, absorbed_by={f"{e}_up": (self.down, f"{e}_down") for e in experts})

    def forward(self, x):  # (B, T, C) -> (B, T, C), and (load-balancing loss, z-loss, load of each expert) as one tensor (2 + E,)
        shape, x = x.size(), rms_norm(x, self.eps).flatten(0, 1)  # (N, C)
        # the router's product and softmax run in float32: rounding must not reorder experts
        logits = self.maps(x.to(self.maps.weight["router"].dtype), ["router"])[0]
        probabilities = logits.softmax(-1)
        weight, expert = probabilities.topk(self.n_active, dim=-1)  # (N, K)
        weight = (weight / weight.sum(-1, keepdim=True)).to(x.dtype)
        grouped = x.is_cuda and x.dtype == torch.bfloat16
        y = (self.experts_grouped if grouped else self.experts_looped)(x, weight, expert)
        for s in self.shared:
            gate, up = self.maps(x, [f"{s}_gate", f"{s}_up"])
            y = y + self.down(F.silu(gate) * up, [f"{s}_down"])[0]
        stats = torch.stack((load_balance_loss(probabilities, expert), router_z_loss(logits)))
        stats = torch.cat((stats, expert_load(expert, self.n_expert).to(stats.dtype)))
        return y.view(shape), stats

    def experts_looped(self, x, weight, expert):
        """One expert after the other. x (N, C), weight and expert (N, K) -> (N, C)."""
        y = torch.zeros_like(x)
        for e in range(self.n_expert):
            row, choice = (expert == e).nonzero(as_tuple=True)
            gate, up = self.maps(x[row], [f"expert_{e}_gate", f"expert_{e}_up"])
            out = self.down(F.silu(gate) * up, [f"expert_{e}_down"])[0]
            y = y.index_add(0, row, out * weight[row, choice, None])
        return y

    def experts_grouped(self, x, weight, expert):
        """All experts in one grouped product for each projection, over the tokens sorted by expert: the same values, no loop, and
        no shape that depends on the routing. x (N, C), weight and expert (N, K) -> (N, C)."""
        order = expert.flatten().argsort(stable=True)  # (N K,) positions, expert by expert
        row, sorted_expert = order // self.n_active, expert.flatten()[order]
        offsets = F.one_hot(sorted_expert, self.n_expert).sum(0).cumsum(0).to(torch.int32)
        rows = (sorted_expert, offsets)
        gate, up = self.maps.forward_experts(x[row], ["gate", "up"], self.n_expert, rows)
        out = self.down.forward_experts(F.silu(gate) * up, ["down"], self.n_expert, rows)[0]
        return torch.zeros_like(x).index_add(0, row, out * weight.flatten()[order, None])


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.moe = config.n_expert > 0 and layer >= config.n_dense_layer
        self.attn, self.mlp, self.post_norm = Attention(config), MoE(config) if self.moe else MLP(config), config.post_norm
        if config.post_norm:
            self.attn_post_norm, self.mlp_post_norm = (
                OutputNorm(config.n_embd, config.scale_vectors, config.scale_reparam, config.norm_eps) for _ in range(2))

    def forward(self, x, cos, sin):
        y = self.attn(x, cos, sin)
        x = x + (self.attn_post_norm(y) if self.post_norm else y)
        y, router = self.mlp(x) if self.moe else (self.mlp(x), None)
        return x + (self.mlp_post_norm(y) if self.post_norm else y), router


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.router_stats = None
        self.compute_dtype = None  # of the activations; None: the parameters' own
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.head = ScaledLinear(config.n_embd, {"head": config.vocab_size}, {"head": "input"},
                                 vectors=config.scale_vectors, reparam=config.scale_reparam,
                                 execution=config.scale_execution, tied=config.tie_embeddings)
        if config.tie_embeddings:
            self.head.weight["head"] = self.embedding.weight
        for name, table in zip(("cos", "sin"), rope_tables(config)):
            self.register_buffer(name, table, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        parameter                     start
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
            mlp = (layer.mlp.maps if layer.moe else layer.mlp.gate_up, layer.mlp.down)
            for maps in (layer.attn.qkv, layer.attn.o, *mlp):
                for name, W in maps.weight.items():
                    last = name.rpartition("_")[2] in ("o", "down")
                    nn.init.normal_(W, std=std / (2 * self.config.n_layer) ** 0.5 if last else std)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.head.weight["head"], std=std)

    def forward(self, idx, targets=None):
        """idx (B, T) token ids, targets (B, T) the ids that follow, -1 where there is nothing to predict.
        Returns logits (B, T, vocab_size) in the compute dtype, and the mean cross-entropy in nats, or None. In training mode a MoE model's
        auxiliary losses are added to it. `self.router_stats` keeps, for each MoE layer, (load-balancing loss, z-loss, loads)."""
        B, T = idx.size()
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size={self.config.block_size}")
        x = self.embedding(idx)  # (B, T, C)
        x = x if self.compute_dtype is None else x.to(self.compute_dtype)
        routers = []
        for layer in self.layers:
            x, router = layer(x, self.cos, self.sin)
            routers += [] if router is None else [router]
        logits = self.head(rms_norm(x, self.config.norm_eps))[0]  # (B, T, vocab_size)
        loss = None if targets is None else chunked_cross_entropy(logits, targets)
        if routers:
            routers = torch.stack(routers)  # (MoE layers, 2 + E)
            self.router_stats = routers.detach()
            if loss is not None and self.training:
                loss = loss + self.auxiliary_loss(routers)
        return logits, loss

    def auxiliary_loss(self, router_stats):
        """load_balance_coef x the load-balancing losses + router_z_coef x the z-losses, each the mean over layers. (L, 2 + E) -> ()."""
        return self.config.load_balance_coef * router_stats[:, 0].mean() + self.config.router_z_coef * router_stats[:, 1].mean()

    def num_params(self, kind="total"):
        """Parameters by kind. "total"; "active": those a token meets; "non_embedding": without the look-up table, as
        nanoGPT counts (a tied table is the head too, and stays); "scale_vectors": every γ, or its β and α."""
        total = sum(p.numel() for p in self.parameters())
        if kind == "total":
            return total
        if kind == "active":
            idle = sum(p.numel() for name, p in self.named_parameters() if ".expert_" in name)
            return total - (idle * (self.config.n_expert - self.config.n_expert_active) // self.config.n_expert if idle else 0)
        if kind == "non_embedding":
            return total - (0 if self.config.tie_embeddings else self.embedding.weight.numel())
        if kind == "scale_vectors":
            return sum(p.numel() for m in self.modules() if isinstance(m, ScaleVector) for p in m.parameters())
        raise ValueError(f"num_params({kind!r}): choose total, active, non_embedding or scale_vectors")

    def flops_per_token(self):
        """Floating-point operations to train on one token: 6 for each parameter of a product, and 12 n_layer n_embd
        block_size for attention (PaLM, appendix B; the causal half is not taken off, as is usual)."""
        share = self.config.n_expert_active / max(1, self.config.n_expert)
        matrices = sum(p.numel() * (share if ".expert_" in name else 1) for name, p in self.named_parameters() if p.ndim == 2)
        matrices = round(matrices) - (0 if self.config.tie_embeddings else self.embedding.weight.numel())
        return 6 * matrices + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Yield max_new_tokens ids (B, 1), one at a time, that continue idx (B, T). temperature 0 takes the likeliest."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size:])
            logits = logits[:, -1].float()
            if top_k:
                logits[logits < logits.topk(min(top_k, logits.size(-1)))[0][:, -1:]] = -float("inf")
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            idx = torch.cat((idx, token), dim=1)
            yield token


def chunked_cross_entropy(logits, targets, chunk_elements=2 ** 26):
    """Mean of -log softmax(logits)[target] over the targets that are not -1, in nats, computed in float32 (or wider).

    Plain F.cross_entropy(logits.float(), ...) keeps a float32 copy of the logits, and a second one for their log-softmax.
    Here float32 exists for one chunk of rows at a time; the backward pass makes it again (activation checkpointing).
    logits (..., V), targets (...) -> ()."""
    logits, targets = logits.flatten(0, -2), targets.flatten()
    rows = max(1, chunk_elements // logits.size(-1))

    def summed(chunk, chunk_targets):
        return F.cross_entropy(chunk if chunk.dtype == torch.float64 else chunk.float(), chunk_targets,
                               ignore_index=-1, reduction="sum")

    if rows >= targets.numel():
        total = checkpoint(summed, logits, targets, use_reentrant=False)
    else:
        total = sum(checkpoint(summed, c, t, use_reentrant=False)
                    for c, t in zip(logits.split(rows), targets.split(rows)))
    return total / (targets != -1).sum()
