"""
Proves that the decoder and its mixtures are their formulas (tests/reference.py), in value and in
every gradient; which scale vectors there are; how a model starts; what it costs; how it generates;
and which configurations are refused. Equal routes to one function: test_every_entry.py.
"""
import copy
import itertools
import math

import pytest
import reference
import torch
from conftest import (COMPILER, EVERYWHERE, MIXTURE, OUR_PLACEMENTS, TINY, UNIFIED,
                      in_pieces, randomize_scales, tiny_batch, tiny_gpt)
from torch.nn import functional as F

import sample
from lib.config import TrainConfig
from lib.count import active_params, flops_per_token, num_params
from lib.process import INDUCTOR_OPTIONS, compile_model
from model import GPT, GPTConfig, MoE
from norms import fold_scale_vectors, named_scale_vectors

HG = {"scale_heterogeneous": True}
HG_EVERYWHERE = {**HG, "scale_placement_on": EVERYWHERE}

# ---- the function --------------------------------------------------------------------------------

# Without the Pre-Norm before DNP the two are equal as ε goes to 0 (with another ε: test_norms).
# Elsewhere a large ε shows that each norm has it.
EXACT, LARGE = {"norm_eps": 1e-30}, {"norm_eps": 0.1}
DECODERS = [
    {"scale_placement": placement, **keys, **(EXACT if "_norm" in placement else LARGE)}
    for placement in OUR_PLACEMENTS
    for keys in ({}, HG_EVERYWHERE, MIXTURE, {**HG_EVERYWHERE, **MIXTURE})]
DECODERS += [
    {**UNIFIED, **EXACT},
    {**UNIFIED, **MIXTURE, **EXACT},
    {**UNIFIED, **MIXTURE, **EXACT, "recompute": True},
    {"scale_placement": "dual_norm", "scale_placement_on": "q,v,gate", **LARGE},
    {"scale_placement": "dual_norm", "scale_placement_on": "k,up,o,down", **MIXTURE, **LARGE},
    {"scale_placement": "after", "scale_reparam": "original", "tie_embeddings": True, **LARGE},
    {"scale_placement": "dual", "scale_reparam": "exponential", **HG, **MIXTURE, **LARGE},
    {"scale_reparam": "zero_centered", "qk_norm": True, "post_norm": True, "n_kv_head": 1,
     "rope_theta": 30.0, **LARGE},
    {"scale_vectors": False, "qk_norm": True, **MIXTURE, **LARGE}]


@pytest.mark.parametrize("keys", DECODERS, ids=lambda keys: "-".join(map(str, keys.values())))
def test_the_decoder_is_its_formulas(keys):
    """Its logits, also with a cache; and each parameter's gradient of the cross-entropy, with
    targets left out, plus a mixture's auxiliary losses."""
    keys = {"load_balance_coef": 0.5, "router_z_coef": 0.25, **keys}
    model = randomize_scales(tiny_gpt(torch.float64, **keys))
    idx, targets = tiny_batch(batch=4)  # 64 tokens: float32 has the experts' shares exactly
    targets[1, 3:] = -1
    close = {"rtol": 1e-10, "atol": 1e-12}

    logits, (balance, z) = reference.decoder(model, idx)
    torch.testing.assert_close(model(idx)[0], logits, **close)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    loss = model(idx, targets)[1]
    torch.testing.assert_close(loss, cross_entropy, rtol=1e-12, atol=0)
    found, expected = loss + model.auxiliary_loss(), cross_entropy + 0.5 * balance + 0.25 * z
    parameters = list(model.parameters())
    gradients = (torch.autograd.grad(value, parameters) for value in (found, expected))
    torch.testing.assert_close(*gradients, **close)
    torch.testing.assert_close(in_pieces(model.eval(), idx), logits, **close)


@pytest.mark.parametrize("width", [24, 21])  # 21 must be padded, as 426, 682 and 853 must
@pytest.mark.parametrize("keys", [{}, {**HG, "scale_placement": "dual"}, UNIFIED],
                         ids=["plain", "dp", "unified"])
