"""
Proves the training program by running it: one process equals two however the batch is cut, validation reads the same windows, a
stopped run equals an undisturbed one bit for bit, the log says what the formulas say, and an error is told once.
"""
import json
import os
import signal

import numpy as np
import pytest
import torch
from conftest import COMPILER, ROOT, UNIFIED_CONFIG, losses, read_log, refused, same_runs, start, train, trained
from conftest import run as run_program

import train as program
from lib.checkpoint import checkpoints, newest_checkpoint
from lib.config import flat, load_config, meta_model
from lib.data import Dataset, window_numbers
from lib.process import Process
from lib.verify import verify
from model import GPT
from norms import ScaleVector, named_scale_vectors
from optim import cosine
from train import EVAL_WINDOWS, EXIT_STOPPED, evaluate, training_step

MIXTURE = ["--n_expert=4", "--n_expert_active=2", "--d_expert=24", "--d_shared_expert=16"]


# ---------------------------------------------------------------------------------------------------------------------
# what a run leaves

def test_run_folder(undisturbed, dataset):
    out, said = undisturbed
    config = load_config([UNIFIED_CONFIG, *start(out, dataset, "--sample_tokens=5", "--checkpoint_interval=4")])
    assert json.loads((out / "config.json").read_text()) == flat(config)
    train, evals = read_log(out, "train"), read_log(out, "eval")
    assert [r["step"] for r in train] == list(range(12)) and [r["step"] for r in evals] == [0, 5, 10, 12]
    assert [r["lr"] for r in train] == [cosine(s, 1e-2, 12, 3, 1e-2 / 20) for s in range(12)]
    assert all(r["grad_norm"] > 0 and r["tokens_per_s"] > 0 and r["mfu"] is None and r["spikes"] == 0 for r in train)
    assert train[-1]["loss"] < train[0]["loss"] - 0.5
    summary = json.loads((out / "summary.json").read_text())
    per_byte = Dataset(dataset, 32).val_bytes_per_token
    assert summary["val_loss"] == evals[-1]["val_loss"] and summary["steps"] == 12 and summary["tokens"] == 12 * 8 * 32
    assert summary["val_bpb"] == evals[-1]["val_bpb"] == pytest.approx(summary["val_loss"] / np.log(2) / per_byte)
    assert [r["tokens"] for r in evals] == [s * 8 * 32 for s in (0, 5, 10, 12)]
    assert summary["params"] == meta_model(config).num_params() and summary["spikes"] == 0
    assert summary["scale_params"] == meta_model(config).num_params("scale_vectors")
    assert {p.name for p in out.iterdir()} == {"ckpt_0000008.pt", "ckpt_0000012.pt", "config.json", "lock", "log.jsonl", "summary.json"}
    assert "step     11/12" in said and "nats/token" in said and "a sample" in said and f"python -m study.report {out}" in said


@pytest.mark.parametrize("kind", [[], MIXTURE], ids=["dense", "mixture"])
def test_scale_and_matrix_events(undisturbed, dataset, tmp_path, kind):
    """Every scale vector and every matrix, at the start and at the end: the statistics of what the checkpoint holds."""
    out = undisturbed[0]
    if kind:
        trained(UNIFIED_CONFIG, *start(tmp_path, dataset, *kind, "--eval_interval=12"))
        out = tmp_path
    model = GPT(load_config([UNIFIED_CONFIG, *start(out, dataset, *kind)]).model)
    scales, matrices, steps = read_log(out, "scale"), read_log(out, "matrix"), [r["step"] for r in read_log(out, "eval")]
    names = [name for name, _ in named_scale_vectors(model)]
    vectors = {p for module in model.modules() if isinstance(module, ScaleVector) for p in module.parameters()}
    weights = [name for name, p in model.named_parameters() if p not in vectors]
    assert len(weights) == 2 + 2 * (4 + (7 if kind else 3))  # embedding, head; q, k, v, o; gate, up, down, and a mixture's other four
    assert [(r["step"], r["name"]) for r in scales] == [(s, name) for s in steps for name in names]
    assert [(r["step"], r["name"]) for r in matrices] == [(s, name) for s in steps for name in weights]
    assert all(r["mean"] == r["min"] == r["max"] == 1 and r["std"] == 0 and r["beta"] in (1, None) for r in scales[:len(names)])
    model.load_state_dict(newest_checkpoint(out)[1]["model"])
    for r, (_, scale) in zip(scales[-len(names):], named_scale_vectors(model)):
        gamma = scale().detach().double()
        assert (r["min"], r["max"]) == (gamma.min().item(), gamma.max().item())
        assert r["mean"] == pytest.approx(gamma.mean().item()) and r["std"] == pytest.approx(gamma.std(unbiased=False).item(), rel=1e-4)
        assert r["beta"] == (scale.beta.mean().item() if hasattr(scale, "beta") else None)
    for r in matrices[-len(weights):]:
        W = model.get_parameter(r["name"]).detach().double()
        assert r["norm"] == pytest.approx(W.square().sum().sqrt().item(), rel=1e-5)
    assert not kind or any(r["name"].endswith("mlp.maps.weight.gate") for r in matrices)


