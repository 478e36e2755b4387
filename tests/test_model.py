"""
Proves that the decoder is one: causal, rotary, counted as the paper counts, started as its table says; that every combination of
the scale keys trains and reloads; that its loss, DNP over the vocabulary included, is
cross-entropy in little memory; and that cached generation gives the tokens that reading everything again gives.
"""
import dataclasses
import itertools
import math
import runpy

import pytest
import torch
from conftest import PAPER_PLACEMENTS, ROOT, TINY, UNIFIED, randomize_scales, tiny_batch, tiny_gpt
from torch.nn import functional as F

import model as model_file
from model import GPT, GPTConfig, apply_rope, rope_tables
from norms import PLACEMENTS, REPARAMS, SCALE_DECAY_POLICIES
from optim import load_optimizer_state, make_optimizer, optimizer_state, param_groups

COMBINATIONS = [dict(scale_vectors=s, scale_heterogeneous=h, scale_placement=p, scale_reparam=r)
                for s, h, p, r in itertools.product((True, False), (False, True), PLACEMENTS, REPARAMS)]


def gradients(model, idx, targets):
    model.zero_grad()
    loss = model(idx, targets)[1]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("keys", COMBINATIONS, ids=lambda keys: "-".join(map(str, keys.values())))
def test_every_combination_trains_and_reloads(keys, tmp_path):
    idx, targets = tiny_batch()
    model = tiny_gpt(**keys)
    before = {name: p.clone() for name, p in model.named_parameters()}
    loss, grads = gradients(model, idx, targets)
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    for policy in SCALE_DECAY_POLICIES:
        model.load_state_dict(before)
        optimizer = make_optimizer(param_groups(model, 0.1, policy), lr=1e-2)
        optimizer.step()
        assert all((p != before[name]).any() for name, p in model.named_parameters())
    torch.save({"model": model.state_dict(), "optimizer": optimizer_state(optimizer)}, tmp_path / "ckpt.pt")
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    again = tiny_gpt(seed=5, **keys)
    again.load_state_dict(state["model"])
    load_optimizer_state(make_optimizer(param_groups(again, 0.1)), state["optimizer"])
    assert torch.equal(again(idx)[0], model(idx)[0])


def test_variants_start_as_the_baselines_function():
    """γ = 1 everywhere, so all but DNP, whose extra norm is another function, start alike; and all from the same matrices."""
    idx, baseline = tiny_batch()[0], tiny_gpt()
    for keys in (k for k in COMBINATIONS if k["scale_placement"] in PAPER_PLACEMENTS):
        model = tiny_gpt(**keys)
        for name, W in baseline.named_parameters():
            if "scale" not in name:
                assert torch.equal(dict(model.named_parameters())[name], W)
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


def test_rope_depends_on_distance_alone():
    """A rotation by position: norms stay, and <q_i, k_j> is a function of i - j. Angles against complex multiplication."""
    config = GPTConfig(**{**TINY, "rope_theta": 100.0})
    cos, sin = rope_tables(config)
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).view(2, 1, 1, 1, 8).expand(2, 1, 16, 1, 8)
    rotated_q, rotated_k = apply_rope(q, cos, sin)[0, :, 0], apply_rope(k, cos, sin)[0, :, 0]
    scores = rotated_q @ rotated_k.T
    for distance in range(1, 16):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    angle = torch.arange(16)[:, None] * 100.0 ** (-torch.arange(4) / 4)
    turned = torch.complex(q[0, :, 0, :4], q[0, :, 0, 4:]) * torch.polar(torch.ones(16, 4), angle)
    torch.testing.assert_close(rotated_q, torch.cat((turned.real, turned.imag), -1), rtol=0, atol=1e-5)


def counts(name):
    """(all, active, in scale vectors, in OR's β) of a config file's model."""
    fields, values = {f.name for f in dataclasses.fields(GPTConfig)}, runpy.run_path(str(ROOT / "configs" / f"{name}.py"))
    with torch.device("meta"):
        model = GPT(GPTConfig(**{key: value for key, value in values.items() if key in fields}))
    betas = sum(p.numel() for key, p in model.named_parameters() if key.endswith(".beta"))
    return model.num_params(), model.num_params("active"), model.num_params("scale_vectors"), betas


@pytest.mark.parametrize("name, expected", [
    ("baseline_120m", 119_744_256), ("baseline_350m", 354_681_856), ("baseline_1b", 1_028_065_024), ("large_120m", 119_854_848),
    ("baseline_moe_250m", 251_044_480), ("baseline_moe_500m", 480_942_336), ("baseline_moe_800m", 797_327_040),
    ("baseline_moe_1b", 1_058_931_712), ("baseline_moe_2b", 1_996_574_720)])