def test_grouped_bfloat16_products_are_the_mixtures_formula(keys, width):
    """CUDA's path, here on the CPU and to bfloat16's rounding; no token chooses the last expert."""
    shape = dict(n_expert=4, n_expert_active=2, d_expert=width, d_shared_expert=2 * width - 1)
    config = GPTConfig(**{**TINY, **shape, **keys})
    layer, draw = MoE(config), torch.Generator().manual_seed(0)
    for name, p in layer.named_parameters():
        p.data = torch.randn(p.shape, generator=draw) * (0.3 if name.endswith(".weight") else 1)
    layer.router.weight.data[3] -= 50
    x = torch.randn(2, 20, 32, generator=draw).abs().bfloat16().float().requires_grad_()
    probe = torch.linspace(-1, 2, x.numel()).view_as(x)

    def with_gradients(y):
        return [y, *torch.autograd.grad((y * probe).sum(), [x, *layer.parameters()])]

    expected = with_gradients(reference.mixture(layer, reference.norm(x, 1e-6), config)[0])
    y = layer(x.bfloat16())[0]
    assert y.dtype == torch.bfloat16
    found = with_gradients(y.float())
    size = torch.cat([t.flatten() for t in expected]).norm()
    for a, b in zip(found, expected):  # a β's gradient is a small sum of large terms
        assert (a - b).norm() <= 0.01 * b.norm() + 1e-3 * size


def test_a_stream_that_bfloat16_cannot_multiply_is_named():
    """Of a loaded model, say; a run is refused before it begins."""
    model = tiny_gpt(**{**MIXTURE, "n_embd": 36, "n_head": 2, "n_kv_head": 1})
    model.compute_dtype = torch.bfloat16
    with pytest.raises(ValueError, match="experts of 36 inputs and 48 outputs: in bfloat16 both"):
        model(tiny_batch()[0])


# ---- scale vectors -------------------------------------------------------------------------------

BOTH, ABSORBED, NEITHER = (True, True), (False, True), (False, False)  # input_norm, absorbable
READERS = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")
MAPS = (*READERS, "attn.o", "mlp.down")


def vectors(names, side, role):
    return {f"{name}.{side}": role for name in names}


NORMS = vectors(("attn.q_norm", "attn.k_norm"), "scale", NEITHER)
NORMS |= vectors(("attn_post_norm", "mlp_post_norm"), "scale", NEITHER)
SHARED = vectors(("attn.norm", "mlp.norm", "norm"), "scale", BOTH)
FINAL = vectors(("norm",), "scale", BOTH)  # of one map: it has γ_b with and without HG
IN = vectors(MAPS, "scale_in", BOTH) | FINAL
OUT = vectors((*MAPS, "head"), "scale_out", ABSORBED)
IN_HG = vectors(READERS, "scale_in", BOTH) | FINAL


@pytest.mark.parametrize("keys, expected", [
    ({"scale_placement": "dual", **HG_EVERYWHERE}, IN | OUT),
    ({"scale_placement": "dual", **HG, "scale_placement_on": "q,o"},
     IN_HG | vectors(("attn.o",), "scale_in", BOTH)
     | vectors(("attn.q", "attn.o"), "scale_out", ABSORBED)),
    ({"scale_placement": "dual_norm", **HG},  # o absorbs γ_a of v, down that of up
     IN_HG | vectors((*READERS, "head"), "scale_out", NEITHER)
     | vectors(("attn.v", "mlp.up"), "scale_out", ABSORBED)),
    ({"qk_norm": True, "post_norm": True}, SHARED | NORMS),
    ({"tie_embeddings": True}, SHARED | {"norm.scale": (True, False)}),  # layer 0 reads it too
    ({"scale_vectors": False, "scale_placement": "dual", "qk_norm": True}, {}),
    ({**MIXTURE, "n_dense_layer": 0}, SHARED),
    ({**MIXTURE, "n_dense_layer": 0, "scale_placement": "after"},  # the router keeps its own
     vectors((*READERS, "head", "mlp.shared_gate", "mlp.shared_up"), "scale_out", ABSORBED)
     | vectors(("mlp.router",), "scale_in", BOTH)),
    ({**HG, "scale_placement": "dual", "scale_vectors_on": "k,gate,o,head", "qk_norm": True},
     vectors(("attn.k", "mlp.gate"), "scale_in", BOTH) | FINAL | vectors(
        ("attn.k", "mlp.gate", "head"), "scale_out", ABSORBED)
     | vectors(("attn.q_norm", "attn.k_norm"), "scale", NEITHER)),
    ({**MIXTURE, "n_dense_layer": 0, "scale_placement": "dual_norm", **HG},
     IN_HG | vectors(("mlp.router", "mlp.shared_gate", "mlp.shared_up"), "scale_in", BOTH)
     | vectors((*READERS, "head", "mlp.shared_gate"), "scale_out", NEITHER)
     | vectors(("attn.v", "mlp.up", "mlp.shared_up"), "scale_out", ABSORBED)),
], ids=["DP", "DP on q, o", "DNP", "output norms", "tied", "none", "mixture", "AP mixture",
        "chosen maps", "DNP mixture"])
