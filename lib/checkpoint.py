"""
What a run leaves in out_dir, and how it is found again.

  config.json      every key
  log.jsonl        events, one JSON object a line: train, eval, scale, matrix, router
  ckpt_0001000.pt  the newest few checkpoints
  summary.json     the end
  lock             held while a process trains here

  save_checkpoint, load_checkpoint, newest_checkpoint   checkpoints: whole or absent, and nothing in them is trusted
  load_weights     a checkpoint's weights into a model
  RunFolder        takes out_dir, refuses what is not this run's, and writes to it once the first step is made
  Log              what a run says and writes of its steps: rates, spikes, steps that are not finite, time left
"""
import collections
import contextlib
import json
import math
import os
import re
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
import torch

from lib.config import flat, tokens_per_step
from lib.disk import sync_folder, write_whole
from norms import named_scale_vectors

FORMAT = 3
# a file in out_dir is a run's if its first JSON object has these keys
OURS = {"config.json": {"out_dir", "dataset", "n_layer"}, "log.jsonl": {"event", "step"}, "summary.json": {"val_loss", "steps"}}
# keys of the model that a resumed run may change; its other keys, and these three, make another run
MAY_CHANGE = ("recompute", "load_balance_coef", "router_z_coef")
MUST_STAY = ("optimizer", "seed")
CHECKPOINT_NAME = re.compile(r"ckpt_(\d{7}|[1-9]\d{7,})\.pt")
SPIKE_WINDOW, SPIKE_STD = 128, 6.0  # see is_spike


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints

def are_tensors(named):
    """True if this is {name: dense floating-point tensor}, and not empty."""
    return bool(named) and all(type(name) is str and torch.is_tensor(t) and t.layout == torch.strided and t.device.type == "cpu"
                               and t.is_floating_point() for name, t in named.items())


def is_rng_state(states):
    """True if process.rng_state may have given this. Raises what torch raises at a state that no generator can have."""
    return all(torch.is_tensor(t) for t in states.values()) and "cpu" in states and bool(torch.Generator().set_state(states["cpu"]))


# what a checkpoint holds, and what tells that it does
PARTS = {"step": lambda v: type(v) is int and v >= 0,  # updates made
         "model": are_tensors,
         "optimizer": lambda v: all(type(name) is str and are_tensors(moments) for name, moments in v.items()),  # by parameter name
         "config": lambda v: all(type(key) is str and type(value) in (str, int, float, bool) for key, value in v.items()),  # as config.json
         "tokenizer": lambda v: isinstance(v, str),
         "data": lambda v: {type(v["sequences"]), type(v["train_tokens"])} == {int} and 0 <= v["sequences"] < 2 ** 62,  # seen; there were
         "rng": lambda v: all(is_rng_state(states) for states in v),  # one {device: state} for each process
         "seconds": lambda v: type(v) is float and 0 <= v < math.inf}  # of training so far


def checkpoints(out_dir):
    """The finished checkpoints in out_dir, oldest first. Only names that save_checkpoint gives count."""
    found = [p for p in Path(out_dir).glob("ckpt_*.pt") if CHECKPOINT_NAME.fullmatch(p.name)]
    return sorted(found, key=step_of)


def step_of(path):
    return int(path.stem[5:])


def save_checkpoint(out_dir, step, state, keep):
    """Write `state`, a dict with the PARTS but step, as the checkpoint of `step`, then delete the oldest so that `keep` remain.
    Raises OSError, one line, if it cannot be written, on a full disk say: older checkpoints stay, nothing half-written
    does. A checkpoint with a later step (a damaged one that a resume passed over) is left alone and does not count."""
    path = Path(out_dir) / f"ckpt_{step:07d}.pt"
    write_whole(path, lambda f: torch.save({"format": FORMAT, "step": step, **state}, f),
                advice="make room and continue with --resume; the older checkpoints stand")
    for old in [p for p in checkpoints(out_dir) if step_of(p) <= step][:-keep]:
        old.unlink()
    return path


