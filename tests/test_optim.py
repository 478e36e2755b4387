"""
Proves that every parameter is in exactly one group, that each policy decays exactly the vectors it
names (watched in a real step), that Muon and AdamW step as torch.optim's do, that their state comes
back by name, and that the schedules are their formulas.
"""
import math
import types

import pytest
import torch
from conftest import UNIFIED, randomize_scales, tiny_batch, tiny_gpt

from norms import SCALE_DECAY_POLICIES
from optim import (
    Muon,
    cosine,
    learning_rate,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    orthogonalize,
    param_groups,
    set_learning_rate,
    wsd,
)

MODELS = [
    {}, UNIFIED, {"tie_embeddings": True}, {"qk_norm": True, "post_norm": True},
    {"scale_vectors": False}, {"scale_placement": "after", "scale_reparam": "zero_centered"},
    {"scale_placement": "dual", "scale_reparam": "exponential", "scale_placement_on": "q,o,down"},
    {"n_expert": 3, "n_expert_active": 2, **UNIFIED}]


def names_in(groups, wanted):
    """Names of the parameters in a group; none where it is left out."""
    return {name for group in groups if group["name"] == wanted for name, _ in group["params"]}


def test_policies_by_name():
    """The scale vectors of one unified block that each policy decays, spelled out."""
    model = tiny_gpt(n_layer=1, **UNIFIED, scale_placement_on="v,gate")
    q, k, v = (f"layers.0.attn.{m}" for m in "qkv")
    gate, up = "layers.0.mlp.gate", "layers.0.mlp.up"
    inputs = {f"{m}.scale_in.alpha" for m in (q, k, v, gate, up, "head")}
    inputs |= {f"{m}.scale_in.beta" for m in (q, k, up, "head")}  # no Norm undoes these
    out_v = {f"{v}.scale_out.alpha", f"{v}.scale_out.beta"}  # o can absorb it
    out_gate = {f"{gate}.scale_out.alpha", f"{gate}.scale_out.beta"}
    expected = {"all": inputs | out_v | out_gate, "none": set(), "input_norm": inputs,
                "output_norm": out_v | out_gate, "absorbable": inputs | out_v}
    assert expected.keys() == SCALE_DECAY_POLICIES.keys()
    for policy, names in expected.items():
        assert names_in(param_groups(model, 0.1, policy), "scale_decayed") == names, policy


@pytest.mark.parametrize("keys", MODELS, ids=str)
def test_a_step_without_gradient_decays_exactly_the_named_parameters(keys):
    for policy in SCALE_DECAY_POLICIES:
        model = randomize_scales(tiny_gpt(torch.float64, n_layer=1, **keys))
        groups = param_groups(model, 0.1, policy, decay_embeddings=False)
        listed = [p for group in groups for _, p in group["params"]]
        assert len(listed) == len(set(listed)) and set(listed) == set(model.parameters())
        decayed = names_in(groups, "scale_decayed")
        decayed |= {name for name, p in model.named_parameters()
                    if name.endswith(".weight") and p is not model.embedding.weight}
        expected = {name: p.detach() * (0.95 if name in decayed else 1.0)
                    for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        make_optimizer(groups, lr=0.5).step()
        found = {name: p.detach() for name, p in model.named_parameters()}
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_unknown_choices_are_refused():
    message = "scale_weight_decay='iwd' is unknown: choose one of all, none, input_norm"
    with pytest.raises(ValueError, match=message):
        param_groups(tiny_gpt(), 0.1, "iwd")
    with pytest.raises(ValueError, match="optimizer='adam' is unknown: choose one of adamw, muon"):
        make_optimizer(param_groups(tiny_gpt(), 0.1), "adam")


def test_embeddings_decay_as_configured():
    for wanted, decay in ((True, 0.1), (False, 0.0)):
        groups = param_groups(tiny_gpt(), 0.1, decay_embeddings=wanted)
        assert {g["name"]: g["weight_decay"] for g in groups}["embedding"] == decay


def test_parameters_that_are_no_scale_vectors():
    """A number or a vector does not decay. A matrix outside the layers has no role that we know."""
    model = tiny_gpt()
    model.temperature = torch.nn.Parameter(torch.ones(()))
    groups = param_groups(model, 0.1)
    assert names_in(groups, "others") == {"temperature"}
    assert {g["name"]: g["weight_decay"] for g in groups}["others"] == 0
    model.matrix = torch.nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"parameter matrix of shape \(3, 4\) fits no group"):
        param_groups(model, 0.1)


