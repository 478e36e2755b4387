"""
Proves that the decoder is one: causal, rotary, counted as the paper counts, started as its table
says; that every combination of the scale keys trains and reloads; that its loss is cross-entropy in
little memory, DNP over the vocabulary included; and that cached generation gives the tokens that
reading everything again gives.
"""
import dataclasses
import functools
import itertools
import math
import runpy

import pytest
import torch
from conftest import PAPER_PLACEMENTS, ROOT, TINY, UNIFIED, randomize_scales, tiny_batch, tiny_gpt
from torch.nn import functional as F

import model as model_file
import sample
from model import GPT, GPTConfig, apply_rope, rope_tables
from norms import PLACEMENTS, REPARAMS, rms_norm
from optim import make_optimizer, param_groups

COMBINATIONS = [dict(scale_heterogeneous=h, scale_placement=p, scale_reparam=r)
                for h, p, r in itertools.product((False, True), PLACEMENTS, REPARAMS)]
COMBINATIONS += [dict(scale_vectors=False, scale_placement=p) for p in PLACEMENTS]


def gradients(model, idx, targets):
    model.zero_grad()
    loss = model(idx, targets)[1]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("keys", COMBINATIONS, ids=lambda keys: "-".join(map(str, keys.values())))
def test_every_combination_trains_and_reloads(keys):
    """A step moves every parameter, and state_dict holds all that the model is."""
    model, (idx, targets) = randomize_scales(tiny_gpt(n_layer=1, **keys)), tiny_batch()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model(idx, targets)[1].backward()
    make_optimizer(param_groups(model, 0.0), lr=1e-2).step()
    assert all((p != before[name]).any() for name, p in model.named_parameters())
    again = tiny_gpt(n_layer=1, seed=5, **keys)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(idx)[0], model(idx)[0])


def test_variants_start_as_the_baselines_function():
    """From the same matrices with γ = 1. Only DNP, whose norm is another function, differs."""
    idx, baseline = tiny_batch()[0], tiny_gpt(n_layer=1)
    matrices = {name: W for name, W in baseline.state_dict().items() if "scale" not in name}
    for keys in (keys for keys in COMBINATIONS if keys["scale_placement"] in PAPER_PLACEMENTS):
        model = tiny_gpt(n_layer=1, **keys)
        state = model.state_dict()
        assert all(torch.equal(state[name], W) for name, W in matrices.items())
        same = torch.allclose(model(idx)[0], baseline(idx)[0], rtol=0, atol=1e-6)
        assert same == (keys["scale_placement"] != "dual_norm"), keys


@pytest.mark.parametrize("keys", [{}, UNIFIED, {"qk_norm": True, "post_norm": True}])
def test_causal(keys):
    model, idx = tiny_gpt(**keys), tiny_batch()[0]
    changed = idx.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 61
    a, b = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(a[:, :9], b[:, :9], rtol=0, atol=1e-6)
    assert (a[:, 9:] != b[:, 9:]).any(-1).all()


def test_rope_is_a_rotation_by_position():
    """Against complex multiplication; and <q_i, k_j> is a function of i - j."""
    cos, sin = rope_tables(GPTConfig(**{**TINY, "rope_theta": 100.0}))
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    rotated_q, rotated_k = (apply_rope(x.expand(1, 16, 1, 8), cos, sin)[0, :, 0] for x in (q, k))
    angle = torch.arange(16)[:, None] * 100.0 ** (-torch.arange(4) / 4)
    turned = torch.complex(q[:4], q[4:]) * torch.polar(torch.ones(16, 4), angle)
    expected = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(rotated_q, expected, rtol=0, atol=1e-5)
    scores = rotated_q @ rotated_k.T
    for distance in range(1, 16):
        diagonal = scores.diagonal(-distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-5


@functools.cache
def on_meta(name):
    """The model of a config file, without storage."""
    values = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))
    fields = {field.name for field in dataclasses.fields(GPTConfig)} & values.keys()
    with torch.device("meta"):
        return GPT(GPTConfig(**{key: values[key] for key in fields}))


@pytest.mark.parametrize("name, total, active", [
    ("baseline_120m", 119_744_256, None), ("baseline_350m", 354_681_856, None),
    ("baseline_1b", 1_028_065_024, None), ("large_120m", 119_854_848, None),
    ("baseline_moe_250m", 251_044_480, 113_633_920),
    ("baseline_moe_500m", 480_942_336, 183_671_040),
    ("baseline_moe_800m", 797_327_040, 281_231_040),
    ("baseline_moe_1b", 1_058_931_712, 354_976_768),
    ("baseline_moe_2b", 1_996_574_720, 620_856_320),
])
def test_the_papers_counts(name, total, active):
    assert on_meta(name).num_params() == total
    assert on_meta(name).num_params("active") == (active or total)


