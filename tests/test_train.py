"""
Proves the training program by running it: one process equals two, an interrupted run equals an undisturbed one bit for bit,
the run folder holds what it promises, and every bad request ends in one line before any work.
"""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import torch
from conftest import ROOT, run

from checkpoint import newest_checkpoint
from data import Dataset
from model import GPT
from norms import named_scale_vectors
from optim import cosine
from prepare_data import verify
from train import (
    EXIT_STOPPED,
    FIELDS,
    SPIKE_WINDOW,
    gpt_config,
    is_spike,
    keep_log_before,
    load_config,
    main,
    meta_model,
    share_batch,
    tokens_per_step,
)

TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--d_ff=48", "--block_size=32", "--vocab_size=257", "--init_std=0",
        "--batch_size=4", "--gradient_accumulation_steps=2", "--max_iters=12", "--warmup_iters=3", "--learning_rate=1e-2",
        "--eval_interval=5", "--eval_iters=3", "--log_interval=1", "--device=cpu"]
UNIFIED = ["configs/unified.py"]


def start(out, dataset, *args):
    return [*TINY, f"--dataset={dataset}", f"--out_dir={out}", *args]


def read_log(out, event=None):
    records = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [r for r in records if event in (None, r["event"])]


def losses(out):
    return [r["loss"] for r in read_log(out, "train")]


def same_runs(a, b):
    """Weights and log of two runs, bit for bit, times aside."""
    (_, state_a), (_, state_b) = newest_checkpoint(a), newest_checkpoint(b)
    assert state_a["step"] == state_b["step"]
    assert all(torch.equal(state_a["model"][key], state_b["model"][key]) for key in state_a["model"])
    assert state_a["data"] == state_b["data"]
    logs = [[{k: v for k, v in r.items() if k not in ("tokens_per_s", "mfu")} for r in read_log(out)] for out in (a, b)]
    assert logs[0] == logs[1]


@pytest.fixture(scope="session")
def undisturbed(dataset, tmp_path_factory):
    """One whole run with the unified strategy, that others are compared with."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = run("train.py", *UNIFIED, *start(out, dataset, "--sample_tokens=5", "--checkpoint_interval=4"))
    return out, done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# what a run leaves

def test_run_folder(undisturbed, dataset):
    out, said = undisturbed
    config = load_config([*UNIFIED, *start(out, dataset, "--sample_tokens=5", "--checkpoint_interval=4")])
    assert json.loads((out / "config.json").read_text()) == vars(config)
    train, evals, scales = (read_log(out, event) for event in ("train", "eval", "scale"))
    assert [r["step"] for r in train] == list(range(12)) and [r["step"] for r in evals] == [0, 5, 10, 12]
    assert [r["lr"] for r in train] == [cosine(s, 1e-2, 12, 3) for s in range(12)]
    assert all(r["grad_norm"] > 0 and r["tokens_per_s"] > 0 and r["mfu"] is None for r in train)
    assert train[-1]["loss"] < train[0]["loss"] - 0.5
    names = [name for name, _ in named_scale_vectors(meta_model(config))]
    assert [(r["step"], r["name"]) for r in scales] == [(s, name) for s in (0, 5, 10, 12) for name in names]
    assert all(r["mean"] == r["min"] == r["max"] == r["beta"] == 1 and r["std"] == 0 for r in scales[:len(names)])
    state = newest_checkpoint(out)[1]["model"]
    for r in scales[-len(names):]:
        gamma = state[r["name"] + ".beta"] * state[r["name"] + ".alpha"]
        assert r["beta"] == state[r["name"] + ".beta"].item() and r["min"] == gamma.min().item()
        assert r["mean"] == pytest.approx(gamma.mean().item()) and r["std"] == pytest.approx(gamma.std(unbiased=False).item())
    summary = json.loads((out / "summary.json").read_text())
    opened = Dataset(dataset, 32)
    assert summary["val_loss"] == evals[-1]["val_loss"] and summary["steps"] == 12 and summary["tokens"] == 12 * 8 * 32
    assert summary["val_bpb"] == pytest.approx(summary["val_loss"] / 0.6931471805599453 / opened.val_bytes_per_token)
    assert summary["params"] == meta_model(config).num_params()
    assert summary["scale_params"] == meta_model(config).num_params("scale_vectors")
    assert sorted(p.name for p in out.glob("*.pt")) == ["ckpt_0000008.pt", "ckpt_0000012.pt"]
    assert "step     11/12" in said and "nats/token" in said and "a sample" in said


def test_the_first_losses_are_the_models(undisturbed, dataset):
    """Step 0's loss and the first and last validation losses, computed here without train.py's loop."""
    out, _ = undisturbed
    config = load_config([*UNIFIED, *start(out, dataset)])
    torch.manual_seed(config.seed)
    model, opened = GPT(gpt_config(config)), Dataset(dataset, 32, 257)
    from data import window_numbers
    x, y = map(torch.tensor, opened.train[window_numbers(0, 8, len(opened.train), config.seed)])
    assert losses(out)[0] == pytest.approx(model(x, y)[1].item(), abs=1e-6)
    windows = [i * len(opened.val) // 12 for i in range(12)]
    x, y = map(torch.tensor, opened.val[windows])
    evals = read_log(out, "eval")
    assert evals[0]["val_loss"] == pytest.approx(model(x, y)[1].item(), abs=1e-5)
    model.load_state_dict(newest_checkpoint(out)[1]["model"])
    assert evals[-1]["val_loss"] == pytest.approx(model(x, y)[1].item(), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# the same run, cut differently

@pytest.mark.parametrize("processes, args", [
    (0, ["--batch_size=8", "--gradient_accumulation_steps=1"]), (0, ["--batch_size=2", "--gradient_accumulation_steps=4"]),
    (2, []), (2, ["--batch_size=8", "--gradient_accumulation_steps=1"]), (2, ["--batch_size=2", "--gradient_accumulation_steps=4"])])
def test_one_process_equals_two_however_the_batch_is_cut(undisturbed, dataset, tmp_path, processes, args):
    run("train.py", *UNIFIED, *start(tmp_path / "out", dataset, *args, f"--eval_iters={12 // int(args[0][-1]) if args else 3}"),
        processes=processes)
    assert losses(tmp_path / "out") == pytest.approx(losses(undisturbed[0]), abs=1e-5)
    for ours, theirs in zip(read_log(tmp_path / "out", "eval"), read_log(undisturbed[0], "eval")):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-5 if not args else 0.5)


def test_quickstart_on_two_processes(tmp_path):
    """The README's own config, twenty steps: the same losses to 1e-5 at every step."""
    args = ["configs/quickstart.py", "--max_iters=20", "--eval_iters=1", "--sample_tokens=0", "--device=cpu"]
    run("train.py", *args, f"--out_dir={tmp_path / 'one'}")
    run("train.py", *args, f"--out_dir={tmp_path / 'two'}", processes=2)
    assert len(losses(tmp_path / "one")) == 20
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.parametrize("kind", [["--optimizer=adamw"], ["--optimizer=muon"],
                                  ["--optimizer=adamw", "--n_expert=4", "--d_expert=24"],
                                  ["--optimizer=muon", "--n_expert=4", "--d_expert=24"]], ids=str)
