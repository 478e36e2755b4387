"""
Proves by real faults that a run loses nothing: kills at random moments, a full disk, a process that dies or stalls, torchrun's
restarts, preemption. After each, the same command line ends in the undisturbed run, bit for bit.
"""
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, UNIFIED_CONFIG, losses, read_log, refused, same_runs, start, trained
from conftest import run as run_program

from lib.checkpoint import checkpoints, newest_checkpoint, step_of
from train import EXIT_STOPPED

MIXTURE = ["--n_expert=4", "--n_expert_active=2", "--d_expert=24"]
MUON_MIXTURE = ["--optimizer=muon", *MIXTURE]


def launch(*args, processes=0, restarts=0):
    """Start train.py, under torchrun for processes > 0, and return at once."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
    return subprocess.Popen([sys.executable, *(torchrun if processes else []), "train.py", *map(str, args)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for_step(process, step):
    for line in process.stdout:
        if line.startswith("step") and f"{step}/" in line:
            return
    raise AssertionError(process.stderr.read())


def workers_of(process):
    """The process ids of a torchrun's train.py processes, in the order of their ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(c) for c in children if b"train.py" in Path(f"/proc/{c}/cmdline").read_bytes()]


# ---------------------------------------------------------------------------------------------------------------------
# kills

def newest_step(out):
    return max(map(step_of, checkpoints(out)), default=0)


def kill_in_a_write(process, out, rng):
    """Kill the process while it writes a checkpoint, some steps from now. Returns whether a half-written file stands."""
    half = out / f"ckpt_{newest_step(out) + rng.randint(2, 6):07d}.pt.tmp"  # the next may be left from the last kill
    while process.poll() is None:
        try:
            if half.stat().st_size > 0:
                break
        except FileNotFoundError:  # not yet, or renamed by now
            pass
    process.kill()
    process.wait()
    return half.exists()


def kill_at_random(process, out, rng):
    """Kill the process after up to three seconds, start-up included, and after eight checkpoints at most: a fast machine must not
    finish the run first."""
    deadline, most = time.time() + rng.uniform(0.3, 3.5), newest_step(out) + 8
    while time.time() < deadline and newest_step(out) < most:
        time.sleep(rng.uniform(0, 0.01))
    process.kill()
    process.wait()


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kills(dataset, tmp_path, kills):
    """Every second kill waits for a checkpoint that is being written, the others strike at a random moment, start-up included."""
    steps = 10 * kills + 6
    args = [UNIFIED_CONFIG, *MUON_MIXTURE, f"--max_iters={steps}", "--checkpoint_interval=1", "--eval_interval=50", "--n_embd=128",
            "--d_ff=384", "--log_interval=50"]
    out, rng, halves = tmp_path / "killed", random.Random(5), 0
    for kill in range(kills):
        process = launch(*start(out, dataset, *args, "--resume"))
        if kill % 2:
            kill_at_random(process, out, rng)
        else:
            halves += kill_in_a_write(process, out, rng)
        assert process.returncode == -signal.SIGKILL, process.stderr.read()
        process.stdout.close()
        process.stderr.close()
    assert halves >= 1 and 0 < newest_checkpoint(out)[1]["step"] < steps  # some kills did leave a half-written file
    trained(*start(out, dataset, *args, "--resume"))
    trained(*start(tmp_path / "straight", dataset, *args, f"--checkpoint_interval={steps}"))
    same_runs(tmp_path / "straight", out)
    assert [r["step"] for r in read_log(out, "train")] == list(range(steps)) and not list(out.glob("*.tmp"))


def test_ctrl_c_and_another_process(dataset, tmp_path):
    """While a process trains, another cannot take its folder. SIGINT lets it finish the step and save."""
    first = launch(*start(tmp_path, dataset, "--max_iters=1000000"))
    wait_for_step(first, 1)
    for key in ("--resume", "--overwrite"):
        assert "another process is training in out_dir" in refused(*start(tmp_path, dataset, key))
    first.send_signal(signal.SIGINT)
    said, errors = first.communicate(timeout=60)
    assert first.returncode == EXIT_STOPPED and "SIGINT: stopping" in said and "stopped by a signal" in said and not errors
    assert newest_checkpoint(tmp_path)[1]["step"] == len(losses(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# under torchrun

def test_torchrun_restarts_a_run_that_overwrites(dataset, tmp_path):
    """Two processes, one of them killed: torchrun's own restart continues the run, and does not wipe it again, though it was started
    with --overwrite in a folder that held another run. The losses are those of one process, to 1e-5."""
    args = [UNIFIED_CONFIG, *start(tmp_path / "killed", dataset, "--max_iters=40", "--checkpoint_interval=5", "--eval_interval=25")]
    trained(UNIFIED_CONFIG, *start(tmp_path / "killed", dataset, "--max_iters=4", "--seed=3"))
    process = launch(*args, "--overwrite", processes=2, restarts=1)
    wait_for_step(process, 12)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "resuming from" in said and "at step 0" not in said
    trained(UNIFIED_CONFIG, *start(tmp_path / "straight", dataset, "--max_iters=40", "--eval_interval=25"))
    assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "straight"), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [["--optimizer=adamw"], MUON_MIXTURE], ids=["adamw", "muon_mixture"])
