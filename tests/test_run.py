"""
Proves that what a run leaves on disk is whole, is its own and stays until something better is there: checkpoints, log and summary;
that a resume takes over exactly what the new request does not change; and that nothing foreign in out_dir is touched.
"""
import json
import math
import pickle
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
import torch
from conftest import ROOT, UNIFIED_CONFIG, losses, read_log, refused, same_runs, start, train, trained

from lib import checkpoint as run
from lib.checkpoint import (
    FORMAT,
    SPIKE_WINDOW,
    checkpoints,
    is_spike,
    load_checkpoint,
    load_weights,
    log_before,
    newest_checkpoint,
    save_checkpoint,
    to_json,
)
from model import GPT, GPTConfig

STATE = {"model": {"w": torch.arange(5000.0)}, "optimizer": {"w": {"step": torch.tensor(1.0)}}, "config": {"n_layer": 1},
         "tokenizer": "bytes", "data": {"sequences": 8, "train_tokens": 99}, "rng": [], "seconds": 1.5}

RUINED = ["--learning_rate=3e37", "--weight_decay=11", "--warmup_iters=0"]  # a finite step that makes some γ infinite


def content(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name != "lock"}


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints: whole or absent

def test_round_trip_and_the_last_few_are_kept(tmp_path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, {**STATE, "model": {"w": torch.full((3,), float(step))}}, keep=2)
    assert {p.name for p in tmp_path.iterdir()} == {"ckpt_0000004.pt", "ckpt_0000005.pt"}
    path, state = newest_checkpoint(tmp_path)
    assert path.name == "ckpt_0000005.pt" and state["step"] == 5 and state["model"]["w"].tolist() == [5.0] * 3
    assert state["data"] == STATE["data"] and state["seconds"] == 1.5 and state["format"] == FORMAT


def test_checkpoints_are_ordered_by_number_and_other_names_are_not_ours(tmp_path):
    for step in (12, 9_999_999, 10_000_000):
        save_checkpoint(tmp_path, step, STATE, keep=5)
    for name in ("ckpt_10.pt", "ckpt_20000000.pt.bad", "ckpt_00000013.pt", "ckpt.pt", "ckpt_last.pt"):
        (tmp_path / name).write_text("somebody's")
    assert [run.step_of(p) for p in checkpoints(tmp_path)] == [12, 9_999_999, 10_000_000]
    assert newest_checkpoint(tmp_path)[1]["step"] == 10_000_000
    save_checkpoint(tmp_path, 10_000_001, STATE, keep=1)
    assert len(checkpoints(tmp_path)) == 1 and (tmp_path / "ckpt_10.pt").read_text() == "somebody's"


