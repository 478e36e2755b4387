"""
Runs as processes of their own: one folder each, found again by its settings, interrupted and
resumed, never destroyed.

  settings_of   what of a configuration decides what a run finds; digest is its hash
  Run           one setting of train.py, and the folder that holds it or will; find_run
  start, wait   runs side by side, and how each ended; stop_all ends them, saved

A folder's name ends in the hash of its settings, so that rows that two studies share run once. A
run that someone continued with other settings is refused, and stays as it is.
"""
import hashlib
import json
import os
import platform
import re
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
CODE = ("norms.py", "model.py", "fast.py", "optim.py", "train.py", "lib/config.py", "lib/data.py")
STOPPED = 75  # train.py's exit status after a signal, once the checkpoint is saved


def settings_of(values):
    """{key: value} of what decides what a run finds: every key whose value is not the default. So a
    key that was added later, or that is gone, changes nothing for a run without it."""
    return {key: values[key] for key in sorted(DEFAULTS)
            if key in values and values[key] != DEFAULTS[key]}


def digest(settings):
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def code_now():
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
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1] if found else platform.machine()


def read_json(path):
    """What a JSON file holds; {} if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@dataclass
class Run:
    """One setting of train.py. record: what a results JSON holds of it, where no folder does."""
    arguments: list
    settings: dict
    folder: Path
    record: dict = field(default_factory=dict)
    data: str = ""  # a hash of the data that it was made on, or will be
    code: str = ""  # a hash of the code that made it, or will, of a row of yours

    @property
    def state(self):
        """"done", "diverged", "interrupted" or "missing"."""
        if self.record:
            return self.record["state"]
        for name, state in (("summary.json", "done"), ("diverged.txt", "diverged"),
                            ("config.json", "interrupted")):
            if (self.folder / name).is_file():
                return state
        return "missing"

    @property
    def has_ended(self):
        return self.state in ("done", "diverged")

    def summary(self):
        """What a finished run ended with."""
        return self.record or read_json(self.folder / "summary.json")

    def made_by(self):
        """The run's device, version, code and data, as far as they are known."""
        return self.record or read_json(self.folder / "made_by.json")


def find_run(out, records, label, config_file, keys, code="", needs=frozenset()):
    """The Run of these keys on top of a config file: in the folder under `out` whose name ends in
    the hash of its settings, whatever row it was made for, or in a new one; if none has ended, one
    of `records`, {digest of settings: [run of a results JSON, ...]}, on equal data. code: a hash,
    for a row of yours: only a run that this code made counts. needs: what a record must have.
    Raises ValueError if the folder holds a run of other settings, or on other data."""
    arguments = [config_file, *(f"--{k}={v}" for k, v in keys.items())]
    settings = settings_of(to_dict(config_of(config_file, keys)))
    key, data = digest(settings), data_of(settings.get("dataset", DEFAULTS["dataset"]))

    end = f"-{key[:6]}-{code[:6]}".removesuffix("-")
    slug = re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")
    name = f"{slug}-lr{keys.get('learning_rate', '')}-seed{keys.get('seed', '')}{end}"
    folder = min(Path(out).glob(f"*{end}"), default=Path(out) / name)
    run = Run(arguments, settings, folder, data=data, code=code)

    if stored := read_json(folder / "config.json"):
        if digest(settings_of(stored)) != key:
            raise ValueError(f"{folder} was continued with other settings: move it away")
        run.data = run.made_by().get("data") or data
        if data not in ("", run.data):
            raise ValueError(f"{folder} holds a run on other data than this machine has (the "
                             "standard library of another Python?): give another --out")
    for record in records.get(key, ()) if not run.has_ended else ():
        fits = data in ("", record["data"]) and code == record.get("code", "")
        if fits and needs <= record.keys():
            run.record, run.data = record, record["data"]
            break
    return run


def start(run, slot):
    """Start or resume a run in a process of its own, with low priority, on a GPU of its own if
    there is one. Returns the child, which knows its run, its slot, and when it started."""
    run.folder.mkdir(parents=True, exist_ok=True)
    stamp_run(run)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    if torch.cuda.is_available():
        gpus = list(map(str, range(torch.cuda.device_count())))
        if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
            gpus = visible.split(",")
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    command = [*(["nice", "-n", "10"] if shutil.which("nice") else []), sys.executable, "train.py",
               *run.arguments, f"--out_dir={run.folder}", "--resume"]
    with open(run.folder / "output.txt", "ab") as output:
        # a session of its own: Ctrl-C reaches us, and we end it
        child = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output,
                                 start_new_session=True, env=environment)
    child.run, child.slot, child.started = run, slot, time.monotonic()
    return child


def wait(children):
    """The first of these children to end, taken out of the list."""
    while True:
        for child in children:
            if child.poll() is not None:
                children.remove(child)
                return child
        time.sleep(0.1)


def outcome(run, status):
    """("done", "stopped", "diverged" or "failed", a line about it)."""
    if status == 0 and run.state == "done":
        loss = run.summary()["val_loss"]
        return "done", "validation loss not finite" if loss is None else f"{loss:.4f}"
    if status == STOPPED:
        return "stopped", "stopped by a signal, and saved"
    if status < 0:
        return "failed", f"killed by signal {-status}"
    # an error is the last line of all; what stands before may be of an earlier start
    output = (run.folder / "output.txt").read_text(encoding="utf-8", errors="replace")
    line = output.strip().rpartition("\n")[2].removeprefix("error: ")
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
    """Write made_by.json: device, version, data; of a row of yours also the code."""
    made_by = {"device": device_name(), "torch": torch.__version__, "code": run.code,
               "data": run.data}
    write_whole(run.folder / "made_by.json", json.dumps(made_by, indent=1) + "\n")
