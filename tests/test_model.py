"""
Proves that the decoder is one: causal, rotary, counted right, started as its table says; that every combination of the
scale keys trains, reloads, and runs the same on both execution routes; and that its loss is cross-entropy in little memory.
"""
import itertools
import math

import pytest
import torch
from conftest import COMPILER, TINY, UNIFIED, randomize_scales, tiny_batch, tiny_gpt
from torch.nn import functional as F

from model import GPT, GPTConfig, apply_rope, chunked_cross_entropy, rope_tables
from norms import PLACEMENTS, REPARAMS
from optim import SCALE_DECAY_POLICIES, make_optimizer, param_groups

COMBINATIONS = [dict(scale_vectors=s, scale_heterogeneous=h, scale_placement=p, scale_reparam=r)
                for s, h, p, r in itertools.product((True, False), (False, True), PLACEMENTS, REPARAMS)]


def gradients(model, idx, targets):
    model.zero_grad()
    logits, loss = model(idx, targets)
    loss.backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("keys", COMBINATIONS, ids=lambda keys: "-".join(map(str, keys.values())))
def test_every_combination_trains_reloads_and_runs_on_both_routes(keys, tmp_path):
    idx, targets = tiny_batch()
    for policy in SCALE_DECAY_POLICIES:
        model = tiny_gpt(**keys)
        optimizer = make_optimizer(param_groups(model, 0.1, policy), lr=1e-2)
        before = {name: p.clone() for name, p in model.named_parameters()}
        model(idx, targets)[1].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        assert all((p != before[name]).any() for name, p in model.named_parameters())
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "ckpt.pt")
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    again = tiny_gpt(seed=5, **keys)
    again.load_state_dict(state["model"])
    assert torch.equal(again(idx)[0], model(idx)[0])

    randomize_scales(model)
    other = tiny_gpt(**keys, scale_execution="activations")
    other.load_state_dict(model.state_dict())
    (logits, grads), (other_logits, other_grads) = gradients(model, idx, targets), gradients(other, idx, targets)
    torch.testing.assert_close(other_logits, logits, rtol=1e-5, atol=1e-5)
    for name in grads:
        torch.testing.assert_close(other_grads[name], grads[name], rtol=1e-5, atol=1e-5, msg=name)


def test_variants_start_as_the_baselines_function():
    """γ = 1 everywhere, so all but DNP, whose extra norm is another function, start alike; and all from the same matrices."""
    idx, baseline = tiny_batch()[0], tiny_gpt()
    for keys in COMBINATIONS:
        model = tiny_gpt(**keys)
        for name, W in baseline.named_parameters():
            if "scale" not in name:
                assert torch.equal(dict(model.named_parameters())[name], W)
        same = torch.equal(model(idx)[0], baseline(idx)[0])
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


def test_llama_1b_has_the_papers_counts():
    with torch.device("meta"):
        model = GPT(GPTConfig(n_embd=1792, n_layer=22, n_head=14, vocab_size=50304))
    assert model.config.d_ff == 4778
    assert (model.num_params("total"), model.num_params("scale_vectors")) == (1_028_065_024, 80_640)
    assert model.num_params("non_embedding") == 1_028_065_024 - 50304 * 1792
    with pytest.raises(ValueError, match="num_params"):
        model.num_params("all")


def test_counts_by_hand():
    C, D, V, ff, L = 32, 8, 61, 48, 2
    matrices = L * (C * C + 2 * C * 2 * D + C * C + 3 * C * ff)
    assert tiny_gpt().num_params() == matrices + 2 * V * C + (2 * L + 1) * C
    assert tiny_gpt(tie_embeddings=True).num_params("non_embedding") == matrices + V * C + (2 * L + 1) * C
    assert tiny_gpt(scale_vectors=False).num_params("scale_vectors") == 0
    unified = tiny_gpt(**UNIFIED).num_params("scale_vectors")  # per layer 5 inputs, outputs of q, k, v, gate, up; and a β each
    assert unified == L * (5 * C + C + 2 * 2 * D + 2 * ff + 10) + C + 1
    assert tiny_gpt().flops_per_token() == 6 * (matrices + V * C) + 12 * L * C * 16