def test_the_papers_counts(name, expected):
    assert counts(name)[0] == expected


@pytest.mark.parametrize("name, without_beta, layers", [
    ("unified_120m", 119_846_784, 6), ("unified_250m", 254_208_112, 12), ("unified_500m", 483_008_372, 18),
    ("unified_750m", 749_558_400, 21), ("unified_1b", 1_028_562_104, 22)])
def test_the_papers_counts_of_unified(name, without_beta, layers):
    """0.11985B of the paper is met only with DNP on the output projection. OR adds a β for each γ_a: 5 a layer and the head's."""
    total, _, _, betas = counts(name)
    assert (total - betas, betas) == (without_beta, 5 * layers + 1)


@pytest.mark.parametrize("size, active", [("250m", 113_633_920), ("500m", 183_671_040), ("800m", 281_231_040), ("1b", 354_976_768),
                                          ("2b", 620_856_320)])
def test_the_papers_activated_counts(size, active):
    assert counts(f"baseline_moe_{size}")[1] == active


def test_llama_1bs_scale_vectors():
    assert counts("baseline_1b")[2] == 80_640
    with pytest.raises(ValueError, match="num_params"):
        tiny_gpt().num_params("all")


def test_counts_by_hand():
    C, D, V, ff, L = 32, 8, 61, 48, 2
    matrices = L * (C * C + 2 * C * 2 * D + C * C + 3 * C * ff)
    assert tiny_gpt().num_params() == matrices + 2 * V * C + (2 * L + 1) * C
    assert tiny_gpt(tie_embeddings=True).num_params() == matrices + V * C + (2 * L + 1) * C
    assert tiny_gpt(scale_vectors=False).num_params("scale_vectors") == 0
    unified = tiny_gpt(**UNIFIED).num_params("scale_vectors")  # per layer 5 inputs, outputs of q, k, v, gate, up with a β each; the head's
    assert unified == L * (5 * C + C + 2 * 2 * D + 2 * ff + 5) + C + V + 1
    for keys in ({}, UNIFIED):
        assert tiny_gpt(**keys).flops_per_token() == 6 * (matrices + V * C) + 12 * L * C * 16
        assert tiny_gpt(**keys).flops_per_token(causal=True) == 6 * (matrices + V * C) + 6 * L * C * 16


def test_initial_weights_follow_the_table():
    model = tiny_gpt(n_embd=128, d_ff=256, vocab_size=300, init_std=0.03)
    for name, p in model.named_parameters():
        if "scale" in name:
            assert (p == 1).all()  # a plain γ
        else:
            std = 0.03 / math.sqrt(2 * 2) if name.endswith((".o.weight", ".down.weight")) else 0.03
            assert abs(p.std() / std - 1) < 0.05 and abs(p.mean()) < 0.05 * std, name
    assert GPTConfig(n_embd=144, init_std=0.0).init_std == 1 / 12


@pytest.mark.parametrize("chunk_elements", [2 ** 26, 300])
@pytest.mark.parametrize("keys", [{}, UNIFIED, {"scale_placement": "after", "tie_embeddings": True}], ids=str)
def test_loss_is_cross_entropy(keys, chunk_elements, monkeypatch):
    """The head and the loss, in float64 and with gradients: every formula written out, DNP's norm over the vocabulary too, whole and
    in chunks, with targets left out."""
    monkeypatch.setattr(model_file, "CHUNK_ELEMENTS", chunk_elements)
    model = randomize_scales(tiny_gpt(torch.float64, **keys))
    x = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    targets = tiny_batch()[1].clone()
    targets[1, 3:] = -1
    head = model.head
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    if keys.get("scale_placement") == "dual_norm":
        logits = (x * head.scale_in()) @ head.weight.T  # DNP needs no Pre-Norm: see norms.pre_norm
        logits = logits / (logits.square().mean(-1, keepdim=True) + 1e-12).sqrt()
    else:
        logits = (normed * (head.scale_in() if head.scale_in else 1)) @ head.weight.T
    logits = logits * (head.scale_out() if head.scale_out else 1)
    expected = F.cross_entropy(logits.view(-1, 61), targets.view(-1), ignore_index=-1)
    wanted = [x, *head.parameters()]
    found = model.loss(x, targets)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [{}, UNIFIED], ids=["baseline", "unified"])
