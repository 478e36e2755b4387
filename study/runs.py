"""
Runs as subprocesses of their own: one folder each, found again by its settings, interrupted and resumed, never destroyed.

  Run         one setting of train.py: command line, settings, the folder that holds it or will
  RunFolders  which settings already have a folder under out/studies/<scale>
  Pool        start runs, so many at once; collect how each ended; end them all on Ctrl-C

A folder is recognized by what its config.json says, not by its name: rows that two studies share run once, a new key of train.py with
a default value changes nothing, and a run that someone continued to more steps is another run, which stays as it is.
"""
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from lib.config import FIELDS, load_config, to_dict
from lib.disk import write_whole

ROOT = Path(__file__).resolve().parent.parent
# keys that change what a run says, not what it finds; tokens_per_param is in max_iters
NOT_SETTINGS = {"out_dir", "resume", "checkpoint_interval", "keep_checkpoints", "log_interval", "sample_tokens",
                "sample_prompt", "wandb_project", "dist_timeout", "tokens_per_param"}
CODE = ("norms.py", "model.py", "optim.py", "train.py", "lib/data.py")
STOPPED = 75  # train.py's exit status after a signal, once the checkpoint is saved


def settings_of(config):
    """{key: value} of all that decides what a run finds."""
    return {key: value for key, value in to_dict(config).items() if key not in NOT_SETTINGS}


def code():
    """A hash of the files that decide what a run finds: a run made before they changed may not be what they would give now."""
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in CODE)).hexdigest()[:12]