def test_scale_vectors_and_their_roles(keys, expected):
    keys = {**TINY, **keys, "n_layer": 1}
    TrainConfig(model=GPTConfig(**keys))  # no check of a run refuses it
    found = named_scale_vectors(tiny_gpt(**keys))
    assert expected == {name.removeprefix("layers.0."): (vector.input_norm, vector.absorbable)
                        for name, vector in found}


# ---- the start -----------------------------------------------------------------------------------

def test_how_variants_start():
    """All from the same matrices, normal with a width of the table, and γ = 1: as the baseline's
    function. Only DNP, whose norm is another function, differs."""
    keys = dict(n_embd=128, d_ff=256, vocab_size=300, init_std=0.03, **MIXTURE)
    idx, baseline = tiny_batch()[0], tiny_gpt(**keys)
    matrices = {name: W for name, W in baseline.state_dict().items() if "scale" not in name}
    for name, W in matrices.items():
        std = 0.03 / math.sqrt(2 * 3) if name.endswith((".o.weight", "down.weight")) else 0.03
        assert abs(W.std() / std - 1) < 0.1 and abs(W.mean()) < 0.1 * std, name
    assert GPTConfig(n_embd=144, init_std=0.0).init_std == 1 / 12
    tied = tiny_gpt(tie_embeddings=True, **keys)  # drawn once
    assert torch.equal(tied.head.weight, matrices["embedding.weight"])
    for placement, hg in itertools.product(OUR_PLACEMENTS, (False, True)):
        model = tiny_gpt(scale_placement=placement, scale_heterogeneous=hg, **keys)
        state = model.state_dict()
        assert all(torch.equal(state[name], W) for name, W in matrices.items())
        same = torch.allclose(model(idx)[0], baseline(idx)[0], rtol=0, atol=1e-6)
        assert same == (placement in ("input", "after", "dual")), placement


def test_a_copy_has_no_compiled_code_of_its_model():
    model = tiny_gpt()
    compile_model(model)
    for copied in (copy.deepcopy(model), fold_scale_vectors(model)):
        assert not any(m._compiled_call_impl for m in copied.modules())


# ---- what it costs -------------------------------------------------------------------------------

