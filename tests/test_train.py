"""
Proves the training program by running it: the log holds what the formulas give, one process equals
two however the batch is cut, and a stopped run equals an undisturbed one bit for bit.
"""
import json
import math
import os
import re
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    CONSTANT, SMALL, UNIFIED_CONFIG, gpt_with_idle, losses, read_log, same_runs, start, train,
    trained)

import train as program
from lib.checkpoint import newest_checkpoint
from lib.config import load_config, meta_model, to_dict
from lib.count import num_params, scale_params
from lib.data import Dataset, window_numbers
from lib.log import RunLog
from lib.process import Process
from model import GPT
from norms import ScaleVector, named_scale_vectors
from optim import learning_rate
from train import EXIT_STOPPED, training_step

ONE_PROCESS = SimpleNamespace(rank=0, world_size=1, is_main=True, device=torch.device("cpu"),
                              dtype=torch.float32, sum=lambda values: values.tolist())


def batches_of(dataset, config, sequences=0):
    return program.Batches(Dataset(dataset, 32).train, config, ONE_PROCESS, sequences)


@pytest.fixture(scope="module")
def mixture(dataset, tmp_path_factory):
    """A whole run of a mixture: its folder and its configuration."""
    out = tmp_path_factory.mktemp("mixture")
    args = [UNIFIED_CONFIG, *start(out, dataset, *CONSTANT)]
    trained(*args)
    return out, load_config(args)


# ---- what a run leaves ---------------------------------------------------------------------------

def test_run_folder(undisturbed, dataset):
    out, printed = undisturbed
    config = load_config([UNIFIED_CONFIG, *start(out, dataset, "--sample_tokens=5",
                                                 "--checkpoint_interval=4")])
    assert json.loads((out / "config.json").read_text("utf-8")) == to_dict(config)
    steps, evals = read_log(out, "train"), read_log(out, "eval")
    assert [r["step"] for r in steps] == list(range(12))
    assert all(r["grad_norm"] > 0 and r["mfu"] is None for r in steps)
    assert steps[0]["tokens_per_s"] is None and all(r["tokens_per_s"] > 0 for r in steps[1:])
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert [(r["step"], r["tokens"]) for r in evals] == [(s, s * 8 * 32) for s in (0, 5, 10, 12)]

    summary = json.loads((out / "summary.json").read_text("utf-8"))
    model, val_loss, seconds = meta_model(config), evals[-1]["val_loss"], summary["seconds"]
    per_byte, tokens = Dataset(dataset, 32).val_bytes_per_token, 12 * 8 * 32
    assert summary == pytest.approx({
        "val_loss": val_loss, "val_bpb": val_loss / math.log(2) / per_byte, "steps": 12,
        "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds,
        "params": num_params(model), "scale_params": scale_params(model)})
    assert {p.name for p in out.iterdir()} == {"ckpt_0000008.pt", "ckpt_0000012.pt", "config.json",
                                               "log.jsonl", "summary.json"}
    assert "a sample" in printed and f"python -m studies report {out}" in printed

    # the first step may hold minutes of compilation: no rate and no time left before the second
    first, second = [line for line in printed.splitlines() if "grad_norm" in line][:2]
    assert first.startswith("step      0/12") and "tokens/s" not in first and "left" not in first
    assert "tokens/s" in second and second.endswith(" left")
    log = RunLog(config, ONE_PROCESS)
    log.began = 1, time.monotonic() - 100  # for 4 steps, so for the other 7 it needs 175 s
    assert log.speed(5, 1234.0, 0.25) == "  1,234 tokens/s  mfu 25.0%  0:02:55 left"