def test_a_stopped_run_resumes_bit_for_bit(dataset, tmp_path, kind):
    args = [*kind, "--max_iters=60", "--checkpoint_interval=7"]
    run("train.py", *UNIFIED, *start(tmp_path / "straight", dataset, *args))
    command = [sys.executable, "train.py", *UNIFIED, *start(tmp_path / "stopped", dataset, *args), "--resume"]  # nothing there yet: starts
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if line.startswith("step     10/"):
            process.send_signal(signal.SIGTERM)
    assert process.wait() == EXIT_STOPPED
    stopped_at = newest_checkpoint(tmp_path / "stopped")[1]["step"]
    assert 10 < stopped_at < 60 and len(losses(tmp_path / "stopped")) == stopped_at
    said = run("train.py", *command[2:]).stdout
    assert f"at step {stopped_at}" in said
    same_runs(tmp_path / "straight", tmp_path / "stopped")


def test_a_killed_run_resumes_on_another_process_count(undisturbed, dataset, tmp_path):
    out = tmp_path / "out"
    command = ["train.py", *UNIFIED, *start(out, dataset, "--checkpoint_interval=4"), "--resume"]
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step      6/"):
            process.kill()
    process.wait()
    with open(out / "log.jsonl", "a") as f:
        f.write('{"event": "train", "st')  # as a kill in the middle of a line leaves it
    said = run(*command, processes=2).stdout
    assert "resuming from" in said and "at step 4" in said
    assert [r["step"] for r in read_log(out, "train")] == list(range(12))
    assert losses(out) == pytest.approx(losses(undisturbed[0]), abs=1e-5)


def test_resuming_a_finished_run_changes_nothing(undisturbed, dataset):
    out, _ = undisturbed
    before = losses(out)
    run("train.py", *UNIFIED, *start(out, dataset, "--checkpoint_interval=4"), "--resume")
    assert losses(out) == before and read_log(out, "eval")[-1]["step"] == 12


