"""
Proves that bench/benchmark.py races what it says: its yardstick is the baseline's function, its variants share matrices and optimizer
state and train all the same, its table follows from its times; and that bench/gpu_check.sh runs to its end without a GPU.
"""
import json
import statistics
import subprocess

import pytest
import torch
from conftest import ROOT, TINY, tiny_batch, tiny_gpt

from bench import benchmark as bench
from bench import gpu_check
from bench.plain import PlainGPT
from lib.config import load_config
from lib.process import Process
from model import GPTConfig

SHAPE = [f"--{key}={value}" for key, value in TINY.items()] + ["--batch_size=2", "--gradient_accumulation_steps=2", "--device=cpu"]
CONFIG = str(ROOT / "configs" / "quickstart_baseline.py")


def test_the_yardstick_is_the_baselines_function():
    """Same weights, in float64: loss and gradients to 1e-12, the flops of both kinds, and every parameter in one group."""
    model, plain = tiny_gpt(torch.float64), PlainGPT(GPTConfig(**TINY)).double()
    plain.compute_dtype = torch.float64
    ours = {}
    for layer, theirs in zip(model.layers, plain.layers):
        attn, mlp = layer.attn, layer.mlp
        ours |= {theirs.qkv.weight: [attn.q.weight, attn.k.weight, attn.v.weight], theirs.o.weight: [attn.o.weight],
                 theirs.gate_up.weight: [mlp.gate.weight, mlp.up.weight], theirs.down.weight: [mlp.down.weight],
                 theirs.norm1.weight: [attn.q.scale_in.alpha], theirs.norm2.weight: [mlp.gate.scale_in.alpha]}
    ours |= {plain.embedding.weight: [model.embedding.weight], plain.head.weight: [model.head.weight],
             plain.norm.weight: [model.head.scale_in.alpha]}
    assert set(ours) == set(plain.parameters()) and sum(map(len, ours.values())) == len(list(model.parameters()))
    with torch.no_grad():
        for p, parts in ours.items():
            p.copy_(torch.cat(parts))
    losses = [m(*tiny_batch())[1] for m in (model, plain)]
    assert (losses[0] - losses[1]).abs() < 1e-12
    for loss in losses:
        loss.backward()
    for p, parts in ours.items():
        torch.testing.assert_close(p.grad, torch.cat([part.grad for part in parts]), rtol=0, atol=1e-12)
    assert all(plain.flops_per_token(causal) == model.flops_per_token(causal) for causal in (False, True))
    grouped = [p for group in plain.groups(0.1) for _, p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(ours)


def test_train(tmp_path):
    out = tmp_path / "bench.json"
    bench.train([CONFIG, *SHAPE], list(bench.VARIANTS), rounds=3, out=out)
    result = json.loads(out.read_text())
    assert result["versions"]["torch"] == torch.__version__
    race = result["races"][CONFIG]
    rows = race["variants"]
    assert list(rows) == list(bench.VARIANTS) and race["micro_steps"] == 2 and race["recompiled_in_the_rounds"] == 0
    assert race["attention"] == ["flash_attention_for_cpu"]
    for row in rows.values():
        assert len(row["seconds"]) == 3
        assert row["tokens_per_s"] == pytest.approx(2 * 2 * 16 / statistics.median(row["seconds"]))
        paired = [a / b for a, b in zip(row["seconds"], rows["baseline"]["seconds"])]
        assert row["time_over_baseline"] == {"median": statistics.median(paired), "min": min(paired), "max": max(paired)}
    assert rows["baseline"]["time_over_baseline"] == {"median": 1, "min": 1, "max": 1}
    assert bench.table(race).count("\n") == len(rows)


def test_contestants_share_what_is_large():
    """Their matrices and AdamW's moments of them are one and the same; each has its own vectors, and a step moves both."""
    config, process = load_config([CONFIG, *SHAPE]), Process()
    process.start(config)
    first = bench.Contestant("baseline", config, process)
    first.step()
    second = bench.Contestant("unified", config, process, first)
    shared = {n: p for n, p in second.model.named_parameters() if any(p is q for q in first.model.parameters())}
    assert set(shared) == {n for n, p in first.model.named_parameters() if "scale" not in n}
    W, gamma = shared["layers.0.attn.o.weight"], second.model.layers[0].attn.q.scale_out.alpha
    before, steps = (W.clone(), gamma.clone()), first.optimizer.state[W]["step"].item()
    second.step()
    assert (W != before[0]).any() and (gamma != before[1]).any()
    assert first.optimizer.state[W]["step"] == steps + 1 and second.optimizer.state[gamma]["step"] == 1


def test_interleave():
    """Each round is begun by the next contestant."""
    order = []

    class Silent:
        def __init__(self, name):
            self.name = name

        def step(self):
            order.append(self.name)

    seconds = bench.interleave([Silent(name) for name in "abc"], 4, lambda line: None)
    assert "".join(order) == "abc" "bca" "cab" "abc" and all(len(times) == 4 for times in seconds.values())


@pytest.mark.parametrize("argv, message", [
    (["train"], "which shape"), (["train", CONFIG, "--variants=best"], "--variants names 'best': choose among nanoGPT"),
    (["train", CONFIG, "--n_layr=2"], "unknown key 'n_layr'"), (["train", CONFIG, "--rounds=0"], "--rounds and --copies must be"),
    (["loader", "--n_layer=2"], "loader does not know --n_layer=2")])
def test_refusals(argv, message):
    with pytest.raises(SystemExit) as error:
        bench.main(argv)
    assert str(error.value).startswith("error: ") and message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("check", [gpu_check.ceilings, gpu_check.compiled_against_float64, gpu_check.grouped_against_looped,
                                   gpu_check.head, gpu_check.optimizers], ids=lambda check: check.__name__)
def test_checks_at_toy_shapes(check, monkeypatch):
    monkeypatch.chdir(ROOT)
    process = Process()
    process.start(load_config(["--device=cpu"]))
    found = check(process, True)
    assert found and json.dumps(found, allow_nan=False)
    if check is gpu_check.compiled_against_float64:  # float32 here, eager: rounding alone
        assert all(row["all_gradients"] < 1e-5 for row in found.values())
    if check is gpu_check.grouped_against_looped:
        assert all(row["output"] < 0.03 and row["load_of_the_empty_expert"] == 0 for row in found.values())


@pytest.mark.slow
def test_gpu_check_runs_without_a_gpu():
    done = subprocess.run(["bash", "bench/gpu_check.sh", "toy"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for part, checks in gpu_check.PARTS.items():
        found = json.loads((ROOT / "out" / "gpu_check" / f"gpu_{part}.json").read_text())
        assert all(isinstance(found[check.__name__], dict) for check in checks)
    refused = subprocess.run(["bash", "bench/gpu_check.sh"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode and "which part?" in refused.stderr
