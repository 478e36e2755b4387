"""
Proves that what a run leaves on disk is whole, is its own and is never replaced: checkpoints, log
and summary; and that a resume restores exactly what the new request does not change.
"""
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import UNIFIED_CONFIG, losses, read_log, refused, same_runs, start, train, trained
from test_train import ONE_PROCESS, at_step, batches_of

import train as program
from lib.checkpoint import (
    checkpoints, load_checkpoint, load_weights, newest_checkpoint, save_checkpoint)
from lib.config import load_config
from lib.log import lines_before, to_json
from model import GPT, GPTConfig
from optim import load_optimizer_state, make_optimizer, param_groups

STATE = {"model": {"w": torch.arange(5000.0)}, "optimizer": {"w": {"step": torch.tensor(1.0)}},
         "config": {"n_layer": 1}, "tokenizer": "bytes", "seconds": 1.5,
         "data": {"sequences": 8, "train_tokens": 99}}


def content(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name != "lock"}


# ---- checkpoints: whole or absent ----------------------------------------------------------------

class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_round_trip_and_the_last_few_are_kept(tmp_path):
    """By their numbers. Files of other names are not ours; a damaged one pushes out no good one."""
    others = ("ckpt_10.pt", "ckpt_20000000.pt.bad", "ckpt_00000013.pt", "ckpt.pt",
              "ckpt_20000000.pt")  # the last one is ours and damaged, and of a later step
    for name in others:
        (tmp_path / name).write_text("somebody's", "utf-8")
    (tmp_path / "ckpt_0000011.pt.tmp").write_text("what a kill left", "utf-8")
    for step in (12, 9_999_999, 10_000_000):
        save_checkpoint(tmp_path, step, {**STATE, "model": {"w": torch.full((3,), step)}}, keep=2)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"ckpt_9999999.pt", "ckpt_10000000.pt", *others}
    path, state = newest_checkpoint(tmp_path)
    assert path.name == "ckpt_10000000.pt" and state["step"] == 10_000_000
    assert state["model"]["w"].tolist() == [1e7] * 3 and state["data"] == STATE["data"]


def test_damage_is_seen_and_passed_over(tmp_path, capsys, monkeypatch):
    """Wherever it is; the newest that is whole is used. What a hostile file wants is not done."""
    monkeypatch.chdir(tmp_path)
    path = save_checkpoint(tmp_path, 2, {**STATE, "model": Hostile()}, keep=2)
    hostile = path.read_bytes()
    path = save_checkpoint(tmp_path, 2, STATE, keep=2)
    whole = path.read_bytes()
    middle = whole.index(torch.arange(5000.0).numpy().tobytes()[:64]) + 40  # in a tensor
    torch.save({"format": 99}, tmp_path / "another")
    torch.save([1], tmp_path / "list")
    others = [(tmp_path / name).read_bytes() for name in ("another", "list")]
    for damaged in (hostile, b"", whole[:-1], whole[: len(whole) // 2], b"x" * 100,
                    whole[:middle] + b"\xff" + whole[middle + 1:], *others):
        path.write_bytes(damaged)
        reason = "not a checkpoint of format" if damaged in others else ""
        with pytest.raises(ValueError, match=f"ckpt_0000002.pt cannot be used: {reason}") as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ValueError, match="none of its 1 checkpoints is whole"):
        newest_checkpoint(tmp_path)
    capsys.readouterr()
    save_checkpoint(tmp_path, 1, STATE, keep=2)
    (tmp_path / "ckpt_0000003.pt.tmp").write_bytes(whole)
    assert newest_checkpoint(tmp_path)[1]["step"] == 1
    assert capsys.readouterr().out.count("ckpt_0000002.pt cannot be used") == 1
    assert newest_checkpoint(tmp_path / "elsewhere") is None


def test_weights_of_another_shape_are_named():
    config = dict(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8)
    model = GPT(GPTConfig(**config))
    other = GPT(GPTConfig(**{**config, "vocab_size": 12})).state_dict()
    with pytest.raises(ValueError, match="^x.pt cannot be used: .*mismatch for embedding.weight"):
        load_weights(model, {"model": other}, "x.pt")


# ---- the log -------------------------------------------------------------------------------------

def test_the_log_before_a_step(tmp_path):
    path = tmp_path / "log.jsonl"
    kept = "".join(json.dumps({"event": e, "step": s}) + "\n"
                   for e, s in (("train", 1), ("eval", 1), ("train", 4)))
    path.write_text(kept + '{"event": "train", "step": 5}\nnonsense\n[]\n{"st', "utf-8")
    assert lines_before(path, 5) == kept


