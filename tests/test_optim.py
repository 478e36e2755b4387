"""
Proves that every parameter is in exactly one group, that each policy decays exactly the vectors it names (watched in a
real step), that Muon and AdamW step as torch.optim's do alone, that their state comes back by name, and that the schedules are
their formulas.
"""
import math
import types

import pytest
import torch
from conftest import UNIFIED, randomize_scales, tiny_batch, tiny_gpt

from norms import SCALE_DECAY_POLICIES, named_scale_vectors
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

MODELS = [{}, UNIFIED, {"tie_embeddings": True}, {"qk_norm": True, "post_norm": True}, {"scale_vectors": False},
          {"scale_placement": "dual", "scale_reparam": "exponential", "scale_placement_on": "q,o,down"},
          {"scale_placement": "after", "scale_reparam": "zero_centered"}, {"n_expert": 3, "n_expert_active": 2, **UNIFIED}]
def test_policies_by_name():
    """The scale vectors of one unified block that each policy decays, spelled out."""
    model = tiny_gpt(n_layer=1, **UNIFIED, scale_placement_on="v,gate")
    inputs = {f"layers.0.{m}.scale_in.alpha" for m in ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")} | {"head.scale_in.alpha"}
    inputs |= {f"{m}.scale_in.beta" for m in ("layers.0.attn.q", "layers.0.attn.k", "layers.0.mlp.up", "head")}  # no Norm undoes these
    v, gate = ({f"layers.0.{m}.scale_out.{part}" for part in ("alpha", "beta")} for m in ("attn.v", "mlp.gate"))
    expected = {"all": inputs | v | gate, "none": set(), "input_norm": inputs, "output_norm": v | gate, "absorbable": inputs | v}
    assert expected.keys() == SCALE_DECAY_POLICIES.keys()
    for policy, names in expected.items():
        decayed = [g["params"] for g in param_groups(model, 0.1, policy) if g["name"] == "scale_decayed"]
        assert {name for params in decayed for name, _ in params} == names, policy


@pytest.mark.parametrize("policy", SCALE_DECAY_POLICIES)
@pytest.mark.parametrize("keys", MODELS, ids=str)
def test_a_step_with_no_gradient_decays_exactly_the_named_parameters(keys, policy):
    model = randomize_scales(tiny_gpt(torch.float64, **keys))
    groups = param_groups(model, weight_decay=0.1, scale_weight_decay=policy, decay_embeddings=False)
    listed = [p for group in groups for _, p in group["params"]]
    assert len(listed) == len(set(listed)) and set(listed) == set(model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    decayed = {name for group in groups if group["name"] == "scale_decayed" for name, _ in group["params"]}
    decayed |= {name for name in before if "scale" not in name and "_norm" not in name and name != "embedding.weight"}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    make_optimizer(groups, lr=0.5).step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if name in decayed else 1.0), rtol=1e-12, atol=0, msg=name)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="scale_weight_decay='iwd' is unknown: choose one of all, none, input_norm"):
        param_groups(tiny_gpt(), 0.1, "iwd")
    with pytest.raises(ValueError, match="optimizer='adam' is unknown: choose one of adamw, muon"):
        make_optimizer(param_groups(tiny_gpt(), 0.1), "adam")


def test_embeddings_decay_as_configured():
    for wanted in (True, False):
        group = next(g for g in param_groups(tiny_gpt(), 0.1, decay_embeddings=wanted) if g["name"] == "embedding")
        assert group["weight_decay"] == (0.1 if wanted else 0.0)


