"""
Proves that a run survives odd machines: output that fails, signals to a whole group, file systems
without locks, a lack of compilers, other encodings. Real pipes, signals and processes.
"""
import ast
import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import (
    ROOT,
    UNIFIED_CONFIG,
    launch,
    losses,
    refused,
    run,
    same_runs,
    start,
    train,
    trained,
    wait_for_step,
)
from test_train import at_step

import sample
import train as program
from lib.checkpoint import newest_checkpoint, save_checkpoint
from lib.disk import sync_folder, write_whole
from lib.process import Process, attention_backend, report
from model import GPTConfig
from train import EXIT_STOPPED

# -------------------------------------------------------------------------------------------------
# output that fails

def test_ctrl_c_to_a_pipeline(dataset, tmp_path):
    """`train.py ... | tee log`: Ctrl-C ends tee too, and the run still saves."""
    tee = subprocess.Popen(["tee", tmp_path / "tee"], stdin=subprocess.PIPE, preexec_fn=os.setpgrp,
                           stdout=subprocess.PIPE, text=True)
    process = launch(*start(tmp_path / "out", dataset, "--max_iters=1000000"), stdout=tee.stdin,
                     preexec_fn=lambda: os.setpgid(0, tee.pid))
    tee.stdin.close()
    wait_for_step(tee, 3)
    os.killpg(tee.pid, signal.SIGINT)
    assert process.wait(timeout=60) == EXIT_STOPPED and process.stderr.read() == ""
    assert newest_checkpoint(tmp_path / "out")[1]["step"] == len(losses(tmp_path / "out")) > 3
    tee.wait()


@pytest.mark.parametrize("output", [
    ">/dev/full 2>/dev/full", pytest.param("| head -n 1", marks=pytest.mark.slow),
    pytest.param(">&- 2>&-", marks=pytest.mark.slow)])
def test_output_that_fails_ends_no_run(undisturbed, dataset, tmp_path, output):
    """A reader that has left, a full disk, a closed output: the run is the undisturbed one."""
    command = [sys.executable, "train.py", UNIFIED_CONFIG, *start(tmp_path, dataset)]
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {' '.join(command)} {output}"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert losses(tmp_path) == losses(undisturbed[0]) and (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("program", [
    "train.py", pytest.param("sample.py", marks=pytest.mark.slow)])
def test_help_without_docstrings_into_a_pipe_that_nobody_reads(program):
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen([sys.executable, "-OO", program, "--help"], cwd=ROOT,
                               stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert process.communicate()[1] == ""


def test_help_lists_every_key():
    printed = trained("--help")
    assert "scale_placement='input'" in printed and "learning_rate=0.001" in printed


# -------------------------------------------------------------------------------------------------
# an error that leaves the weights intact

def test_an_error_in_the_loop_saves_first(undisturbed, dataset, tmp_path, monkeypatch):
    """A shard that changes during the run: one line, and nothing is lost."""
    def broken(*args):
        raise ValueError("the shard has changed")
    args = [UNIFIED_CONFIG, *start(tmp_path, dataset, "--checkpoint_interval=4"), "--resume"]
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: patch.setattr(program, "window_numbers", broken))
        assert "the shard has changed" in refused(*args)
    assert newest_checkpoint(tmp_path)[1]["step"] == len(losses(tmp_path)) == 6
    assert "at step 6" in trained(*args)
    same_runs(undisturbed[0], tmp_path)


def test_an_evaluation_that_dies_takes_no_training_with_it(dataset, tmp_path, monkeypatch):
    """A mistake of the program keeps its traceback, and what was trained is saved."""
    def dies(*args):
        raise MemoryError
    monkeypatch.setattr(program, "evaluate", dies)
    with pytest.raises(MemoryError):
        train(*start(tmp_path, dataset, "--eval_interval=0"))
    assert newest_checkpoint(tmp_path)[1]["step"] == 12


def test_a_signal_while_steps_are_not_finite_saves_nothing(dataset, tmp_path, monkeypatch):
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    status, printed, _ = train(*start(tmp_path, dataset, "--learning_rate=1e30",
                                      "--warmup_iters=0"))
    assert status == EXIT_STOPPED and "after 4 steps, and not saved" in printed
    assert newest_checkpoint(tmp_path) is None