def test_damage_is_seen_wherever_it_is(tmp_path):
    path = save_checkpoint(tmp_path, 1, STATE, keep=2)
    whole = path.read_bytes()
    tensor_bytes = whole.index(torch.arange(5000.0).numpy().tobytes()[:64])
    for damaged in (b"", whole[:100], whole[:-1], whole[: len(whole) // 2], b"x" * 100,
                    whole[:tensor_bytes + 40] + b"\xff" + whole[tensor_bytes + 41:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="ckpt_0000001.pt cannot be used") as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)
    path.write_bytes(whole)
    assert load_checkpoint(path)["step"] == 1


@pytest.mark.parametrize("key", STATE)
def test_a_part_that_is_missing_or_wrong_is_named(tmp_path, key):
    path = save_checkpoint(tmp_path, 1, {k: v for k, v in STATE.items() if k != key}, keep=2)
    with pytest.raises(ValueError, match=f"cannot be used: its '{key}' is missing"):
        load_checkpoint(path)
    save_checkpoint(tmp_path, 1, {**STATE, key: 7}, keep=2)
    with pytest.raises(ValueError, match="cannot be used"):
        load_checkpoint(path)


WRONG = {"step": -3, "model": {3: torch.zeros(2)}, "config": {"n_layer": torch.zeros(2)}, "seconds": math.nan,
         "model ": {"w": torch.zeros(2).to_sparse()}, "model  ": {"w": torch.zeros(2, dtype=torch.int64)},
         "optimizer": {3: {"step": torch.tensor(1.0)}}, "optimizer ": {"w": {"step": torch.tensor(1)}},
         "data": {"sequences": 10 ** 30, "train_tokens": 99}, "data ": {"sequences": -5, "train_tokens": 99},
         "rng": [{}], "rng ": [{"cpu": torch.zeros(3)}], "rng  ": [{"cpu": torch.zeros(3, dtype=torch.uint8)}]}


@pytest.mark.parametrize("key", WRONG)
def test_a_checkpoint_with_an_impossible_part_is_passed_over(tmp_path, key):
    """Parts of the right kind that no run writes; a resume takes the checkpoint before."""
    save_checkpoint(tmp_path, 1, {**STATE, "rng": [{"cpu": torch.get_rng_state()}]}, keep=2)
    torch.save({"format": FORMAT, "step": 2, **STATE, key.strip(): WRONG[key]}, tmp_path / "ckpt_0000002.pt")
    said = []
    assert newest_checkpoint(tmp_path, said.append)[1]["step"] == 1
    assert len(said) == 1 and "ckpt_0000002.pt cannot be used" in said[0] and "\n" not in said[0]


def test_newest_good_one_is_found(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, STATE, keep=3)
    (tmp_path / "ckpt_0000003.pt").write_bytes(b"half")
    (tmp_path / "ckpt_0000004.pt.tmp").write_bytes(b"never renamed")
    said = []
    assert newest_checkpoint(tmp_path, said.append)[1]["step"] == 2
    assert len(said) == 1 and "ckpt_0000003.pt cannot be used" in said[0]
    for path in checkpoints(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of its 3 checkpoints is whole"):
        newest_checkpoint(tmp_path, said.append)
    assert newest_checkpoint(tmp_path / "elsewhere") is None


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


def test_a_hostile_file_runs_no_code(tmp_path):
    marker = tmp_path / "executed"
    save_checkpoint(tmp_path, 1, {**STATE, "model": Hostile(str(marker))}, keep=1)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile(str(marker))))
    for path in (tmp_path / "ckpt_0000001.pt", tmp_path / "plain.pt"):
        with pytest.raises(ValueError, match="cannot be used"):
            load_checkpoint(path)
    assert not marker.exists()
    torch.load(tmp_path / "ckpt_0000001.pt", weights_only=False)  # the file is hostile indeed
    assert marker.exists()


def test_other_files_are_not_checkpoints(tmp_path):
    torch.save({"format": 99}, tmp_path / "a.pt")
    torch.save([1], tmp_path / "b.pt")
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as archive:
        archive.writestr("x", "y")
    for name, message in (("a", f"not a checkpoint of format {FORMAT}"), ("b", "not a checkpoint"), ("c", "")):
        with pytest.raises(ValueError, match=f"{name}.pt cannot be used: .*{message}"):
            load_checkpoint(tmp_path / f"{name}.pt")


def test_a_write_that_fails_leaves_the_older_checkpoint(tmp_path):
    """A limit on the size of files stands in for a full disk: the write fails in the middle, for real."""
    save_checkpoint(tmp_path, 1, STATE, keep=1)
    script = ("import sys, torch, signal; from run import save_checkpoint; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
              "save_checkpoint(sys.argv[1], 2, {'model': {'w': torch.zeros(10**6)}}, keep=1)")
    done = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 5, 10 ** 5)))
    assert done.returncode != 0 and "ckpt_0000002.pt cannot be written (File too large)" in done.stderr
    assert "the older checkpoints stand" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt_0000001.pt"]
    assert newest_checkpoint(tmp_path)[1]["step"] == 1