def test_router_events(dataset, tmp_path):
    """The first step's, against the model's own forward passes over the two micro-batches."""
    args = start(tmp_path, dataset, *MIXTURE, "--n_dense_layer=1", "--max_iters=5", "--log_interval=2")
    trained(*args)
    events, config = read_log(tmp_path, "router"), load_config(args)
    assert [(r["step"], r["layer"]) for r in events] == [(0, 1), (2, 1), (4, 1)]
    torch.manual_seed(config.seed)
    model, split, stats = GPT(config.model), Dataset(dataset, 32).train, 0
    for half in range(2):
        model(*map(torch.tensor, split[window_numbers(4 * half, 4, len(split), config.seed)]))
        stats = stats + model.router_stats[0] / 2
    first = events[0]
    assert [first["balance_loss"], first["z_loss"], *first["load"]] == pytest.approx(stats.tolist(), rel=1e-5)
    assert first["load_max"] == max(first["load"]) and first["load_min"] == min(first["load"]) and sum(first["load"]) == pytest.approx(1)


def test_the_first_losses_are_the_models(undisturbed, dataset):
    """Step 0's loss and the first and last validation losses, computed here without train.py's loop."""
    out, _ = undisturbed
    config = load_config([UNIFIED_CONFIG, *start(out, dataset)])
    torch.manual_seed(config.seed)
    model, opened = GPT(config.model), Dataset(dataset, 32, 257)
    x, y = map(torch.tensor, opened.train[window_numbers(0, 8, len(opened.train), config.seed)])
    assert losses(out)[0] == pytest.approx(model(x, y)[1].item(), abs=1e-6)
    windows = [i * len(opened.val) // (2 * EVAL_WINDOWS) for i in range(2 * EVAL_WINDOWS)]
    x, y = map(torch.tensor, opened.val[windows])
    evals = read_log(out, "eval")
    assert evals[0]["val_loss"] == pytest.approx(model(x, y)[1].item(), abs=1e-5)
    model.load_state_dict(newest_checkpoint(out)[1]["model"])
    assert evals[-1]["val_loss"] == pytest.approx(model(x, y)[1].item(), abs=1e-5)


def test_builtin_dataset_is_made_when_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from conftest import SMALL
    assert "preparing data/stdlib" in trained(*SMALL, "--max_iters=3", "--eval_iters=1", "--out_dir=out")
    verify(tmp_path / "data" / "stdlib")


# ---------------------------------------------------------------------------------------------------------------------
# the step and the validation loss

class Alone:
    """A Process that is alone, on the CPU."""
    count, rank, first, device = 1, 0, True, torch.device("cpu")

    def sum(self, values):
        return values.tolist()


@pytest.mark.parametrize("kind", [[], MIXTURE], ids=["dense", "mixture"])
def test_the_step_is_that_of_the_whole_batch(dataset, tmp_path, kind):
    """In float64, three micro-batches with clipping, against autograd over all their sequences at once and torch.optim.SGD. In a
    mixture the auxiliary losses add to the gradient, micro-batch by micro-batch, and not to the loss that is returned."""
    config = load_config([UNIFIED_CONFIG, *start(tmp_path, dataset, *kind, "--gradient_accumulation_steps=3", "--load_balance_coef=1")])
    split = Dataset(dataset, 32).train
    torch.manual_seed(0)
    ours, theirs = GPT(config.model).double(), GPT(config.model).double()
    theirs.load_state_dict(ours.state_dict())
    optimizer = torch.optim.SGD([{"params": ours.parameters(), "lr_scale": 1.0}], lr=1.0)
    batches = program.Batches(split, config, Alone(), sequences=24)
    loss, norm, stop, routers = training_step(ours, ours, optimizer, batches, 0.1, 0.05, Alone(), stop=False)

    parts = [split[window_numbers(24 + 4 * i, 4, len(split), config.seed)] for i in range(3)]
    cross_entropy = theirs(*(torch.tensor(np.concatenate(a)) for a in zip(*parts)))[1]
    objective = cross_entropy
    for part in parts if kind else []:
        theirs(*map(torch.tensor, part))
        objective = objective + theirs.auxiliary_loss() / 3
    objective.backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters()])
    assert loss == pytest.approx(cross_entropy.item(), rel=1e-12) and norm == pytest.approx(expected.item(), rel=1e-9) and not stop
    assert len(routers) == (2 * (2 + 4) if kind else 0)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(a, b - 0.1 * b.grad * (0.05 / expected), atol=1e-8) and a.grad is None
    assert batches.sequences == 24 + 4 * 4  # one micro-batch ahead


