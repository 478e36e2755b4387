"""
Proves that what torch.compile makes of a model is the same function in value and gradient, and
counts it: one graph for all blocks, and no second one for a second batch, micro-step or layer.
"""
import pytest
import torch
import torch.distributed as dist
from conftest import COMPILER, MIXTURE, UNIFIED, randomize_scales, tiny_batch, tiny_gpt
from torch._dynamo.utils import counters

from lib.process import Process, compile_model
from sample import generate


LONG_HEAD = {"vocab_size": 161}  # so that the head, and nine sequences, go fast.by_gram's way


def micro_steps(model, runner=None, batches=2):
    """{name: gradient}, added up over micro-steps. runner: the model, or what is around it."""
    model.zero_grad(set_to_none=False)  # under DDP they are views of its buckets
    for seed in range(batches):
        loss = (runner or model)(*tiny_batch(seed, batch=9).to(model.cos.device))[1]
        (loss + model.auxiliary_loss()).backward()
    return {name: p.grad.cpu().clone() for name, p in model.named_parameters()}


def check_gradients(found, expected, each, together):
    """All gradients together, and each by itself: to a share of its own norm and of the norm of
    all, because a β's is a small sum of large terms."""
    def flat(gradients):
        return torch.cat([g.flatten() for g in gradients.values()])

    size = flat(expected).norm()
    assert (flat(found) - flat(expected)).norm() <= together * size
    for name, g in expected.items():
        assert (found[name] - g).norm() <= each * (g.norm() + size / 20), name


def compiled(model, **how):
    torch._dynamo.reset()
    counters.clear()
    compile_model(model, **how)
    return model


def counted():
    """(graphs, breaks) since `compiled`."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.fixture
def parallel(tmp_path):
    """Process.parallel, as in one process of several."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    process = Process()
    process.world_size, process.device = 2, torch.device("cpu")
    yield process.parallel
    dist.destroy_process_group()


# One block for all dense layers, one with experts, the head with the loss. Experts in float32
# are a loop that stays eager: of their block only the attention is compiled.
@pytest.mark.parametrize("keys, dtype, ddp, parts", [
    (MIXTURE, torch.bfloat16, False, 3),  # what CUDA runs
    pytest.param(MIXTURE, torch.bfloat16, True, 3, marks=pytest.mark.slow),
    pytest.param(MIXTURE, torch.float32, False, 3, marks=pytest.mark.slow),
    pytest.param({}, torch.float32, True, 2, marks=pytest.mark.slow),
    pytest.param({"recompute": True}, torch.float32, False, 2, marks=pytest.mark.slow),
], ids=["mixture", "parallel mixture", "looped mixture", "parallel dense", "recompute"])
def test_graphs_and_recompiles(keys, dtype, ddp, parts, parallel):
    """Training with accumulation, evaluation, training again and sampling compile each part once
    with gradients and once without, whatever the layer and the routing, without a break."""
    depth = {"n_layer": 4, "n_dense_layer": 2 if "n_expert" in keys else 0}
    model = randomize_scales(tiny_gpt(**{**UNIFIED, **LONG_HEAD, **keys, **depth}))
    model.compute_dtype = dtype
    expected = micro_steps(model)
    runner = parallel(model) if ddp else model
    compiled(model, backend="eager", options=None)
    found = micro_steps(model, runner)
    assert counted() == (parts, 0)
    for seed in range(2):
        with torch.no_grad():
            model.eval()(*tiny_batch(seed, batch=9))
        model.train()
    assert counted() == (2 * parts, 0)
    micro_steps(model, runner, batches=3)
    list(generate(model.eval(), tiny_batch(length=5)[0], 3))
    assert counted() == (2 * parts, 0)

    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    check_gradients(found, expected, tolerance, tolerance)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("keys, dtype, each, together", [
    ({}, torch.float32, 1e-4, 1e-4),
    (MIXTURE, torch.bfloat16, 1.0, 0.1),  # a token routed otherwise changes two experts' gradients
], ids=["dense", "mixture"])
def test_inductors_kernels_are_the_same_function(keys, dtype, each, together):
    """Against eager float32."""
    keys = {**UNIFIED, **LONG_HEAD, **keys}
    expected = micro_steps(randomize_scales(tiny_gpt(**keys)))
    model = randomize_scales(tiny_gpt(**keys))
    model.compute_dtype = dtype
    check_gradients(micro_steps(compiled(model)), expected, each, together)