def train_steps(model, optimizer, steps=3):
    idx, targets = tiny_batch()
    for _ in range(steps):
        optimizer.zero_grad()
        model(idx, targets)[1].backward()
        optimizer.step()


def test_muon_is_torchs_muon_for_the_matrices_and_adamw_for_the_rest():
    ours, theirs = tiny_gpt(**UNIFIED), tiny_gpt(**UNIFIED)
    train_steps(ours, make_optimizer(param_groups(ours, 0.1, "input_norm"), "muon", lr=0.01))
    named = dict(theirs.named_parameters())
    hidden = [p for name, p in named.items() if name.startswith("layers.") and p.ndim == 2]
    assert len(hidden) == 2 * 7
    # all that is not hidden: embedding, head and γ_b decay, γ_a does not
    rest = [p for name, p in named.items() if "scale_out" in name]
    decayed = list(set(named.values()) - {*hidden, *rest})
    muon = torch.optim.Muon(hidden, lr=0.01, weight_decay=0.1, momentum=0.95,
                            adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1},
                               {"params": rest, "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.95))
    for _ in range(3):
        theirs.zero_grad()
        theirs(*tiny_batch())[1].backward()
        muon.step()
        adamw.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)  # both orthogonalize in bfloat16


def test_muon_batched_by_shape_is_torchs_slice_by_slice():
    """Matrices of two shapes, tall and wide, and a stack of experts, against torch.optim.Muon on
    each matrix by itself."""
    def matrices(tensors):
        return [m for t in tensors for m in t.detach().view(-1, *t.shape[-2:])]

    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 6), (6, 8), (8, 6), (3, 8, 6)]
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(m.clone()) for m in matrices(ours)]
    keys = dict(lr=0.02, momentum=0.9, weight_decay=0.1)
    a, b = Muon(ours, **keys), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **keys)
    for _ in range(4):
        for p in ours:
            p.grad = torch.randn(p.shape, generator=generator)
        for p, grad in zip(theirs, matrices([p.grad for p in ours])):
            p.grad = grad
        a.step()
        b.step()
    # four steps of 0.011 an entry, in bfloat16
    torch.testing.assert_close(matrices(ours), matrices(theirs), rtol=0, atol=2e-4)


def test_orthogonalize():
    """M = U S Vᵀ becomes about U Vᵀ: values near 1, and each v_i is sent to its own u_i."""
    M = torch.randn(5, 12, 7, generator=torch.Generator().manual_seed(1))
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    found = orthogonalize(M).float()
    values = torch.linalg.svdvals(found)
    assert 0.6 < values.min() and values.max() < 1.3
    assert (torch.einsum("kmi,kmn,kin->ki", U, found, Vh) > 0.6).all()


def test_scale_lr_multiplies_the_rate_of_scale_vectors_only():
    """In a step of AdamW a rate twice as large moves each scale vector twice as far, and no
    matrix."""
    moved = []
    for factor in (1.0, 2.0):
        model = tiny_gpt(torch.float64, **UNIFIED)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = make_optimizer(param_groups(model, 0.0, scale_lr=factor), lr=1.0)
        set_learning_rate(optimizer, 1e-3)
        train_steps(model, optimizer, 1)
        moved.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    expected = {name: once * (2 if "scale" in name else 1) for name, once in moved[0].items()}
    torch.testing.assert_close(moved[1], expected, rtol=1e-6, atol=1e-12)


