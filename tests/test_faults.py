"""
Proves by real faults that a run loses nothing: kills at random moments, a full disk, a process that dies or stalls, torchrun's
restarts, preemption, two runs in one folder. After each, the same command line ends in the undisturbed run, bit for bit.
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
import torch
from conftest import ROOT, run
from test_train import UNIFIED, losses, read_log, same_runs, start

from checkpoint import checkpoints, newest_checkpoint
from train import EXIT_STOPPED, main

MIXTURE = ["--n_expert=4", "--d_expert=24"]


def launch(*args, processes=0, restarts=0, **kwargs):
    """Start train.py, under torchrun for processes > 0, and return at once."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
    return subprocess.Popen([sys.executable, *(torchrun if processes else []), "train.py", *map(str, args)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)


def wait_for_step(process, step):
    for line in process.stdout:
        if line.startswith("step") and f"{step}/" in line:
            return
    raise AssertionError(process.stderr.read())


def lines_until(stream, part):
    lines = []
    for line in stream:
        lines.append(line)
        if part in line:
            break
    return "".join(lines)


def newest_step(out):
    return max((int(p.name[5:-3]) for p in checkpoints(out)), default=0)


def being_written(path):
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:  # not yet, or renamed by now
        return False


def workers_of(process):
    """The process ids of a torchrun's train.py processes, in the order of their ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(c) for c in children if b"train.py" in Path(f"/proc/{c}/cmdline").read_bytes()]


def test_twenty_kills(dataset, tmp_path):
    """Every second kill waits for a checkpoint that is being written, the others strike at a random moment, start-up included."""
    args = [*UNIFIED, "--optimizer=muon", *MIXTURE]
    common = ["--max_iters=200", "--checkpoint_interval=1", "--eval_interval=50", "--n_embd=128", "--d_ff=384", "--log_interval=50"]
    run("train.py", *args, *start(tmp_path / "straight", dataset, *common))
    out, rng, halves, kills = tmp_path / "killed", random.Random(5), 0, 0
    while kills < 20:
        process = launch(*args, *start(out, dataset, *common), "--resume")
        before, temporary = len(checkpoints(out)), None
        if kills % 2:
            newest = checkpoints(out)[-1].name if before else ""
            while process.poll() is None and not (temporary and being_written(temporary)):
                name = f"ckpt_{int(newest[5:-3] or 0) + rng.randint(1, 6):07d}.tmp" if newest else "ckpt_0000002.tmp"
                temporary = temporary or out / name
        else:
            deadline, most = time.time() + rng.uniform(0.3, 3.5), newest_step(out) + 8  # a fast machine must not finish the run
            while time.time() < deadline and newest_step(out) < most:
                time.sleep(rng.uniform(0, 0.01))
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
        kills += 1
        halves += bool(temporary and temporary.exists())
        process.stdout.close()
        process.stderr.close()
    assert halves >= 3  # some kills did leave a half-written file
    assert 0 < newest_checkpoint(out)[1]["step"] < 200
    run("train.py", *args, *start(out, dataset, *common), "--resume")
    same_runs(tmp_path / "straight", out)
    assert [r["step"] for r in read_log(out, "train")] == list(range(200)) and not list(out.glob("*.tmp"))


@pytest.mark.parametrize("kind", [["--optimizer=adamw"], ["--optimizer=muon", *MIXTURE]], ids=["adamw", "muon_moe"])
def test_torchrun_restarts_bit_for_bit(dataset, tmp_path, kind):
    """Two processes, one of them killed: torchrun's own restart continues the run. Then the same on one process, to 1e-5."""
    args = [*UNIFIED, *kind]
    common = ["--max_iters=60", "--checkpoint_interval=5", "--eval_interval=25"]
    run("train.py", *args, *start(tmp_path / "straight", dataset, *common), processes=2)
    process = launch(*args, *start(tmp_path / "killed", dataset, *common), "--resume", processes=2, restarts=2)
    wait_for_step(process, 12)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "resuming from" in said[0]
    same_runs(tmp_path / "straight", tmp_path / "killed")
    if kind == ["--optimizer=adamw"]:
        for path in checkpoints(tmp_path / "killed")[1:]:
            path.unlink()
        run("train.py", *args, *start(tmp_path / "killed", dataset, *common), "--resume")
        assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "straight"), abs=1e-5)


def test_preemption_under_torchrun(dataset, tmp_path):
    """SIGTERM to torchrun, as a scheduler sends it: the workers finish the step and save; the same command goes on."""
    args = [*UNIFIED, *start(tmp_path / "out", dataset, "--max_iters=400", "--eval_interval=0"), "--resume"]
    process = launch(*args, processes=2)
    wait_for_step(process, 8)
    process.terminate()
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "stopped by a signal after" in said
    step = newest_checkpoint(tmp_path / "out")[1]["step"]
    assert 8 < step < 400 and [r["step"] for r in read_log(tmp_path / "out", "train")] == list(range(step))
    assert f"at step {step}" in run("train.py", *args, "--max_iters=401", processes=2).stdout
    assert len(losses(tmp_path / "out")) == 401


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stalled"])
def test_a_lost_process_ends_the_others(dataset, tmp_path, number):
    """A dead process is noticed at once, a silent one after dist_timeout; the other says so and leaves."""
    process = launch(*start(tmp_path / "out", dataset, "--max_iters=1000000", "--dist_timeout=5"), processes=2)
    wait_for_step(process, 5)
    workers, before = workers_of(process), ""
    os.kill(workers[1], number)
    if number == signal.SIGSTOP:
        before = lines_until(process.stderr, "dist_timeout=5 s")
        os.kill(workers[1], signal.SIGKILL)  # torchrun would do this after thirty seconds
    _, said = process.communicate(timeout=120)
    said = before + said
    assert process.returncode != 0
    assert "waited for another that has ended, or has been silent for dist_timeout=5 s" in said and "continue with --resume" in said
    assert not any(Path(f"/proc/{w}").exists() for w in workers)


