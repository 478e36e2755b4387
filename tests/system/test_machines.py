"""
Proves that a run survives odd machines: output that fails, signals to a whole group, file systems
without locks, a lack of compilers, other encodings. Real pipes, signals and processes.
"""
import ast
import contextlib
import errno
import fcntl
import importlib.util
import io
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import (
    ROOT, UNIFIED_CONFIG, launch, losses, refused, run, same_runs, start, train, trained, wait_for)
from test_train import at_step

import sample
import train as program
from lib.checkpoint import newest_checkpoint, save_checkpoint
from lib.disk import sync_folder, write_whole
from lib.lock import hold_lock
from lib.process import Process, hard_exit, report
from train import EXIT_STOPPED

# ---- output that fails ---------------------------------------------------------------------------

def test_ctrl_c_to_a_pipeline(dataset, tmp_path):
    """`train.py ... | tee log`: while it trains, another process cannot use its folder. Ctrl-C ends
    tee too, so that output fails, and the run still saves."""
    args = start(tmp_path / "out", dataset, "--max_iters=1000000")
    tee = subprocess.Popen(["tee", tmp_path / "tee"], stdin=subprocess.PIPE, preexec_fn=os.setpgrp,
                           stdout=subprocess.PIPE, text=True)
    process = launch(*args, stdout=tee.stdin, preexec_fn=lambda: os.setpgid(0, tee.pid))
    tee.stdin.close()
    wait_for(tee, " 3/")
    assert "another process is training in out_dir" in refused(*args, "--resume")
    os.killpg(tee.pid, signal.SIGINT)
    assert process.wait(timeout=60) == EXIT_STOPPED and process.stderr.read() == ""
    assert newest_checkpoint(tmp_path / "out")[1]["step"] == len(losses(tmp_path / "out")) > 3
    tee.wait()


@pytest.mark.slow
@pytest.mark.parametrize("output", [">/dev/full 2>/dev/full", "| head -n 1", ">&- 2>&-"])
def test_output_that_fails_ends_no_run(undisturbed, dataset, tmp_path, output):
    """A reader that has left, a full disk, a closed output, no docstrings: nothing changes."""
    command = [sys.executable, "-OO", "train.py", UNIFIED_CONFIG, *start(tmp_path, dataset)]
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {' '.join(command)} {output}"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert losses(tmp_path) == losses(undisturbed[0]) and (tmp_path / "summary.json").exists()


# ---- an error that leaves the weights intact -----------------------------------------------------

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


def test_a_mistake_of_the_program_keeps_its_traceback(dataset, tmp_path, monkeypatch, capsys):
    """One line is for what the user can mend. What was trained is saved here too."""
    monkeypatch.delattr(program, "evaluate")
    with pytest.raises(NameError, match="evaluate"):
        train(*start(tmp_path, dataset, "--eval_interval=0", "--max_iters=3"))
    assert newest_checkpoint(tmp_path)[1]["step"] == 3
    assert not report(RuntimeError("gloo: connection closed"), Process())
    assert report(RuntimeError("x.cpp:1:10: fatal error: Python.h: No such file\n1 |"), Process())
    line = capsys.readouterr().err
    assert "Python's headers" in line and "--compile=False" in line and line.count("\n") == 1


def test_ctrl_c_before_the_first_step(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "open_dataset", lambda *args: signal.raise_signal(signal.SIGINT))
    line = refused(*start(tmp_path / "out", dataset))
    assert "interrupted before the first step: nothing was changed" in line


def test_a_sample_that_fails_does_not_fail_the_run(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "stream_text", lambda *args: signal.raise_signal(signal.SIGINT))
    args = start(tmp_path, dataset, "--sample_tokens=5", "--max_iters=3")
    assert "no sample: interrupted" in trained(*args) and (tmp_path / "summary.json").exists()


def test_a_clock_that_was_wrong_makes_no_checkpoint_unusable(undisturbed, dataset, tmp_path):
    state = {**newest_checkpoint(undisturbed[0])[1], "seconds": -3600.0}
    save_checkpoint(tmp_path, 12, state, keep=1)
    trained(UNIFIED_CONFIG, *start(tmp_path, dataset, "--max_iters=13", "--resume"))
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert -3600 < summary["seconds"] < 0  # a resumed run counts on


# ---- file systems --------------------------------------------------------------------------------

def test_a_folder_that_cannot_be_flushed(tmp_path):
    """/proc answers fsync with EINVAL, as some network disks do. Only a full disk asks for room."""
    sync_folder("/proc")
    with pytest.raises(OSError, match="/nowhere"):
        sync_folder("/nowhere")
    with pytest.raises(OSError, match="/nowhere/x .*: there is no folder /nowhere"):
        write_whole("/nowhere/x", "text")
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="make room"):
        write_whole(tmp_path / "x", lambda file: full.write(b"x"))
    assert not list(tmp_path.iterdir())


# ---- locks: held by one process at a time, and free when it has ended ----------------------------

