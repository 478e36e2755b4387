"""
What bench/benchmark.py compares with: two models written without this project's modules.

  PlainGPT   the baseline's function in nn.Linear, nn.RMSNorm and scaled_dot_product_attention
  NanoGPT    nanoGPT's block at the same width and depth: LayerNorm, GELU of 4 x the width, learned
             positions, a tied head

q, k, v are one matrix, gate and up another. Float32 weights are cast where they are used.
"""
from torch import nn
from torch.nn import functional as F

from model import CrossEntropy, apply_rope, rope_tables


class Linear(nn.Linear):
    def __init__(self, d, m):
        super().__init__(d, m, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    def __init__(self, dim, eps):
        super().__init__(dim, eps=eps, bias=False)

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), eps=self.eps)


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
        q, k, v = self.qkv(self.norm1(x)).split(self.sizes, dim=-1)
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in (q, k, v))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                           enable_gqa=k.size(1) != q.size(1))
        x = x + self.o(y.transpose(1, 2).reshape(B, T, C))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class NanoBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        C, self.n_head = c.n_embd, c.n_head
        self.norm1, self.norm2 = LayerNorm(C, c.norm_eps), LayerNorm(C, c.norm_eps)
        self.qkv, self.o = Linear(C, 3 * C), Linear(C, C)
        self.fc, self.proj = Linear(C, 4 * C), Linear(4 * C, C)

    def forward(self, x, cos, sin):
        B, T, C = x.size()
        q, k, v = self.qkv(self.norm1(x)).split(C, dim=-1)
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(B, T, C))
        return x + self.proj(F.gelu(self.fc(self.norm2(x))))


class PlainGPT(nn.Module):
    """The part of GPT's interface that a training step uses. config: a dense GPTConfig; its scale_*
    keys, qk_norm and post_norm are ignored."""
    block, final_norm = PlainBlock, RMSNorm

    def __init__(self, config):
        super().__init__()
        self.config, self.compute_dtype, self.routers = config, None, None
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList([self.block(config) for _ in range(config.n_layer)])
        self.norm = self.final_norm(config.n_embd, config.norm_eps)
        self.head = Linear(config.n_embd, config.vocab_size)
        self.cross_entropy = CrossEntropy()  # what compile_model compiles with the head
        for name, table in zip(("cos", "sin"), rope_tables(config)):
            self.register_buffer(name, table, persistent=False)
        self.add_parameters()
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=config.init_std)

    def add_parameters(self):
        pass

    def embed(self, idx):
        return self.embedding(idx)

    def forward(self, idx, targets):
        x = self.embed(idx).to(self.compute_dtype)
        for layer in self.layers:
            x = layer(x, self.cos[:idx.size(1)], self.sin[:idx.size(1)])
        return None, self.cross_entropy(self, x, targets)

    def logits(self, x):
        return self.head(self.norm(x))

    def auxiliary_loss(self):
        return 0.0

    def groups(self, weight_decay):
        """Parameter groups as optim.param_groups names them: all decayed."""
        groups = {"hidden": [], "others": []}
        for name, p in self.named_parameters():
            hidden = name.startswith("layers.") and p.ndim == 2
            groups["hidden" if hidden else "others"].append((name, p))
        return [{"name": name, "params": params, "weight_decay": weight_decay, "lr_scale": 1.0}
                for name, params in groups.items()]


class NanoGPT(PlainGPT):
    block, final_norm = NanoBlock, LayerNorm

    def add_parameters(self):
        self.positions = nn.Embedding(self.config.block_size, self.config.n_embd)
        self.head.weight = self.embedding.weight

    def embed(self, idx):
        return self.embedding(idx) + self.positions.weight[:idx.size(1)]