def test_scale_and_matrix_events(mixture):
    """Every scale vector and every matrix, at each evaluation: γ = 1 at the start, and at the end
    the statistics of what the checkpoint holds."""
    out, config = mixture
    model = GPT(config.model)
    model.load_state_dict(newest_checkpoint(out)[1]["model"])
    scales = dict(named_scale_vectors(model))
    vectors = {p for m in model.modules() if isinstance(m, ScaleVector) for p in m.parameters()}
    matrices = {name: p for name, p in model.named_parameters() if p not in vectors}
    steps = [r["step"] for r in read_log(out, "eval")]
    by_scale, by_matrix = read_log(out, "scale"), read_log(out, "matrix")
    assert [(r["step"], r["name"]) for r in by_scale] == [(s, n) for s in steps for n in scales]
    assert [(r["step"], r["name"]) for r in by_matrix] == [(s, n) for s in steps for n in matrices]
    for r in by_scale[:len(scales)]:
        assert (r["mean"], r["min"], r["max"], r["std"]) == (1, 1, 1, 0) and r["beta"] in (1, None)
    for r in by_scale[-len(scales):]:
        vector = scales[r["name"]].double()
        gamma, alpha, beta = vector().detach(), vector.alpha.detach(), vector.beta
        expected = {"min": gamma.min(), "max": gamma.max(), "mean": gamma.mean(),
                    "std": gamma.std(unbiased=False), "alpha": alpha.norm() / alpha.numel() ** 0.5}
        if torch.is_tensor(beta):
            expected["beta"] = beta.detach().mean()
        assert (r["beta"] is None) == ("beta" not in expected)
        found = torch.tensor([r[key] for key in expected], dtype=torch.float64)
        torch.testing.assert_close(found, torch.stack([*expected.values()]), rtol=1e-5, atol=0)
    moments = newest_checkpoint(out)[1]["optimizer"]
    for r in by_matrix[-len(matrices):]:
        W, state = matrices[r["name"]].detach(), moments[r["name"]]
        assert r["norm"] == pytest.approx(W.norm().item(), rel=1e-6)
        assert (r["update"] is None) == r["name"].startswith("layers.")  # those are Muon's
        if r["update"]:
            m, v = state["exp_avg"] / (1 - 0.9 ** 12), state["exp_avg_sq"] / (1 - 0.95 ** 12)
            step = learning_rate(11, config) * (m / (v.sqrt() + 1e-8)).norm() / W.norm()
            assert r["update"] == pytest.approx(step.item(), rel=1e-6)


def test_the_first_step_is_the_models(mixture, dataset):
    """The first step's routers, over two micro-batches, and the first logits' scale, against the
    model's own forward passes."""
    out, config = mixture
    events = read_log(out, "router")
    steps = [(step, layer) for step in (0, 5, 10, 11) for layer in (1, 2)]
    assert [(r["step"], r["layer"]) for r in events] == steps
    torch.manual_seed(config.seed)
    model, opened, stats = GPT(config.model), Dataset(dataset, 32), 0
    for half in range(2):
        windows = window_numbers(4 * half, 4, len(opened.train), config.seed)
        model(*map(torch.tensor, opened.train[windows]))
        stats = stats + model.routers / 2
    for event, expected in zip(events, stats.tolist()):
        found = [event["balance_loss"], event["z_loss"], *event["load"]]
        assert found == pytest.approx(expected, rel=1e-6)
        assert event["load_max"] == max(event["load"]) and event["load_min"] == min(event["load"])
    logits = model.eval()(torch.tensor(opened.val[[0]][0]))[0]
    scale = logits[0].std(-1).mean().item()  # over the vocabulary, at each position
    assert read_log(out, "eval")[0]["logit_scale"] == pytest.approx(scale, rel=1e-6)