def test_loss_holds_nothing_of_the_size_of_the_logits_but_the_product(keys, compute_dtype):
    """What autograd keeps between forward and backward, by storage: the head's product once, in the compute dtype, unified too."""
    model = tiny_gpt(vocab_size=4096, block_size=64, **keys)
    model.compute_dtype = compute_dtype
    idx, targets = tiny_batch(batch=4, length=64, vocab=4096)
    kept, size = {}, idx.numel() * 4096 * compute_dtype.itemsize

    def remember(tensor):
        if tensor.untyped_storage().nbytes() >= idx.numel() * 4096 * 2:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
        loss = model(idx, targets)[1]
    assert sum(kept.values()) <= size
    loss.backward()


def test_recompute_changes_nothing():
    idx, targets = tiny_batch()
    for keys in (UNIFIED, dict(n_expert=3, n_expert_active=2)):
        (loss, grads), (again, recomputed) = (gradients(randomize_scales(tiny_gpt(**keys, recompute=r)), idx, targets)
                                              for r in (False, True))
        assert torch.equal(loss, again) and all(torch.equal(grads[name], recomputed[name]) for name in grads)


def test_compute_dtype_is_the_only_cast():
    model, idx = tiny_gpt(**UNIFIED), tiny_batch()[0]
    full = model(idx)[0]
    model.compute_dtype = torch.bfloat16
    half, loss = model(idx)[0], model(idx, idx)[1]
    assert half.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert (half.float() - full).norm() / full.norm() < 0.02


@pytest.mark.parametrize("keys", [{}, UNIFIED, {"qk_norm": True, "n_expert": 3, "n_expert_active": 2}], ids=["plain", "unified", "moe"])
def test_generate(keys):
    """Greedy tokens, far beyond block_size, against the whole context read again for each, and against the cache left out."""
    model, idx = tiny_gpt(torch.float64, **keys), tiny_batch(length=5)[0]
    cached, plain = (torch.cat(list(model.generate(idx, 40, temperature=0, use_cache=c)), 1) for c in (True, False))
    assert torch.equal(cached, plain)
    context = idx
    for t in range(40):
        context = context[:, -8:] if context.size(1) > 16 else context  # full: the newer half stays
        expected = model(context)[0][:, -1].argmax(-1)
        assert torch.equal(cached[:, t], expected)
        context = torch.cat((context, expected[:, None]), 1)
    assert torch.equal(torch.cat(list(model.generate(idx, 5, temperature=2.0, top_k=1)), 1), cached[:, :5])
    a, b = (torch.cat(list(model.generate(idx, 5, generator=torch.Generator().manual_seed(3))), 1) for _ in range(2))
    assert torch.equal(a, b)


def test_a_cached_step_reads_one_position():
    """The work of a step does not grow but for attention itself: every map sees one row."""
    model, rows = tiny_gpt(), []
    for attention in (layer.attn for layer in model.layers):
        attention.register_forward_hook(lambda module, args, out: rows.append(args[0].size(1)))
    list(model.generate(tiny_batch(length=5)[0], 11, temperature=0))
    assert rows == [5, 5] + [1] * 20


@pytest.mark.parametrize("keys, message", [
    (dict(n_embd=30), r"n_embd=30 is not divisible by n_head=4: choose n_embd=32"),
    (dict(n_embd=12), r"n_embd/n_head=3 is odd"),
    (dict(n_kv_head=3), r"n_head=4 is not divisible by n_kv_head=3"),
    (dict(n_layer=0), r"n_layer=0 must be at least 1"),
    (dict(n_expert=2, n_expert_active=1, n_dense_layer=2), r"n_dense_layer=2 leaves none of n_layer=2 for n_expert=2"),
    (dict(norm_eps=0.0), r"norm_eps=0.0 must be above 0"),
    (dict(scale_placement="both"), r"scale_placement='both' is unknown: choose one of input, after, dual, dual_norm"),
    (dict(scale_placement="dualnorm"), r"did you mean dual_norm\?"), (dict(scale_reparam="orignal"), r"did you mean original\?"),
    (dict(scale_reparam="OR"), r"scale_reparam='OR' is unknown"),
    (dict(scale_placement_on="q,x"), r"scale_placement_on='x' is unknown: choose one of q, k, v, gate, up, head, o, down"),
    (dict(scale_placement="dual_norm", qk_norm=True), r"set qk_norm=False, or take q,k out of scale_placement_on"),
    (dict(scale_placement="dual_norm", scale_placement_on="o", post_norm=True), r"set post_norm=False, or take o out"),
])
def test_impossible_configurations(keys, message):
    with pytest.raises(ValueError, match=message) as error:
        GPTConfig(**{**TINY, **keys})
    assert "\n" not in str(error.value)


def test_sequence_too_long():
    with pytest.raises(ValueError, match="17 tokens is longer than block_size=16"):
        tiny_gpt()(torch.zeros(1, 17, dtype=torch.long))