def test_parameters_that_are_no_scale_vectors():
    """A number or a vector does not decay. A matrix outside the layers has no role that we know."""
    model = tiny_gpt()
    model.temperature = torch.nn.Parameter(torch.ones(()))
    others = next(g for g in param_groups(model, 0.1) if g["name"] == "others")
    assert [name for name, _ in others["params"]] == ["temperature"] and others["weight_decay"] == 0
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
    hidden = [p for name, p in theirs.named_parameters() if name.endswith(".weight") and name.startswith("layers.")]
    decayed = {p for _, s in named_scale_vectors(theirs) if s.input_norm for p in s.parameters()}
    decayed |= {theirs.embedding.weight, theirs.head.weight}
    rest = [p for p in theirs.parameters() if not any(p is h for h in hidden) and p not in decayed]
    muon = torch.optim.Muon(hidden, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([{"params": list(decayed), "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                              lr=0.01, betas=(0.9, 0.95))
    idx, targets = tiny_batch()
    for _ in range(3):
        theirs.zero_grad()
        theirs(idx, targets)[1].backward()
        muon.step()
        adamw.step()
    assert len(hidden) == 2 * 7
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4, msg=name)  # both orthogonalize in bfloat16


def test_muon_batched_by_shape_is_torchs_slice_by_slice():
    """Matrices of two shapes, tall and wide, and a stack of experts, against torch.optim.Muon on each matrix alone."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 6), (6, 8), (8, 6), (3, 8, 6)]
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(m.clone()) for p in ours for m in p.detach().view(-1, *p.shape[-2:])]
    a = Muon(ours, lr=0.02, momentum=0.9, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p in ours:
            p.grad = torch.randn(p.shape, generator=generator)
        for matrix, grad in zip(theirs, [m for p in ours for m in p.grad.view(-1, *p.shape[-2:])]):
            matrix.grad = grad
        a.step()
        b.step()
    for found, expected in zip([m for p in ours for m in p.detach().view(-1, *p.shape[-2:])], theirs):
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=2e-4)  # four steps of 0.011 an entry, in bfloat16


def test_orthogonalize():
    M = torch.randn(5, 12, 7, generator=torch.Generator().manual_seed(1))
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    found = torch.linalg.svdvals(orthogonalize(M).float())
    assert 0.6 < found.min() and found.max() < 1.3
    aligned = torch.einsum("kmi,kmn,kin->ki", U, orthogonalize(M).float(), Vh)  # each u_i is sent to its own v_i
    assert (aligned > 0.6).all()


def test_scale_lr_multiplies_the_rate_of_scale_vectors_alone():
    """Two models one step apart under AdamW: a rate twice as large moves each scale vector twice as far, and no matrix."""
    moved = []
    for factor in (1.0, 2.0):
        model = tiny_gpt(torch.float64, **UNIFIED)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = make_optimizer(param_groups(model, 0.0, scale_lr=factor), lr=1.0)
        set_learning_rate(optimizer, 1e-3)
        train_steps(model, optimizer, 1)
        moved.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    for name, once in moved[0].items():
        torch.testing.assert_close(moved[1][name], once * (2.0 if "scale" in name else 1.0), rtol=1e-6, atol=1e-12)


def test_optimizer_state_of_another_model_is_refused():
    optimizer = make_optimizer(param_groups(tiny_gpt(), 0.1))
    train_steps(model := tiny_gpt(), optimizer := make_optimizer(param_groups(model, 0.1)), 1)
    state = optimizer_state(optimizer)
    for other, message in ((tiny_gpt(n_layer=1), "layers.1.attn.* is unknown"),
                           (tiny_gpt(d_ff=40), r"exp_avg of .*mlp.* has shape .*48.*, the parameter .*40")):
        with pytest.raises(ValueError, match=message) as error:
            load_optimizer_state(make_optimizer(param_groups(other, 0.1)), state)
        assert "\n" not in str(error.value)


def test_state_follows_names_when_the_decay_policy_changes():
    """Another policy sorts the parameters into other groups; each keeps its own moments."""
    train_steps(model := tiny_gpt(**UNIFIED), optimizer := make_optimizer(param_groups(model, 0.1, "all")), 2)
    state = optimizer_state(optimizer)
    other = make_optimizer(param_groups(model, 0.1, "input_norm"))
    load_optimizer_state(other, state)
    for name, p in model.named_parameters():
        assert torch.equal(other.state[p]["exp_avg"], optimizer.state[p]["exp_avg"]), name


def test_learning_rate_reads_the_configuration():
    config = types.SimpleNamespace(schedule="cosine", learning_rate=1e-3, max_iters=50, warmup_iters=5, min_lr=1e-4, decay_share=0.2,
                                   decay_shape="linear")
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
        assert math.isclose(cosine(step, 3e-3, 100, 10, 3e-4), scheduler.get_last_lr()[0], rel_tol=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", [cosine, wsd])
def test_warmup_is_linear_and_never_zero(schedule):
    assert [schedule(s, 1.0, 100, 4) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule(0, 1.0, 100, 0) == 1.0
    assert schedule(150, 1.0, 100, 4, 0.1) == 0.1


@pytest.mark.parametrize("shape, quarter", [("linear", 0.75), ("cosine", 0.5 + 0.5 * math.cos(math.pi / 4)), ("sqrt", 0.5)])
def test_wsd(shape, quarter):
    lr = [wsd(s, 1.0, 100, 10, 0.0, decay_share=0.4, decay_shape=shape) for s in range(101)]
    assert lr[9:61] == [1.0] * 52
    assert math.isclose(lr[70], quarter)
    assert lr[100] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in zip(lr[60:], lr[61:]))
    assert wsd(70, 1.0, 100, 10, 0.2, 0.4, shape) == pytest.approx(0.2 + 0.8 * quarter)
    with pytest.raises(ValueError, match="decay_shape='step' is unknown"):
        wsd(70, 1.0, 100, decay_shape="step")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_cuda_fused_step_agrees_with_the_cpu(name):
    cpu, gpu = tiny_gpt(**UNIFIED), tiny_gpt(**UNIFIED).cuda()
    idx, targets = tiny_batch()
    for model, fused in ((cpu, False), (gpu, True)):
        optimizer = make_optimizer(param_groups(model, 0.1, "absorbable"), name, lr=1e-3, fused=fused)
        model(idx.to(model.cos.device), targets.to(model.cos.device))[1].backward()
        optimizer.step()
    for (key, a), b in zip(cpu.named_parameters(), gpu.parameters()):
        assert (a - b.cpu()).norm() <= 0.02 * a.norm(), key  # Muon orthogonalizes in bfloat16
