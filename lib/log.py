"""
What a run leaves in out_dir beside its checkpoints, and what it prints.

  config.json    every key
  log.jsonl      one JSON object a line; "event" is train, eval, scale, matrix or router
  summary.json   the end
  lock           held while a process trains here
"""
import contextlib
import json
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

from lib.checkpoint import changed_keys, checkpoints, newest_checkpoint, save_checkpoint
from lib.config import to_dict, tokens_per_step
from lib.disk import cannot_write, write_whole
from lib.lock import hold_lock
from lib.process import attention_backend, say
from norms import named_scale_vectors
from optim import optimizer_state

AGAIN = "continue with --resume; the checkpoints are intact"


class RunLog:
    """The run's folder and its progress lines. Processes other than the main one write nothing.

    No file is written before the first step has succeeded, so a request that cannot work, one
    too large for the memory say, leaves at most an empty folder with a lock."""

    def __init__(self, config, process):
        self.config, self.process, self.out = config, process, Path(config.out_dir)
        self.lock, self.file = contextlib.ExitStack(), None
        self.old_lines, self.unwritten, self.leftovers = "", b"", []
        self.bad_steps = 0  # in a row
        self.began = None  # the number of the second step and its time: the first one may compile
        self.steps, self.seconds = 0, 0.0  # since the last progress line

    def lock_and_check(self, dataset):
        """Returns the checkpoint to resume from, or None. Raises ValueError if the folder cannot
        be used."""
        config, out, where = self.config, self.out, f"out_dir={self.config.out_dir!r}"
        held = [n for n in ("config.json", "log.jsonl", "summary.json") if (out / n).exists()]
        if (held or checkpoints(out)) and not config.resume:
            raise ValueError(f"{where} holds a run: continue it with --resume, or choose another "
                             f"--out_dir")
        try:
            out.mkdir(parents=True, exist_ok=True)
            busy = f"another process is training in {where}: choose another --out_dir"
            self.lock.enter_context(hold_lock(out / "lock", busy))
        except OSError as error:
            raise ValueError(f"{where} cannot be written ({error.strerror}): choose another "
                             f"--out_dir") from None
        newest = newest_checkpoint(out) if config.resume else None
        if newest:
            changed_keys(config, dataset, *newest)
        elif held and (held[-1] != "log.jsonl" or not is_log(out / "log.jsonl")):
            raise ValueError(f"{where} holds {held[-1]} and no checkpoint: choose another "
                             f"--out_dir")
        elif held:
            say(f"{out} holds a log and no checkpoint: starting at step 0")
        if "log.jsonl" in held:
            self.old_lines = lines_before(out / "log.jsonl", newest[1]["step"] if newest else 0)
            self.leftovers = [*out.glob("ckpt_*.pt.tmp"), out / "summary.json"]
        return newest and newest[0]

    def flush(self):
        """Every event is in the file when this returns. The first call makes the file: what comes
        before the checkpoint of a resumed run stays in it."""
        try:
            if self.file is None:
                for path in self.leftovers:
                    path.unlink(missing_ok=True)
                write_whole(self.out / "log.jsonl", self.old_lines, AGAIN)
                keys = json.dumps(to_dict(self.config), indent=1)
                write_whole(self.out / "config.json", keys, AGAIN)
                self.file = open(self.out / "log.jsonl", "ab", buffering=0)
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten):]
        except OSError as error:
            if error.errno is None:  # write_whole's, with the path
                raise
            raise cannot_write(self.out / "log.jsonl", error, AGAIN) from None

    def save(self, step, state):
        """Write a checkpoint, none of whose steps is missing from the log."""
        self.flush()
        os.fsync(self.file.fileno())
        save_checkpoint(self.out, step, state, self.config.keep_checkpoints)

    def close(self):
        if self.file:
            self.file.close()
        self.lock.close()

    def say(self, text):
        if self.process.is_main:
            say(text)

    def write(self, event, **values):
        """Add a line to the log: to the file, or before the first step to what waits for it."""
        if not self.process.is_main:
            return
        self.unwritten += (to_json({"event": event, **values}) + "\n").encode()
        if self.file:
            self.flush()
        if self.config.wandb_project and event in ("train", "eval"):
            shown = {f"{event}/{key}": value for key, value in values.items() if key != "step"}
            sys.modules["wandb"].log(shown, step=values["step"])

    def step(self, run, loss, lr, grad_norm, routers, seconds):
        """Write the step that run.step has just counted and that took so many seconds, and show it
        if it is its turn. Raises FloatingPointError after max_bad_steps that were not finite."""
        step, finite = run.step - 1, math.isfinite(loss) and math.isfinite(grad_norm)
        self.bad_steps = 0 if finite else self.bad_steps + 1
        rate = tokens_per_step(self.config) / max(seconds, 1e-9) if self.began else None
        self.write("train", step=step, loss=loss if finite else None, lr=lr, tokens_per_s=rate,
                   grad_norm=grad_norm if finite else None, mfu=self.mfu(run, rate))
        shows = step % self.config.log_interval == 0 or step == self.config.max_iters - 1
        if shows:
            self.routers(run, routers)
        if self.process.is_main:
            self.flush()
        if self.began:
            self.steps, self.seconds = self.steps + 1, self.seconds + seconds
        elif finite:
            self.warn_without_gradient(run)
        if not finite:
            self.say(f"step {step:>6}  loss {loss}, gradient norm {grad_norm}: no update made")
            self.check_bad_steps(step, self.config.max_bad_steps)
        elif shows:
            self.say(f"step {step:>6}/{self.config.max_iters}  loss {loss:.4f}  lr {lr:.2e}  "
                     f"grad_norm {grad_norm:.2f}{self.speed(run)}")
        self.began = self.began or (run.step, time.monotonic())

    def speed(self, run):
        """Tokens a second since the last progress line, and the time left, as text."""
        if not self.steps:
            return ""
        rate = self.steps * tokens_per_step(self.config) / max(self.seconds, 1e-9)
        self.steps, self.seconds = 0, 0.0
        step, since = self.began
        left = (time.monotonic() - since) / (run.step - step) * (self.config.max_iters - run.step)
        mfu = self.mfu(run, rate)
        return (f"  {rate:,.0f} tokens/s" + (f"  mfu {mfu:.1%}" if mfu else "")
                + f"  {duration(left)} left")

    def mfu(self, run, rate):
        """The share of the devices' peak FLOP/s that training at this rate uses, or None."""
        peak = self.process.peak_flops()
        return rate * run.model.flops_per_token() / peak if rate and peak else None

    def warn_without_gradient(self, run):
        """Name each trainable parameter whose first gradient was missing, or zero everywhere, by
        the moments that the optimizer keeps of it. Scale vectors are computed as one batch, so one
        that the loss does not depend on has a zero gradient, and decay would still shrink it."""
        moments = optimizer_state(run.optimizer)
        for name, p in run.model.named_parameters():
            known = moments.get(name, {})
            first = known.get("exp_avg", known.get("momentum_buffer"))
            if p.requires_grad and (first is None or not first.any()):
                self.say(f"{name} got no gradient in the first step: the loss does not depend on "
                         f"it, so only decay can move it")

    def check_bad_steps(self, step, most):
        """Raise FloatingPointError if the last `most` steps or more were not finite. A checkpoint
        from which none was finite is renamed: a resume takes the one before."""
        if self.bad_steps < most:
            return
        ruined = self.out / f"ckpt_{step + 1 - self.bad_steps:07d}.pt"
        whole = self.bad_steps < self.config.max_bad_steps or not ruined.exists()
        if self.process.is_main and not whole:
            os.rename(ruined, f"{ruined}.bad")
        raise FloatingPointError(
            f"{self.bad_steps} steps in a row up to step {step} were not finite (max_bad_steps="
            f"{self.config.max_bad_steps}): stopped. The last checkpoint is "
            f"{(checkpoints(self.out) or ['none'])[-1]}; resume with a lower --learning_rate")

    def evaluation(self, run, val_loss):
        """Write and show a validation loss and the statistics of the weights. Returns the loss in
        bits per byte, None if the tokens' length in bytes is unknown."""
        tokens = run.sequences * self.config.model.block_size
        per_byte = run.dataset.val_bytes_per_token
        val_bpb = val_loss / math.log(2) / per_byte if per_byte else None
        self.write("eval", step=run.step, tokens=tokens, val_loss=val_loss, val_bpb=val_bpb)
        self.say(f"step {run.step:>6}  val_loss {val_loss:.4f} nats/token"
                 + (f", {val_bpb:.4f} bits/byte" if val_bpb else ""))
        if self.process.is_main:
            for event, values in weight_events(run.model):
                self.write(event, step=run.step, **values)
        return val_bpb

    def routers(self, run, stats):
        """Write what each mixture layer's router did. stats: 2 + E numbers for each of them."""
        layers = [i for i, layer in enumerate(run.model.layers) if layer.moe]
        for i, layer in enumerate(layers):
            size = len(stats) // len(layers)
            balance, z, *load = stats[i * size:(i + 1) * size]
            self.write("router", step=run.step - 1, layer=layer, balance_loss=balance, z_loss=z,
                       load=load, load_max=max(load), load_min=min(load))


