"""
Proves that the mixture of experts is the sum it says: against a dense reference that computes every expert, against
transformers' Mixtral, float64 against the grouped bfloat16 products, and that with one expert it is the dense model; that its
load-balancing loss spreads a collapsed router; and that scale vectors keep their rules for every expert.
"""
import itertools

import pytest
import torch
from conftest import PAPER_PLACEMENTS, TINY, UNIFIED, randomize_scales, tiny_batch, tiny_gpt
from torch.nn import functional as F

from model import GPTConfig, MoE, Permute, load_balance_loss, router_z_loss
from norms import PLACEMENTS, REPARAMS, fold_scale_vectors, named_scale_vectors
from optim import make_optimizer, param_groups

EXPERTS = dict(n_expert=4, n_expert_active=2, d_expert=24)
VARIANTS = [dict(scale_vectors=s, scale_heterogeneous=h, scale_placement=p, scale_placement_on=on, scale_reparam=r)
            for s, h, p, on, r in itertools.product((True, False), (False, True), PLACEMENTS, ("gate,up", "up,down"), REPARAMS)]


def moe(seed=0, **keys):
    torch.manual_seed(seed)
    layer = MoE(GPTConfig(**{**TINY, **EXPERTS, **keys})).double()
    with torch.no_grad():
        for i, (name, p) in enumerate(layer.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype) * (0.3 if name.endswith(".weight") else 1))
    return layer


def reference(layer, x, n_active):
    """Every expert on every token, masked and weighted; the formula of each map written out."""
    def read(m, x, e=None):
        def own(p):  # expert e's, or what all share
            return p[e] if e is not None and p.ndim > 1 else p
        y = x * own(m.scale_in()) if m.scale_in else x
        y = y @ (m.weight if e is None else m.weight[e]).T
        if m.placement.output:  # DNP
            y = y / (y.square().mean(-1, keepdim=True) + m.eps).sqrt()
        return y * own(m.scale_out()) if m.scale_out else y

    def swiglu(gate, up, down, *e):
        return read(down, F.silu(read(gate, x, *e)) * read(up, x, *e), *e)

    x = x / (x.square().mean(-1, keepdim=True) + layer.eps).sqrt()
    p = read(layer.router, x).softmax(-1)
    p = p * (p >= p.topk(n_active)[0][..., -1:])
    p = p / p.sum(-1, keepdim=True)
    out = swiglu(layer.shared_gate, layer.shared_up, layer.shared_down)
    for e in range(layer.n_expert):
        out = out + p[..., e, None] * swiglu(layer.gate, layer.up, layer.down, e)
    return out


def with_gradients(function, layer, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


def test_routed_layer_equals_a_dense_reference():
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    known = [keys for keys in VARIANTS if keys["scale_placement"] in PAPER_PLACEMENTS]
    for keys in known[::5] + [UNIFIED]:
        layer = moe(d_shared_expert=40, norm_eps=1e-30, **keys)
        found = with_gradients(lambda x, layer=layer: layer(x)[0], layer, x)
        expected = with_gradients(lambda x, layer=layer: reference(layer, x, 2), layer, x)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("width", [24, 21])  # rows of 16 bytes, and rows that must be padded, as 426, 682 and 853 must
@pytest.mark.parametrize("keys", [{}, {"scale_heterogeneous": True, "scale_placement": "dual"}, UNIFIED], ids=["plain", "dp", "unified"])
def test_grouped_bfloat16_products_equal_the_loop(keys, width):
    """The path that CUDA takes, here on the CPU, with an expert that no token chooses: values and gradients to bfloat16's rounding."""
    layer = moe(d_shared_expert=2 * width - 1, d_expert=width, **keys).float()
    with torch.no_grad():
        layer.router.weight[3] -= 50 * torch.ones(32)
    x = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(9)).abs().bfloat16().float()
    expected = with_gradients(lambda x: layer(x)[0], layer, x)
    found = with_gradients(lambda x: layer(x.bfloat16())[0].float(), layer, x)
    for a, b in zip(found, expected):
        assert (a - b).norm() <= (0.05 if b.numel() > 4 else 0.5) * b.norm() + 1e-6  # a β's gradient is a sum that cancels
    a, b = (torch.cat([t.flatten() for t in values]) for values in (found, expected))
    assert (a - b).norm() <= 0.02 * b.norm()