def test_optimizer_state_of_another_model_is_refused():
    model = tiny_gpt()
    optimizer = make_optimizer(param_groups(model, 0.1))
    train_steps(model, optimizer, 1)
    state = optimizer_state(optimizer)
    for other, message in (
            (tiny_gpt(n_layer=1), "layers.1.attn.* is unknown"),
            (tiny_gpt(d_ff=40), r"exp_avg of .*mlp.* has shape .*48.*, the parameter .*40")):
        with pytest.raises(ValueError, match=message) as error:
            load_optimizer_state(make_optimizer(param_groups(other, 0.1)), state)
        assert "\n" not in str(error.value)


def test_state_follows_names_when_the_decay_policy_changes():
    """Another policy sorts the parameters into other groups; each keeps its own moments."""
    model = tiny_gpt(**UNIFIED)
    optimizer = make_optimizer(param_groups(model, 0.1, "all"))
    train_steps(model, optimizer, 2)
    state = optimizer_state(optimizer)
    other = make_optimizer(param_groups(model, 0.1, "input_norm"))
    load_optimizer_state(other, state)
    for name, p in model.named_parameters():
        assert torch.equal(other.state[p]["exp_avg"], optimizer.state[p]["exp_avg"]), name


def test_learning_rate_reads_the_configuration():
    config = types.SimpleNamespace(schedule="cosine", learning_rate=1e-3, max_iters=50, min_lr=1e-4,
                                   warmup_iters=5, decay_share=0.2, decay_shape="linear")
    assert learning_rate(20, config) == cosine(20, 1e-3, 50, 5, 1e-4)
    config.schedule = "wsd"
    assert learning_rate(45, config) == wsd(45, 1e-3, 50, 5, 1e-4, 0.2, "linear")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_state_survives_a_file(name, tmp_path):
    straight, stopped, resumed = (tiny_gpt(**UNIFIED) for _ in range(3))
    train_steps(straight, make_optimizer(param_groups(straight, 0.1), name), steps=4)
    optimizer = make_optimizer(param_groups(stopped, 0.1), name)
    train_steps(stopped, optimizer, steps=2)
    torch.save(optimizer_state(optimizer), tmp_path / "optimizer.pt")
    resumed.load_state_dict(stopped.state_dict())
    optimizer = make_optimizer(param_groups(resumed, 0.1), name)
    load_optimizer_state(optimizer, torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train_steps(resumed, optimizer, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))


def test_cosine_is_torchs():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=3e-4)
    for step in range(10, 101):
        [expected] = scheduler.get_last_lr()
        assert cosine(step, 3e-3, 100, 10, 3e-4) == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", [cosine, wsd])
def test_warmup_is_linear_and_never_zero(schedule):
    assert [schedule(s, 1.0, 100, 4) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule(0, 1.0, 100, 0) == 1.0
    assert schedule(150, 1.0, 100, 4, 0.1) == 0.1


@pytest.mark.parametrize("shape, quarter", [
    ("linear", 0.75), ("cosine", 0.5 + 0.5 * math.cos(math.pi / 4)), ("sqrt", 0.5),
])
def test_wsd(shape, quarter):
    lr = [wsd(s, 1.0, 100, 10, 0.0, decay_share=0.4, decay_shape=shape) for s in range(101)]
    assert lr[9:61] == [1.0] * 52
    assert math.isclose(lr[70], quarter)
    assert lr[100] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in zip(lr[60:], lr[61:]))
    assert wsd(70, 1.0, 100, 10, 0.2, 0.4, shape) == pytest.approx(0.2 + 0.8 * quarter)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_cuda_fused_step_agrees_with_the_cpu(name):
    cpu, gpu = tiny_gpt(**UNIFIED), tiny_gpt(**UNIFIED).cuda()
    idx, targets = tiny_batch()
    for model, fused in ((cpu, False), (gpu, True)):
        groups = param_groups(model, 0.1, "absorbable")
        optimizer = make_optimizer(groups, name, lr=1e-3, fused=fused)
        model(idx.to(model.cos.device), targets.to(model.cos.device))[1].backward()
        optimizer.step()
    for (key, a), b in zip(cpu.named_parameters(), gpu.parameters()):
        assert (a - b.cpu()).norm() <= 0.02 * a.norm(), key  # Muon orthogonalizes in bfloat16