def test_initial_weights_follow_the_table():
    model = tiny_gpt(n_embd=128, d_ff=256, vocab_size=300, init_std=0.03)
    for name, p in model.named_parameters():
        if "scale" in name:
            assert (p == 1).all()
        else:
            std = 0.03 / math.sqrt(2 * 2) if name.endswith((".o", ".down")) else 0.03
            assert abs(p.std() / std - 1) < 0.05 and abs(p.mean()) < 0.05 * std, name
    assert GPTConfig(n_embd=144, init_std=0.0).init_std == 1 / 12


@pytest.mark.parametrize("chunk_elements", [2 ** 26, 200])
def test_loss_is_cross_entropy(chunk_elements):
    logits = torch.randn(4, 7, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    targets = torch.randint(30, (4, 7), generator=torch.Generator().manual_seed(1))
    targets[1, 3:] = -1
    loss = chunked_cross_entropy(logits, targets, chunk_elements)
    expected = F.cross_entropy(logits.view(-1, 30), targets.view(-1), ignore_index=-1)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_loss_holds_at_most_one_float32_copy_of_the_logits(compute_dtype):
    """What autograd keeps between forward and backward, by storage: logits once (in the compute dtype), nothing else so big."""
    model = tiny_gpt(vocab_size=4096, block_size=64)
    model.compute_dtype = compute_dtype
    idx, targets = tiny_batch(batch=4, length=64, vocab=4096)
    kept = {}

    def remember(tensor):
        if tensor.untyped_storage().nbytes() >= idx.numel() * 4096 * 2:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
        logits, loss = model(idx, targets)
    assert sum(kept.values()) <= idx.numel() * 4096 * 4
    loss.backward()


def test_compute_dtype_is_the_only_cast():
    model, idx = tiny_gpt(**UNIFIED), tiny_batch()[0]
    full = model(idx)[0]
    model.compute_dtype = torch.bfloat16
    half, loss = model(idx, idx)
    assert half.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert (half.float() - full).norm() / full.norm() < 0.02


def test_generate():
    model, idx = tiny_gpt(), tiny_batch()[0]
    tokens = torch.cat(list(model.generate(idx, 5, temperature=0)), 1)  # longer than block_size together: the window slides
    text = idx
    for t in range(5):
        expected = model(text[:, -16:])[0][:, -1].argmax(-1)
        assert torch.equal(tokens[:, t], expected)
        text = torch.cat((text, expected[:, None]), 1)
    greedy = torch.cat(list(model.generate(idx, 5, temperature=2.0, top_k=1)), 1)
    assert torch.equal(greedy, tokens)
    a, b = (torch.cat(list(model.generate(idx, 5, generator=torch.Generator().manual_seed(3))), 1) for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.skipif(COMPILER is None, reason="torch.compile needs a C++ compiler")
def test_compiled_model_is_the_same_function():
    model = randomize_scales(tiny_gpt(**UNIFIED))
    idx, targets = tiny_batch()
    (_, grads), (_, compiled) = gradients(model, idx, targets), gradients(torch.compile(model), idx, targets)
    for name, grad in grads.items():
        torch.testing.assert_close(compiled["_orig_mod." + name], grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("keys, message", [
    (dict(n_embd=30), r"n_embd=30 is not divisible by n_head=4: choose n_embd=32"),
    (dict(n_embd=12), r"n_embd/n_head=3 is odd"),
    (dict(n_kv_head=3), r"n_head=4 is not divisible by n_kv_head=3"),
    (dict(n_layer=0), r"n_layer=0 must be at least 1"),
    (dict(norm_eps=0.0), r"norm_eps=0.0 must be above 0"),
    (dict(scale_placement="both"), r"scale_placement='both' is unknown: choose one of input, dual, dual_norm"),
    (dict(scale_reparam="OR"), r"scale_reparam='OR' is unknown"),
    (dict(scale_execution="fast"), r"scale_execution='fast' is unknown"),
    (dict(scale_placement_on="q,x"), r"names 'x': choose among q,k,v,gate,up,o,down"),
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("keys", [{}, UNIFIED], ids=["baseline", "unified"])
def test_cuda_bf16_compiled_agrees_with_float32(keys):
    model, (idx, targets) = randomize_scales(tiny_gpt(n_embd=128, d_ff=256, **keys)), tiny_batch()
    _, expected = gradients(model, idx, targets)
    model = model.cuda()
    model.compute_dtype = torch.bfloat16
    _, grads = gradients(torch.compile(model), idx.cuda(), targets.cuda())
    for name, grad in expected.items():
        found = grads["_orig_mod." + name].cpu()
        assert (found - grad).norm() <= 0.05 * grad.norm() + 1e-6, name