@torch.no_grad()
def weight_events(model):
    """("scale", mean, deviation, extremes and β) of each scale vector, ("matrix", Frobenius norm)
    of each matrix, a stack of experts as one."""
    scales = named_scale_vectors(model)
    for name, scale in scales:
        gamma, beta = scale(), scale.beta
        numbers = torch.stack((gamma.mean(), gamma.std(unbiased=False), gamma.min(), gamma.max()))
        yield "scale", {"name": name, **dict(zip(("mean", "std", "min", "max"), numbers.tolist())),
                        "beta": beta.mean().item() if torch.is_tensor(beta) else None}
    vectors = {p for _, scale in scales for p in scale.parameters()}
    for name, p in model.named_parameters():
        if p not in vectors:
            yield "matrix", {"name": name, "norm": p.norm().item()}


def describe(run):
    """Print what is about to run."""
    config, process, model, say = run.config, run.process, run.model, run.log.say
    params, scales = model.num_params(), model.num_params("scale_vectors")
    active = f" ({model.num_params('active'):,} active)" if config.model.n_expert else ""
    tokens, step_tokens = run.dataset.train.tokens, tokens_per_step(config)
    say(f"{params:,} parameters{active}, {scales:,} of them in {len(named_scale_vectors(model))} "
        f"scale vectors ({scales / params:.4%})")
    say(f"{tokens:,} training tokens ({run.dataset.tokenizer}); {config.max_iters:,} steps of "
        f"{step_tokens:,} tokens, {config.max_iters * step_tokens / tokens:.2f} epochs")
    if config.long_warmup:
        say(f"warmup_iters={config.long_warmup} is more than max_iters={config.max_iters}: the "
            f"run warms up for {config.warmup_iters}")
    compiled = "compiled" if process.compile else "not compiled"
    say(f"{process.world_size} x {process.device.type}, {str(process.dtype)[6:]}, {compiled}, "
        f"{run.batches.micro_steps} x {run.batches.micro_batch} sequences of "
        f"{config.model.block_size} in each process")
    if process.device.type == "cuda":
        say(f"attention: {attention_backend(config.model, process.device, process.dtype)}")