def load_checkpoint(path):
    """The checkpoint as a dict, on the CPU. Every byte is checked against the archive's own CRC-32, and a hostile file runs no code.
    Raises ValueError, one line, if it is not whole or not ours."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the bytes of {damaged} have changed")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"not a checkpoint of format {FORMAT}")
        for key, is_right in PARTS.items():
            if key not in state or not is_right(state[key]):
                raise ValueError(f"its {key!r} is {'damaged' if key in state else 'missing'}")
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged archive can fail in as many ways as there are bytes
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path} cannot be used: {reason[0]}") from None
    return state


def newest_checkpoint(out_dir, say=print):
    """(path, state) of the newest checkpoint that is whole, or None if out_dir has no checkpoint at all. Damaged ones are
    passed over, saying so. Raises ValueError if all are damaged."""
    found = checkpoints(out_dir)
    for path in reversed(found):
        try:
            return path, load_checkpoint(path)
        except ValueError as error:
            say(f"passing over a checkpoint: {error}")
    if found:
        raise ValueError(f"{out_dir}: none of its {len(found)} checkpoints is whole: remove them, or start again with --overwrite")
    return None


def load_weights(model, state, path):
    """Put a checkpoint's weights into the model. Raises ValueError, one line, if a name or a shape is not the model's."""
    ours, theirs = model.state_dict(), state["model"]
    for name in sorted(ours.keys() | theirs.keys()):
        was, now = (tuple(tensors[name].shape) if name in tensors else None for tensors in (theirs, ours))
        if was != now:
            raise ValueError(f"{path} cannot be used: {name} has shape {was} in it and {now} in the model: "
                             f"remove it, and an older checkpoint is taken")
    model.load_state_dict(theirs)


# ---------------------------------------------------------------------------------------------------------------------
# the folder

class RunFolder:
    """out_dir of a run. `take` locks and checks it and changes nothing else; until `begin`, called after the first step, what is
    written waits in memory. So a request that cannot work, too large for the memory say, leaves an older run as it was."""

    def __init__(self, config):
        self.config, self.path = config, Path(config.out_dir)
        self.lock = filelock.FileLock(self.path / "lock")
        self.log, self.waiting, self.kept, self.history, self.starts_over = None, [], "", History([]), False
        self.made_folder, self.made_lock = False, False

    def take(self, tokenizer):
        """Returns the checkpoint to resume from, or None. Raises ValueError, one line, if the folder is another's, a run's that this
        request does not mention, or another run's."""
        config, out = self.config, self.path
        try:
            no_folder, no_lock = not out.exists(), not (out / "lock").exists()
            out.mkdir(parents=True, exist_ok=True)
            if not no_lock and (out / "lock").stat().st_size:
                raise ValueError(f"out_dir={config.out_dir!r} holds a file `lock` that is not a run's: choose another --out_dir")
            self.lock.acquire(timeout=0)
            self.made_folder, self.made_lock = no_folder, no_lock
        except filelock.Timeout:
            raise ValueError(f"another process is training in out_dir={config.out_dir!r}: choose another --out_dir") from None
        except OSError as error:
            raise ValueError(f"out_dir={config.out_dir!r} cannot be written ({error.strerror}): choose another --out_dir") from None
        self.check_what_is_there(checkpoints(out))
        found = newest_checkpoint(out) if config.resume else None
        if found:
            check_same_run(config, tokenizer, *found)
        if config.resume and (out / "log.jsonl").exists():
            self.starts_over = found is None and (out / "log.jsonl").stat().st_size > 0
            self.kept, self.history = log_before(out / "log.jsonl", found[1]["step"] if found else 0)
        if self.starts_over:
            print(f"{out} holds a log and no checkpoint: starting at step 0, and keeping the old log as {self.old_log().name}")
        return str(found[0]) if found else None

    def check_what_is_there(self, found):
        config, out = self.config, self.path
        for name, keys in OURS.items():
            if (out / name).exists() and not is_a_runs(out / name, keys):
                raise ValueError(f"out_dir={config.out_dir!r} holds a file {name} that is not a run's: choose another --out_dir")
        names = [name for name in ("config.json", "log.jsonl") if (out / name).exists()]
        if (strange := half_written(out)) and self.made_lock and not (found or names):  # where a run of ours was, there was a lock
            raise ValueError(f"out_dir={config.out_dir!r} holds a file {strange[0].name} that is not a run's: choose another --out_dir")
        if (found or any((out / name).exists() for name in ("log.jsonl", "summary.json"))) and not config.resume and not config.overwrite:
            raise ValueError(f"out_dir={config.out_dir!r} holds a run: continue it with --resume, discard it with --overwrite, "
                             f"or choose another --out_dir")
        if config.overwrite and found and not (out / "config.json").exists():
            raise ValueError(f"out_dir={config.out_dir!r} holds {found[-1].name} and no config.json, so it may not be a run's: "
                             f"remove it, or choose another --out_dir")

    def begin(self):
        """The first step is made: discard the old run, or cut its log to what comes before the checkpoint, and write what waited."""
        out = self.path
        if self.log:
            return
        discarded = [*checkpoints(out), out / "log.jsonl"] if self.config.overwrite else []
        for path in (*discarded, *half_written(out), out / "summary.json"):
            path.unlink(missing_ok=True)
        if self.starts_over:
            os.rename(out / "log.jsonl", self.old_log())
        advice = "make room and continue with --resume"
        write_whole(out / "config.json", json.dumps(flat(self.config), indent=1), advice)
        write_whole(out / "log.jsonl", self.kept, advice)
        self.log = open(out / "log.jsonl", "ab", buffering=0)
        for line in self.waiting:
            self.append(line)

    def old_log(self):
        return next(p for n in range(1, 10 ** 6) if not (p := self.path / f"log.old-{n}.jsonl").exists())

    def append(self, line):
        """Write bytes to the log: in the file as soon as this returns."""
        if self.log is None:
            return self.waiting.append(line)
        try:
            while line:
                line = line[self.log.write(line):]
        except OSError as error:
            raise OSError(f"{self.path / 'log.jsonl'} cannot be written ({error.strerror}): make room and continue with --resume; the "
                          f"checkpoints stand") from None

    def save(self, step, state):
        os.fsync(self.log.fileno())  # no step of a checkpoint may be missing from the log
        save_checkpoint(self.path, step, state, self.config.keep_checkpoints)

    def finish(self, summary):
        self.begin()
        os.fsync(self.log.fileno())
        write_whole(self.path / "summary.json", to_json(summary, indent=1), "make room and continue with --resume")

    def set_aside(self, step):
        """Rename the checkpoint of a step from which no step was finite, so that a resume takes the one before it."""
        path = self.path / f"ckpt_{step:07d}.pt"
        if path in checkpoints(self.path):
            os.rename(path, f"{path}.bad")
            sync_folder(self.path)

    def close(self):
        """Let the folder go. Before the first step, what `take` has made, the lock and perhaps the folder, is removed."""
        if self.log:
            self.log.close()
        with contextlib.suppress(OSError):
            if self.made_lock and not self.log:
                (self.path / "lock").unlink()
                if self.made_folder:
                    self.path.rmdir()  # fails if somebody has put a file there
        self.lock.release()