def test_weights_of_another_shape_are_named():
    config = dict(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8)
    model = GPT(GPTConfig(**config))
    other = GPT(GPTConfig(**{**config, "vocab_size": 12})).state_dict()
    with pytest.raises(ValueError, match=r"x.pt cannot be used: embedding.weight has shape \(12, 8\) in it and \(11, 8\) in the model"):
        load_weights(model, {"model": other}, "x.pt")
    fewer = {name: tensor for name, tensor in model.state_dict().items() if name != "embedding.weight"}
    with pytest.raises(ValueError, match="embedding.weight has shape None in it"):
        load_weights(model, {"model": fewer}, "x.pt")


# ---------------------------------------------------------------------------------------------------------------------
# the log

def test_the_log_before_a_step(tmp_path):
    path = tmp_path / "log.jsonl"
    events = [{"event": "train", "step": s, "loss": x, "spikes": n} for s, x, n in ((1, 2.5, 0), (2, 9.0, 1), (3, None, 1), (4, 2.0, 1))]
    first = "".join(json.dumps(e) + "\n" for e in (events[0], {"event": "eval", "step": 1}, *events[1:]))
    path.write_text(first + '{"event": "train", "step": 5, "loss": 1.0, "spikes": 7}\nnonsense\n[]\n{"st')
    kept, history = log_before(path, 5)
    assert kept == first and (history.recent, history.spikes) == ([2.5, 9.0, 2.0], 1)


def test_spikes():
    recent = [2.0 + 0.1 * (-1) ** i for i in range(SPIKE_WINDOW)]  # mean 2, standard deviation 0.1
    assert is_spike(2.61, recent) and not is_spike(2.59, recent) and not is_spike(1.0, recent)
    assert not is_spike(99.0, recent[1:])  # too few to say


def test_spikes_are_counted_over_a_resume(dataset, tmp_path, monkeypatch):
    """With the bar far below the mean, every step is a spike that has enough losses before it: here from the fourth on."""
    monkeypatch.setattr(run, "SPIKE_WINDOW", 4)
    monkeypatch.setattr(run, "SPIKE_STD", -1e9)
    for steps in (7, 9):
        said = trained(*start(tmp_path, dataset, f"--max_iters={steps}", "--resume"))
    assert [r["spikes"] for r in read_log(tmp_path, "train")] == [0, 0, 0, 0, 1, 2, 3, 4, 5] and "is spike number 5" in said
    assert json.loads((tmp_path / "summary.json").read_text())["spikes"] == 5


def test_json_has_no_nan():
    assert to_json({"a": math.nan, "b": [1.5, -math.inf, {"c": math.inf}], "d": "NaN", "e": True}) == \
        '{"a": null, "b": [1.5, null, {"c": null}], "d": "NaN", "e": true}'


def test_a_run_that_diverges_writes_json(dataset, tmp_path):
    """NaN, of the validation loss too, stands as null in the log, which a strict reader takes."""
    train(*start(tmp_path, dataset, *RUINED, "--eval_interval=1", "--max_bad_steps=3"))

    def refuse(name):
        raise ValueError(name)
    records = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["val_loss"] for r in records if r["event"] == "eval"][1:] == [None] * 3


# ---------------------------------------------------------------------------------------------------------------------
# whose folder is it

def test_out_dir_is_guarded(undisturbed, dataset, tmp_path):
    out, _ = undisturbed
    before = content(out)
    assert "holds a run: continue it with --resume, discard it with --overwrite" in refused(*start(out, dataset))
    assert "is a checkpoint of another run: scale_heterogeneous=True (now False)" in refused(*start(out, dataset, "--resume"))
    with filelock.FileLock(out / "lock"):
        for key in ("--resume", "--overwrite"):
            assert "another process is training in out_dir" in refused(UNIFIED_CONFIG, *start(out, dataset, key))
    assert content(out) == before
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(*start(tmp_path / "file" / "out", dataset))