@pytest.mark.parametrize("name, without_beta, layers", [
    ("unified_120m", 119_846_784, 6), ("unified_250m", 254_208_112, 12),
    ("unified_500m", 483_008_372, 18), ("unified_750m", 749_558_400, 21),
    ("unified_1b", 1_028_562_104, 22),
])
def test_the_papers_counts_of_unified(name, without_beta, layers):
    """The paper's 0.11985B is met only with DNP on the output projection. OR adds a β for each γ_a:
    5 a layer and the head's."""
    model = on_meta(name)
    betas = sum(p.numel() for key, p in model.named_parameters() if key.endswith(".beta"))
    assert (model.num_params() - betas, betas) == (without_beta, 5 * layers + 1)


def test_llama_1bs_scale_vectors():
    assert on_meta("baseline_1b").num_params("scale_vectors") == 80_640
    with pytest.raises(ValueError, match="num_params"):
        tiny_gpt().num_params("all")


def test_counts_by_hand():
    C, D, V, ff, L = 32, 8, 61, 48, 2
    matrices = L * (C * C + 2 * C * 2 * D + C * C + 3 * C * ff)
    assert tiny_gpt().num_params() == matrices + 2 * V * C + (2 * L + 1) * C
    assert tiny_gpt(tie_embeddings=True).num_params() == matrices + V * C + (2 * L + 1) * C
    assert tiny_gpt(scale_vectors=False).num_params("scale_vectors") == 0
    # in a layer γ_b of five maps, γ_a of q, of k and v, of gate and up, and five β; the head's
    in_a_layer = 5 * C + C + 2 * 2 * D + 2 * ff + 5
    unified = tiny_gpt(**UNIFIED)
    assert unified.num_params("scale_vectors") == L * in_a_layer + C + V + 1
    for model in (tiny_gpt(), unified):
        assert model.flops_per_token() == 6 * (matrices + V * C) + 12 * L * C * 16
        assert model.flops_per_token(causal=True) == 6 * (matrices + V * C) + 6 * L * C * 16


def test_initial_weights_follow_the_table():
    model = tiny_gpt(n_embd=128, d_ff=256, vocab_size=300, init_std=0.03)
    for name, p in model.named_parameters():
        if "scale" in name:
            assert (p == 1).all()  # a plain γ
        else:
            last = name.endswith((".o.weight", ".down.weight"))
            std = 0.03 / math.sqrt(2 * 2) if last else 0.03
            assert abs(p.std() / std - 1) < 0.05 and abs(p.mean()) < 0.05 * std, name
    assert GPTConfig(n_embd=144, init_std=0.0).init_std == 1 / 12


@pytest.mark.parametrize("chunk_elements", [2 ** 26, 300])
@pytest.mark.parametrize("keys", [
    {}, UNIFIED, {"scale_placement": "after", "tie_embeddings": True},
], ids=["baseline", "unified", "after"])
def test_loss_is_cross_entropy(keys, chunk_elements, monkeypatch):
    """In value and gradient, from formulas written out, whole and in chunks, with targets left
    out."""
    def norm(x, eps):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    monkeypatch.setattr(model_file, "CHUNK_ELEMENTS", chunk_elements)
    model, targets = randomize_scales(tiny_gpt(torch.float64, **keys)), tiny_batch()[1].clone()
    targets[1, 3:] = -1
    x = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    head, wanted = model.head, [x.requires_grad_(), *model.head.parameters()]
    if keys == UNIFIED:  # DNP needs no Pre-Norm: see norms.pre_norm
        logits = head.scale_out() * norm((x * head.scale_in()) @ head.weight.T, 1e-12)
    elif not keys:
        logits = (norm(x, 1e-6) * head.scale_in()) @ head.weight.T
    else:
        logits = head.scale_out() * (norm(x, 1e-6) @ head.weight.T)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    found = model.loss(x, targets)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    gradients = (torch.autograd.grad(loss, wanted) for loss in (found, expected))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [{}, UNIFIED], ids=["baseline", "unified"])
def test_loss_keeps_only_the_product_of_the_size_of_the_logits(keys, compute_dtype):
    """What autograd keeps between forward and backward, by storage: W̃ x of the head, once, in the
    compute dtype, under DNP too."""
    model = tiny_gpt(vocab_size=4096, block_size=64, n_layer=1, **keys)
    model.compute_dtype = compute_dtype
    idx, targets = tiny_batch(batch=4, length=64, vocab=4096)
    logits, kept = idx.numel() * 4096, {}

    def remember(tensor):
        storage = tensor.untyped_storage()
        if storage.nbytes() >= logits * 2:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
        loss = model(idx, targets)[1]
    assert sum(kept.values()) <= logits * compute_dtype.itemsize
    loss.backward()


@pytest.mark.parametrize("keys", [UNIFIED, {"n_expert": 3, "n_expert_active": 2}],
                         ids=["unified", "mixture"])
def test_recompute_changes_nothing(keys):
    def gradients(recompute):
        model = randomize_scales(tiny_gpt(**keys, recompute=recompute))
        loss = model(*tiny_batch())[1]
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    torch.testing.assert_close(gradients(False), gradients(True), rtol=0, atol=0)