def half_written(out):
    """Files that write_whole did not come to rename, by their names."""
    return sorted(p for p in out.glob("*.tmp") if p.stem in OURS or CHECKPOINT_NAME.fullmatch(p.stem))


def is_a_runs(path, keys):
    """True if the file is empty or its first JSON object, in a .jsonl the first line, has these keys."""
    try:
        with open(path) as f:
            text = f.readline() if path.suffix == ".jsonl" else f.read()
        return not text or keys <= json.loads(text).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def check_same_run(config, tokenizer, path, state):
    """Raise ValueError, naming it, if the checkpoint's run differs in what a resumed run cannot change."""
    model = [key for key in vars(config.model) if key not in MAY_CHANGE]
    now = {**{key: flat(config)[key] for key in (*model, *MUST_STAY)}, "tokenizer": tokenizer}
    was = {**state["config"], "tokenizer": state["tokenizer"]}
    changed = [f"{key}={was.get(key)!r} (now {value!r})" for key, value in now.items() if was.get(key) != value]
    if changed:
        raise ValueError(f"{path} is a checkpoint of another run: {', '.join(changed)}: resume with its configuration, "
                         f"or choose another --out_dir")


def changed_keys(config, train_tokens, state):
    """["learning_rate=0.001 (was 0.002)", ...] of a resumed run."""
    now = {**flat(config), "train_tokens": train_tokens}
    was = {**state["config"], "train_tokens": state["data"]["train_tokens"]}
    return [f"{key}={value!r} (was {was.get(key)!r})" for key, value in now.items()
            if was.get(key) != value and key not in ("out_dir", "resume", "overwrite")]