def test_permute():
    x, order = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(Permute.apply(x, order, order.argsort()), x[order])
    assert torch.autograd.gradcheck(lambda x: Permute.apply(x, order, order.argsort()), x)


def test_every_variant_folds():
    idx = tiny_batch()[0]
    for keys in VARIANTS[::2]:
        model = randomize_scales(tiny_gpt(torch.float64, **EXPERTS, d_shared_expert=40, n_dense_layer=1, **keys)).eval()
        folded = fold_scale_vectors(model)
        torch.testing.assert_close(folded(idx)[0], model(idx)[0], rtol=0, atol=1e-10)
        assert {n for n, _ in named_scale_vectors(folded)} == {n for n, s in named_scale_vectors(model) if not s.absorbable}


def test_heterogeneous_branches_are_router_and_each_expert():
    def inputs(**keys):
        return {name: s.shape for name, s in named_scale_vectors(moe(d_shared_expert=40, **keys))}
    assert inputs(scale_heterogeneous=True) == {
        "router.scale_in": (32,), "gate.scale_in": (4, 32), "up.scale_in": (4, 32), "shared_gate.scale_in": (32,),
        "shared_up.scale_in": (32,)}
    assert inputs() == {"router.scale_in": (32,)}


def test_one_expert_is_the_dense_model():
    idx, targets = tiny_batch()
    for keys in ({}, UNIFIED):
        dense = randomize_scales(tiny_gpt(torch.float64, **keys))
        one = tiny_gpt(torch.float64, n_expert=1, n_expert_active=1, d_expert=48, **keys)
        state, given = one.state_dict(), dense.state_dict()
        for name, value in given.items():
            # without HG all maps share one γ_b, which has the name of the first, here the router
            name = name.replace("mlp.gate.scale_in", "mlp.router.scale_in") if not keys else name
            state[name] = value.view(state[name].shape)
        one.load_state_dict(state)
        torch.testing.assert_close(dense(idx)[0], one(idx)[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(dense(idx, targets)[1], one(idx, targets)[1], rtol=0, atol=1e-12)


def test_auxiliary_losses():
    even = torch.full((8, 4), 0.25)
    spread = torch.arange(8)[:, None] % 4
    assert load_balance_loss(even, spread) == pytest.approx(1.0)
    collapsed = torch.tensor([[1.0, 0, 0, 0]]).expand(8, 4)
    assert load_balance_loss(collapsed, torch.zeros(8, 1, dtype=torch.long)) == pytest.approx(4.0)
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert router_z_loss(logits).item() == pytest.approx(sum(row.exp().sum().log().item() ** 2 for row in logits) / 6)
    model, (idx, targets) = tiny_gpt(**EXPERTS, load_balance_coef=0.5, router_z_coef=0.25), tiny_batch()
    loss = model(idx, targets)[1]
    stats = model.router_stats
    assert torch.equal(loss, model.eval()(idx, targets)[1])  # the cross-entropy alone, apart from what follows
    assert model.auxiliary_loss().item() == pytest.approx((0.5 * stats[:, 0].mean() + 0.25 * stats[:, 1].mean()).item())
    assert not stats.requires_grad and model.auxiliary_loss().requires_grad and tiny_gpt().auxiliary_loss() == 0.0
    fold_scale_vectors(model)  # the graph that auxiliary_loss belongs to does not forbid a copy
    assert stats.shape == (2, 6) and stats[:, 2:].sum(1).tolist() == pytest.approx([1.0, 1.0])


def test_a_collapsed_router_spreads_its_load():
    """All tokens share a direction that two of the four experts' rows point along, so these two get everything; the whole model
    then trains with and without the load-balancing loss."""
    def max_load(coef, steps=150):
        model, (idx, targets) = tiny_gpt(**EXPERTS, n_layer=1, load_balance_coef=coef), tiny_batch(batch=8)
        with torch.no_grad():
            model.embedding.weight += 0.3
            model.layers[0].mlp.router.weight *= 0.1
            model.layers[0].mlp.router.weight[:2] += 0.05
        optimizer, loads = make_optimizer(param_groups(model, 0.1), lr=3e-3), []
        for _ in range(steps):
            (model(idx, targets)[1] + model.auxiliary_loss()).backward()
            optimizer.step()
            optimizer.zero_grad()
            loads.append(model.router_stats[0, 2:].max().item())
        return loads
    balanced, left_alone = max_load(0.1), max_load(0.0)
    assert balanced[0] == left_alone[0] == pytest.approx(0.5)
    assert balanced[-1] < 0.35 and balanced[-1] < left_alone[-1], (balanced[-1], left_alone[-1])


def test_counts():
    model = tiny_gpt(**EXPERTS, d_shared_expert=40, n_dense_layer=1, **UNIFIED)
    per_expert = 3 * 32 * 24 + 32 + 32 + 2 * (24 + 1)  # γ_b of gate and up, without β; γ_a with
    assert model.num_params("total") - model.num_params("active") == 2 * per_expert
    matrices = sum(p.numel() for name, p in model.named_parameters() if name.endswith(".weight") and "embedding" not in name) - 2 * 3 * 32 * 24
    assert model.flops_per_token() == 6 * matrices + 12 * 2 * 32 * 16
    with torch.device("meta"):
        dense = tiny_gpt(n_layer=1)
    assert dense.num_params("active") == dense.num_params("total")


def test_muon_takes_every_matrix_of_the_blocks():
    """The router too: the paper's appendix B has AdamW for scale vectors, embedding and output alone."""
    groups = {g["name"]: g["params"] for g in param_groups(tiny_gpt(**EXPERTS), 0.1)}
    assert len(groups["hidden"]) == 2 * (4 + 1 + 3)


@pytest.mark.parametrize("keys, message", [
    (dict(n_expert=2, n_expert_active=3), "n_expert_active=3 is more than n_expert=2"),
    (dict(n_expert=-1), "n_expert=-1 must be at least 0"), (dict(n_expert=2, n_expert_active=0), "n_expert_active=0 must be at least 1"),
    (dict(d_shared_expert=8), "d_shared_expert=8 with n_expert=0"),
    (dict(n_expert=2, n_expert_active=1, d_expert=-8), "d_expert=-8 must be at least 1")])
def test_impossible_mixtures(keys, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**TINY, **keys})


def test_mixtral():
    transformers = pytest.importorskip("transformers", reason="needs the optional package transformers")
    model, idx = fold_scale_vectors(randomize_scales(tiny_gpt(**EXPERTS, scale_heterogeneous=True))).eval(), tiny_batch()[0]
    c, ones = model.config, torch.ones(32)
    theirs = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.d_expert, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, max_position_embeddings=c.block_size,
        rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, tie_word_embeddings=False,
        num_local_experts=4, num_experts_per_tok=2, sliding_window=None))
    state = {"model.embed_tokens.weight": model.embedding.weight, "lm_head.weight": model.head.weight, "model.norm.weight": ones}
    for i, layer in enumerate(model.layers):
        prefix, mlp = f"model.layers.{i}", layer.mlp
        state |= {f"{prefix}.self_attn.{b}_proj.weight": getattr(layer.attn, b).weight for b in "qkvo"}
        state |= {f"{prefix}.input_layernorm.weight": ones, f"{prefix}.post_attention_layernorm.weight": ones,
                  f"{prefix}.mlp.gate.weight": mlp.router.weight,
                  f"{prefix}.mlp.experts.gate_up_proj": torch.cat((mlp.gate.weight, mlp.up.weight), dim=1),
                  f"{prefix}.mlp.experts.down_proj": mlp.down.weight}
    theirs.load_state_dict(state, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(idx).logits, model(idx)[0], rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_grouped_agrees_with_the_loop():
    layer = moe(n_embd=64, d_expert=64, **UNIFIED).float().cuda()
    x = torch.randn(2, 50, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    expected = layer(x)[0]
    found = layer(x.bfloat16())[0].float()
    assert (found - expected).norm() < 0.03 * expected.norm()