@pytest.mark.parametrize("key", ["", "--resume", "--overwrite"])
@pytest.mark.parametrize("name, text", [("config.json", '{"model_type": "gpt2", "n_layer": 12}'), ("summary.json", "[1, 2]"),
                                        ("log.jsonl", "Mon: all well\n"), ("lock", "do not touch"),
                                        ("config.json.tmp", "{}"), ("ckpt_0000020.pt.tmp", "mine")])
def test_files_of_others_are_left_alone(dataset, tmp_path, key, name, text):
    (tmp_path / name).write_text(text)
    (tmp_path / "thesis.tmp").write_text("a year of work")
    assert name in refused(*start(tmp_path, dataset, *([key] if key else []))) and (tmp_path / name).read_text() == text
    (tmp_path / name).unlink()
    trained(*start(tmp_path, dataset, "--max_iters=3", *([key] if key else [])))
    assert (tmp_path / "thesis.tmp").read_text() == "a year of work"


def test_checkpoints_without_a_run_are_not_overwritten(dataset, tmp_path):
    (tmp_path / "ckpt_0000012.pt").write_text("whose?")
    assert "holds ckpt_0000012.pt and no config.json" in refused(*start(tmp_path, dataset, "--overwrite"))
    assert (tmp_path / "ckpt_0000012.pt").exists()


def test_overwrite(dataset, tmp_path):
    trained(*start(tmp_path, dataset, "--max_iters=4", "--checkpoint_interval=2"))
    (tmp_path / "ckpt_0000006.pt.tmp").write_text("half of one")
    trained(*start(tmp_path, dataset, "--max_iters=3", "--overwrite"))
    assert len(losses(tmp_path)) == 3 and [p.name for p in tmp_path.glob("ckpt*")] == ["ckpt_0000003.pt"]
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 3


@pytest.mark.parametrize("request_that_fails, message", [
    (["--n_embd=100000", "--d_ff=100000000"], "out of memory: lower batch_size"),
    (["--wandb_project=x"], "wandb_project needs the package wandb"),
    (["--vocab_size=100"], "token ids up to 256"),
])
def test_overwrite_deletes_nothing_until_the_request_works(dataset, tmp_path, monkeypatch, request_that_fails, message):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    trained(*start(tmp_path, dataset, "--max_iters=3"))
    before = content(tmp_path)
    assert message in refused(*start(tmp_path, dataset, "--overwrite", *request_that_fails))
    assert content(tmp_path) == before


def test_a_new_run_leaves_nothing_if_its_first_step_fails(dataset, tmp_path, monkeypatch):
    """So the next try needs neither --resume nor --overwrite."""
    import train as program

    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with monkeypatch.context() as patch:
        patch.setattr(program, "training_step", no_memory)
        for out in (tmp_path, tmp_path / "missing"):
            assert "recompute=True" in refused(*start(out, dataset))
            assert list(tmp_path.iterdir()) == []
    trained(*start(tmp_path, dataset, "--max_iters=3"))


def test_a_log_without_its_checkpoints_is_kept(dataset, tmp_path):
    trained(*start(tmp_path, dataset, "--max_iters=4"))
    (tmp_path / "ckpt_0000004.pt").unlink()
    old = (tmp_path / "log.jsonl").read_bytes()
    said = trained(*start(tmp_path, dataset, "--max_iters=3", "--resume"))
    assert "holds a log and no checkpoint: starting at step 0, and keeping the old log as log.old-1.jsonl" in said
    assert (tmp_path / "log.old-1.jsonl").read_bytes() == old and len(losses(tmp_path)) == 3


# ---------------------------------------------------------------------------------------------------------------------
# resuming

def test_resuming_a_finished_run_changes_nothing(undisturbed, dataset, tmp_path):
    out = Path(shutil.copytree(undisturbed[0], tmp_path / "out"))
    before = losses(out), json.loads((out / "summary.json").read_text())["val_loss"], checkpoints(out)
    trained(UNIFIED_CONFIG, *start(out, dataset, "--checkpoint_interval=4"), "--resume")
    assert before == (losses(out), json.loads((out / "summary.json").read_text())["val_loss"], checkpoints(out))
    assert read_log(out, "eval")[-1]["step"] == 12