def test_a_first_run(tmp_path, monkeypatch):
    """It makes the built-in data, and trains with the largest seed. A line shows the mean of the
    steps since the last one, the first validation loss stands beside that of a uniform guess, a
    busy machine gets its line, and the hint at the end names the package that is missing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "getloadavg", lambda: (float(os.cpu_count()), 0.0, 0.0))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(Process, "peak_flops", lambda process: 1e12)
    torch.set_num_threads(2)
    printed = trained(*SMALL, "--max_iters=4", "--log_interval=3", "--out_dir=out",
                      f"--seed={2 ** 63 - 1}")
    torch.set_num_threads(1)
    assert "preparing data/stdlib" in printed
    Dataset(tmp_path / "data" / "stdlib", 32, verify=True)
    shown = [float(loss) for loss in re.findall(r"^step +\d/4  loss ([\d.]+)", printed, re.M)]
    first, *middle = losses("out")
    assert shown == pytest.approx([first, sum(middle) / 3], abs=1e-4)
    assert f"uniform over 257 tokens is {math.log(257):.4f}\n" in printed
    # 6 for each weight that a token meets, and what attention needs
    flops = 6 * (2 * (4 * 32 * 32 + 3 * 32 * 48) + 257 * 32) + 12 * 2 * 32 * 32
    for r in read_log("out", "train")[1:]:
        assert r["mfu"] == pytest.approx(r["tokens_per_s"] * flops / 1e12)
    assert "2 threads would wait for each other: set OMP_NUM_THREADS=1" in printed
    assert "`pip install matplotlib && python -m studies report out`" in printed


# ---- what is not finite --------------------------------------------------------------------------

def test_no_update_from_a_gradient_that_is_not_finite(dataset, tmp_path):
    """Half an update is not saved: the optimizer fails at the last group, whose moment is gone."""
    config = load_config(start(tmp_path, dataset))
    run = program.set_up(config, ONE_PROCESS, None, SimpleNamespace(bad_steps=0))
    model, optimizer = run.model, run.optimizer
    step = (model, model, optimizer, batches_of(dataset, config), 0.1, 1.0, ONE_PROCESS, False)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    hook = model.embedding.weight.register_hook(lambda grad: grad * float("nan"))
    loss, norm, _, _ = training_step(*step)
    assert np.isfinite(loss) and not np.isfinite(norm)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())

    hook.remove()
    training_step(*step)
    run.step, last = 1, optimizer.param_groups[-1]["params"][-1]
    optimizer.state[last]["exp_avg"] = None
    with pytest.raises(TypeError):
        training_step(*step)
    assert not program.save(run)

    optimizer.is_updating = False
    optimizer.state[last]["exp_avg"] = torch.full_like(last, float("inf"))
    with pytest.raises(FloatingPointError, match="after 1 steps were not finite"):
        program.save(run)


# ---- one process and two -------------------------------------------------------------------------

def same_losses(a, b, tolerance=2e-6):
    assert losses(a) == pytest.approx(losses(b), abs=tolerance)
    found, expected = ([r["val_loss"] for r in read_log(out, "eval")] for out in (a, b))
    assert found == pytest.approx(expected, abs=tolerance)


def test_one_process_equals_two_however_the_batch_is_cut(undisturbed, two):
    """The undisturbed run's micro-batches of 4 on one process, and of 2 on two, where gradients are
    averaged once a step, not once for each of its two micro-steps."""
    folder, outcomes = two
    assert [o["small"][0] for o in outcomes] == [0, 0]
    assert outcomes[1]["small"][1:] == ["", ""]  # only the main process prints
    assert [o["averaged"] for o in outcomes] == [12, 12]
    seeds = sorted(outcomes[0]["seeds"] + outcomes[1]["seeds"])
    assert seeds == list(range(1337, 1337 + 2 * 12))  # of a fork's dropout
    same_losses(folder / "small", undisturbed[0])


def test_a_mixture_on_two_processes(mixture, two):
    """It equals one process, and resumes bit for bit."""
    same_losses(two[0] / "mixture", mixture[0], tolerance=1e-5)  # bfloat16 magnifies rounding
    a, b = (read_log(out, "router")[0]["load"] for out in (two[0] / "mixture", mixture[0]))
    assert a == pytest.approx(b, abs=1e-6)
    same_runs(two[0] / "half", two[0] / "mixture")


def test_a_parameter_without_a_gradient_is_named(two, dataset, tmp_path, monkeypatch):
    """On two processes and on one; it has no moments, and the run resumes without them."""
    monkeypatch.setattr(program, "GPT", gpt_with_idle)
    args = [UNIFIED_CONFIG, *start(tmp_path, dataset), "--resume"]
    for printed in (two[1][0]["idle"][1], trained(*args, "--max_iters=3"), trained(*args)):
        assert printed.count("layers.0.idle gets no gradient") == 1
        assert printed.count("gets no gradient") == 1
    assert losses(two[0] / "idle") == pytest.approx(losses(tmp_path)[:3], abs=2e-6)
    state = newest_checkpoint(tmp_path)[1]
    assert state["model"].keys() - state["optimizer"].keys() == {"layers.0.idle"}


def test_an_error_of_all_processes_is_printed_once(two):
    for name, message in (
            ("uneven", "global batch of 3 sequences (batch_size=3 x gradient_accumulation_steps=1) "
                       "does not divide by 2"),
            ("guarded", "holds a run: continue it with --resume")):
        status, _, errors = zip(*(outcome[name] for outcome in two[1]))
        assert status == (1, 1) and "".join(errors).count("\n") == 1 and message in "".join(errors)


def test_an_error_of_one_process_has_its_number(two):
    """Process 1 reads a bad token; process 0 loses contact, and saves."""
    folder, outcomes = two
    (status_0, _, errors_0), (status_1, _, errors_1) = (o["bad"] for o in outcomes)
    assert (status_0, status_1) == (1, 1)
    assert errors_0.startswith("error: process 0: another process has ended, or has been silent")
    assert errors_1.startswith("error: process 1: ") and errors_1.count("\n") == 1
    assert "token id 60000 is beyond vocab_size=40000" in errors_1
    assert newest_checkpoint(folder / "bad")[1]["step"] == len(losses(folder / "bad")) == 2


# ---- stopping and resuming -----------------------------------------------------------------------

def at_step(monkeypatch, step, action):
    """Have the loop call `action` as it begins this step."""
    original = program.optim.learning_rate
    monkeypatch.setattr(program.optim, "learning_rate", lambda s, config:
                        (action() if s == step else None) or original(s, config))


def test_a_stopped_run_resumes_bit_for_bit(mixture, dataset, tmp_path, monkeypatch, request):
    """Stopped three times, by each signal once. In the end SIGHUP is ignored, as under nohup, where
    this test may itself run, and one in the last step comes too late."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    args = [UNIFIED_CONFIG, *start(tmp_path, dataset, *CONSTANT), "--resume"]  # at first it starts
    for step, number in ((2, signal.SIGTERM), (5, signal.SIGINT), (8, signal.SIGHUP)):
        handler = signal.getsignal(number)
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda number=number: signal.raise_signal(number))
            status, printed, _ = train(*args)
        assert status == EXIT_STOPPED and signal.getsignal(number) == handler
        done = f"stopped by a signal after {step + 1} steps, and saved: continue with --resume"
        assert done in printed and newest_checkpoint(tmp_path)[1]["step"] == step + 1
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(monkeypatch, 10, lambda: signal.raise_signal(signal.SIGHUP))
    at_step(monkeypatch, 11, lambda: signal.raise_signal(signal.SIGTERM))
    assert "at step 9" in trained(*args)
    same_runs(mixture[0], tmp_path)


def test_a_fork_with_random_numbers_resumes_exactly(dataset, tmp_path, monkeypatch):
    """With dropout put into the model, a step draws the same numbers whether the run was
    interrupted before it or not, and so does a block that is run again in the backward pass.
    Evaluations draw none: test_keys."""
    import model
    forward = model.MLP.forward
    monkeypatch.setattr(model.MLP, "forward", lambda self, *a: torch.nn.functional.dropout(
        forward(self, *a), 0.2, self.training))
    constant = ["--schedule=wsd", "--decay_share=0", "--resume"]
    for name, *more in (("straight", "--max_iters=8"), ("stopped", "--max_iters=3"),
                        ("stopped", "--max_iters=8", "--recompute=True")):
        trained(*start(tmp_path / name, dataset, *constant, *more))
    assert losses(tmp_path / "straight") == losses(tmp_path / "stopped")