def test_damaged_newest_checkpoint_is_passed_over(undisturbed, dataset, tmp_path):
    out = tmp_path / "out"
    run("train.py", *UNIFIED, *start(out, dataset, "--checkpoint_interval=4"))
    (out / "ckpt_0000012.pt").write_bytes((out / "ckpt_0000012.pt").read_bytes()[:5000])
    said = run("train.py", *UNIFIED, *start(out, dataset, "--checkpoint_interval=4"), "--resume").stdout
    assert "passing over a checkpoint" in said and "at step 8" in said
    same_runs(undisturbed[0], out)


def test_keep_log_before(tmp_path):
    path = tmp_path / "log.jsonl"
    events = [{"event": "train", "step": s, "loss": x, "spikes": n} for s, x, n in ((1, 2.5, 0), (2, 9.0, 1), (3, None, 1), (4, None, 1))]
    first = "".join(json.dumps(e) + "\n" for e in (events[0], {"event": "eval", "step": 1}, *events[1:]))
    path.write_text(first + '{"event": "train", "step": 5, "loss": 1.0, "spikes": 7}\nnonsense\n[]\n{"st')
    history = keep_log_before(path, 5)
    assert path.read_text() == first
    assert (history.recent, history.spikes, history.bad_steps) == ([2.5, 9.0], 1, 2)


def test_spikes():
    recent = [2.0 + 0.1 * (-1) ** i for i in range(SPIKE_WINDOW)]  # mean 2, standard deviation 0.1
    assert is_spike(2.61, recent) and not is_spike(2.59, recent) and not is_spike(1.0, recent)
    assert not is_spike(99.0, recent[1:])  # too few to say


def test_builtin_dataset_is_made_when_missing(tmp_path):
    said = run(ROOT / "train.py", *TINY, "--max_iters=1", cwd=tmp_path).stdout
    assert "preparing data/stdlib" in said
    verify(tmp_path / "data" / "stdlib")


# ---------------------------------------------------------------------------------------------------------------------
# bad requests

def one_line(arguments, message, capsys):
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert message in said


@pytest.mark.parametrize("arguments, message", [
    (["--learning_rat=1"], "unknown key 'learning_rat' in the command line; did you mean learning_rate?"),
    (["--xyzzy=1"], "unknown key 'xyzzy'"),
    (["--n_layer=two"], "n_layer='two' is of the wrong type: it takes int, such as 12"),
    (["--n_layer=2.5"], "n_layer=2.5 is of the wrong type"),
    (["--n_layer=True"], "n_layer=True is of the wrong type"),
    (["--scale_heterogeneous=1"], "scale_heterogeneous=1 is of the wrong type: it takes bool"),
    (["--learning_rate=nan"], "learning_rate='nan' is of the wrong type"),
    (["--learning_rate=1e999"], "learning_rate=inf is of the wrong type"),
    (["--learning_rate=-1"], "learning_rate=-1.0 must be at least 0"),
    (["--batch_size=0"], "batch_size=0 must be at least 1"),
    (["--beta1=1"], "beta1=1.0 must be between 0 and 1"),
    (["--optimizer=adam"], "optimizer='adam' is unknown: choose one of adamw, muon; did you mean adamw?"),
    (["--schedule=linear"], "schedule='linear' is unknown: choose one of cosine, wsd"),
    (["--compile=yes"], "compile='yes' is unknown: choose one of auto, True, False"),
    (["--dtype=float16"], "dtype='float16' is unknown: choose one of auto, float32, bfloat16"),
    (["--scale_weight_decay=iwd"], "scale_weight_decay='iwd' is unknown: choose one of none, all, absorbable"),
    (["--n_embd=100", "--n_head=3"], "n_embd=100 is not divisible by n_head=3"),
    (["--max_iters=0", "--tokens_per_param=0"], "tokens_per_param=0.0 with max_iters=0 makes no step"),
    (["--resume", "--overwrite"], "continue the run in out_dir or discard it, not both"),
    (["configs/nothing.py"], "config file not found: configs/nothing.py"),
    (["configs/quickstart.py", "max_iters", "3"], "one config file at most"),
    (["--dataset=data/none"], "no dataset at data/none: make it with `python prepare_data.py PATH... --out data/none`"),
])
def test_bad_configuration(arguments, message, capsys):
    one_line(arguments, message, capsys)


@pytest.mark.parametrize("text, message", [
    ("n_layr = 3", "unknown key 'n_layr' in {}; did you mean n_layer?"),
    ("n_layer = '3'", "n_layer='3' is of the wrong type"),
    ("n_layer = ", "{} does not run: SyntaxError"),
    ("from configs.missing import *", "{} does not run: ModuleNotFoundError"),
    ("raise RuntimeError('a\\nb')", "{} does not run: RuntimeError: a"),
])
def test_bad_config_files(tmp_path, text, message, capsys):
    path = tmp_path / "config.py"
    path.write_text(text)
    one_line([str(path)], message.format(path), capsys)