def summarize(run, val_loss, val_bpb):
    """Write summary.json, and name the run's files."""
    out, seconds = run.log.out, time.monotonic() - run.started
    tokens = run.sequences * run.config.model.block_size
    run.log.flush()
    summary = {"val_loss": val_loss, "val_bpb": val_bpb, "steps": run.step, "tokens": tokens,
               "params": run.model.num_params(), "seconds": seconds,
               "scale_params": run.model.num_params("scale_vectors"),
               "tokens_per_s": tokens / max(seconds, 1e-9)}
    write_whole(out / "summary.json", to_json(summary, indent=1), AGAIN)
    say(f"done in {duration(seconds)}: {out}/ holds the last checkpoint, log.jsonl, config.json "
        f"and summary.json; draw it with `python -m study.report {out}`")


def start_wandb(config):
    """Log to Weights & Biases too, if the configuration asks for it. Raises ValueError."""
    if config.wandb_project:
        try:
            import wandb
            wandb.init(project=config.wandb_project, name=Path(config.out_dir).name,
                       config=to_dict(config))
        except Exception as error:  # not installed, or whatever its network layers raise
            raise ValueError(f"wandb does not start ({str(error).partition(chr(10))[0]}): pip "
                             f"install wandb, or leave wandb_project unset") from None


def lines_before(path, step):
    """The lines of a log with events before `step`; a killed run may have cut the last one."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            kept += [line + "\n"] if record["event"] and record["step"] < step else []
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return "".join(kept)


def is_log(path):
    """True if the file is a run's log, or empty, as one is when a run opens it."""
    return path.exists() and (not path.stat().st_size or bool(lines_before(path, math.inf)))


def to_json(value, **keys):
    """JSON, which has no NaN and no infinity: null stands for them."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None), **keys)


def duration(seconds):
    return str(timedelta(seconds=int(seconds)))