def device_name():
    """The GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text("utf-8"))[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def gpu_for(slot, count, visible):
    """Which of `count` GPUs the slot-th run gets, as CUDA_VISIBLE_DEVICES writes it. visible: that variable here, such as "4,5"."""
    gpus = [gpu.strip() for gpu in visible.split(",") if gpu.strip()] or list(map(str, range(count)))
    return gpus[slot % len(gpus)]


class Run:
    """One setting of train.py: arguments, the settings they resolve to, and its folder."""

    def __init__(self, label, arguments, settings, folder):
        self.label, self.arguments, self.settings, self.folder = label, arguments, settings, folder

    @property
    def state(self):
        """"done", "diverged", "interrupted" or "missing"."""
        if (self.folder / "summary.json").is_file():
            return "done"
        if (self.folder / "diverged.txt").is_file():
            return "diverged"
        return "interrupted" if (self.folder / "config.json").is_file() else "missing"

    def summary(self):
        """The summary.json of a finished run. Raises ValueError, one line, if it is not what train.py leaves."""
        try:
            summary = json.loads((self.folder / "summary.json").read_text("utf-8"))
            numbers = [summary[key] for key in ("steps", "tokens", "params", "scale_params", "seconds")]
            if all(isinstance(n, (int, float)) for n in (*numbers, summary["val_loss"] or 0)):
                return summary
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise ValueError(f"{self.folder / 'summary.json'} is not what train.py leaves at the end of a run: move {self.folder} away")

    def made_by(self):
        """What made_by.json says of the run's command, device and versions; {} without one."""
        try:
            return dict(json.loads((self.folder / "made_by.json").read_text("utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return {}


class RunFolders:
    """The run folders under one folder, by their settings."""

    def __init__(self, out):
        self.out, self.known, self.cache = Path(out), {}, {}
        for path in sorted(self.out.glob("*/config.json")):
            key = self.held(path.parent)
            if key and (key not in self.known or (path.parent / "summary.json").is_file()):  # of two copies, the finished one
                self.known[key] = path.parent
        self.taken = set(self.known.values())

    @staticmethod
    def key(settings):
        return json.dumps(settings, sort_keys=True)

    def held(self, folder):
        """The key of the run that a folder holds; None if it holds none."""
        try:
            stored = json.loads((folder / "config.json").read_text("utf-8"))
            return self.key({k: stored.get(k, field.default) for k, field in FIELDS.items() if k not in NOT_SETTINGS})
        except (OSError, ValueError, AttributeError, RecursionError):
            return None

    def find(self, label, config_file, keys):
        """The Run of these keys on top of this config file: in the folder that holds it, or in a new one that nothing else has.
        Raises ValueError, one line, if train.py would refuse the keys."""
        arguments = [config_file, *(f"--{k}={v}" for k, v in keys.items())]
        if tuple(arguments) not in self.cache:
            path = config_file if Path(config_file).is_absolute() else str(ROOT / config_file)
            settings = settings_of(load_config([path, *arguments[1:]]))
            key = self.key(settings)
            if key not in self.known:
                self.known[key] = self.free(label, f"{settings['learning_rate']:g}", settings["seed"], key)
            self.cache[tuple(arguments)] = Run(label, arguments, settings, self.known[key])
        return self.cache[tuple(arguments)]

    def free(self, label, rate, seed, key):
        """A folder that nothing else has, named after label, rate, seed and a hash of all settings. Another tool at work here may have
        made it since we looked: the same settings share it, others have another name."""
        name = f"{re.sub(r'[^a-z0-9]+', '_', label.lower()).strip('_')}-lr{rate}-seed{seed}-{hashlib.sha256(key.encode()).hexdigest()[:6]}"
        folder, number = self.out / name, 1
        while folder in self.taken or (folder.exists() and self.held(folder) != key):
            number += 1
            folder = self.out / f"{name}-{number}"
        self.taken.add(folder)
        return folder


class Pool:
    """At most `jobs` children at once. nproc_per_node: each under torchrun with so many processes."""

    def __init__(self, jobs, nproc_per_node=0):
        self.jobs, self.nproc, self.children = jobs, nproc_per_node, {}  # child -> (run, slot, when it started, size of its output then)

    def start(self, run):
        """Start or resume the run: python train.py ... --out_dir=... --resume, with low priority, on a GPU of its own if there is one."""
        slot = min(set(range(self.jobs)) - {slot for _, slot, _, _ in self.children.values()})
        run.folder.mkdir(parents=True, exist_ok=True)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.nproc}"] if self.nproc else []
        command = [sys.executable, *torchrun, "train.py", *run.arguments, f"--out_dir={run.folder}", "--resume"]
        codes = dict.fromkeys([*filter(None, str(run.made_by().get("code", "")).split(", ")), code()])  # a resumed run may have several
        made_by = {"command": shlex.join(["python", "train.py", *run.arguments]), "device": device_name(), "torch": torch.__version__,
                   "python": platform.python_version(), "code": ", ".join(codes)}
        write_whole(run.folder / "made_by.json", json.dumps(made_by, indent=1) + "\n")
        environment = dict(os.environ)
        if run.settings["device"] == "cpu" or not torch.cuda.is_available():
            environment.setdefault("OMP_NUM_THREADS", "1")
        elif not self.nproc:
            environment["CUDA_VISIBLE_DEVICES"] = gpu_for(slot, torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        nice = ["nice", "-n", "10"] if shutil.which("nice") else []
        with open(run.folder / "output.txt", "ab") as output:  # a session of its own: Ctrl-C reaches us, and we end the children
            before = output.tell()
            child = subprocess.Popen([*nice, *command], cwd=ROOT, stdout=output, stderr=output, start_new_session=True, env=environment)
        self.children[child] = (run, slot, time.time(), before)

    def wait(self):
        """Wait for one child. Returns (run, how it ended, a line about it, seconds): "done", "stopped", "diverged" or "failed"."""
        while True:
            for child in self.children:
                if child.poll() is not None:
                    run, _, started, before = self.children.pop(child)
                    return run, *self.outcome(run, child.returncode, before), time.time() - started
            time.sleep(0.1)

    @staticmethod
    def outcome(run, status, before=0):
        """("done", "stopped", "diverged" or "failed", a line about it). before: the size of output.txt when the child started."""
        if status == 0 and run.state == "done":
            loss = run.summary()["val_loss"]
            return "done", "validation loss not finite" if loss is None else f"{loss:.4f}"
        if status == STOPPED:
            return "stopped", "stopped by a signal, and saved"
        if status < 0:
            return "failed", f"killed by signal {-status}"
        lines = (run.folder / "output.txt").read_bytes()[before:].decode(errors="replace").strip().splitlines()
        errors = [line for line in lines if line.startswith("error: ")] or lines
        line = errors[-1].removeprefix("error: ") if errors else f"exit status {status}, no message"
        if "not finite" in line:
            write_whole(run.folder / "diverged.txt", line + "\n")  # so that the next call does not try again
            return "diverged", line
        return "failed", line

    def stop(self):
        """Ask all children to save and end, and wait until they have. Returns how many had something to save."""
        for child in self.children:
            child.send_signal(signal.SIGTERM)
        saved = sum(child.wait() in (0, STOPPED) for child in self.children)
        self.children.clear()
        return saved