def test_config_files_are_python(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("import math\nfrom configs.unified import *\n_width = 96\nn_embd = 2 * _width\nlearning_rate = 1\nmax_iters = 1e3\n")
    config = load_config([str(path), "--n_layer=3", "--out_dir=5", "--resume", "--compile=False"])
    assert (config.n_embd, config.learning_rate, config.max_iters, config.n_layer) == (192, 1.0, 1000, 3)
    assert config.out_dir == "5" and config.resume is True and config.compile is False and config.scale_placement == "dual_norm"
    assert type(config.learning_rate) is float and type(config.max_iters) is int
    assert set(vars(config)) == set(FIELDS)


def test_length_from_tokens_per_param():
    config = load_config(["--tokens_per_param=20", "--n_layer=2", "--n_embd=64", "--n_head=2"])
    params = meta_model(config).num_params()
    assert (config.max_iters - 1) * tokens_per_step(config) < 20 * params <= config.max_iters * tokens_per_step(config)


def test_share_batch():
    config = load_config(["--batch_size=4", "--gradient_accumulation_steps=6"])
    assert [share_batch(config, n) for n in (1, 2, 3, 4, 6, 8)] == [(4, 6), (4, 3), (4, 2), (3, 2), (4, 1), (3, 1)]
    for n in (5, 7, 48):
        with pytest.raises(ValueError, match=f"global batch of 24 sequences .* does not divide by {n} processes"):
            share_batch(config, n)


def test_batch_that_does_not_divide_by_the_process_count(dataset, tmp_path):
    done = run("train.py", *start(tmp_path / "out", dataset, "--batch_size=3", "--gradient_accumulation_steps=1"), processes=2, check=False)
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    assert done.stderr.count("the global batch of 3 sequences (batch_size=3 x gradient_accumulation_steps=1) does not divide by 2") == 1


def test_out_dir_is_guarded(undisturbed, dataset, tmp_path, capsys):
    out, _ = undisturbed
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    one_line(start(out, dataset), "holds a run: continue it with --resume, discard it with --overwrite", capsys)
    one_line(start(out, dataset, "--resume"), "is a checkpoint of another run: scale_heterogeneous=True (now False)", capsys)
    with filelock.FileLock(out / "lock"):
        other = run("train.py", *UNIFIED, *start(out, dataset, "--resume"), check=False)
        assert other.returncode == 1 and "another process is training in out_dir" in other.stderr
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    (tmp_path / "file").write_text("")
    one_line(start(tmp_path / "file" / "out", dataset), "cannot be written", capsys)
    run("train.py", *start(tmp_path / "out", dataset, "--max_iters=2"))
    run("train.py", *start(tmp_path / "out", dataset, "--max_iters=1", "--overwrite"))
    assert len(losses(tmp_path / "out")) == 1 and [p.name for p in (tmp_path / "out").glob("*.pt")] == ["ckpt_0000001.pt"]


def test_vocabulary_of_data_and_model(dataset, tmp_path, capsys):
    one_line(start(tmp_path / "out", dataset, "--vocab_size=200"), "token ids up to 256 (bytes), beyond the model's vocab_size=200", capsys)
    assert not (tmp_path / "out").exists()


def test_steps_that_are_not_finite_are_not_made(dataset, tmp_path):
    out = tmp_path / "out"
    done = run("train.py", *start(out, dataset, "--learning_rate=1e30", "--max_bad_steps=3", "--checkpoint_interval=1",
                                  "--warmup_iters=0", "--keep_checkpoints=20"), check=False)
    assert done.returncode == 1 and "no update made" in done.stdout
    assert "error: 3 steps in a row" in done.stderr and "Traceback" not in done.stderr
    log = read_log(out, "train")
    assert [r["loss"] for r in log[-3:]] == [None] * 3 and log[0]["loss"] is not None
    assert all(p.isfinite().all() for p in newest_checkpoint(out)[1]["model"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_no_gpu(dataset, tmp_path, capsys):
    one_line(start(tmp_path / "out", dataset, "--device=cuda"), "device='cuda' is not available", capsys)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_trains_as_the_cpu_does(undisturbed, dataset, tmp_path):
    for dtype, tolerance in (("float32", 1e-3), ("bfloat16", 0.05)):
        run("train.py", *UNIFIED, *start(tmp_path / dtype, dataset, "--device=cuda", f"--dtype={dtype}"))
        assert losses(tmp_path / dtype) == pytest.approx(losses(undisturbed[0]), abs=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# the configs that come with the project

@pytest.mark.parametrize("path", sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*.py")))
def test_every_config_loads_and_its_model_can_be_built(path):
    config = load_config([path])
    assert meta_model(config).num_params() > 0 and config.max_iters > 0