def test_fewer_steps_than_were_made_are_refused(undisturbed, dataset):
    before = content(undisturbed[0])
    line = refused(UNIFIED_CONFIG, *start(undisturbed[0], dataset, "--max_iters=11", "--resume"))
    assert "ckpt_0000012.pt has made 12 steps, and max_iters=11: set --max_iters=12 or more" in line
    assert content(undisturbed[0]) == before


def test_a_damaged_newest_checkpoint_is_passed_over(undisturbed, dataset, tmp_path):
    args = [UNIFIED_CONFIG, *start(tmp_path, dataset, "--checkpoint_interval=4")]
    trained(*args)
    (tmp_path / "ckpt_0000012.pt").write_bytes((tmp_path / "ckpt_0000012.pt").read_bytes()[:5000])
    said = trained(*args, "--resume")
    assert "passing over a checkpoint" in said and "at step 8" in said
    same_runs(undisturbed[0], tmp_path)


def test_a_damaged_checkpoint_never_pushes_out_a_good_one(dataset, tmp_path):
    """keep_checkpoints=1, and the newest file is damaged: what the resumed run saves at an earlier step is the one to keep."""
    trained(*start(tmp_path, dataset, "--max_iters=5", "--checkpoint_interval=3"))
    (tmp_path / "ckpt_0000005.pt").write_bytes(b"half")
    trained(*start(tmp_path, dataset, "--max_iters=4", "--keep_checkpoints=1", "--resume"))
    assert newest_checkpoint(tmp_path)[1]["step"] == 4


def test_a_fork_with_random_numbers_resumes_exactly(dataset, tmp_path, monkeypatch):
    """Nothing here draws random numbers while training. With dropout put into the model, the checkpoint's generators matter."""
    import model
    forward = model.MLP.forward
    monkeypatch.setattr(model.MLP, "forward", lambda self, *a: torch.nn.functional.dropout(forward(self, *a), 0.2, self.training))
    for stops in ([8], [3, 8]):
        for stop in stops:
            trained(*start(tmp_path / str(stops), dataset, "--schedule=wsd", "--decay_share=0", f"--max_iters={stop}", "--resume",
                           "--eval_interval=1"))
    a, b = (losses(tmp_path / name) for name in ("[8]", "[3, 8]"))
    assert a == b and len(a) == 8


# lr is constant in these, so that a run to step 3 and on to 8 makes the steps of a run to 8
CONSTANT = ["--schedule=wsd", "--decay_share=0", "--warmup_iters=0", "--eval_interval=0"]