def test_flops_and_active_parameters():
    """6 for each weight that a token meets, 2 of 3 experts here, and attention's. Idle in a mixture
    are one expert's matrices, its γ_b of gate and up, and its γ_a of both with its β."""
    C, D, V, T, expert, shared = 32, 8, 61, 16, 3 * 32 * 21, 3 * 32 * 27
    attention, mlp = C * C + 2 * C * 2 * D + C * C, 3 * C * 48
    dense = 2 * (attention + mlp) + V * C
    mixture = 3 * attention + mlp + 2 * (2 * expert + shared + 3 * C) + V * C
    for keys, weights, L in (
            ({}, dense, 2), (UNIFIED, dense, 2), ({**UNIFIED, **MIXTURE}, mixture, 3)):
        model = tiny_gpt(**keys)
        assert flops_per_token(model) == 6 * weights + 12 * L * C * T
        assert flops_per_token(model, causal=True) == 6 * weights + 6 * L * C * T
    idle = 2 * (expert + 2 * C + 2 * (21 + 1))
    assert num_params(model) - active_params(model) == idle


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=[
    pytest.mark.slow, pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")])])
@pytest.mark.parametrize("keys", [{}, UNIFIED], ids=["baseline", "unified"])
def test_what_a_loss_in_bfloat16_keeps(keys, compiled):
    """Of the size of the logits autograd keeps one tensor, by storage, under DNP too: compiled the
    logits in the compute dtype, eagerly the cross-entropy's float32 log-probabilities. Parameters
    and loss stay float32."""
    model = tiny_gpt(vocab_size=4096, block_size=64, n_layer=1, **keys)
    model.compute_dtype = torch.bfloat16
    idx, targets = tiny_batch(batch=4, length=64, vocab=4096)
    logits, kept = idx.numel() * 4096, {}
    if compiled:
        torch._dynamo.reset()
        model.cross_entropy.compile(dynamic=False, options=INDUCTOR_OPTIONS)

    def remember(tensor):
        storage = tensor.untyped_storage()
        if storage.nbytes() >= logits * 2:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
        loss = model(idx, targets)[1]
    assert list(kept.values()) == [logits * (2 if compiled else 4)]
    loss.backward()
    assert model(idx)[0].dtype == torch.bfloat16
    assert {loss.dtype, *(p.dtype for p in model.parameters())} == {torch.float32}


# ---- starting again ------------------------------------------------------------------------------

@pytest.mark.parametrize("keys", [
    {}, {**UNIFIED, "scale_reparam": "exponential"},
    {**UNIFIED, **MIXTURE, "scale_placement": "dual"},
    dict(scale_reparam="zero_centered", qk_norm=True, post_norm=True, tie_embeddings=True)],
    ids=["shared", "ER", "mixture", "Gemma"])
def test_a_model_without_memory_starts_as_any_other(keys):
    """Built on the meta device and given memory, in which anything may stand, init_weights draws
    what the seed draws elsewhere. Each module that has parameters can do so by itself."""
    expected = tiny_gpt(**keys)
    with torch.device("meta"):
        model = GPT(expected.config)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan"))
    torch.manual_seed(0)
    expected.init_weights()
    torch.manual_seed(0)
    model.init_weights()
    found, wanted = ({**dict(m.named_parameters()), **dict(m.named_buffers())}
                     for m in (model, expected))
    assert list(found) == list(wanted)
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
    for m in model.modules():
        if next(m.parameters(recurse=False), None) is not None:
            m.reset_parameters()
    assert all((vector() == 1).all() for _, vector in named_scale_vectors(model))


# ---- generation ----------------------------------------------------------------------------------

def test_generate():
    """Greedy tokens, far beyond block_size, against the whole context read again for each: a cached
    step reads one position, and the newer half when the context is full, because the model takes no
    more. And tokens drawn from the likeliest top_k by softmax(logits / temperature)."""
    model, many = tiny_gpt(torch.float64, n_layer=1, **UNIFIED), tiny_batch(length=5, batch=100)[0]

    def generate(idx, n, **how):
        return torch.cat(list(sample.generate(model, idx, n, **how)), 1)

    context, read = many[:2], []
    hook = model.layers[0].attn.register_forward_hook(lambda m, x, y: read.append(x[0].size(1)))
    found = generate(context, 30, temperature=0)
    assert read == [5, *[1] * 11, 8, *[1] * 8, 8, *[1] * 8]
    hook.remove()
    assert torch.equal(generate(context, 30, temperature=0, use_cache=False), found)
    for token in found.T:
        context = context[:, -8:] if context.size(1) > 16 else context
        assert torch.equal(token, model(context)[0][:, -1].argmax(-1))
        context = torch.cat((context, token[:, None]), 1)
    assert len(list(sample.generate(tiny_gpt(block_size=1), many[:1, :3], 3))) == 3
    with pytest.raises(ValueError, match="17 tokens is longer than block_size=16"):
        model(torch.zeros(1, 17, dtype=torch.long))
    caches = [[]]
    model(context[:, :4], caches=caches)
    with pytest.raises(ValueError, match="take one token at a time, not 2"):
        model(context[:, 4:6], caches=caches)

    values, ids = model(many)[0][:, -1].float().topk(7)
    probabilities = torch.zeros(100, 61).scatter(1, ids, (values / 2).softmax(-1))
    expected, = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(3)).T
    seed = torch.Generator().manual_seed(3)
    drawn = generate(many, 1, temperature=2.0, top_k=7, generator=seed)
    assert torch.equal(drawn[:, 0], expected)
    assert torch.equal(generate(many, 1, top_k=1), generate(many, 1, temperature=0))


