"""
Proves that the mixture of experts is the sum it says: against a dense reference that computes every
expert for every token, against transformers' Mixtral, with one expert against the dense model, and
in grouped bfloat16 products against the loop in float32; that the load-balancing loss spreads a
collapsed router; and that scale vectors keep their rules for every expert.
"""
import pytest
import torch
from conftest import PAPER_PLACEMENTS, TINY, UNIFIED, randomize_scales, tiny_batch, tiny_gpt
from torch.nn import functional as F

from model import GPTConfig, MoE, Permute, load_balance_loss, router_z_loss
from norms import PLACEMENTS, fold_scale_vectors, named_scale_vectors
from optim import make_optimizer, param_groups

EXPERTS = dict(n_expert=4, n_expert_active=2, d_expert=24)


def random(*shape, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def moe(**keys):
    """A float64 layer whose matrices and vectors are random."""
    layer = MoE(GPTConfig(**{**TINY, **EXPERTS, "d_shared_expert": 40, **keys})).double()
    for i, (name, p) in enumerate(layer.named_parameters()):
        p.data = random(*p.shape, seed=i) * (0.3 if name.endswith(".weight") else 1)
    return layer


def norm(x, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def read(m, x, e):
    """γ_a ⊙ Norm(W(γ_b ⊙ x)) of expert e, or of a map that every token meets; only what m has."""
    W = m.weight[e] if m.weight.ndim == 3 else m.weight
    v, u = (scale() if scale else torch.ones(()) for scale in (m.scale_in, m.scale_out))
    v, u = (gamma[e] if gamma.ndim == 2 else gamma for gamma in (v, u))
    y = (v * x) @ W.T
    return u * (norm(y, m.eps) if m.placement is PLACEMENTS["dual_norm"] else y)


def swiglu(gate, up, down, x, e=None):
    return read(down, F.silu(read(gate, x, e)) * read(up, x, e), e)


def reference(layer, x):
    """Every expert on every token, with weight 0 where the token has not chosen it."""
    x = norm(x, layer.eps)
    p = read(layer.router, x, None).softmax(-1)
    least = p.topk(layer.n_active).values[..., -1:]
    p = p.where(p >= least, 0)
    p = p / p.sum(-1, keepdim=True)
    y = swiglu(layer.shared_gate, layer.shared_up, layer.shared_down, x)
    for e in range(layer.n_expert):
        y = y + p[..., e, None] * swiglu(layer.gate, layer.up, layer.down, x, e)
    return y


def with_gradients(function, layer, x):
    """[y, ∂/∂x, ∂/∂parameter, ...] of a fixed weighted sum of y = function(x)."""
    x = x.clone().requires_grad_()
    y = function(x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("placement", PAPER_PLACEMENTS)
@pytest.mark.parametrize("keys", [
    {}, {"scale_reparam": "exponential", "scale_placement_on": "up,down"},
    {"scale_heterogeneous": True, "scale_reparam": "original"},
    {"scale_heterogeneous": True, "scale_placement_on": "gate,up,down"}, {"scale_vectors": False},
], ids=["shared", "on down", "HG", "HG on down", "none"])
def test_routed_layer_equals_a_dense_reference(placement, keys):
    """In value and in every gradient; and folding, which leaves what is not absorbable."""
    layer, x = moe(norm_eps=1e-30, scale_placement=placement, **keys), random(2, 7, 32)
    found = with_gradients(lambda x: layer(x)[0], layer, x)
    expected = with_gradients(lambda x: reference(layer, x), layer, x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    folded = fold_scale_vectors(layer)
    torch.testing.assert_close(folded(x)[0], found[0], rtol=0, atol=1e-10)
    stays = {name for name, vector in named_scale_vectors(layer) if not vector.absorbable}
    assert {name for name, _ in named_scale_vectors(folded)} == stays


@pytest.mark.parametrize("width", [24, 21])  # 21 must be padded, as 426, 682 and 853 must
@pytest.mark.parametrize("keys", [
    {}, {"scale_heterogeneous": True, "scale_placement": "dual"}, UNIFIED,
], ids=["plain", "dp", "unified"])
def test_grouped_bfloat16_products_equal_the_loop(keys, width):
    """The path that CUDA takes, here on the CPU, with an expert that no token chooses: values and
    gradients to bfloat16's rounding."""
    layer = moe(d_shared_expert=2 * width - 1, d_expert=width, **keys).float()
    layer.router.weight.data[3] -= 50
    x = random(2, 20, 32).abs().bfloat16().float()
    expected = with_gradients(lambda x: layer(x)[0], layer, x)
    found = with_gradients(lambda x: layer(x.bfloat16())[0].float(), layer, x)
    def together(tensors):
        return torch.cat([t.flatten() for t in tensors])

    size = together(expected).norm()
    assert (together(found) - together(expected)).norm() <= 0.01 * size
    for a, b in zip(found, expected):  # a β's gradient is a small sum of large terms
        assert (a - b).norm() <= 0.02 * b.norm() + 1e-3 * size


def test_permute():
    x, order = random(5, 3).requires_grad_(), torch.tensor([3, 1, 4, 0, 2])

    def permute(x):
        return Permute.apply(x, order, order.argsort())

    assert torch.equal(permute(x), x[order])
    assert torch.autograd.gradcheck(permute, x)


def test_who_shares_an_input_scale():
    """All that read the Norm share one γ_b. Under HG router, shared expert and each routed expert
    have their own."""
    def inputs(**keys):
        return {name: vector.shape for name, vector in named_scale_vectors(moe(**keys))}

    assert inputs() == {"router.scale_in": (32,)}
    assert inputs(scale_heterogeneous=True) == {
        "router.scale_in": (32,), "gate.scale_in": (4, 32), "up.scale_in": (4, 32),
        "shared_gate.scale_in": (32,), "shared_up.scale_in": (32,)}


@pytest.mark.parametrize("keys", [{}, UNIFIED], ids=["plain", "unified"])
def test_one_expert_is_the_dense_model(keys):
    idx, targets = tiny_batch()
    dense = randomize_scales(tiny_gpt(torch.float64, **keys))
    one = tiny_gpt(torch.float64, n_expert=1, n_expert_active=1, d_expert=48, **keys)
    state = one.state_dict()
    for name, value in dense.state_dict().items():
        if not keys:  # all maps share one γ_b, which has the name of the first, here the router
            name = name.replace("mlp.gate.scale_in", "mlp.router.scale_in")
        state[name] = value.view(state[name].shape)
    one.load_state_dict(state)
    torch.testing.assert_close(dense(idx)[0], one(idx)[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(dense(idx, targets)[1], one(idx, targets)[1], rtol=0, atol=1e-12)


def test_load_balance_loss():
    """1 for an even load, E for one expert that gets everything."""
    even, chosen = torch.full((8, 4), 0.25), torch.arange(8)[:, None] % 4
    assert load_balance_loss(even, chosen).item() == pytest.approx(1.0)
    collapsed = torch.tensor([[1.0, 0, 0, 0]]).expand(8, 4)
    assert load_balance_loss(collapsed, 0 * chosen).item() == pytest.approx(4.0)


def test_router_z_loss():
    logits = random(6, 4)
    expected = sum(row.exp().sum().log() ** 2 for row in logits) / 6
    torch.testing.assert_close(router_z_loss(logits), expected)


def test_auxiliary_loss():
    """By its coefficients, apart from the cross-entropy; a graph does not forbid a copy."""
    model = tiny_gpt(**EXPERTS, load_balance_coef=0.5, router_z_coef=0.25)
    loss = model(*tiny_batch())[1]
    stats, auxiliary = model.router_stats, model.auxiliary_loss()
    assert stats.shape == (2, 6) and not stats.requires_grad and auxiliary.requires_grad
    torch.testing.assert_close(auxiliary, 0.5 * stats[:, 0].mean() + 0.25 * stats[:, 1].mean())
    torch.testing.assert_close(stats[:, 2:].sum(1), torch.ones(2))
    assert torch.equal(loss, model.eval()(*tiny_batch())[1])
    fold_scale_vectors(model)
    assert tiny_gpt().auxiliary_loss() == 0.0


def test_a_collapsed_router_spreads_its_load():
    """Two of four experts' rows point along a direction that all tokens share, so at first these
    two get everything. Trained with and without the load-balancing loss."""
    def max_load(coef):
        model = tiny_gpt(**EXPERTS, n_layer=1, load_balance_coef=coef)
        model.embedding.weight.data += 0.3
        router = model.layers[0].mlp.router.weight.data
        router *= 0.1
        router[:2] += 0.05
        optimizer, loads = make_optimizer(param_groups(model, 0.1), lr=6e-3), []
        for _ in range(30):
            (model(*tiny_batch())[1] + model.auxiliary_loss()).backward()
            optimizer.step()
            optimizer.zero_grad()
            loads.append(model.router_stats[0, 2:].max().item())
        return loads

    balanced, left_alone = max_load(0.1), max_load(0.0)
    assert balanced[0] == left_alone[0] == pytest.approx(0.5)
    assert balanced[-1] < 0.35 and left_alone[-1] > 0.45, (balanced[-1], left_alone[-1])


def test_counts():
    model = tiny_gpt(**EXPERTS, d_shared_expert=40, n_dense_layer=1, **UNIFIED)
    per_expert = 3 * 32 * 24 + 32 + 32 + 2 * (24 + 1)  # γ_b of gate and up, without β; γ_a with
    assert model.num_params("total") - model.num_params("active") == 2 * per_expert
    weights = {name: p.numel() for name, p in model.named_parameters() if name.endswith(".weight")}
    met = sum(weights.values()) - weights["embedding.weight"] - 2 * 3 * 32 * 24
    assert model.flops_per_token() == 6 * met + 12 * 2 * 32 * 16
    dense = tiny_gpt(n_layer=1)
    assert dense.num_params("active") == dense.num_params("total")


def test_muon_takes_every_matrix_of_the_blocks():
    """The router's too: appendix B has AdamW for scale vectors, embedding and output only."""
    groups = {g["name"]: g["params"] for g in param_groups(tiny_gpt(**EXPERTS), 0.1)}
    assert len(groups["hidden"]) == 2 * (4 + 1 + 3)


@pytest.mark.parametrize("keys, message", [
    (dict(n_expert=2, n_expert_active=3), "n_expert_active=3 is more than n_expert=2"),
    (dict(n_expert=-1), "n_expert=-1 must be at least 0"),
    (dict(n_expert=2, n_expert_active=0), "n_expert_active=0 must be at least 1"),
    (dict(d_shared_expert=8), "d_shared_expert=8 with n_expert=0"),
    (dict(n_expert=2, n_expert_active=1, d_expert=-8), "d_expert=-8 must be at least 1"),
])
def test_impossible_mixtures(keys, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**TINY, **keys})


def mixtral_state(model):
    """A folded model's matrices by the names of transformers' Mixtral."""
    ones = torch.ones(model.config.n_embd)
    state = {"model.embed_tokens.weight": model.embedding.weight,
             "lm_head.weight": model.head.weight, "model.norm.weight": ones}
    for i, layer in enumerate(model.layers):
        attn, mlp = layer.attn, layer.mlp
        gate_up = torch.cat((mlp.gate.weight, mlp.up.weight), dim=1)
        of_layer = {f"self_attn.{b}_proj.weight": getattr(attn, b).weight for b in "qkvo"}
        of_layer |= {"input_layernorm.weight": ones, "post_attention_layernorm.weight": ones,
                     "mlp.gate.weight": mlp.router.weight, "mlp.experts.gate_up_proj": gate_up,
                     "mlp.experts.down_proj": mlp.down.weight}
        state |= {f"model.layers.{i}.{name}": value for name, value in of_layer.items()}
    return state


def test_mixtral():
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    model = randomize_scales(tiny_gpt(**EXPERTS, scale_heterogeneous=True))
    model, c, idx = fold_scale_vectors(model), model.config, tiny_batch()[0]
    theirs = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.d_expert,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.block_size, rope_theta=c.rope_theta, sliding_window=None,
        num_local_experts=c.n_expert, num_experts_per_tok=c.n_expert_active)).eval()
    theirs.load_state_dict(mixtral_state(model), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, model(idx)[0], rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_grouped_agrees_with_the_loop():
    layer = moe(n_embd=64, d_expert=64, **UNIFIED).float().cuda()
    x = random(2, 50, 64).float().cuda()
    expected = layer(x)[0]
    found = layer(x.bfloat16())[0].float()
    assert (found - expected).norm() < 0.03 * expected.norm()
