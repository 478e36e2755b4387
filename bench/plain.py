"""
The yardstick of bench/benchmark.py: the baseline's function as one writes it without this project, in nn.Linear, nn.RMSNorm and
scaled_dot_product_attention, q, k, v in one matrix and gate, up in another. Float32 weights are cast where they are used.
"""
import torch
from torch import nn
from torch.nn import functional as F

from model import apply_rope, rope_tables


class Linear(nn.Linear):
    def __init__(self, d, m):
        super().__init__(d, m, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class PlainBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        kv = c.n_kv_head * c.head_dim
        self.head_dim, self.sizes = c.head_dim, (c.n_embd, kv, kv)
        self.norm1, self.norm2 = RMSNorm(c.n_embd, c.norm_eps), RMSNorm(c.n_embd, c.norm_eps)
        self.qkv, self.o = Linear(c.n_embd, c.n_embd + 2 * kv), Linear(c.n_embd, c.n_embd)
        self.gate_up, self.down = Linear(c.n_embd, 2 * c.d_ff), Linear(c.d_ff, c.n_embd)

    def forward(self, x, cos, sin):
        B, T, C = x.size()
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in self.qkv(self.norm1(x)).split(self.sizes, dim=-1))
        q, k, v = (y.transpose(1, 2) for y in (apply_rope(q, cos, sin), apply_rope(k, cos, sin), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.size(1) != q.size(1))
        x = x + self.o(y.transpose(1, 2).reshape(B, T, C))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class PlainGPT(nn.Module):
    """GPT's face for a training step. config: a dense model.GPTConfig, whose scale_* keys and Output-Norms are not looked at."""

    def __init__(self, config):
        super().__init__()
        self.config, self.compute_dtype, self.router_stats = config, None, None
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList([PlainBlock(config) for _ in range(config.n_layer)])
        self.norm, self.head = RMSNorm(config.n_embd, config.norm_eps), Linear(config.n_embd, config.vocab_size)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=config.init_std)
        for name, table in zip(("cos", "sin"), rope_tables(config)):
            self.register_buffer(name, table, persistent=False)

    def forward(self, idx, targets):
        x = self.embedding(idx).to(self.compute_dtype)
        for layer in self.layers:
            x = layer(x, self.cos[:idx.size(1)], self.sin[:idx.size(1)])
        return None, self.loss(x, targets)

    def loss(self, x, targets):
        logits = self.head(self.norm(x))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def auxiliary_loss(self):
        return 0.0

    def groups(self, weight_decay):
        """Parameter groups as optim.param_groups names them: all decayed."""
        named = list(self.named_parameters())
        hidden = [(n, p) for n, p in named if n.startswith("layers.") and p.ndim == 2]
        others = [(n, p) for n, p in named if not (n.startswith("layers.") and p.ndim == 2)]
        return [{"name": name, "params": params, "weight_decay": weight_decay, "lr_scale": 1.0}
                for name, params in (("hidden", hidden), ("others", others))]

    def flops_per_token(self, causal=False):
        matrices = sum(p.numel() for p in self.parameters() if p.ndim == 2) - self.embedding.weight.numel()
        return 6 * matrices + (6 if causal else 12) * self.config.n_layer * self.config.n_embd * self.config.block_size