@pytest.fixture(params=[None, errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def flock(request, monkeypatch):
    """flock as it is, and as a file system without it answers."""
    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    if request.param:
        monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_lock_is_held_once_and_leaves_nothing(tmp_path, flock, monkeypatch):
    path = tmp_path / "lock"
    with hold_lock(path, "busy"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", os.getppid)  # the question is another process's
            with pytest.raises(ValueError, match="^busy"):
                with hold_lock(path, "busy"):
                    pass
        assert path.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["{}\n{}\n", "{}\n{}\n123456\n"])
def test_the_lock_of_a_process_that_has_ended_here_is_taken_over(tmp_path, flock, content):
    """The file as the package filelock writes it; its newer versions add a third line."""
    path, ended = tmp_path / "lock", subprocess.Popen(["true"])
    ended.wait()
    for pid in (ended.pid, os.getpid()):  # a container may give the new process the old pid
        path.write_text(content.format(pid, socket.gethostname()), encoding="utf-8")
        with hold_lock(path, "busy"):
            pass
        assert not path.exists()


@pytest.mark.parametrize("content, message", [
    (f"1\n{socket.gethostname()}\n", f"busy; if process 1 on {socket.gethostname()} has ended"),
    ("999999999\nelsewhere\n", "busy; if process 999999999 on elsewhere has ended, remove "),
    ("my own notes", "lock is not a lock file of this program: move it away"),
])
def test_another_lock_is_left_alone(tmp_path, flock, content, message):
    path = tmp_path / "lock"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        with hold_lock(path, "busy"):
            pass
    assert path.read_text(encoding="utf-8") == content


# ---- compilers, devices, encodings ---------------------------------------------------------------

@pytest.mark.slow
def test_compiling_without_a_compiler(dataset, tmp_path):
    done = run("train.py", *start(tmp_path / "out", dataset, "--compile=True"), check=False,
               env={"PATH": "/nowhere", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "torch.compile needs a C++ compiler" in done.stderr
    assert "--compile=False" in done.stderr


@pytest.mark.parametrize("left", [
    {"RANK": "2"}, {"WORLD_SIZE": "2"}, {"LOCAL_RANK": "7"}, {"TORCHELASTIC_RESTART_COUNT": "1"},
    dict.fromkeys(("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"), "")])
def test_what_another_program_left_in_the_environment(monkeypatch, left):
    """Half of what torchrun sets, or nothing in it: the process is on its own, writes its run on
    the first GPU, and ends as others do."""
    for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    for key, value in left.items():
        monkeypatch.setenv(key, value)
    process = Process()
    assert process.is_main and process.world_size == 1 and process.local_rank == 0
    assert process.restarts == 0 and process.torchrun == ""
    with pytest.raises(SystemExit):
        hard_exit(3)


@pytest.mark.parametrize("name", ["train.py", "prepare_data.py"])
def test_windows_is_refused_in_one_line(name, monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "lib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match="^error: Windows is not supported: use Linux or macOS"):
        runpy.run_path(str(ROOT / name), run_name="__main__")


def test_programs_leave_a_notebook_as_it_was(texts, dataset, tmp_path, monkeypatch):
    """As `%run` runs them: in this process, with an output that is no terminal's, no file's and
    cannot be reconfigured."""
    def state():
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE)
        return ([signal.getsignal(n) for n in numbers], os.getcwd(), dict(os.environ), sys.path[:],
                torch.get_num_threads(), torch.get_default_dtype())

    before, out = state(), str(tmp_path / "run")
    programs = {
        "prepare_data.py": [str(texts), "--encoding=bytes", f"--out={tmp_path / 'data'}"],
        "train.py": [*start(out, dataset, "--max_iters=2")],
        "sample.py": [f"--out_dir={out}", "--max_new_tokens=2"]}
    if importlib.util.find_spec("transformers"):
        programs["hf/export.py"] = [out, f"--out={tmp_path / 'hf'}"]
    for name, args in programs.items():
        output = io.StringIO()
        monkeypatch.setattr(sys, "argv", [name, *args])
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / name), run_name="__main__")
        assert output.getvalue() and state() == before, name
    assert (tmp_path / "data" / "meta.json").exists()


def test_the_reader_of_a_sample_may_leave(undisturbed):
    """`| head` ends sample.py as it ends other filters, without a traceback."""
    command = f"{sys.executable} sample.py --out_dir={undisturbed[0]} --num_samples=99 | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stderr == "" and done.returncode == 141


def test_every_text_file_is_opened_with_its_encoding():
    """Or a machine with another locale reads and writes other text."""
    found, others = [], ("os.open", "gzip.open", "Image.open")
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).parts[0]
        if part not in ("tests", "out") and not part.startswith((".", "venv")):
            calls = [n for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, ast.Call)]
            for code, name in ((ast.unparse(c), ast.unparse(c.func)) for c in calls):
                opens = name.rpartition(".")[2] in ("open", "fdopen", "read_text", "write_text")
                says = re.search(r"encoding=|'utf-8'|'[rwax]\+?b'", code)
                if opens and name not in others and not says:
                    found.append(f"{path}: {code}")
    assert not found