def test_an_ignored_signal_stays_ignored(dataset, tmp_path, monkeypatch):
    """As under nohup, which ignores SIGHUP for its children."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGHUP))
    try:
        trained(*start(tmp_path, dataset))
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_ctrl_c_before_the_first_step(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "open_dataset", lambda *args: signal.raise_signal(signal.SIGINT))
    line = refused(*start(tmp_path / "out", dataset))
    assert "interrupted before the first step: nothing was changed" in line


def test_a_sample_that_fails_does_not_fail_the_run(dataset, tmp_path, monkeypatch):
    def bad_prompt(*args):
        raise ValueError("the prompt has token id 300")
    for name, action, message in (
            ("a", lambda *args: signal.raise_signal(signal.SIGINT), "no sample: interrupted"),
            ("b", bad_prompt, "no sample: the prompt has token id 300")):
        monkeypatch.setattr(sample, "stream_text", action)
        args = start(tmp_path / name, dataset, "--sample_tokens=5", "--max_iters=3")
        assert message in trained(*args) and (tmp_path / name / "summary.json").exists()


def test_a_clock_that_was_wrong_makes_no_checkpoint_unusable(undisturbed, dataset, tmp_path):
    state = {**newest_checkpoint(undisturbed[0])[1], "seconds": -3600.0}
    save_checkpoint(tmp_path, 12, state, keep=1)
    trained(UNIFIED_CONFIG, *start(tmp_path, dataset, "--max_iters=13", "--resume"))


# -------------------------------------------------------------------------------------------------
# file systems

NO_FLOCK = """
import errno, fcntl, sys
def flock(*args):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
import train
train.hard_exit(train.main(sys.argv[1:]))
"""


@pytest.fixture
def no_flock(monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_file_system_without_flock(dataset, tmp_path, no_flock):
    """The lock holds while the process lives; a killed run can be resumed at once."""
    args = [*start(tmp_path, dataset, "--checkpoint_interval=1"), "--resume"]
    command = [sys.executable, "-c", NO_FLOCK, *args, "--max_iters=1000000"]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    wait_for_step(process, 2)
    line = refused(*args)
    assert "another process is training in out_dir" in line
    assert f"if process {process.pid} on " in line
    assert line.endswith(f"remove {tmp_path / 'lock'}\n")
    process.kill()
    process.communicate()
    steps = newest_checkpoint(tmp_path)[1]["step"] + 2
    assert "resuming from" in trained(*args, f"--max_iters={steps}")
    assert not (tmp_path / "lock").exists()  # another machine can have it now


def test_a_lock_of_another_machine(dataset, tmp_path, no_flock):
    (tmp_path / "lock").write_text("1\nelsewhere\n", "utf-8")
    line = refused(*start(tmp_path, dataset))
    assert f"if process 1 on elsewhere has ended, remove {tmp_path / 'lock'}" in line
    assert (tmp_path / "lock").read_text("utf-8") == "1\nelsewhere\n"


def test_a_folder_that_cannot_be_flushed(tmp_path):
    """/proc answers fsync with EINVAL, as some network file systems do; other errors have a path,
    and only a full disk asks for room."""
    sync_folder("/proc")
    with pytest.raises(OSError, match="/nowhere"):
        sync_folder("/nowhere")
    with pytest.raises(OSError, match="/nowhere/x cannot be written .No such file.*: try again"):
        write_whole("/nowhere/x", "text")
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="make room"):
        write_whole(tmp_path / "x", lambda file: full.write(b"x"))
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------
# compilers, devices, encodings

@pytest.mark.slow
def test_compiling_without_a_compiler(dataset, tmp_path):
    done = run("train.py", *start(tmp_path / "out", dataset, "--compile=True"), check=False,
               env={"PATH": "/nowhere", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "torch.compile needs a C++ compiler" in done.stderr
    assert "--compile=False" in done.stderr


def test_unexpected_errors_keep_their_traceback(dataset, tmp_path, monkeypatch):
    """One line is for what the user can mend; a mistake of the program's shows where it is."""
    def mistaken(*args, **kwargs):
        raise RuntimeError("size mismatch")
    monkeypatch.setattr(program, "training_step", mistaken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        train(*start(tmp_path, dataset))
    assert not report(RuntimeError("gloo: connection closed"), Process())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_no_gpu(dataset, tmp_path):
    line = refused(*start(tmp_path / "out", dataset, "--device=cuda"))
    assert "device='cuda' is not available" in line and not (tmp_path / "out").exists()


def test_the_attention_kernel_has_a_name():
    config = GPTConfig(block_size=64, n_head=4, n_kv_head=2, n_embd=64)
    name = attention_backend(config, torch.device("cpu"), torch.bfloat16)
    assert name in ("FLASH_ATTENTION", "MATH")


def test_the_environment_of_another_program(dataset, tmp_path, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        line = refused(*start(tmp_path / "out", dataset))
        assert "WORLD_SIZE=2 is set in the environment and RANK is not" in line
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")  # a process on its own still writes its run
    assert Process().is_main


def test_the_largest_seed_trains(dataset, tmp_path):
    trained(*start(tmp_path, dataset, "--max_iters=3", f"--seed={2 ** 63 - 1}"))


def opens_without_encoding(call):
    """True for open(), read_text(), write_text() and the like of a text file that leave the
    encoding to the machine."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    place = {"open": 3, "fdopen": 3, "read_text": 0, "write_text": 1}.get(name)
    if place is None or ast.unparse(call.func) in ("os.open", "gzip.open", "Image.open"):
        return False
    binary = place == 3 and "b'" in ast.unparse(call).partition(",")[2]  # the mode, as in 'rb'
    return not (binary or len(call.args) > place or any(k.arg == "encoding" for k in call.keywords))


def test_every_text_file_is_opened_with_its_encoding():
    """Or a machine with another locale reads and writes other text."""
    found = []
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] not in ("tests", "out", ".venv-ci"):
            calls = [n for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, ast.Call)]
            found += [f"{path}:{c.lineno}" for c in calls if opens_without_encoding(c)]
    assert not found
