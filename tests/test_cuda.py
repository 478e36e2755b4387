"""
Proves on a GPU what a CPU cannot: that Inductor's bfloat16 kernels and the grouped products of
experts are the same functions as exact ones, that a run repeats and resumes, and that a partial
batch is evaluated whole. Without CUDA these are skipped.
"""
import pytest
import torch
from conftest import (
    MIXTURE, SMALL, UNIFIED, UNIFIED_CONFIG, losses, randomize_scales, start, tiny_gpt, trained)
from test_graphs import LONG_HEAD, check_gradients, compiled, counted, micro_steps

from lib.config import load_config
from lib.data import Dataset
from lib.process import Process, to_device
from model import GPTConfig, MoE
from train import evaluate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICE = "cuda"


@pytest.mark.parametrize("keys", [{}, UNIFIED, {**UNIFIED, **MIXTURE}],
                         ids=["baseline", "unified", "mixture"])
def test_bf16_compiled_agrees_with_float64(keys):
    """What training runs: its loss's gradients in every parameter, over two micro-steps."""
    shape = dict(d_ff=250, **LONG_HEAD, **keys)
    expected = micro_steps(randomize_scales(tiny_gpt(torch.float64, **shape)))
    model = randomize_scales(tiny_gpt(**shape)).to(DEVICE)
    model.compute_dtype = torch.bfloat16
    found = micro_steps(compiled(model))
    assert counted() == (3 if "n_expert" in keys else 2, 0)
    # a token that bfloat16 routes otherwise changes the gradients of two experts
    check_gradients(found, expected, 1.0 if "n_expert" in keys else 0.05, 0.05)


@pytest.mark.parametrize("width, C", [(426, 640), (682, 1024), (853, 1280)])
def test_grouped_bf16_experts_agree_with_the_loop(width, C):
    """The routed layer at the paper's widths against float32, with an expert that no token chooses:
    the output, and every gradient."""
    torch.manual_seed(0)
    config = GPTConfig(n_embd=C, n_head=2, n_expert=8, n_expert_active=2, d_expert=width,
                       d_shared_expert=width, init_std=0.0, **UNIFIED)
    layer = MoE(config)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.endswith(".weight"):
                p.normal_(std=C ** -0.5)
        layer.router.weight[7] = -10 * C ** -0.5
    layer.to(DEVICE)
    x = torch.rand(512, C, device=DEVICE).bfloat16().float()  # so that both route alike
    outputs, grads = [], []
    for dtype in (torch.float32, torch.bfloat16):
        layer.zero_grad()
        y, stats = layer(x.to(dtype))
        y.float().square().sum().backward()
        outputs.append(y.detach().float())
        grads.append({name: p.grad for name, p in layer.named_parameters()})
    assert stats[-1] == 0
    assert (outputs[1] - outputs[0]).norm() < 0.01 * outputs[0].norm()
    for name, g in grads[0].items():
        assert (grads[1][name] - g).norm() <= 0.015 * g.norm(), name


def test_a_run_repeats_and_resumes(dataset, tmp_path):
    """Some sums on CUDA have no fixed order: what is resumed differs by no more than what is
    repeated may."""
    def run(name, *args):
        trained(UNIFIED_CONFIG, *start(tmp_path / name, dataset, f"--device={DEVICE}",
                                       "--checkpoint_interval=6", *args))
        return losses(tmp_path / name)

    first, again = run("first"), run("again")
    (tmp_path / "again" / "ckpt_0000012.pt").unlink()
    resumed = run("again", "--resume")
    assert len(first) == len(resumed) == 12
    assert again == pytest.approx(first, abs=1e-3) and resumed == pytest.approx(first, abs=1e-3)


def test_a_partial_batch_is_evaluated_whole(dataset):
    """Eight windows by micro-batches of three: the mean of window by window, in one graph more."""
    config = load_config([UNIFIED_CONFIG, *SMALL, "--batch_size=3", "--eval_windows=8",
                          f"--device={DEVICE}", f"--dataset={dataset}"])
    process, split = Process(), Dataset(dataset, 32).val
    process.start(config)
    torch.manual_seed(0)
    model = tiny_gpt(**vars(config.model)).to(process.device)
    windows = [i * len(split) // 8 for i in range(8)]
    with torch.no_grad():
        one_by_one = [model(*to_device(split[[i]], process.device))[1].item() for i in windows]
    model.compute_dtype = process.dtype
    compiled(model)
    assert evaluate(model, split, config, process) == pytest.approx(sum(one_by_one) / 8, rel=1e-3)
    assert counted() == (2, 0)