@pytest.mark.parametrize("kind", [["--optimizer=adamw"], ["--optimizer=muon"]], ids=["adamw", "muon"])
def test_changed_hyperparameters_are_in_force(dataset, tmp_path, kind):
    """Resumed with other values, the steps are those of an optimizer that is built here with these values and given the moments."""
    from lib.config import load_config
    from lib.data import Dataset, window_numbers
    from optim import load_optimizer_state, make_optimizer, param_groups, set_learning_rate
    common = [UNIFIED_CONFIG, *start(tmp_path, dataset, *CONSTANT, *kind)]
    trained(*common, "--max_iters=3")
    state = newest_checkpoint(tmp_path)[1]
    new = ["--learning_rate=3e-3", "--weight_decay=0.7", "--scale_weight_decay=all", "--decay_embeddings=False", "--beta1=0.5",
           "--beta2=0.8", "--muon_momentum=0.6", "--scale_lr=2.0"]
    said = trained(*common, "--max_iters=6", "--resume", *new)
    for key, was in (("weight_decay=0.7", 0.1), ("scale_weight_decay='all'", "'input_norm'"), ("decay_embeddings=False", True),
                     ("beta1=0.5", 0.9), ("beta2=0.8", 0.95), ("muon_momentum=0.6", 0.95), ("scale_lr=2.0", 1.0),
                     ("learning_rate=0.003", 0.01)):
        assert f"{key} (was {was})" in said

    config = load_config([*common, "--max_iters=6", *new])
    opened, model = Dataset(dataset, 32, 257), GPT(config.model)
    model.load_state_dict(state["model"])
    groups = param_groups(model, 0.7, "all", decay_embeddings=False, scale_lr=2.0)
    optimizer = make_optimizer(groups, config.optimizer, 3e-3, (0.5, 0.8), 0.6)
    load_optimizer_state(optimizer, state["optimizer"])
    for step in range(3, 6):
        for half in range(2):  # two micro-batches of 4
            x, y = map(torch.tensor, opened.train[window_numbers(step * 8 + half * 4, 4, len(opened.train), config.seed)])
            (model(x, y)[1] / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_learning_rate(optimizer, 3e-3)
        optimizer.step()
        optimizer.zero_grad()
    resumed = newest_checkpoint(tmp_path)[1]["model"]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("change", ["optimizer='muon'", "seed=7", "n_layer=3", "norm_eps=1e-05", "scale_placement='dual'"])
def test_what_cannot_be_changed_is_refused_by_name(dataset, tmp_path, change):
    trained(*start(tmp_path, dataset, "--max_iters=3"))
    before, (key, value) = content(tmp_path), change.split("=")
    line = refused(*start(tmp_path, dataset, "--max_iters=4", "--resume", f"--{key}={value.strip(chr(39))}"))
    assert f"is a checkpoint of another run: {key}=" in line and f"(now {value})" in line and content(tmp_path) == before


def test_another_tokenizer_is_refused(dataset, tmp_path):
    trained(*start(tmp_path, dataset, "--max_iters=3"))
    path, state = newest_checkpoint(tmp_path)
    save_checkpoint(tmp_path, 3, {**{k: v for k, v in state.items() if k not in ("format", "step")}, "tokenizer": "gpt2"}, keep=1)
    assert "tokenizer='gpt2' (now 'bytes')" in refused(*start(tmp_path, dataset, "--resume"))


def test_a_checkpoint_with_other_tensors_is_one_line(dataset, tmp_path):
    trained(*start(tmp_path, dataset, "--max_iters=3"))
    path, state = newest_checkpoint(tmp_path)
    parts = {k: v for k, v in state.items() if k not in ("format", "step")}
    save_checkpoint(tmp_path, 3, {**parts, "model": {**parts["model"], "embedding.weight": torch.zeros(3, 3)}}, keep=1)
    assert "embedding.weight has shape (3, 3) in it" in refused(*start(tmp_path, dataset, "--resume"))
    moments = {**parts["optimizer"], "embedding.weight": {"exp_avg": torch.zeros(3, 3)}}
    save_checkpoint(tmp_path, 3, {**parts, "optimizer": moments}, keep=1)
    assert "ckpt_0000003.pt cannot be used: the optimizer's exp_avg of embedding.weight" in refused(*start(tmp_path, dataset, "--resume"))


def test_another_batch_size_takes_up_the_data_where_the_run_was(dataset, tmp_path, monkeypatch):
    """Halving the batch in the middle neither repeats nor leaves out a sequence: the position counts sequences, not steps."""
    import train as program
    taken, original = [], program.window_numbers
    monkeypatch.setattr(program, "window_numbers", lambda first, count, n, seed:
                        taken.extend(range(first, first + count)) or original(first, count, n, seed))
    trained(*start(tmp_path, dataset, "--max_iters=3", "--batch_size=8", "--gradient_accumulation_steps=1"))
    first = sorted(set(taken))
    taken.clear()
    said = trained(*start(tmp_path, dataset, "--max_iters=5", "--batch_size=4", "--gradient_accumulation_steps=1", "--resume"))
    assert first == list(range(32)) and sorted(taken) == list(range(24, 36))  # each run has fetched one batch ahead
    assert "batch_size=4 (was 8)" in said
    assert newest_checkpoint(tmp_path)[1]["data"]["sequences"] == 3 * 8 + 2 * 4
    assert [(r["step"], r["tokens"]) for r in read_log(tmp_path, "eval")] == [(0, 0), (5, 32 * 32)]


@pytest.mark.parametrize("batch", [4, 16])
def test_a_length_in_tokens_is_counted_in_tokens(dataset, tmp_path, batch):
    """max_iters=0: stopped in the middle and resumed with half or twice the batch, the run sees the tokens it was to see."""
    args = start(tmp_path, dataset, "--tokens_per_param=0.1", "--gradient_accumulation_steps=1", "--checkpoint_interval=4")
    trained(*args, "--batch_size=8", "--max_iters=0")
    summary = json.loads((tmp_path / "summary.json").read_text())
    budget = 0.1 * summary["params"]
    assert budget <= summary["tokens"] < budget + 8 * 32
    checkpoints(tmp_path)[-1].unlink()
    trained(*args, f"--batch_size={batch}", "--max_iters=0", "--resume")
    resumed = json.loads((tmp_path / "summary.json").read_text())
    assert budget <= resumed["tokens"] < budget + batch * 32 and resumed["steps"] != summary["steps"]


# ---------------------------------------------------------------------------------------------------------------------
# steps that are not finite

def test_steps_that_are_not_finite_leave_a_run_that_resumes(dataset, tmp_path):
    """A rate that ruins the weights from step 3 on: no checkpoint of the ruin stands, and a lower rate takes the run up."""
    common = ["--checkpoint_interval=1", "--warmup_iters=0", "--keep_checkpoints=2", "--eval_interval=0", "--max_bad_steps=3"]
    trained(*start(tmp_path, dataset, *common, "--max_iters=3"))
    status, said, errors = train(*start(tmp_path, dataset, *common, "--resume", "--learning_rate=1e30"))
    assert status == 1 and said.count("no update made") == 3 and errors.count("\n") == 1
    assert "error: 3 steps in a row up to step 6 were not finite (max_bad_steps=3): stopped." in errors and "ckpt_0000003.pt" in errors
    assert [r["loss"] is None for r in read_log(tmp_path, "train")] == [False] * 4 + [True] * 3
    assert [p.name for p in checkpoints(tmp_path)] == ["ckpt_0000003.pt"] and (tmp_path / "ckpt_0000004.pt.bad").exists()
    assert "at step 3" in trained(*start(tmp_path, dataset, *common, "--resume"))
    assert len(losses(tmp_path)) == 12 and None not in losses(tmp_path)


def test_a_run_does_not_end_on_steps_that_are_not_finite(dataset, tmp_path):
    status, _, errors = train(*start(tmp_path, dataset, "--learning_rate=1e30", "--warmup_iters=0", "--max_iters=4"))
    assert status == 1 and "3 steps in a row up to step 3 were not finite" in errors and not checkpoints(tmp_path)
    assert not (tmp_path / "summary.json").exists()


def test_weights_that_are_not_finite_are_not_saved(dataset, tmp_path):
    status, _, errors = train(*start(tmp_path, dataset, *RUINED, "--checkpoint_interval=1"))
    assert status == 1 and "the weights after 1 steps were not finite" in errors and not checkpoints(tmp_path)


@pytest.mark.parametrize("max_iters, interval, due", [(10, 3, [3, 6, 9, 10]), (9, 3, [3, 6, 9]), (5, 0, [5]), (4, 8, [4])])
def test_evaluations_that_are_still_to_come_count_in_the_time_left(max_iters, interval, due):
    log = run.Log(None, SimpleNamespace(max_iters=max_iters, eval_interval=interval), 0)
    assert [log.evaluations_after(step) for step in range(max_iters)] == [sum(d > step for d in due) for step in range(max_iters)]