def test_json_has_no_nan():
    value = {"a": math.nan, "b": [1.5, -math.inf, {"c": math.inf}], "d": "NaN", "e": True}
    assert to_json(value) == '{"a": null, "b": [1.5, null, {"c": null}], "d": "NaN", "e": true}'


# ---- nothing is ever replaced --------------------------------------------------------------------

def test_out_dir_is_guarded(undisturbed, dataset, tmp_path):
    """It holds a run, another run, or files of others; or it cannot be written."""
    out, _ = undisturbed
    before = content(out)
    assert "continue it with --resume, or choose another" in refused(*start(out, dataset))
    assert "is a checkpoint of another run" in refused(*start(out, dataset, "--resume"))
    assert content(out) == before
    for name in ("torchrun", "config.json", "summary.json", "log.jsonl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine", "utf-8")
        for key in ("--resume=False", "--resume"):
            assert "choose another --out_dir" in refused(*start(tmp_path / name, dataset, key))
        assert content(tmp_path / name) == {name: b"mine"}
    file = tmp_path / "log.jsonl" / "log.jsonl"
    assert "cannot be written (Not a directory)" in refused(*start(file / "x", dataset))


def test_a_request_that_fails_leaves_nothing_but_a_lock(dataset, tmp_path, monkeypatch):
    """So the next one needs no other folder."""
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")
    for keys, message in ((["--vocab_size=100"], "token ids up to 256"),
                          (["--n_embd=1000000", "--d_ff=10000000"], "out of memory")):
        assert message in refused(*start(tmp_path, dataset, *keys))
    with monkeypatch.context() as patch:
        patch.setattr(program, "training_step", no_memory)
        assert "recompute=True" in refused(*start(tmp_path, dataset))
    assert content(tmp_path) == {}
    trained(*start(tmp_path, dataset, "--max_iters=3"))


def test_a_run_that_was_killed_before_its_first_checkpoint(dataset, tmp_path):
    """It starts again; a finished run whose checkpoints are gone is refused."""
    trained(*start(tmp_path, dataset, "--max_iters=4"))
    (tmp_path / "ckpt_0000004.pt").unlink()
    line = refused(*start(tmp_path, dataset, "--resume"))
    assert "holds summary.json and no checkpoint" in line
    (tmp_path / "summary.json").unlink()
    assert "holds a run: continue it with --resume" in refused(*start(tmp_path, dataset))
    (tmp_path / "ckpt_0000002.pt.tmp").write_text("half of one", "utf-8")
    printed = trained(*start(tmp_path, dataset, "--max_iters=3", "--resume"))
    assert "holds a log and no checkpoint: starting at step 0" in printed
    assert len(losses(tmp_path)) == 3 and not list(tmp_path.glob("*.tmp"))


# ---- resuming ------------------------------------------------------------------------------------

def test_resuming_a_finished_run_changes_nothing(undisturbed, dataset, tmp_path):
    """Fewer steps are refused. A damaged newest checkpoint is passed over."""
    out = Path(shutil.copytree(undisturbed[0], tmp_path / "out"))
    args = [UNIFIED_CONFIG, *start(out, dataset, "--checkpoint_interval=4"), "--resume"]
    before = (out / "log.jsonl").read_bytes(), checkpoints(out)
    trained(*args)
    line = refused(*args, "--max_iters=11")
    assert "ckpt_0000012.pt has made 12 steps, and max_iters=11: set --max_iters=12" in line
    assert before == ((out / "log.jsonl").read_bytes(), checkpoints(out))

    before[1][-1].write_bytes(before[1][-1].read_bytes()[:5000])
    printed = trained(*args)
    assert "passing over a checkpoint" in printed and "at step 8" in printed
    same_runs(undisturbed[0], out)


NEW = {"learning_rate": 3e-3, "weight_decay": 0.7, "scale_weight_decay": "none", "beta1": 0.5,
       "decay_embeddings": False, "beta2": 0.8, "muon_momentum": 0.6, "scale_lr": 2.0}


def test_changed_hyperparameters_are_in_force(dataset, tmp_path):
    """The steps are those of an optimizer with these values that is given the moments. Muon has
    AdamW for the rest."""
    args = [UNIFIED_CONFIG, *start(tmp_path, dataset, "--schedule=wsd", "--decay_share=0",
                                   "--warmup_iters=0", "--optimizer=muon")]
    trained(*args, "--max_iters=3")
    state = newest_checkpoint(tmp_path)[1]
    args += ["--max_iters=6", *(f"--{key}={value}" for key, value in NEW.items())]
    printed = trained(*args, "--resume")
    assert all(f"{key}={value!r} (was " in printed for key, value in NEW.items())
    assert printed.count(" (was ") == len(NEW) + 1  # and max_iters

    config = load_config(args)
    model = GPT(config.model)
    model.load_state_dict(state["model"])
    groups = param_groups(model, 0.7, "none", decay_embeddings=False, scale_lr=2.0)
    optimizer = make_optimizer(groups, "muon", 3e-3, (0.5, 0.8), 0.6)
    load_optimizer_state(optimizer, state["optimizer"])
    batches = batches_of(dataset, config, sequences=3 * 8)
    for _ in range(3):
        program.training_step(model, model, optimizer, batches, 3e-3, 1.0, ONE_PROCESS, stop=False)
    resumed = newest_checkpoint(tmp_path)[1]["model"]
    assert all(torch.equal(resumed[name], w) for name, w in model.state_dict().items())