def test_torchrun_restarts_bit_for_bit(dataset, tmp_path, kind):
    args = [UNIFIED_CONFIG, *kind, "--max_iters=60", "--checkpoint_interval=5", "--eval_interval=25"]
    run_program("train.py", *start(tmp_path / "straight", dataset, *args), processes=2)
    process = launch(*start(tmp_path / "killed", dataset, *args, "--resume"), processes=2, restarts=2)
    wait_for_step(process, 12)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "resuming from" in said
    same_runs(tmp_path / "straight", tmp_path / "killed")


def test_preemption_under_torchrun(dataset, tmp_path):
    """SIGTERM to torchrun, as a scheduler sends it: the workers finish the step and save; the same command resumes, here on one."""
    args = [UNIFIED_CONFIG, *start(tmp_path, dataset, "--max_iters=4000", "--eval_interval=0"), "--resume"]
    process = launch(*args, processes=2)
    wait_for_step(process, 8)
    process.terminate()
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and said.count("stopped by a signal after") == 1
    step = newest_checkpoint(tmp_path)[1]["step"]
    assert 8 < step < 4000 and [r["step"] for r in read_log(tmp_path, "train")] == list(range(step))
    assert f"at step {step}" in trained(*args, f"--max_iters={step + 3}")
    assert [r["step"] for r in read_log(tmp_path, "train")] == list(range(step + 3))


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)], ids=["killed", "stalled"])
def test_a_lost_process_ends_the_others(dataset, tmp_path, number):
    """A dead process is noticed at once, a silent one after dist_timeout; the other says so and leaves."""
    process = launch(*start(tmp_path / "out", dataset, "--max_iters=1000000", "--dist_timeout=5"), processes=2)
    wait_for_step(process, 5)
    workers, before = workers_of(process), []
    os.kill(workers[1], number)
    if number == signal.SIGSTOP:
        for line in process.stderr:
            before.append(line)
            if "dist_timeout" in line:
                break
        os.kill(workers[1], signal.SIGKILL)  # torchrun would do this after thirty seconds
    _, errors = process.communicate(timeout=120)
    told = [line for line in ("".join(before) + errors).splitlines() if line.startswith("error:")]
    assert process.returncode != 0
    if not told:  # torchrun may end the other before it speaks; then torchrun says who died
        assert number == signal.SIGKILL and "Signal 9 (SIGKILL)" in errors
    else:
        assert len(told) == 1 and "--resume" in told[0]
        assert "process 0: another process has ended, or has been silent for dist_timeout seconds" in told[0]
    assert not any(Path(f"/proc/{w}").exists() for w in workers)


# ---------------------------------------------------------------------------------------------------------------------
# the disk

def small_disk(folder, command):
    """Run a shell command in a mount namespace of its own, with a file system of 1 MB at `folder`; None where that is forbidden."""
    folder.mkdir(exist_ok=True)
    script = f"mount -t tmpfs -o size=1m tmpfs {folder} || exit 99\n{command}"
    if not shutil.which("unshare"):
        return None
    done = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return None if done.returncode == 99 or "unshare" in done.stderr else done


@pytest.mark.parametrize("free, keys, message", [
    (700, ["--checkpoint_interval=4"], "cannot be written (No space left on device)"),
    pytest.param(20, ["--checkpoint_interval=0", "--eval_interval=1"], "log.jsonl cannot be written", marks=pytest.mark.slow)])
def test_a_full_disk(dataset, tmp_path, free, keys, message):
    """A real full file system: one line, nothing lost, and with room made the run resumes to the same end."""
    args = [UNIFIED_CONFIG, *start(tmp_path / "disk" / "out", dataset, *keys, "--max_iters=60", "--resume")]
    command = " ".join([sys.executable, "train.py", *args])
    done = small_disk(tmp_path / "disk", f"mkdir {tmp_path}/disk/out; dd if=/dev/zero of={tmp_path}/disk/fill bs=1k "
                      f"count={1016 - free} 2>&-\n{command}; echo status $? >&2\n"
                      f"ls {tmp_path}/disk/out >&2; cp -r {tmp_path}/disk/out {tmp_path}/rescued")
    if done is None:
        pytest.skip("no mount namespaces here: the file-size limit in test_run.py stands in for a full disk")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0] and "No space left on device" in errors[0], done.stderr
    assert "status 1" in done.stderr and "Traceback" not in done.stderr and ".tmp" not in done.stderr and done.returncode == 0
    trained(*args, f"--out_dir={tmp_path / 'rescued'}")
    trained(*args, f"--out_dir={tmp_path / 'straight'}")
    same_runs(tmp_path / "straight", tmp_path / "rescued")
