"""
Proves by real faults that a run loses nothing: kills while it writes, writes that fail, a process
that dies or stalls, torchrun's restarts, preemption. After each, the same command line ends in the
undisturbed run, bit for bit.
"""
import os
import random
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import (
    UNIFIED_CONFIG,
    launch,
    losses,
    read_log,
    refused,
    same_runs,
    start,
    trained,
    wait_for_step,
)

from lib.checkpoint import newest_checkpoint
from lib.config import load_config
from lib.log import RunLog

MIXTURE = ["--n_expert=4", "--n_expert_active=2", "--d_expert=24"]
MUON_MIXTURE = ["--optimizer=muon", *MIXTURE]


def workers_of(process):
    """The process ids of a torchrun's train.py processes, in the order of their ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text("utf-8").split()
    return [int(c) for c in children if b"train.py" in Path(f"/proc/{c}/cmdline").read_bytes()]


# -------------------------------------------------------------------------------------------------
# kills

def test_a_kill_in_the_midst_of_a_write(dataset, tmp_path):
    """The process is stopped and let go on until it has half of a checkpoint on disk, and killed
    then. The run goes on from the whole one before, and ends as the undisturbed one."""
    args = [UNIFIED_CONFIG, *MUON_MIXTURE, "--max_iters=20", "--n_embd=64", "--d_ff=384"]
    out, half_written = tmp_path / "killed", []
    process = launch(*start(out, dataset, *args, "--checkpoint_interval=1"))
    wait_for_step(process, 2)
    while not half_written:
        process.send_signal(signal.SIGCONT)
        time.sleep(random.uniform(0, 0.01))
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        half_written = [p for p in out.glob("ckpt_*.pt.tmp") if p.stat().st_size]
    process.kill()
    process.communicate()
    assert half_written[0].exists() and 0 < newest_checkpoint(out)[1]["step"] < 20
    trained(*start(out, dataset, *args, "--resume"))
    trained(*start(tmp_path / "straight", dataset, *args))
    same_runs(tmp_path / "straight", out)
    assert not list(out.glob("*.tmp"))


# -------------------------------------------------------------------------------------------------
# under torchrun

def test_torchrun_restarts_a_run_and_passes_signals_on(dataset, tmp_path):
    """One of two processes is killed: torchrun's restart continues the run, which was started
    without --resume, as if nothing had happened. Then SIGTERM to torchrun, as a scheduler sends it:
    the workers finish the step and save. The same command resumes, here on one process."""
    args = [UNIFIED_CONFIG, *MUON_MIXTURE, "--checkpoint_interval=5", "--load_balance_coef=0",
            "--schedule=wsd", "--decay_share=0", "--eval_interval=0"]
    out, lines = tmp_path / "killed", []
    run = start(out, dataset, *args, "--max_iters=4000")
    process = launch(*run, processes=2, restarts=1)
    wait_for_step(process, 12)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    while " 20/" not in "".join(lines[-1:]):
        lines.append(next(process.stdout))
    process.terminate()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "resuming from" in "".join(lines)
    assert printed.count("SIGTERM: stopping") == printed.count("stopped by a signal after") == 1

    step = newest_checkpoint(out)[1]["step"]
    assert 20 < step < 4000
    assert f"at step {step}" in trained(*run, f"--max_iters={step + 3}", "--resume")
    assert [r["step"] for r in read_log(out, "train")] == list(range(step + 3))
    trained(*start(tmp_path / "straight", dataset, *args, "--max_iters=20"))
    assert losses(out)[:20] == pytest.approx(losses(tmp_path / "straight"), abs=1e-4)


@pytest.mark.slow
def test_a_silent_process_ends_the_others(dataset, tmp_path):
    """After dist_timeout. The other one saves its last whole step, and its error is one line."""
    process = launch(*start(tmp_path, dataset, "--max_iters=1000000", "--dist_timeout=5"),
                     processes=2)
    wait_for_step(process, 5)
    silent = workers_of(process)[1]
    os.kill(silent, signal.SIGSTOP)
    line = next(line for line in process.stderr if line.startswith("error:"))
    os.kill(silent, signal.SIGKILL)  # torchrun would do this after thirty seconds
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "error:" not in errors
    assert line.startswith("error: process 0: another process has ended, or has been silent")
    assert newest_checkpoint(tmp_path)[1]["step"] == len(losses(tmp_path)) > 5


# -------------------------------------------------------------------------------------------------
# the disk

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