def test_a_fork_with_random_numbers_resumes_exactly(dataset, tmp_path, monkeypatch):
    """Nothing here draws random numbers while training. With dropout put into the model, the checkpoint's generators matter."""
    import model
    forward = model.MLP.forward
    monkeypatch.setattr(model.MLP, "forward", lambda self, *a: torch.nn.functional.dropout(forward(self, *a), 0.2, self.training))
    for stops in ([8], [3, 8]):
        for stop in stops:
            assert main(start(tmp_path / str(stops), dataset, "--schedule=wsd", "--decay_share=0", f"--max_iters={stop}", "--resume",
                              "--eval_interval=1")) == 0
    a, b = (losses(tmp_path / name) for name in ("[8]", "[3, 8]"))
    assert a == b and len(a) == 8


def test_another_batch_size_goes_on_in_the_data_where_the_run_was(dataset, tmp_path, capsys):
    """Halving the batch in the middle neither repeats nor leaves out a sequence: the position counts sequences, not steps."""
    out, taken = tmp_path / "out", []
    import train
    original = train.window_numbers
    try:
        train.window_numbers = lambda first, count, n, seed: taken.extend(range(first, first + count)) or original(first, count, n, seed)
        assert main(start(out, dataset, "--max_iters=3", "--batch_size=8", "--gradient_accumulation_steps=1")) == 0
        first = sorted(set(taken))
        taken.clear()
        assert main(start(out, dataset, "--max_iters=5", "--batch_size=4", "--gradient_accumulation_steps=1", "--resume")) == 0
    finally:
        train.window_numbers = original
    assert first == list(range(32)) and sorted(taken) == list(range(24, 36))  # each run has fetched one batch ahead
    assert "batch_size=4 (was 8)" in capsys.readouterr().out
    assert newest_checkpoint(out)[1]["data"]["sequences"] == 3 * 8 + 2 * 4


def test_two_runs_in_one_folder(dataset, tmp_path):
    first = launch(*start(tmp_path / "out", dataset, "--max_iters=1000000"))
    wait_for_step(first, 1)
    for key in ("--resume", "--overwrite"):
        second = run("train.py", *start(tmp_path / "out", dataset, key), check=False)
        assert second.returncode == 1 and "another process is training in out_dir" in second.stderr
    first.send_signal(signal.SIGINT)
    first.communicate()
    assert first.returncode == EXIT_STOPPED and newest_checkpoint(tmp_path / "out")


def small_disk(folder, command):
    """Run a shell command in a mount namespace of its own, with a file system of 1 MB at `folder`; None where that is forbidden."""
    folder.mkdir(exist_ok=True)
    script = f"mount -t tmpfs -o size=1m tmpfs {folder} || exit 99\n{command}"
    if not shutil.which("unshare"):
        return None
    done = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return None if done.returncode == 99 or "unshare" in done.stderr else done


@pytest.mark.parametrize("keys, message", [(["--checkpoint_interval=4"], "cannot be written to"),
                                           (["--checkpoint_interval=0", "--eval_interval=1"], "log.jsonl cannot be written")])
def test_a_full_disk(dataset, tmp_path, keys, message):
    """A real full file system: one line, nothing lost, and with room made the run goes on to the same end."""
    args = " ".join([sys.executable, "train.py", *UNIFIED, *start(tmp_path / "disk" / "out", dataset, *keys), "--max_iters=60", "--resume"])
    free = 700 if keys[0][-1] == "4" else 20
    done = small_disk(tmp_path / "disk", f"mkdir {tmp_path}/disk/out; dd if=/dev/zero of={tmp_path}/disk/fill bs=1k "
                      f"count={1016 - free} 2>&-\n{args}; echo status $? >&2\n"
                      f"rm {tmp_path}/disk/fill; mount -o remount,size=50m {tmp_path}/disk\n"
                      f"ls {tmp_path}/disk/out >&2; {args} >&2 && cp -r {tmp_path}/disk/out {tmp_path}/rescued")
    if done is None:
        pytest.skip("no mount namespaces here: the file-size limit in test_checkpoint.py stands in for a full disk")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0] and "No space left on device" in errors[0], done.stderr
    assert "status 1" in done.stderr and "Traceback" not in done.stderr and ".tmp" not in done.stderr and done.returncode == 0
    run("train.py", *UNIFIED, *start(tmp_path / "straight", dataset, *keys), "--max_iters=60")
    same_runs(tmp_path / "straight", tmp_path / "rescued")


def test_a_damaged_checkpoint_never_pushes_out_a_good_one(dataset, tmp_path):
    """keep_checkpoints=1, and the newest file is damaged: what the resumed run saves at an earlier step is the one to keep."""
    out = tmp_path / "out"
    assert main(start(out, dataset, "--max_iters=4", "--checkpoint_interval=2", "--keep_checkpoints=2")) == 0
    (out / "ckpt_0000004.pt").write_bytes(b"half")
    assert main(start(out, dataset, "--max_iters=3", "--keep_checkpoints=1", "--resume")) == 0
    assert newest_checkpoint(out)[1]["step"] == 3