# ---------------------------------------------------------------------------------------------------------------------
# the log

@dataclass
class History:
    """What a resumed run must know of the log before it."""
    recent: list  # the last SPIKE_WINDOW finite losses
    spikes: int = 0  # counted so far


def log_before(path, step):
    """The part of a log that a run resumed at `step` keeps, so that every step stands in it once, and its History."""
    kept, recent, spikes = [], collections.deque(maxlen=SPIKE_WINDOW), 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            if not record["step"] < step:
                continue
            if record["event"] == "train":
                loss, counted = record["loss"], int(record["spikes"])
                recent.extend([] if loss is None else [float(loss)])
                spikes = counted
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # the last line of a killed run may be cut
        kept.append(line + "\n")
    return "".join(kept), History(list(recent), spikes)


def is_spike(loss, recent):
    """A loss is a spike if it lies more than SPIKE_STD standard deviations above the mean of the SPIKE_WINDOW finite losses
    before it; False while there are fewer. (Our reading: the literature counts spikes in this way with various numbers.)"""
    return len(recent) >= SPIKE_WINDOW and bool(loss > np.mean(recent) + SPIKE_STD * np.std(recent))


def to_json(value, **keys):
    """JSON, which has no NaN and no infinity: null stands for them."""
    def plain(v):
        if isinstance(v, dict):
            return {key: plain(inner) for key, inner in v.items()}
        if isinstance(v, (list, tuple)):
            return [plain(inner) for inner in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v
    return json.dumps(plain(value), allow_nan=False, **keys)


def duration(seconds):
    seconds = int(seconds)
    return f"{seconds}s" if seconds < 60 else f"{seconds // 60}m{seconds % 60:02d}s" if seconds < 3600 else \
        f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class Log:
    """What a run says and writes of its steps. folder: the RunFolder on the first process; None on the others, which only count.
    flops: of a token's training; peak: FLOP/s of all devices together, None if unknown."""

    def __init__(self, folder, config, step, flops=0, peak=None):
        self.folder, self.config, self.flops, self.peak = folder, config, flops, peak
        history = folder.history if folder else History([])
        self.recent, self.spikes, self.bad_steps = collections.deque(history.recent, SPIKE_WINDOW), history.spikes, 0
        self.first_step, self.started = step, time.time()
        self.shown_step, self.shown_time = step, self.started  # where the running throughput starts
        self.evaluated, self.evaluation_seconds = False, 0.0  # of the last pause that held an evaluation

    def say(self, text):
        if self.folder:
            print(text, flush=True)

    def write(self, event, **values):
        if self.folder:
            self.folder.append((to_json({"event": event, **values}) + "\n").encode())
            if self.config.wandb_project and event in ("train", "eval"):
                sys.modules["wandb"].log({f"{event}/{key}": value for key, value in values.items() if key != "step"}, step=values["step"])

    @contextlib.contextmanager
    def paused(self):
        """What runs in here, evaluating and saving, does not count as training in tokens_per_s."""
        started, self.evaluated = time.time(), False
        yield
        seconds = time.time() - started
        self.started += seconds
        self.shown_time += seconds
        self.evaluation_seconds = seconds if self.evaluated else self.evaluation_seconds

    def shows(self, step):
        return step % self.config.log_interval == 0 or step == self.config.max_iters - 1

    def step(self, step, loss, lr, grad_norm):
        """Write one step, and show it if it is its turn. Raises FloatingPointError after max_bad_steps in a row that were not finite."""
        now, finite = time.time(), math.isfinite(loss) and math.isfinite(grad_norm)
        spike = finite and is_spike(loss, self.recent)
        self.recent.extend([loss] if finite else [])
        self.spikes += spike
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if self.folder:
            self.folder.begin()
        rate = tokens_per_step(self.config) * (step + 1 - self.shown_step) / max(now - self.shown_time, 1e-9)
        mfu = rate * self.flops / self.peak if self.peak else None
        self.write("train", step=step, loss=loss if finite else None, lr=lr, grad_norm=grad_norm if finite else None,
                   tokens_per_s=rate, mfu=mfu, spikes=self.spikes)
        if spike:
            self.say(f"step {step:>6}  loss {loss:.4f} is spike number {self.spikes}")
        if not finite:
            self.say(f"step {step:>6}  loss {loss}, gradient norm {grad_norm}: no update made")
            self.check_bad_steps(step, self.config.max_bad_steps)
        elif self.shows(step):
            left = ((self.config.max_iters - step - 1) * (now - self.started) / (step + 1 - self.first_step)
                    + self.evaluations_after(step) * self.evaluation_seconds)
            self.say(f"step {step:>6}/{self.config.max_iters}  loss {loss:.4f}  lr {lr:.2e}  grad_norm {grad_norm:.2f}  "
                     f"{rate:,.0f} tokens/s  " + (f"mfu {mfu:.1%}  " if mfu else "") + f"{duration(left)} left")
            self.shown_step, self.shown_time = step + 1, now

    def evaluations_after(self, step):
        """How many evaluations are due after this step, the last step's included."""
        interval, last = self.config.eval_interval, self.config.max_iters
        return 1 + ((last - 1) // interval - step // interval if interval > 0 else 0)

    def check_bad_steps(self, step, most):
        """Raise FloatingPointError if the last `most` steps up to `step`, or more, were not finite."""
        if self.bad_steps < most:
            return
        if self.folder and self.bad_steps >= self.config.max_bad_steps:
            self.folder.set_aside(step + 1 - self.bad_steps)
        raise FloatingPointError(f"{self.bad_steps} steps in a row up to step {step} were not finite (max_bad_steps="
                                 f"{self.config.max_bad_steps}): stopped. The last checkpoint is "
                                 f"{(checkpoints(self.config.out_dir) or ['none'])[-1]}; resume with a lower --learning_rate")

    def evaluation(self, step, tokens, val_loss, bytes_per_token):
        """Write and show a validation loss. Returns it in bits per byte, None if the tokens' length in bytes is unknown."""
        val_bpb = val_loss / math.log(2) / bytes_per_token if bytes_per_token else None
        self.evaluated = True
        self.write("eval", step=step, tokens=tokens, val_loss=val_loss, val_bpb=val_bpb)
        self.say(f"step {step:>6}  val_loss {val_loss:.4f} nats/token" + (f", {val_bpb:.4f} bits/byte" if val_bpb else ""))
        return val_bpb

    @torch.no_grad()
    def weights(self, step, model):
        """Write mean, standard deviation, extremes and β of each scale vector, and the Frobenius norm of each matrix (of a stack of
        experts: of all together)."""
        if not self.folder:
            return
        for name, scale in named_scale_vectors(model):
            gamma, beta = scale(), getattr(scale, "beta", None)
            mean, std, least, most = torch.stack((gamma.mean(), gamma.std(unbiased=False), gamma.min(), gamma.max())).tolist()
            self.write("scale", step=step, name=name, mean=mean, std=std, min=least, max=most,
                       beta=beta.mean().item() if torch.is_tensor(beta) else None)
        vectors = {p for _, scale in named_scale_vectors(model) for p in scale.parameters()}
        for name, p in model.named_parameters():
            if p not in vectors:
                self.write("matrix", step=step, name=name, norm=p.norm().item())

    def routers(self, step, layers, stats):
        """Write each mixture layer's load-balancing loss, z-loss and loads. stats: a flat list, 2 + E numbers for each of the layers."""
        size = len(stats) // len(layers)
        for i, layer in enumerate(layers):
            balance, z, *load = stats[i * size:(i + 1) * size]
            self.write("router", step=step, layer=layer, balance_loss=balance, z_loss=z, load=load, load_max=max(load), load_min=min(load))


def start_wandb(config):
    """Start logging to Weights & Biases if the configuration asks for it. Raises ValueError if that fails."""
    if not config.wandb_project:
        return
    try:
        import wandb
        wandb.init(project=config.wandb_project, name=Path(config.out_dir).name, config=flat(config))
    except ImportError:
        raise ValueError("wandb_project needs the package wandb: pip install wandb, or leave wandb_project unset") from None
    except Exception as error:  # whatever its network layers raise
        raise ValueError(f"wandb does not start ({str(error).partition(chr(10))[0]}): leave wandb_project unset, or mend it") from None
