"""
Proves that bench/benchmark.py races what it says: its yardstick is the baseline's function, its
variants share matrices and optimizer state and train all the same, its table follows from its
times; and that bench/gpu_check.sh runs to its end without a GPU.
"""
import contextlib
import json
import re
import statistics
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, tiny_batch, tiny_gpt
from torch._inductor import config as inductor

from bench import benchmark as bench
from bench import gpu_check
from bench.plain import PlainGPT
from lib.config import load_config
from lib.count import flops_per_token
from lib.process import Process, compile_model
from model import GPTConfig

SHAPE = [f"--{key}={value}" for key, value in TINY.items()]
SHAPE += ["--batch_size=2", "--gradient_accumulation_steps=2", "--device=cpu"]
CONFIG = str(ROOT / "configs" / "quickstart_baseline.py")
STANDS_FOR = {  # parameters of PlainGPT: ours, if they have other names
    "qkv.weight": ["attn.q.weight", "attn.k.weight", "attn.v.weight"],
    "o.weight": ["attn.o.weight"],
    "gate_up.weight": ["mlp.gate.weight", "mlp.up.weight"],
    "down.weight": ["mlp.down.weight"],
    "norm1.weight": ["attn.norm.scale.alpha"],
    "norm2.weight": ["mlp.norm.scale.alpha"],
    "norm.weight": ["norm.scale.alpha"]}


def test_the_yardstick_is_the_baselines_function():
    """Same weights in float64: same loss and gradients, to 1e-12, and the same FLOPs."""
    model, plain = tiny_gpt(torch.float64), PlainGPT(GPTConfig(**TINY)).double()
    plain.compute_dtype = torch.float64
    all_ours, pairs = dict(model.named_parameters()), []
    for name, p in plain.named_parameters():
        layer, part = re.fullmatch(r"(layers\.\d\.|)(.+)", name).groups()
        pairs.append((p, [all_ours.pop(layer + ours) for ours in STANDS_FOR.get(part, [part])]))
        p.data = torch.cat(pairs[-1][1]).detach().clone()
    assert not all_ours
    losses = [m(*tiny_batch())[1] for m in (model, plain)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)
    for loss in losses:
        loss.backward()
    torch._dynamo.reset()
    compile_model(plain, backend="eager", options=None)  # as a race does
    torch.testing.assert_close(plain(*tiny_batch())[1], losses[1], rtol=0, atol=1e-12)
    for p, ours in pairs:
        expected = torch.cat([q.grad for q in ours])
        torch.testing.assert_close(p.grad, expected, rtol=0, atol=1e-12)
    for causal in (False, True):
        assert flops_per_token(plain, causal) == flops_per_token(model, causal)
    grouped = [p for group in plain.groups(0.1) for _, p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(pairs)


def test_train(tmp_path):
    """Every contestant; each number of a row follows from its seconds."""
    out = tmp_path / "results" / "bench.json"
    bench.main(["train", CONFIG, *SHAPE, "--rounds=3", f"--out={out}"])
    [race] = json.loads(out.read_text("utf-8"))["races"].values()
    table = bench.table(race).splitlines()
    assert list(race["variants"]) == bench.NAMES == [line[:20].strip() for line in table[1:-1]]
    assert race["micro_steps"] == 2 and race["recompiled_in_the_rounds"] == 0
    assert race["attention"] == ["flash_attention_for_cpu"]
    for row in race["variants"].values():
        assert len(row["seconds"]) == 3
        assert row["tokens_per_s"] == pytest.approx(64 / statistics.median(row["seconds"]))
        baseline = race["variants"]["baseline"]["seconds"]
        ratios = [a / b for a, b in zip(row["seconds"], baseline)]
        assert row["time_over_baseline"] == {"median": statistics.median(ratios),
                                             "min": min(ratios), "max": max(ratios)}


def test_contestants_share_what_is_large():
    """Matrices and AdamW's moments of them are one and the same, vectors are each one's own."""
    config, process = load_config([CONFIG, *SHAPE]), Process()
    process.start(config)
    first = bench.Contestant("baseline", config, process)
    first.step()
    second = bench.Contestant("unified", config, process, first)
    theirs = dict(first.model.named_parameters())
    shared = {n for n, p in second.model.named_parameters() if p is theirs.get(n)}
    assert shared == {n for n in theirs if "scale" not in n}
    W = first.model.layers[0].attn.o.weight
    gamma = second.model.layers[0].attn.q.scale_out.alpha
    before = W.clone(), gamma.clone()
    second.step()
    assert (W != before[0]).any() and (gamma != before[1]).any()
    assert first.optimizer.state[W]["step"] == 2 and second.optimizer.state[gamma]["step"] == 1


def test_interleave():
    """Each round is begun by the next contestant."""
    order = []
    contestants = [SimpleNamespace(name=name, step=lambda name=name: order.append(name))
                   for name in "abc"]
    seconds = bench.interleave(contestants, rounds=4)
    assert "".join(order) == "abc" "bca" "cab" "abc"
    assert all(len(times) == 4 for times in seconds.values())


@pytest.mark.parametrize("argv, message", [
    (["train", CONFIG, "--variants=best"], "--variants names 'best': choose among nanoGPT"),
    (["train", CONFIG, "--rounds=0"], "--rounds=0 must be at least 1"),
    (["cpu", "--threads=1,x"], "--threads=1,x must be numbers"),
    (["cpu", CONFIG], "quickstart_baseline.py: its config is its own")])
def test_refusals(argv, message):
    with pytest.raises(SystemExit) as error:
        bench.main(argv)
    text = str(error.value)
    assert text.startswith("error: ") and message in text and "\n" not in text


def test_a_race_runs_with_its_inductor_keys(monkeypatch):
    seen = []

    @contextlib.contextmanager
    def attention():
        seen.append(inductor.max_pointwise_cat_inputs)
        yield

    keys = {"max_pointwise_cat_inputs": 3}
    race = gpu_check.Race([CONFIG, *SHAPE], ["baseline"], 1, keys, attention)
    monkeypatch.setitem(gpu_check.RACES, "one", race)
    assert gpu_check.run_race("one", toy=True)["variants"] and seen == [3]
    race.inductor["no_such_key"] = 0
    assert "has no Inductor key no_such_key" in gpu_check.run_race("one", toy=True)


@pytest.mark.slow
def test_gpu_check_runs_without_a_gpu():
    command = ["bash", str(ROOT / "bench" / "gpu_check.sh")]
    assert subprocess.run([*command, "D"], capture_output=True).returncode == 2  # no such part
    done = subprocess.run([*command, "toy"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr  # no check has failed
    for check in {*gpu_check.CHECKS, *gpu_check.RACES} - {"race_1b_cudnn"}:
        found = json.loads((ROOT / "out/gpu_check" / f"gpu_{check}.json").read_text("utf-8"))
        assert found[check] and found["toy"], check