def test_what_cannot_be_changed_is_refused_by_name(undisturbed, dataset, tmp_path):
    args = [UNIFIED_CONFIG, *start(undisturbed[0], dataset, "--resume")]
    for key, value in (("optimizer", "muon"), ("seed", 7), ("scale_placement", "dual")):
        line = refused(*args, f"--{key}={value}")
        assert f"is a checkpoint of another run: {key}=" in line and f"(now {value!r})" in line
    state = {**newest_checkpoint(undisturbed[0])[1], "tokenizer": "gpt2"}
    save_checkpoint(tmp_path, 12, state, keep=1)
    assert "tokenizer='gpt2' (now 'bytes')" in refused(*args, f"--out_dir={tmp_path}")


def test_another_batch_size_continues_the_data_where_the_run_was(dataset, tmp_path, monkeypatch):
    """Half the batch neither repeats nor omits a sequence: the position is not counted in steps."""
    read, original = [], program.window_numbers
    monkeypatch.setattr(program, "window_numbers", lambda first, count, n, seed: read.extend(
        range(first, first + count)) or original(first, count, n, seed))
    args = start(tmp_path, dataset, "--gradient_accumulation_steps=1")
    trained(*args, "--max_iters=3", "--batch_size=8")
    first, read[:] = read[:], []
    printed = trained(*args, "--max_iters=5", "--batch_size=4", "--resume")
    # each run has fetched one batch ahead
    assert first == list(range(32)) and read == list(range(24, 36))
    assert "batch_size=4 (was 8)" in printed
    assert newest_checkpoint(tmp_path)[1]["data"]["sequences"] == 3 * 8 + 2 * 4
    assert read_log(tmp_path, "eval")[-1]["tokens"] == 32 * 32


# ---- steps that are not finite -------------------------------------------------------------------

def test_steps_that_are_not_finite_leave_a_run_that_resumes(dataset, tmp_path):
    """A rate that ruins the weights from step 3 on. The ruin of step 4 is finite and saved: the
    error says what to do, and a lower rate then continues the run."""
    args = start(tmp_path, dataset, "--checkpoint_interval=1", "--warmup_iters=0",
                 "--eval_interval=0", "--max_bad_steps=3")
    trained(*args, "--max_iters=3")
    status, printed, errors = train(*args, "--resume", "--learning_rate=1e30")
    assert status == 1 and printed.count("no update made") == 3 and errors.count("\n") == 1
    assert not (tmp_path / "summary.json").exists()  # that of the first three steps
    assert "error: 3 steps in a row up to step 6 were not finite (max_bad_steps=3)" in errors
    assert "ckpt_0000004.pt; resume with a lower --learning_rate" in errors
    assert "move it away: the one before is used" in errors
    assert [r["loss"] is None for r in read_log(tmp_path, "train")] == [False] * 4 + [True] * 3
    assert [p.name for p in checkpoints(tmp_path)] == ["ckpt_0000003.pt", "ckpt_0000004.pt"]
    (tmp_path / "ckpt_0000004.pt").rename(tmp_path / "ruined")
    assert "at step 3" in trained(*args, "--resume")
    assert len(losses(tmp_path)) == 12 and None not in losses(tmp_path)


def test_what_is_not_finite_is_not_saved(dataset, tmp_path, monkeypatch):
    """The last steps of a run; some infinite γ after a finite step; the steps before a signal."""
    args = start(tmp_path, dataset, "--warmup_iters=0", "--learning_rate=1e30", "--resume")
    line = refused(*args, "--max_iters=4")
    assert "3 steps in a row up to step 3 were not finite" in line
    assert "There is no checkpoint: start again with a lower --learning_rate" in line
    line = refused(*args, "--learning_rate=3e37", "--weight_decay=11", "--checkpoint_interval=1")
    assert "the weights after 1 steps were not finite" in line
    at_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGTERM))
    status, printed, _ = train(*args)
    assert status == program.EXIT_STOPPED and "after 4 steps, and not saved" in printed
    assert not checkpoints(tmp_path) and not (tmp_path / "summary.json").exists()
