"""
A Llama-style decoder whose scale vectors can be placed, shared, split, reparameterized or left out.

  - RMSNorm before each sub-layer, rotary positions, grouped-query attention, SwiGLU, no biases
  - optional Output-Norms to study: Q/K-norm (`qk_norm`) and Gemma's post-norms (`post_norm`)
  - every linear map is a norms.ScaledLinear; which vectors it carries is decided there, from the `scale_*` keys
  - no autocast: weights stay float32 and are cast where they are used, activations run in `compute_dtype`

Letters in the shape comments: B sequences, T positions, C = n_embd, H heads, D = head_dim.
"""
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from norms import EXECUTIONS, PLACEMENTS, REPARAMS, OutputNorm, ScaledLinear, ScaleVector, rms_norm

READS_A_NORM = ("q", "k", "v", "gate", "up")  # these maps have an input-side vector whatever the placement
MAPS = (*READS_A_NORM, "o", "down")


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
    scale_vectors: bool = True  # False: no scale vector anywhere; normalizations stay
    scale_heterogeneous: bool = False  # HG: one input-side vector for each branch that reads a norm
    scale_placement: str = "input"  # "dual" (DP): on both sides of the map; "dual_norm" (DNP): with a norm in between
    scale_placement_on: str = "q,k,v,gate,up"  # the maps that scale_placement is about; o and down can be named too
    scale_reparam: str = "none"  # "ordinary" (OR): γ = β α; "exponential" (ER): γ = e^β α
    scale_execution: str = "weights"  # or "activations", the textbook form: the same function, slower

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.d_ff = self.d_ff or int(8 / 3 * self.n_embd)
        self.init_std = self.init_std or self.n_embd ** -0.5
        for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "d_ff"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
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
    placement = {b: config.scale_placement if b in config.placed_maps else "input" if b in READS_A_NORM else None
                 for b in branches}
    return ScaledLinear(in_features, branches, placement, vectors=config.scale_vectors,
                        heterogeneous=config.scale_heterogeneous, reparam=config.scale_reparam,
                        execution=config.scale_execution, eps=config.norm_eps, **kwargs)


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
                                 norm_width=D, absorbed_by={"v": self.o})
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
                                     norm_width=config.d_ff, absorbed_by={"up": self.down})

    def forward(self, x):
        gate, up = self.gate_up(rms_norm(x, self.eps))
        return self.down(F.silu(gate) * up)[0]


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn, self.mlp, self.post_norm = Attention(config), MLP(config), config.post_norm
        if config.post_norm:
            self.attn_post_norm, self.mlp_post_norm = (
                OutputNorm(config.n_embd, config.scale_vectors, config.scale_reparam, config.norm_eps) for _ in range(2))

    def forward(self, x, cos, sin):
        y = self.attn(x, cos, sin)
        x = x + (self.attn_post_norm(y) if self.post_norm else y)
        y = self.mlp(x)
        return x + (self.mlp_post_norm(y) if self.post_norm else y)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.compute_dtype = None  # of the activations; None: the parameters' own
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
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
        o, down                       normal(0, init_std / sqrt(2 n_layer)), so the residual stream grows with depth slowly
        head                          normal(0, init_std), or the embedding if tied
        every scale vector            γ = 1: see ScaleVector

        Scale vectors draw no random numbers: at one seed, all variants of a shape start with the same matrices.
        """
        std = self.config.init_std
        nn.init.normal_(self.embedding.weight, std=std)
        for layer in self.layers:
            for maps in (layer.attn.qkv, layer.attn.o, layer.mlp.gate_up, layer.mlp.down):
                for name, W in maps.weight.items():
                    nn.init.normal_(W, std=std / (2 * self.config.n_layer) ** 0.5 if name in ("o", "down") else std)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.head.weight["head"], std=std)

    def forward(self, idx, targets=None):
        """idx (B, T) token ids, targets (B, T) the ids that follow, -1 where there is nothing to predict.
        Returns logits (B, T, vocab_size) in the compute dtype, and the mean cross-entropy in nats, or None."""
        B, T = idx.size()
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size={self.config.block_size}")
        x = self.embedding(idx)  # (B, T, C)
        x = x if self.compute_dtype is None else x.to(self.compute_dtype)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = self.head(rms_norm(x, self.config.norm_eps))[0]  # (B, T, vocab_size)
        return logits, None if targets is None else chunked_cross_entropy(logits, targets)

    def num_params(self, kind="total"):
        """Parameters by kind. "total"; "active": those a token meets; "non_embedding": without the look-up table, as
        nanoGPT counts (a tied table is the head too, and stays); "scale_vectors": every γ, or its β and α."""
        total = sum(p.numel() for p in self.parameters())
        if kind in ("total", "active"):
            return total
        if kind == "non_embedding":
            return total - (0 if self.config.tie_embeddings else self.embedding.weight.numel())
        if kind == "scale_vectors":
            return sum(p.numel() for m in self.modules() if isinstance(m, ScaleVector) for p in m.parameters())
        raise ValueError(f"num_params({kind!r}): choose total, active, non_embedding or scale_vectors")

    def flops_per_token(self):
        """Floating-point operations to train on one token: 6 for each parameter of a product, and 12 n_layer n_embd
        block_size for attention (PaLM, appendix B; the causal half is not taken off, as is usual)."""
        matrices = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        matrices -= 0 if self.config.tie_embeddings else self.embedding.weight.numel()
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


def chunked_cross_entropy(logits, targets, chunk_elements=2 ** 24):
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
