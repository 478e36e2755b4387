"""
Proves by real faults that a run loses nothing: a kill while it writes, writes that fail, a process
that dies or stalls, torchrun's restarts, preemption.
"""
import os
import random
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import UNIFIED_CONFIG, launch, losses, refused, start, trained, wait_for

from lib.checkpoint import newest_checkpoint
from lib.config import load_config
from lib.log import RunLog


def workers_of(process):
    """The process ids of a torchrun's train.py processes, in the order of their ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text("utf-8").split()
    return [int(c) for c in children if b"train.py" in Path(f"/proc/{c}/cmdline").read_bytes()]


# ---- under torchrun ------------------------------------------------------------------------------

def killed_in_the_midst_of_a_write(pid, out):
    """Stop the process and let it go on until it has half of a checkpoint on disk; then kill it."""
    while True:
        os.kill(pid, signal.SIGSTOP)
        while ") T " not in Path(f"/proc/{pid}/stat").read_text("utf-8"):
            time.sleep(0.001)
        if any(path.stat().st_size for path in out.glob("ckpt_*.pt.tmp")):
            return os.kill(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGCONT)
        time.sleep(random.uniform(0, 0.01))


@pytest.mark.slow
def test_torchrun_restarts_a_run_and_passes_signals_on(dataset, tmp_path):
    """One of two processes is killed while it writes a checkpoint: torchrun's restart continues
    from the whole one before, also without --resume. Then SIGTERM to torchrun, as a scheduler sends
    it: the workers save. The same command, on one process, resumes as if nothing had been."""
    args = [UNIFIED_CONFIG, "--n_embd=64", "--d_ff=384", "--schedule=wsd", "--decay_share=0",
            "--eval_interval=0"]
    out = tmp_path / "killed"
    run = start(out, dataset, *args, "--max_iters=4000", "--checkpoint_interval=1")
    process = launch(*run, processes=2, restarts=1)
    wait_for(process, " 3/")
    killed_in_the_midst_of_a_write(workers_of(process)[0], out)
    whole = newest_checkpoint(out)[1]["step"]
    wait_for(process, f"at step {whole}\n")
    wait_for(process, f" {whole + 5}/")
    process.terminate()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and not list(out.glob("*.tmp"))
    assert printed.count("SIGTERM: stopping") == printed.count("stopped by a signal after") == 1

    step = newest_checkpoint(out)[1]["step"]
    assert whole + 5 < step < 4000
    assert f"at step {step}" in trained(*run, f"--max_iters={step + 3}", "--resume")
    trained(*start(tmp_path / "straight", dataset, *args, f"--max_iters={step + 3}"))
    assert losses(out) == pytest.approx(losses(tmp_path / "straight"), abs=1e-4)


@pytest.mark.slow
def test_a_restart_continues_its_own_run_only(dataset, tmp_path):
    """Of one process, too. Another torchrun, whose restart finds a run that it was refused, leaves
    it alone."""
    run = start(tmp_path / "run", dataset, "--max_iters=2000", "--checkpoint_interval=1")
    process = launch(*run, processes=1, restarts=1)
    wait_for(process, " 3/")
    os.kill(workers_of(process)[0], signal.SIGKILL)
    wait_for(process, "resuming from")
    process.terminate()
    process.communicate(timeout=120)
    step, log = newest_checkpoint(tmp_path / "run")[1]["step"], losses(tmp_path / "run")

    process = launch(*run, "--learning_rate=0.5", processes=1, restarts=1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and errors.count("holds a run: continue it with") == 2
    assert newest_checkpoint(tmp_path / "run")[1]["step"] == step
    assert losses(tmp_path / "run") == log


@pytest.mark.slow
def test_a_silent_process_ends_the_others(dataset, tmp_path):
    """After dist_timeout. The other one saves its last whole step, and its error is one line."""
    process = launch(*start(tmp_path, dataset, "--max_iters=1000000", "--dist_timeout=5"),
                     processes=2)
    wait_for(process, " 5/")
    silent = workers_of(process)[1]
    os.kill(silent, signal.SIGSTOP)
    line = next(line for line in process.stderr if line.startswith("error:"))
    os.kill(silent, signal.SIGKILL)  # torchrun would do this after thirty seconds
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "error:" not in errors
    assert line.startswith("error: process 0: another process has ended, or has been silent")
    assert newest_checkpoint(tmp_path)[1]["step"] == len(losses(tmp_path)) > 5


# ---- the disk ------------------------------------------------------------------------------------

def test_a_log_on_a_full_disk(dataset, tmp_path):
    """One line that asks for room; what could not be written is not taken for written."""
    log = RunLog(load_config(start(tmp_path, dataset)), SimpleNamespace(is_main=True))
    with open("/dev/full", "wb", buffering=0) as log.file:
        for _ in range(2):
            with pytest.raises(OSError, match=r"log.jsonl cannot be written \(No space .*: make "):
                log.write("train", step=0)


def test_a_write_that_fails_leaves_the_older_checkpoint(dataset, tmp_path):
    """A limit on the size of files: the second checkpoint's write fails in the middle, for real."""
    args = start(tmp_path, dataset, "--resume")
    trained(*args, "--max_iters=2")
    size = newest_checkpoint(tmp_path)[0].stat().st_size // 2
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        line = refused(*args, "--max_iters=4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "ckpt_0000004.pt cannot be written (File too large): continue with" in line
    assert [p.name for p in tmp_path.glob("ckpt*")] == ["ckpt_0000002.pt"]
