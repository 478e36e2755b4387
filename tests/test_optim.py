"""
Proves that an optimizer's state comes back by name, that what fits no group is refused, and that
the schedules are their formulas. The steps of AdamW and Muon, who decays and at which rate:
test_keys.
"""
import math
import types

import pytest
import torch
import torch.distributed as dist
from conftest import UNIFIED, tiny_batch, tiny_gpt
from torch.distributed.fsdp import FullyShardedDataParallel

from norms import weight_decay_groups
from optim import (
    learning_rate, load_optimizer_state, make_optimizer, optimizer_state, param_groups)


def train_steps(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(*tiny_batch())[1].backward()
        optimizer.step()


def test_refusals():
    model = tiny_gpt()
    groups = param_groups(model, 0.1)
    with pytest.raises(ValueError, match="scale_weight_decay='iwd' is unknown: choose one of all,"):
        param_groups(model, 0.1, "iwd")
    with pytest.raises(ValueError, match="optimizer='adam' is unknown: choose one of adamw, muon"):
        make_optimizer(groups, "adam")
    model.matrix = torch.nn.Parameter(torch.zeros(3, 4))  # outside the layers no role is known
    with pytest.raises(ValueError, match=r"parameter matrix of shape \(3, 4\) fits no group"):
        param_groups(model, 0.1)


def test_a_forks_bias_is_no_scale_vector():
    """It does not decay, and scale_lr does not change its rate."""
    model = tiny_gpt(**UNIFIED)
    model.layers[0].bias = torch.nn.Parameter(torch.zeros(3))
    groups = {g["name"]: g for g in param_groups(model, 0.1, "all", scale_lr=3.0)}
    assert [name for name, _ in groups["others"]["params"]] == ["layers.0.bias"]
    for name, decay, rate in (("others", 0.0, 1.0), ("hidden", 0.1, 1.0),
                              ("scale_decayed", 0.1, 3.0)):
        assert (groups[name]["weight_decay"], groups[name]["lr_scale"]) == (decay, rate)


# ---- optimizers ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_comes_back_by_name_from_a_file(name, tmp_path):
    """Bit for bit, also where another policy sorts the vectors into other groups."""
    straight, stopped, resumed = (tiny_gpt(**UNIFIED) for _ in range(3))
    train_steps(straight, make_optimizer(param_groups(straight, 0.1, "all"), name), steps=4)
    optimizer = make_optimizer(param_groups(stopped, 0.1, "all"), name)
    train_steps(stopped, optimizer, steps=2)
    torch.save(optimizer_state(optimizer), tmp_path / "optimizer.pt")
    resumed.load_state_dict(stopped.state_dict())
    optimizer = make_optimizer(param_groups(resumed, 0.1, "input_norm"), name)
    for group in optimizer.param_groups:  # the decay is not the state's, and stays as it is here
        group["weight_decay"] = 0.1
    load_optimizer_state(optimizer, torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train_steps(resumed, optimizer, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_on_cuda_agrees_with_the_cpus(name):
    cpu, gpu = tiny_gpt(**UNIFIED), tiny_gpt(**UNIFIED).cuda()
    for model in (cpu, gpu):
        optimizer = make_optimizer(param_groups(model, 0.1), name, lr=1e-3)
        model(*tiny_batch().to(model.cos.device))[1].backward()
        optimizer.step()
    for (key, a), b in zip(cpu.named_parameters(), gpu.parameters()):
        assert (a - b.cpu()).norm() <= 0.02 * a.norm(), key  # Muon orthogonalizes in bfloat16


def test_flat_pieces_of_fsdp1_are_refused(tmp_path):
    """Nothing would decay them. use_orig_params=True cuts each parameter, and else one has all."""
    pieces = torch.nn.Module()
    pieces._fsdp_wrapped_module = tiny_gpt()
    for p in pieces.parameters():
        p.data = p.data.flatten()  # what each of several processes has
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    flat = FullyShardedDataParallel(tiny_gpt(), device_id=torch.device("cpu"))
    dist.destroy_process_group()
    for model, name in ((pieces, "embedding.weight"), (flat, "_flat_param")):
        with pytest.raises(ValueError, match=f"^_fsdp_wrapped_module.{name} may be a flat .*FSDP2"):
            weight_decay_groups(model, 0.1, "input_norm")


# ---- schedules -----------------------------------------------------------------------------------

WSD = {0: 0.1, 9: 1.0, 10: 1.0, 60: 1.0, 100: 0.2, 150: 0.2}


@pytest.mark.parametrize("keys, expected", [
    ({"schedule": "cosine"},  # (1 + cos 60°)/2 and (1 + cos 90°)/2 of the way down
     {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 40: 0.2 + 0.8 * 0.75, 55: 0.6, 100: 0.2, 150: 0.2}),
    ({"decay_shape": "linear"}, WSD | {70: 0.2 + 0.8 * 0.75}),
    ({"decay_shape": "cosine"}, WSD | {70: 0.2 + 0.8 * (0.5 + 0.5 * math.sqrt(0.5))}),
    ({"decay_shape": "sqrt"}, WSD | {70: 0.2 + 0.8 * 0.5}),
    ({"decay_share": 0.29}, {71: 1.0, 72: 1 - 0.8 / 29}),  # 28.999999999999996 steps are 29
    ({"warmup_iters": 0}, {0: 1.0}),
    ({"warmup_iters": 0, "schedule": "cosine"}, {0: 1.0}),
], ids=str)
def test_schedules(keys, expected):
    config = types.SimpleNamespace(**{
        "schedule": "wsd", "learning_rate": 1.0, "min_lr": 0.2, "max_iters": 100,
        "warmup_iters": 10, "decay_share": 0.4, "decay_shape": "linear", **keys})
    assert {step: learning_rate(step, config) for step in expected} == pytest.approx(
        expected, rel=1e-12)