def test_autocast_and_odd_widths():
    """Under autocast the dtype changes between two maps: no zeros may stand between them."""
    model, (idx, targets) = tiny_gpt(d_ff=45, **UNIFIED), tiny_batch()
    expected = model(idx, targets)[1]
    with torch.autocast("cpu", torch.bfloat16):
        found = model(idx, targets)[1]
    assert 0 < (found - expected).abs() < 0.01 * expected


def test_a_cache_is_used_where_blocks_are_recomputed():
    model, idx = tiny_gpt(torch.float64, recompute=True), tiny_batch()[0]
    caches = [[] for _ in model.layers]
    model.train()(idx[:, :5], caches=caches)
    found = model(idx[:, 5:6], caches=caches)[0][:, 0]
    torch.testing.assert_close(found, model(idx[:, :6])[0][:, 5], rtol=0, atol=1e-12)


# ---- refusals ------------------------------------------------------------------------------------

@pytest.mark.parametrize("keys, message", [
    (dict(n_embd=30), "n_embd=30 is not divisible by n_head=4: choose n_embd=32"),
    (dict(n_embd=12), "n_embd/n_head=3 is odd"),
    (dict(n_kv_head=3), "n_head=4 is not divisible by n_kv_head=3"),
    (dict(n_layer=0), "n_layer=0 must be at least 1"),
    (dict(n_layer=10 ** 6), "n_layer=1000000 must be at most 10000"),
    (dict(n_embd=10 ** 18), "n_embd=1000000000000000000 must be at most 10000000"),
    (dict(norm_eps=0.0), "norm_eps=0.0 must be above 0"),
    (dict(n_expert=-1), "n_expert=-1 must be at least 0"),
    (dict(n_expert=2, n_expert_active=3), "n_expert_active=3 is more than n_expert=2"),
    (dict(n_expert=2, n_expert_active=0), "n_expert_active=0 must be at least 1"),
    (dict(n_expert=2, n_expert_active=1), "n_expert_active=1: the weight of a single expert is"),
    (dict(n_expert=2, n_expert_active=1, d_expert=-8), "d_expert=-8 must be at least 1"),
    (dict(n_expert=2, n_expert_active=1, n_dense_layer=2), "n_dense_layer=2 leaves none of"),
    (dict(d_shared_expert=8), "d_shared_expert=8 with n_expert=0"),
    (dict(scale_placement="both"), "scale_placement='both' is unknown: choose one of input, after"),
    (dict(scale_reparam="orignal"), r"did you mean original\?"),
    (dict(scale_placement_on="q,x"), "there is no map 'x': scale_placement_on and"),
    (dict(scale_vectors_on="q,gat"), "there is no map 'gat'"),
    (dict(scale_placement_on="q,router"), "cannot name the router"),
    (dict(scale_vectors_on="k,v,gate,up"), "k and v would share the γ of the norm that q, k, v re"),
    (dict(scale_placement="after", scale_placement_on="up", n_expert=4), "router and gate would"),
    (dict(scale_vectors_on="gate", n_expert=4, d_shared_expert=27), "gate and shared_gate would"),
    (dict(scale_placement="dual_norm", qk_norm=True),
     "set qk_norm=False, or take q,k out of scale_placement_on"),
    (dict(scale_placement="dual_norm", scale_placement_on="o", post_norm=True),
     "set post_norm=False, or take o out")])
def test_impossible_configurations(keys, message):
    with pytest.raises(ValueError, match=message) as error:
        TrainConfig(model=GPTConfig(**{**TINY, **keys}))
    assert "\n" not in str(error.value)
