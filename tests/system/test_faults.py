"""
Proves by real faults that a run loses nothing: kills at random moments and while it writes, a full
disk, a process that dies or stalls, torchrun's restarts, preemption. After each, the same command
line ends in the undisturbed run, bit for bit.
"""
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import (
    ROOT,
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
from conftest import run as run_program

from lib.checkpoint import checkpoints, newest_checkpoint, step_of
from train import EXIT_STOPPED

MIXTURE = ["--n_expert=4", "--n_expert_active=2", "--d_expert=24"]
MUON_MIXTURE = ["--optimizer=muon", *MIXTURE]


def workers_of(process):
    """The process ids of a torchrun's train.py processes, in the order of their ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text("utf-8").split()
    return [int(c) for c in children if b"train.py" in Path(f"/proc/{c}/cmdline").read_bytes()]


# -------------------------------------------------------------------------------------------------
# kills

def kill_in_a_write(process, out, rng):
    """Kill the process, some steps from now, while a half-written checkpoint is there: stop it,
    look, and kill it or let it go on. What an earlier kill left is gone after the first step."""
    wait_for_step(process, newest_step(out) + rng.randint(1, 4))
    half_written = []
    while not half_written:
        process.send_signal(signal.SIGCONT)
        time.sleep(rng.uniform(0, 0.01))
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        half_written = [p for p in out.glob("ckpt_*.pt.tmp") if p.stat().st_size]
    process.kill()
    process.wait()
    assert half_written[0].exists()


def newest_step(out):
    return max(map(step_of, checkpoints(out)), default=0)


def kill_at_random(process, out, rng):
    """Kill the process after up to four seconds, start-up included, and after eight steps at most:
    a fast machine must not finish the run first."""
    deadline, most = time.monotonic() + rng.uniform(0.3, 4), newest_step(out) + 8
    while time.monotonic() < deadline and newest_step(out) < most:
        time.sleep(rng.uniform(0, 0.01))
    process.kill()
    process.wait()


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_kills(dataset, tmp_path, kills):
    """Every second kill waits for a checkpoint that is being written, the others come at a random
    moment. Each run goes on from the last checkpoint, and the end is the undisturbed one's."""
    steps = 10 * kills + 6
    args = [UNIFIED_CONFIG, *MUON_MIXTURE, f"--max_iters={steps}", "--eval_interval=50",
            "--n_embd=64", "--d_ff=384"]
    out, rng = tmp_path / "killed", random.Random(5)
    for kill in range(kills):
        process = launch(*start(out, dataset, *args, "--checkpoint_interval=1", "--resume"))
        (kill_at_random if kill % 2 else kill_in_a_write)(process, out, rng)
        assert process.returncode == -signal.SIGKILL, process.stderr.read()
        process.stdout.close()
        process.stderr.close()
    assert 0 < newest_checkpoint(out)[1]["step"] < steps
    trained(*start(out, dataset, *args, "--resume"))
    trained(*start(tmp_path / "straight", dataset, *args))
    same_runs(tmp_path / "straight", out)
    assert [r["step"] for r in read_log(out, "train")] == list(range(steps))
    assert not list(out.glob("*.tmp"))


def test_ctrl_c_and_another_process(dataset, tmp_path):
    """While a process trains, another cannot use its folder. SIGINT lets it finish the step and
    save."""
    first = launch(*start(tmp_path, dataset, "--max_iters=1000000"))
    wait_for_step(first, 1)
    line = refused(*start(tmp_path, dataset, "--resume"))
    assert "another process is training in out_dir" in line
    first.send_signal(signal.SIGINT)
    printed, errors = first.communicate(timeout=60)
    assert first.returncode == EXIT_STOPPED and not errors
    assert "SIGINT: stopping" in printed and "stopped by a signal" in printed
    assert newest_checkpoint(tmp_path)[1]["step"] == len(losses(tmp_path))


# -------------------------------------------------------------------------------------------------
# under torchrun

@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_torchrun_restarts_a_run(dataset, tmp_path, processes):
    """One of two processes is killed: torchrun's restart continues the run, which was started
    without --resume. It ends as an undisturbed one: on one process to 1e-4, on two bit for bit."""
    args = [UNIFIED_CONFIG, *MUON_MIXTURE, "--max_iters=20", "--checkpoint_interval=5",
            "--eval_interval=25", "--load_balance_coef=0"]
    process = launch(*start(tmp_path / "killed", dataset, *args), processes=2, restarts=1)
    wait_for_step(process, 12)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "resuming from" in printed and "at step 0" not in printed
    straight = start(tmp_path / "straight", dataset, *args)
    if processes == 1:
        trained(*straight)
        found, expected = (losses(tmp_path / name) for name in ("killed", "straight"))
        assert found == pytest.approx(expected, abs=1e-4)
    else:
        run_program("train.py", *straight, processes=2)
        same_runs(tmp_path / "straight", tmp_path / "killed")


def test_preemption_under_torchrun(dataset, tmp_path):
    """SIGTERM to torchrun, as a scheduler sends it: the workers finish the step and save. The same
    command resumes, here on one process."""
    args = [UNIFIED_CONFIG, *start(tmp_path, dataset, "--max_iters=4000", "--eval_interval=0"),
            "--resume"]
    process = launch(*args, processes=2)
    wait_for_step(process, 8)
    process.terminate()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and printed.count("stopped by a signal after") == 1
    step = newest_checkpoint(tmp_path)[1]["step"]
    assert 8 < step < 4000
    assert [r["step"] for r in read_log(tmp_path, "train")] == list(range(step))
    assert f"at step {step}" in trained(*args, f"--max_iters={step + 3}")
    assert [r["step"] for r in read_log(tmp_path, "train")] == list(range(step + 3))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_ends_the_others(dataset, tmp_path, number):
    """A dead process is noticed at once, a silent one after dist_timeout. The other one saves its
    last whole step, and its error is one line."""
    process = launch(*start(tmp_path, dataset, "--max_iters=1000000", "--dist_timeout=5"),
                     processes=2)
    wait_for_step(process, 5)
    workers, lines = workers_of(process), []
    os.kill(workers[1], number)
    if number == signal.SIGSTOP:
        for line in process.stderr:
            lines.append(line)
            if "dist_timeout" in line:
                break
        os.kill(workers[1], signal.SIGKILL)  # torchrun would do this after thirty seconds
    _, errors = process.communicate(timeout=120)
    lines = [line for line in (*lines, *errors.splitlines()) if line.startswith("error:")]
    assert process.returncode != 0 and not any(Path(f"/proc/{w}").exists() for w in workers)
    if lines:  # torchrun may end the other one before it reports
        assert len(lines) == 1 and "--resume" in lines[0]
        assert "process 0: another process has ended, or has been silent" in lines[0]
        assert newest_checkpoint(tmp_path)[1]["step"] == len(losses(tmp_path)) > 5


# -------------------------------------------------------------------------------------------------
# the disk

def small_disk(folder, command):
    """Run a shell command in a mount namespace of its own, with a file system of 1 MB at `folder`;
    None where that is forbidden."""
    folder.mkdir(exist_ok=True)
    script = f"mount -t tmpfs -o size=1m tmpfs {folder} || exit 99\n{command}"
    if not shutil.which("unshare"):
        return None
    done = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
                          cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    return None if done.returncode == 99 or "unshare" in done.stderr else done


@pytest.mark.parametrize("free, keys, message", [
    (700, ["--checkpoint_interval=4"], ".pt cannot be written (No space left"),
    pytest.param(20, ["--checkpoint_interval=0", "--eval_interval=1"],
                 "log.jsonl cannot be written (No space left", marks=pytest.mark.slow)])
def test_a_full_disk(dataset, tmp_path, free, keys, message):
    """A real full file system: one line, nothing lost, and with room the run resumes to the same
    end."""
    disk = tmp_path / "disk"
    args = [UNIFIED_CONFIG, *start(disk / "out", dataset, *keys, "--max_iters=30", "--resume")]
    done = small_disk(disk, f"""mkdir {disk}/out
        dd if=/dev/zero of={disk}/fill bs=1k count={1016 - free} 2>&-
        {' '.join([sys.executable, 'train.py', *args])}
        echo status $? >&2
        ls {disk}/out >&2
        cp -r {disk}/out {tmp_path}/rescued""")
    if done is None:
        pytest.skip("no mount namespaces here: the limit on files' sizes stands in for this test")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0] and "make room" in errors[0], done.stderr
    assert "status 1" in done.stderr and "Traceback" not in done.stderr
    assert ".tmp" not in done.stderr and done.returncode == 0
    trained(*args, f"--out_dir={tmp_path / 'rescued'}")
    trained(*args, f"--out_dir={tmp_path / 'straight'}")
    same_runs(tmp_path / "straight", tmp_path / "rescued")


def test_a_write_that_fails_leaves_the_older_checkpoint(dataset, tmp_path):
    """A limit on the size of files: the second checkpoint's write fails in the middle, for real."""
    args = start(tmp_path, dataset, "--max_iters=2", "--resume")
    trained(*args)
    size = newest_checkpoint(tmp_path)[0].stat().st_size // 2
    script = ("import signal, sys, train; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
              "train.hard_exit(train.main(sys.argv[1:]))")
    done = subprocess.run(
        [sys.executable, "-c", script, *args, "--max_iters=4"], cwd=ROOT, text=True,
        capture_output=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE,
                                                                   (size, size)))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "ckpt_0000004.pt cannot be written (File too large): continue with" in done.stderr
    assert [p.name for p in tmp_path.glob("ckpt*")] == ["ckpt_0000002.pt"]
