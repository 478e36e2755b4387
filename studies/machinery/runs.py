"""
Runs as processes of their own: one folder each, found again by its settings, interrupted and
resumed, never destroyed.

  settings_of   what of a configuration decides what a run finds; digest is its hash
  Run           one setting of train.py, and the folder that holds it or will
  RunFolders    the folders under out/studies/<scale> and the runs that results/*.json hold
  start, wait   runs side by side, and how each ended; stop_all ends them, saved

A folder is recognized by what its config.json says, not by its name: rows that two studies share
run once, and a run that someone continued to more steps is another run, which stays as it is.
"""
import hashlib
import itertools
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
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lib.config import FIELDS, to_dict
from lib.disk import write_whole
from studies.machinery.plan import ROOT, config_of

# keys that change what a run prints, not what it finds; tokens_per_param is in max_iters
NOT_SETTINGS = {"out_dir", "resume", "checkpoint_interval", "keep_checkpoints", "log_interval",
                "sample_tokens", "sample_prompt", "dist_timeout", "tokens_per_param"}
DEFAULTS = {key: f.default for key, f in FIELDS.items() if key not in NOT_SETTINGS}
CODE = ("norms.py", "model.py", "optim.py", "train.py", "lib/config.py", "lib/data.py")
NUMBERS = ("steps", "tokens", "params", "scale_params", "seconds")
STOPPED = 75  # train.py's exit status after a signal, once the checkpoint is saved


def settings_of(values):
    """{key: value} of what decides what a run finds: every key whose value is not the default. So a
    key that was added later, or that is gone, changes nothing for a run without it."""
    return {key: values[key] for key in sorted(DEFAULTS)
            if key in values and values[key] != DEFAULTS[key]}


def digest(settings):
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def code():
    """A hash of the files that decide what a row of yours is: after a change in them its runs are
    made anew."""
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in CODE)).hexdigest()[:12]


def data_of(dataset):
    """A hash of a dataset's shards; "" where it is not on this machine."""
    splits = read_json(ROOT / Path(dataset).expanduser() / "meta.json").get("splits")
    return digest(splits) if splits else ""


def device_name():
    """The GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return re.search(r"model name\s*:\s*(.+)", cpuinfo)[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def gpu_for(slot, count, visible):
    """The GPU of `count` that the slot-th run gets, as CUDA_VISIBLE_DEVICES writes it. visible: the
    value of that variable here, such as "4,5"."""
    gpus = [g.strip() for g in visible.split(",") if g.strip()] or list(map(str, range(count)))
    return gpus[slot % len(gpus)]


def read_json(path):
    """The dict that a JSON file holds; {} if there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


@dataclass
class Run:
    """One setting of train.py. record: what results/*.json hold of it, where no folder does."""
    arguments: list
    settings: dict
    folder: Path
    record: dict = field(default_factory=dict)
    made_by_code: str = ""  # a hash of code, of a row of yours

    @property
    def state(self):
        """"done", "diverged", "interrupted" or "missing"."""
        if not self.is_recorded:
            for name, state in (("summary.json", "done"), ("diverged.txt", "diverged"),
                                ("config.json", "interrupted")):
                if (self.folder / name).is_file():
                    return state
        return self.record.get("state", "missing")

    @property
    def is_recorded(self):
        """Is the run's result only in results/*.json, with no folder that has ended?"""
        ended = ((self.folder / name).is_file() for name in ("summary.json", "diverged.txt"))
        return bool(self.record) and not any(ended)

    @property
    def data(self):
        """A hash of the data that it was made on, or will be; "" where that is not known."""
        if self.is_recorded:
            return self.record["data"]
        dataset = self.settings.get("dataset", DEFAULTS["dataset"])
        return self.made_by().get("data") or data_of(dataset)

    @property
    def has_ended(self):
        return self.state in ("done", "diverged")

    def summary(self):
        """What a finished run ended with. Raises ValueError if it is not what train.py leaves."""
        if self.is_recorded:
            return self.record
        path = self.folder / "summary.json"
        summary = read_json(path)
        values = [summary.get(key) for key in NUMBERS] + [summary.get("val_loss", "") or 0]
        if not all(isinstance(value, (int, float)) for value in values):
            raise ValueError(f"{path} is not what train.py leaves at the end of a run: "
                             f"move {self.folder} away")
        return summary

    def made_by(self):
        """The run's command, device, versions and code, as far as they are known."""
        return self.record if self.is_recorded else read_json(self.folder / "made_by.json")


