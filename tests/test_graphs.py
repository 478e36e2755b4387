"""
Proves that what was made fast is the same function as what was written plainly, in value and gradient, and counts what
torch.compile makes of it: one graph for all blocks, and no second one for a second batch, a second micro-step or a second layer.
"""
import json

import pytest
import torch
from conftest import COMPILER, MIXTURE, UNIFIED, randomize_scales, run, tiny_batch, tiny_gpt
from torch._dynamo.utils import counters

from lib.process import compile_model
from model import GPT

PARTS = dict(backend="aot_eager", options=None)  # the graphs that Inductor would get, run by PyTorch's own kernels


def micro_steps(model, batches=2):
    """Gradients after some micro-steps with other batches, added up as in training. -> {name: gradient}"""
    model.zero_grad()
    for seed in range(batches):
        loss = model(*tiny_batch(seed))[1]
        (loss + model.auxiliary_loss()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def compiled(model, **how):
    torch._dynamo.reset()
    counters.clear()
    compile_model(model, **how)
    return model


def counted():
    """(graphs, breaks) since `compiled`."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.parametrize("keys, dtype, parts", [
    ({}, torch.float32, 3),  # one block for all layers, the head's product, the loss
    pytest.param({"recompute": True}, torch.float32, 3, marks=pytest.mark.slow),
    (MIXTURE, torch.bfloat16, 4),  # and a block with experts: what CUDA runs
    (MIXTURE, torch.float32, 4),  # experts in float32 are a loop that stays eager: a dense block, the other's attention, head, loss
], ids=["dense", "recompute", "mixture", "looped mixture"])
def test_graphs_and_recompiles(keys, dtype, parts):
    """Training with accumulation, evaluation, and training again compile each part once with gradients and once without, whatever
    the layer and the routing, without a break; and the graphs are the same function."""
    def four_layers():
        model = randomize_scales(tiny_gpt(n_layer=4, **UNIFIED, **keys))
        model.compute_dtype = dtype
        return model
    plain, model = four_layers(), compiled(four_layers(), **PARTS)
    expected, found = micro_steps(plain), micro_steps(model)
    assert counted() == (parts, 0)
    for seed in range(2):
        with torch.no_grad():
            model.eval()(*tiny_batch(seed))
        model.train()
    assert counted() == (2 * parts, 0)
    micro_steps(model, batches=3)
    assert counted() == (2 * parts, 0)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= tolerance * grad.norm() + 1e-6, name
    assert model.state_dict().keys() == plain.state_dict().keys()
    list(model.eval().generate(tiny_batch(length=5)[0], 3))
    assert counted() == (2 * parts, 0)  # a sample, whose every length would be another graph, compiles nothing


@pytest.mark.slow
def test_graphs_in_two_processes(tmp_path):
    """Under torchrun and DistributedDataParallel, with gradients that meet in the last of two micro-steps: no other graphs."""
    run("tests/two_graphs.py", tmp_path, processes=2, env={"PYTHONPATH": ".:tests"})
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for name, parts in (("dense", 3), ("mixture", 4)):
        assert [process[name]["after_training"] for process in said] == [[parts, 0]] * 2, said
        assert [process[name]["after_evaluation"] for process in said] == [[2 * parts, 0]] * 2, said
        assert said[0][name]["weights"] == said[1][name]["weights"]


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("keys, dtype, tolerance", [({}, torch.float32, 1e-4), (MIXTURE, torch.bfloat16, 0.1)], ids=["dense", "mixture"])
def test_compiled_parts_are_the_same_function(keys, dtype, tolerance):
    """Inductor's own kernels against eager float32, gradient by gradient; a mixture's in bfloat16 together."""
    expected = micro_steps(randomize_scales(tiny_gpt(**UNIFIED, **keys)))
    model = randomize_scales(tiny_gpt(**UNIFIED, **keys))
    model.compute_dtype = dtype
    found = micro_steps(compiled(model))
    together = torch.cat([grad.flatten() for grad in expected.values()])
    assert (torch.cat([grad.flatten() for grad in found.values()]) - together).norm() <= tolerance * together.norm()
    for name, grad in expected.items():
        assert dtype != torch.float32 or (found[name] - grad).norm() <= tolerance * grad.norm() + 1e-5, name


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("keys", [{}, UNIFIED], ids=["baseline", "unified"])
def test_the_compiled_loss_keeps_nothing_of_the_size_of_the_logits_but_the_product(keys):
    """It has no chunks: what it keeps for the backward pass is W̃ x, its argument."""
    model = compiled(tiny_gpt(vocab_size=4096, **keys))
    y = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    kept = {}

    def remember(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
        loss = model.summed_loss(y, torch.arange(64))
    assert sum(kept.values()) < 1.2 * y.numel() * 2 and y.data_ptr() in kept
    loss.backward()
    torch.testing.assert_close(loss, GPT.summed_loss(model, y, torch.arange(64)), rtol=1e-5, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("keys", [{}, UNIFIED, {**UNIFIED, **MIXTURE}], ids=["baseline", "unified", "mixture"])
def test_cuda_bf16_compiled_agrees_with_float32(keys):
    shape = dict(n_embd=128, d_ff=250, **keys)
    expected = micro_steps(randomize_scales(tiny_gpt(**shape)))
    model = randomize_scales(tiny_gpt(**shape)).cuda()
    model.compute_dtype = torch.bfloat16
    compiled(model)
    for seed in range(2):
        loss = model(*(t.cuda() for t in tiny_batch(seed)))[1]
        (loss + model.auxiliary_loss()).backward()
    assert counted() == (4 if "n_expert" in keys else 3, 0)
    found = {name: p.grad.cpu() for name, p in model.named_parameters()}
    everything = [torch.cat([grad.flatten() for grad in grads.values()]) for grads in (expected, found)]
    assert (everything[1] - everything[0]).norm() <= 0.05 * everything[0].norm()
    if "n_expert" not in keys:  # a token that bfloat16 routes otherwise changes the gradients of two experts
        for name, grad in expected.items():
            assert (found[name] - grad).norm() <= 0.05 * grad.norm() + 1e-6, name