def test_compute_dtype_is_the_only_cast():
    model, idx = tiny_gpt(**UNIFIED), tiny_batch()[0]
    full = model(idx)[0]
    model.compute_dtype = torch.bfloat16
    half, loss = model(idx)[0], model(idx, idx)[1]
    assert half.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert (half.float() - full).norm() / full.norm() < 0.02


@pytest.mark.parametrize("keys", [
    {}, UNIFIED, {"qk_norm": True, "n_expert": 3, "n_expert_active": 2},
], ids=["plain", "unified", "mixture"])
def test_generate(keys):
    """Greedy tokens, far beyond block_size, against the whole context read again for each."""
    model, idx = tiny_gpt(torch.float64, n_layer=1, **keys), tiny_batch(length=5)[0]

    def generate(n, **how):
        return torch.cat(list(sample.generate(model, idx, n, **how)), 1)

    found, context = generate(30, temperature=0), idx
    assert torch.equal(generate(30, temperature=0, use_cache=False), found)
    for token in found.T:
        context = context[:, -8:] if context.size(1) > 16 else context  # full: the newer half stays
        assert torch.equal(token, model(context)[0][:, -1].argmax(-1))
        context = torch.cat((context, token[:, None]), 1)
    assert torch.equal(generate(5, temperature=2.0, top_k=1), found[:, :5])
    a, b = (generate(5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)


def test_a_cached_step_reads_one_position():
    """Every map sees one row: only attention's own work grows."""
    model, rows = tiny_gpt(), []
    for attention in (layer.attn for layer in model.layers):
        attention.register_forward_hook(lambda module, args, out: rows.append(args[0].size(1)))
    list(sample.generate(model, tiny_batch(length=5)[0], 11, temperature=0))
    assert rows == [5, 5] + [1] * 20


@pytest.mark.parametrize("keys, message", [
    (dict(n_embd=30), r"n_embd=30 is not divisible by n_head=4: choose n_embd=32"),
    (dict(n_embd=12), r"n_embd/n_head=3 is odd"),
    (dict(n_kv_head=3), r"n_head=4 is not divisible by n_kv_head=3"),
    (dict(n_layer=0), r"n_layer=0 must be at least 1"),
    (dict(n_expert=2, n_expert_active=1, n_dense_layer=2),
     r"n_dense_layer=2 leaves none of n_layer=2 for n_expert=2"),
    (dict(norm_eps=0.0), r"norm_eps=0.0 must be above 0"),
    (dict(scale_placement="both"),
     r"scale_placement='both' is unknown: choose one of input, after, dual, dual_norm"),
    (dict(scale_placement="dualnorm"), r"did you mean dual_norm\?"),
    (dict(scale_reparam="orignal"), r"did you mean original\?"),
    (dict(scale_placement_on="q,x"),
     r"scale_placement_on='x' is unknown: choose one of q, k, v, gate, up, head, o, down"),
    (dict(scale_placement="dual_norm", qk_norm=True),
     r"set qk_norm=False, or take q,k out of scale_placement_on"),
    (dict(scale_placement="dual_norm", scale_placement_on="o", post_norm=True),
     r"set post_norm=False, or take o out"),
])
def test_impossible_configurations(keys, message):
    with pytest.raises(ValueError, match=message) as error:
        GPTConfig(**{**TINY, **keys})
    assert "\n" not in str(error.value)


def test_sequence_too_long():
    with pytest.raises(ValueError, match="17 tokens is longer than block_size=16"):
        tiny_gpt()(torch.zeros(1, 17, dtype=torch.long))


def test_the_epsilon_of_dnp_is_squared_where_the_pre_norm_is_left_out():
    for on, expected in (("q,k,v,gate,up,head", 1e-12), ("q,k,gate", 1e-6), ("o,down", 1e-6)):
        maps = dict(tiny_gpt(**UNIFIED, scale_placement_on=on).scaled_linears())
        normalized = {name: m.eps for name, m in maps.items() if m.placement.undoes_factor}
        assert len(normalized) == {1e-12: 11}.get(expected, 2 * len(on.split(",")))
        assert list(normalized.values()) == pytest.approx([expected] * len(normalized))


def test_training_without_the_pre_norm_follows_the_same_losses(monkeypatch):
    """Twenty steps of AdamW in float64, with eq. 7 as written and with its Pre-Norm left out."""
    def losses(model):
        optimizer, found = make_optimizer(param_groups(model, 0.1), lr=1e-2), []
        for seed in range(20):
            found.append(model(*tiny_batch(seed))[1])
            optimizer.zero_grad()
            found[-1].backward()
            optimizer.step()
        return torch.stack(found)

    without, written = (tiny_gpt(torch.float64, **UNIFIED) for _ in range(2))
    found = losses(without)
    for _, m in written.scaled_linears():
        m.eps = 1e-6
    monkeypatch.setattr(model_file, "pre_norm", lambda x, maps, eps=1e-6: rms_norm(x, eps))
    torch.testing.assert_close(losses(written), found, rtol=0, atol=1e-4)
    assert found[-1] < found[0] - 0.1