def test_no_update_from_a_gradient_that_is_not_finite(dataset, tmp_path):
    config = load_config(start(tmp_path, dataset))
    model = GPT(config.model)
    optimizer = torch.optim.SGD([{"params": model.parameters(), "lr_scale": 1.0}], lr=1.0)
    model.embedding.weight.register_hook(lambda grad: grad * float("nan"))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    batches = program.Batches(Dataset(dataset, 32).train, config, Alone(), sequences=0)
    loss, norm, _, _ = training_step(model, model, optimizer, batches, 0.1, 1.0, Alone(), stop=False)
    assert np.isfinite(loss) and not np.isfinite(norm)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("eval_iters", [1, 2, 1000])
def test_validation_reads_the_same_windows_whatever_the_batch(dataset, tmp_path, eval_iters):
    """Against one forward pass over all windows; 5 does not divide their number, and the micro-batch stays whole all the same."""
    found, shapes = [], set()
    for batch in (1, 5, 8):
        config = load_config(start(tmp_path, dataset, f"--batch_size={batch}", f"--eval_iters={eval_iters}", *MIXTURE,
                                   "--load_balance_coef=100"))
        torch.manual_seed(0)
        model, split = GPT(config.model), Dataset(dataset, 32).val
        handle = model.register_forward_pre_hook(lambda module, args, batch=batch:
                                                 shapes.add((*args[0].shape, module.training) == (batch, 32, False)))
        found.append(evaluate(model, split, config, Alone()))
        handle.remove()
        assert model.training
    count = min(len(split), eval_iters * EVAL_WINDOWS)
    x, y = map(torch.tensor, split[[i * len(split) // count for i in range(count)]])
    assert found == pytest.approx([model.eval()(x, y)[1].item()] * 3, rel=1e-5) and shapes == {True}
    assert (count < eval_iters * EVAL_WINDOWS) == (eval_iters == 1000)


def test_an_evaluation_that_dies_takes_no_training_with_it(dataset, tmp_path, monkeypatch):
    def dies(model, split, config, process):
        raise MemoryError
    monkeypatch.setattr(program, "evaluate", dies)
    with pytest.raises(MemoryError):
        train(*start(tmp_path, dataset, "--eval_interval=0"))
    assert newest_checkpoint(tmp_path)[1]["step"] == 12


@pytest.mark.parametrize("batch, accumulation", [(8, 1), (2, 4)])
def test_the_batch_is_cut_differently(undisturbed, dataset, tmp_path, batch, accumulation):
    trained(UNIFIED_CONFIG, *start(tmp_path, dataset, f"--batch_size={batch}", f"--gradient_accumulation_steps={accumulation}"))
    assert losses(tmp_path) == pytest.approx(losses(undisturbed[0]), abs=1e-5)
    for ours, theirs in zip(read_log(tmp_path, "eval"), read_log(undisturbed[0], "eval")):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# two processes

@pytest.fixture(scope="module")
def two(undisturbed, dataset, tmp_path_factory):
    """Several runs on two processes: the folder of their outputs, and what the two said."""
    folder = tmp_path_factory.mktemp("two")
    bad = folder / "bad"  # a token that no vocabulary has, in the windows of process 1 at step 3
    bad.mkdir()
    tokens = np.random.default_rng(0).integers(0, 250, 32 * 200 + 1).astype("<u2")
    window = window_numbers(3 * 8 + 4, 1, 200, 1337)[0]
    tokens[window * 32 + 5] = 60_000
    tokens.tofile(bad / "train.bin")
    tokens[:32 * 20 + 1].clip(max=250).tofile(bad / "val.bin")

    def args(name, *keys, data=dataset):
        return [UNIFIED_CONFIG, *start(folder / name, data, *keys)]
    requests = {
        "plain": args("plain"), "whole": args("whole", "--batch_size=8", "--gradient_accumulation_steps=1"),
        "small": args("small", "--batch_size=2", "--gradient_accumulation_steps=4"),
        "watched": args("watched", "--batch_size=2", "--gradient_accumulation_steps=6", "--max_iters=4"),
        "mixture": args("mixture", *MIXTURE, "--optimizer=muon", "--load_balance_coef=0"),
        "uneven": args("uneven", "--batch_size=3", "--gradient_accumulation_steps=1"),
        "guarded": [UNIFIED_CONFIG, *start(undisturbed[0], dataset)],
        "bad": args("bad/out", "--vocab_size=40000", "--dist_timeout=20", data=bad)}
    (folder / "requests.json").write_text(json.dumps(requests))
    run_program(ROOT / "tests" / "two_processes.py", folder / "requests.json", folder, processes=2, timeout=120,
                env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["plain", "whole", "small"])
def test_one_process_equals_two_however_the_batch_is_cut(undisturbed, two, name):
    folder, said = two
    assert [s[name][0] for s in said] == [0, 0] and said[1][name][1:] == ["", ""]  # the first process alone speaks
    assert losses(folder / name) == pytest.approx(losses(undisturbed[0]), abs=1e-5)
    for ours, theirs in zip(read_log(folder / name, "eval"), read_log(undisturbed[0], "eval")):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-5)


def test_a_mixture_on_two_processes(two, dataset, tmp_path):
    trained(UNIFIED_CONFIG, *start(tmp_path, dataset, *MIXTURE, "--optimizer=muon", "--load_balance_coef=0"))
    assert losses(two[0] / "mixture") == pytest.approx(losses(tmp_path), abs=1e-4)  # Muon's bfloat16 magnifies rounding
    a, b = read_log(two[0] / "mixture", "router")[0], read_log(tmp_path, "router")[0]
    assert a["load"] == pytest.approx(b["load"], abs=1e-6)


def test_gradients_meet_once_a_step_and_stay_where_they_are(two):
    """Three micro-steps each: one bucket meets once in each step; no gradient moves out of it (but after the first step, when DDP
    puts its buckets in order), and each is zero afterwards. And PyTorch warns of nothing that concerns the buffers."""
    for said in two[1]:
        seen = said["seen"]
        assert len(seen["meetings"]) == 4 and set(seen["meetings"]) == {1}
        assert seen["moved"][2:] == [0, 0] and seen["left"] == 0 and seen["warnings"] == 0


@pytest.mark.parametrize("name, message", [("uneven", "the global batch of 3 sequences (batch_size=3 x gradient_accumulation_steps=1) does "
                                                      "not divide by 2"), ("guarded", "holds a run: continue it with --resume")])
def test_an_error_that_all_have_is_told_once(two, name, message):
    folder, said = two
    assert [s[name][0] for s in said] == [1, 1] and not (folder / "uneven").exists()
    errors = "".join(s[name][2] for s in said)
    assert errors.count("\n") == 1 and errors.startswith("error: process ") and message in errors


def test_an_error_of_one_process_is_told_with_its_number(two):
    """Process 1 meets a bad token; process 0 only loses contact, and does not say so."""
    _, said = two
    assert [s["bad"][0] for s in said] == [1, 1] and said[0]["bad"][2] == ""
    assert said[1]["bad"][2].startswith("error: process 1: ") and "token id 60000 is beyond vocab_size=40000" in said[1]["bad"][2]


@pytest.mark.slow
def test_quickstart_on_two_processes(tmp_path):
    """The README's own config, twenty steps: the same losses to 1e-5 at every step."""
    args = ["configs/quickstart.py", "--max_iters=20", "--warmup_iters=10", "--eval_iters=1", "--sample_tokens=0", "--device=cpu"]
    run_program("train.py", *args, f"--out_dir={tmp_path / 'one'}")
    run_program("train.py", *args, f"--out_dir={tmp_path / 'two'}", processes=2)
    assert len(losses(tmp_path / "one")) == 20
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("processes", [0, 2])
def test_compiled_training(undisturbed, dataset, tmp_path, processes):
    run_program("train.py", UNIFIED_CONFIG, *start(tmp_path, dataset, "--compile=True"), processes=processes)
    assert losses(tmp_path) == pytest.approx(losses(undisturbed[0]), abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# signals

def at_step(monkeypatch, step, action):
    """Have the loop call `action` as it begins this step."""
    original = program.learning_rate
    monkeypatch.setattr(program, "learning_rate", lambda s, config: (action() if s == step else None) or original(s, config))


@pytest.mark.parametrize("kind, number", [(["--optimizer=adamw"], signal.SIGTERM), (["--optimizer=muon"], signal.SIGINT),
                                          (["--optimizer=adamw", *MIXTURE], signal.SIGINT),
                                          (["--optimizer=muon", *MIXTURE], signal.SIGTERM)],
                         ids=["adamw", "muon", "adamw_mixture", "muon_mixture"])
def test_a_stopped_run_resumes_bit_for_bit(dataset, tmp_path, monkeypatch, kind, number):
    args = [*kind, "--max_iters=20", "--checkpoint_interval=7"]
    trained(UNIFIED_CONFIG, *start(tmp_path / "straight", dataset, *args))
    stopped = [UNIFIED_CONFIG, *start(tmp_path / "stopped", dataset, *args), "--resume"]  # nothing there yet: starts
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        at_step(patch, 10, lambda: os.kill(os.getpid(), number))
        status, said, _ = train(*stopped)
    assert status == EXIT_STOPPED and "stopped by a signal after 11 steps, and saved: continue with --resume" in said
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert newest_checkpoint(tmp_path / "stopped")[1]["step"] == len(losses(tmp_path / "stopped")) == 11
    assert "at step 11" in trained(*stopped)
    same_runs(tmp_path / "straight", tmp_path / "stopped")


def test_a_signal_while_steps_are_not_finite_saves_nothing(dataset, tmp_path, monkeypatch):
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    status, said, _ = train(*start(tmp_path, dataset, "--learning_rate=1e30", "--warmup_iters=0"))
    assert status == EXIT_STOPPED and "after 4 steps, and not saved" in said and not checkpoints(tmp_path)


def test_ctrl_c_before_the_first_step(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "open_dataset", lambda *args: signal.raise_signal(signal.SIGINT))
    assert "interrupted before the first step: nothing was changed" in refused(*start(tmp_path / "out", dataset))


def test_a_sample_that_fails_does_not_fail_the_run(dataset, tmp_path, monkeypatch):
    def bad_prompt(*args):
        raise ValueError("the prompt has token id 300")
    for name, action, message in (("a", lambda *args: signal.raise_signal(signal.SIGINT), "no sample: interrupted"),
                                  ("b", bad_prompt, "no sample: the prompt has token id 300")):
        monkeypatch.setattr(program, "stream_text", action)
        assert message in trained(*start(tmp_path / name, dataset, "--sample_tokens=5", "--max_iters=3"))
        assert (tmp_path / name / "summary.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# machines

def test_vocabulary_of_data_and_model(dataset, tmp_path):
    message = "token ids up to 256 (bytes), beyond the model's vocab_size=200"
    assert message in refused(*start(tmp_path / "out", dataset, "--vocab_size=200"))
    assert not (tmp_path / "out").exists()


def test_help_lists_every_key():
    said = trained("--help")
    assert "scale_placement='input'" in said and "learning_rate=0.001" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_no_gpu(dataset, tmp_path):
    assert "device='cuda' is not available" in refused(*start(tmp_path / "out", dataset, "--device=cuda"))


def test_world_size_without_torchrun(dataset, tmp_path, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE=2 is set in the environment and RANK is not" in refused(*start(tmp_path / "out", dataset))
    assert not (tmp_path / "out").exists()


def test_the_largest_seed_trains(dataset, tmp_path):
    trained(*start(tmp_path, dataset, "--max_iters=3", f"--seed={2 ** 63 - 1}"))


def test_unexpected_errors_keep_their_traceback(dataset, tmp_path, monkeypatch):
    """One line is for what the user can mend; a mistake of the program's shows where it is."""
    def mistaken(*args):
        raise RuntimeError("size mismatch")
    monkeypatch.setattr(program, "training_step", mistaken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        train(*start(tmp_path, dataset))
    assert not Process().report(RuntimeError("size mismatch")) and not Process().report(RuntimeError("gloo: connection closed"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_trains_as_the_cpu_does(undisturbed, dataset, tmp_path):
    for dtype, tolerance in (("float32", 1e-3), ("bfloat16", 0.05)):
        run_program("train.py", UNIFIED_CONFIG, *start(tmp_path / dtype, dataset, "--device=cuda", f"--dtype={dtype}"))
        assert losses(tmp_path / dtype) == pytest.approx(losses(undisturbed[0]), abs=tolerance)


def test_a_rank_that_another_program_left_is_no_process_of_several(monkeypatch):
    """RANK=1 alone: this process still writes its run."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    assert Process().first