class RunFolders:
    """The runs under one folder, by their settings. records {digest of settings: [run of a results
    JSON, ...]}: these count as done where no folder holds them."""

    def __init__(self, out, records=None):
        self.out, self.records, self.folders, self.given = Path(out), records or {}, {}, {}
        for path in sorted(self.out.glob("*/config.json")):
            self.folders.setdefault(self.held(path.parent), []).append(path.parent)

    @staticmethod
    def held(folder):
        """The digest of the run that a folder holds, or that was started in it and made no step;
        None if it holds none, or one that somebody has continued with other settings."""
        stored = read_json(folder / "config.json")
        started = read_json(folder / "made_by.json").get("settings")
        found = digest(settings_of(stored)) if stored else started
        return found if started in (None, found) else None

    def find(self, label, config_file, keys, made_by=""):
        """The Run of these keys on top of a config file: in the folder that holds it, or in a new
        one. made_by: a hash of code, for a row of yours: only a run that this code made counts."""
        arguments = [config_file, *(f"--{k}={v}" for k, v in keys.items())]
        settings = settings_of(to_dict(config_of(config_file, keys)))
        key = digest(settings)
        if key not in self.given:
            data = data_of(settings.get("dataset", DEFAULTS["dataset"]))
            fit = [f for f in self.folders.get(key, []) if self.fits(f, made_by, data)]
            fit.sort(key=lambda folder: (folder / "summary.json").is_file())
            folder = fit[-1] if fit else self.free(label, keys, key, made_by, data)
            run = Run(arguments, settings, folder, made_by_code=made_by)
            records = [r for r in self.records.get(key, [])
                       if data in ("", r["data"]) and made_by in ("", r.get("code"))]
            run.record = records[0] if records else {}
            self.given[key] = run
        return self.given[key]

    @staticmethod
    def fits(folder, made_by, data):
        """Was a folder's run made by this code, or any for "", and on this data, if known?"""
        stamp = read_json(folder / "made_by.json")
        same_code = made_by in ("", stamp.get("code"))
        return same_code and (not data or stamp.get("data") in (None, "", data))

    def free(self, label, keys, key, made_by, data):
        """A folder that nothing else has, named after label, rate, seed and settings. Another tool
        at work here may have made it since we looked: a run of the same settings shares it."""
        rate, seed = (keys.get(k, "") for k in ("learning_rate", "seed"))
        slug = re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")
        name = f"{slug}-lr{rate}-seed{seed}-{key[:6]}" + (f"-{made_by[:6]}" if made_by else "")
        taken = {run.folder for run in self.given.values()}
        for number in itertools.count(1):
            folder = self.out / (f"{name}-{number}" if number > 1 else name)
            same = self.held(folder) == key and self.fits(folder, made_by, data)
            if folder not in taken and (same or not folder.exists()):
                return folder


def start(run, slot, nproc_per_node=0):
    """Start or resume a run in a process of its own, with low priority, on a GPU of its own if
    there is one. nproc_per_node: under torchrun, so many processes. Returns the child, which knows
    its run, its slot, when it started, and the size of its output then."""
    run.folder.mkdir(parents=True, exist_ok=True)
    stamp_run(run)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    command = ["nice", "-n", "10"] if shutil.which("nice") else []
    command.append(sys.executable)
    if nproc_per_node:
        command += ["-m", "torch.distributed.run", "--standalone",
                    f"--nproc_per_node={nproc_per_node}"]
    elif torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        environment["CUDA_VISIBLE_DEVICES"] = gpu_for(slot, torch.cuda.device_count(), visible)
    command += ["train.py", *run.arguments, f"--out_dir={run.folder}", "--resume"]
    with open(run.folder / "output.txt", "ab") as output:
        before = output.tell()
        # a session of its own: Ctrl-C reaches us, and we end it
        child = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output,
                                 start_new_session=True, env=environment)
    child.run, child.slot, child.started, child.before = run, slot, time.monotonic(), before
    return child


def wait(children):
    """The first of these children to end, taken out of the list."""
    while True:
        for child in children:
            if child.poll() is not None:
                children.remove(child)
                return child
        time.sleep(0.1)


def outcome(run, status, before=0):
    """("done", "stopped", "diverged" or "failed", a line about it). before: the size of output.txt
    when the child started; what stands before is of an earlier start."""
    if status == 0 and run.state == "done":
        loss = run.summary()["val_loss"]
        return "done", "validation loss not finite" if loss is None else f"{loss:.4f}"
    if status == STOPPED:
        return "stopped", "stopped by a signal, and saved"
    if status < 0:
        return "failed", f"killed by signal {-status}"
    output = (run.folder / "output.txt").read_bytes()[before:]
    lines = output.decode("utf-8", errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")] or lines
    line = errors[-1].removeprefix("error: ") if errors else f"exit status {status}, no message"
    if "not finite" in line:
        write_whole(run.folder / "diverged.txt", line + "\n")  # it is not tried again
        return "diverged", line
    return "failed", line


def stop_all(children):
    """Ask all children to save and end, and wait. Returns how many had something to save."""
    for child in children:
        child.send_signal(signal.SIGTERM)
    return sum(child.wait() in (0, STOPPED) for child in children)


def stamp_run(run):
    """Write made_by.json: command, device, versions, data; of a row of yours also the code."""
    made_by = {"command": shlex.join(["python", "train.py", *run.arguments]),
               "device": device_name(), "torch": torch.__version__,
               "python": platform.python_version(), "code": run.made_by_code, "data": run.data,
               "settings": digest(run.settings)}
    write_whole(run.folder / "made_by.json", json.dumps(made_by, indent=1) + "\n")
