"""
What a run leaves in out_dir beside its checkpoints, and what it prints.

  config.json    every key
  log.jsonl      one JSON object a line; "event" is train, eval, scale, matrix or router
  summary.json   the end
  torchrun       the torchrun that trains here: its own restarts resume without --resume
  lock           held while a process trains here
"""
import contextlib
import importlib.util
import json
import math
import os
import time
from datetime import timedelta
from pathlib import Path

import torch

from lib.check import check, idle, map_table
from lib.checkpoint import changed_keys, checkpoints, newest_checkpoint, save_checkpoint
from lib.config import to_dict, tokens_per_step
from lib.count import active_params, flops_per_token, num_params, scale_params
from lib.disk import cannot_write, write_whole
from lib.lock import hold_lock
from lib.output import say
from lib.process import to_device
from norms import named_scale_vectors
from optim import update_norms

AGAIN = "continue with --resume; the checkpoints are intact"


class RunLog:
    """The run's folder and its progress lines. Processes other than the main one write nothing.

    No file is written before the first step has succeeded, so a request that cannot work, one
    too large for the memory say, leaves at most an empty folder with a lock."""

    def __init__(self, config, process):
        self.config, self.process, self.out = config, process, Path(config.out_dir)
        self.lock, self.file = contextlib.ExitStack(), None
        self.path, self.unwritten = self.out / "log.jsonl", b""
        self.first_step = 0  # the step of the checkpoint that is resumed
        self.bad_steps = 0  # in a row
        self.unshown = []  # (loss, gradient norm) of the steps since the last line
        self.began = None  # the number of the second step and its time: the first one may compile

    def lock_and_check(self, dataset):
        """Returns the checkpoint to resume from, or None. Raises ValueError if the folder cannot
        be used."""
        config, out, where = self.config, self.out, f"out_dir={self.config.out_dir!r}"

        # a folder with a run in it is refused, unless the run is to go on
        names = "torchrun", "config.json", "log.jsonl", "summary.json"
        held = [name for name in names if (out / name).exists()]
        if (held or checkpoints(out)) and not (config.resume or self.is_restarted()):
            raise ValueError(f"{where} holds a run: continue it with --resume, or choose another "
                             f"--out_dir")

        # one process at a time
        try:
            out.mkdir(parents=True, exist_ok=True)
            busy = f"another process is training in {where}: choose another --out_dir"
            self.lock.enter_context(hold_lock(out / "lock", busy))
        except OSError as error:
            raise ValueError(f"{where} cannot be written ({error.strerror}): choose another "
                             f"--out_dir") from None

        # the newest whole checkpoint, if it is of this run
        if newest := newest_checkpoint(out):
            changed_keys(config, dataset, *newest)
            self.first_step = newest[1]["step"]
            return newest[0]
        if held and not (held[-1] == "log.jsonl" and lines_before(self.path, math.inf)):
            raise ValueError(f"{where} holds {held[-1]} and no checkpoint: choose another "
                             f"--out_dir")
        if held:
            say(f"{out} holds a log and no checkpoint: starting at step 0")
        return None

    def is_restarted(self):
        """Has the torchrun that trained here started its processes again?"""
        path = self.out / "torchrun"
        return self.process.restarts > 0 and path.is_file() and (
            path.read_text(encoding="utf-8") == self.process.torchrun)

    def begin(self):
        """Write the log, of a resumed run with its lines from before the checkpoint, and
        config.json."""
        (self.out / "summary.json").unlink(missing_ok=True)
        kept = lines_before(self.path, self.first_step) if self.path.exists() else ""
        write_whole(self.path, kept.encode() + self.unwritten, AGAIN)
        write_whole(self.out / "config.json", json.dumps(to_dict(self.config), indent=1), AGAIN)
        if self.process.torchrun:
            write_whole(self.out / "torchrun", self.process.torchrun, AGAIN)
        self.file, self.unwritten = open(self.path, "ab", buffering=0), b""

    def flush(self):
        """Every event is in the file when this returns. The first call makes the file."""
        if self.file is None:
            self.begin()
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten):]
        except OSError as error:
            raise cannot_write(self.path, error, AGAIN) from None

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
        if self.process.is_main:
            self.unwritten += (to_json({"event": event, **values}) + "\n").encode()
            if self.file:
                self.flush()

    def step(self, run, loss, lr, grad_norm, routers, seconds):
        """Write the step that run.step has just counted and that took so many seconds, and show it
        if it is its turn. Raises FloatingPointError after max_bad_steps that were not finite."""
        step, steps = run.step - 1, self.config.max_iters

        # the log has every step
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        self.bad_steps = 0 if finite else self.bad_steps + 1
        rate = tokens_per_step(self.config) / seconds if self.began else None
        peak = self.process.peak_flops()
        mfu = rate * flops_per_token(run.model) / peak if rate and peak else None
        self.write("train", step=step, loss=loss if finite else None, lr=lr, tokens_per_s=rate,
                   grad_norm=grad_norm if finite else None, mfu=mfu)

        # the screen has some of them, and each that is not finite
        shows = step % self.config.log_interval == 0 or step == steps - 1
        if shows:
            self.routers(run, routers)
        if self.process.is_main:
            self.flush()
        if not finite:
            self.say(f"step {step:>6}  loss {loss}, gradient norm {grad_norm}: no update made")
            self.check_bad_steps(step, self.config.max_bad_steps)
        else:
            self.unshown.append((loss, grad_norm))
        if finite and shows:
            # one small batch tells little: the means of all steps since the last line do
            loss, grad_norm = (sum(values) / len(values) for values in zip(*self.unshown))
            self.unshown = []
            self.say(f"step {step:>6}/{steps}  loss {loss:.4f}  lr {lr:.2e}  "
                     f"grad_norm {grad_norm:.2f}{self.speed(run.step, rate, mfu)}")
        self.began = self.began or (run.step, time.monotonic())

    def speed(self, step, rate, mfu):
        """Tokens a second of the last step, and the time left by the average, as text."""
        if not self.began:
            return ""
        first, since = self.began
        left = (time.monotonic() - since) / (step - first) * (self.config.max_iters - step)
        return (f"  {rate:,.0f} tokens/s" + (f"  mfu {mfu:.1%}" if mfu else "")
                + f"  {duration(left)} left")

    def check_bad_steps(self, step, most):
        """Raise FloatingPointError if the last `most` steps or more were not finite."""
        if self.bad_steps >= most:
            advice = "There is no checkpoint: start again with a lower --learning_rate"
            if found := checkpoints(self.out):
                advice = (f"The last checkpoint is {found[-1]}; resume with a lower "
                          f"--learning_rate. If no step after it is finite, move it away: the one "
                          f"before is used")
            raise FloatingPointError(
                f"{self.bad_steps} steps in a row up to step {step} were not finite (max_bad_steps="
                f"{self.config.max_bad_steps}): stopped. {advice}")

    def evaluation(self, run, val_loss):
        """Write and show a validation loss and the statistics of the weights. Returns the loss in
        bits per byte, None if the tokens' length in bytes is unknown."""
        tokens = run.sequences * self.config.model.block_size
        per_byte = run.dataset.val_bytes_per_token
        val_bpb = val_loss / math.log(2) / per_byte if per_byte else None
        text = f"step {run.step:>6}  val_loss {val_loss:.4f} nats/token"
        if val_bpb:
            text += f", {val_bpb:.4f} bits/byte"
        if run.step == 0:
            size = self.config.model.vocab_size
            text += f"; uniform over {size} tokens is {math.log(size):.4f}"
        self.say(text)
        if self.process.is_main:
            self.write("eval", step=run.step, tokens=tokens, val_loss=val_loss, val_bpb=val_bpb,
                       logit_scale=logit_scale(run))
            for event, values in weight_events(run.model, update_norms(run.optimizer)):
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
def weight_events(model, updates):
    """("scale": γ's mean, deviation and extremes, α's root mean square, β) of each scale vector;
    ("matrix": Frobenius norm, and the last update's share of it) of each matrix, a stack of experts
    as one. updates: optim.update_norms."""
    scales = named_scale_vectors(model)
    for name, scale in scales:
        gamma, beta = scale(), scale.beta
        numbers = {"mean": gamma.mean(), "std": gamma.std(unbiased=False), "min": gamma.min(),
                   "max": gamma.max(), "alpha": scale.alpha.square().mean().sqrt()}
        yield "scale", {"name": name, **{key: value.item() for key, value in numbers.items()},
                        "beta": beta.mean().item() if torch.is_tensor(beta) else None}
    vectors = {p for _, scale in scales for p in scale.parameters()}
    for name, p in model.named_parameters():
        if p not in vectors:
            norm = p.norm().item()
            update = updates[name] / norm if name in updates and norm else None
            yield "matrix", {"name": name, "norm": norm, "update": update}


@torch.no_grad()
def logit_scale(run):
    """The logits' standard deviation over the vocabulary: its mean over the first positions, at
    most 256, of the validation split."""
    x, _ = to_device(run.dataset.val[[0]], run.process.device)
    run.model.eval()  # a fork's dropout has no part in it
    with torch.compiler.set_stance("force_eager"):  # this shape would compile anew
        logits, _ = run.model(x[:, :256])
    run.model.train()
    return logits.float().std(-1).mean().item()


def describe(run):
    """Print what is about to run."""
    config, process, model, say = run.config, run.process, run.model, run.log.say

    # sizes, data, machine
    params, scales = num_params(model), scale_params(model)
    active = f" ({active_params(model):,} active)" if config.model.n_expert else ""
    tokens, step_tokens = run.dataset.train.tokens, tokens_per_step(config)
    say(f"{params:,} parameters{active}, {scales:,} of them in {len(named_scale_vectors(model))} "
        f"scale vectors ({scales / params:.4%})")
    say(f"{tokens:,} training tokens ({run.dataset.tokenizer}); {config.max_iters:,} steps of "
        f"{step_tokens:,} tokens (warm-up: {config.warmup_iters:,}), "
        f"{config.max_iters * step_tokens / tokens:.2f} epochs")
    compiled = "compiled" if process.compile else "not compiled"
    say(f"{process.world_size} x {process.device.type}, {str(process.dtype)[6:]}, {compiled}, "
        f"{run.batches.micro_steps} x {run.batches.micro_batch} sequences of "
        f"{config.model.block_size} in each process")

    # threads that wait for each other make a run ten times slower
    threads, cores = torch.get_num_threads(), os.cpu_count()
    load = os.getloadavg()[0]
    if process.device.type == "cpu" and threads > 1 and load + threads > cores + 0.5:
        say(f"this machine is busy (load {load:.1f}, {cores} cores), and {threads} threads would "
            f"wait for each other: set OMP_NUM_THREADS=1")

    # which map has which vectors, and what lib/check.py has found
    decayed = {name for group in run.optimizer.param_groups if group["weight_decay"]
               for name in group["param_names"]}
    for line in (*map_table(model, decayed), *run.problems):
        say(line)


def summarize(run, val_loss, val_bpb):
    """Write summary.json, and name the run's files."""
    out, seconds = run.log.out, time.monotonic() - run.started
    tokens = run.sequences * run.config.model.block_size
    run.log.flush()  # a resumed run that had finished has made no step that would open the log
    summary = {"val_loss": val_loss, "val_bpb": val_bpb, "steps": run.step, "tokens": tokens,
               "params": num_params(run.model), "seconds": seconds,
               "scale_params": scale_params(run.model),
               "tokens_per_s": tokens / max(seconds, 1e-9)}
    write_whole(out / "summary.json", to_json(summary, indent=1), AGAIN)
    draw = f"python -m studies report {out}"
    if importlib.util.find_spec("matplotlib") is None:
        draw = f"pip install matplotlib && {draw}"
    say(f"done in {duration(seconds)}: {out}/ holds the last checkpoint, log.jsonl, config.json "
        f"and summary.json; draw it with `{draw}`")


def look_at(model):
    """(sentences on what is wrong with a GPT, the names of its parameters without gradient), by a
    short sequence in float32."""
    config, dtype, device = model.config, model.compute_dtype, next(model.parameters()).device
    tokens = torch.arange(min(16, config.block_size), device=device)[None] % config.vocab_size

    def loss(model, tokens):
        return model(tokens, tokens)[1] + model.auxiliary_loss()

    model.compute_dtype = None
    try:
        return check(model, tokens, loss), idle(model, tokens, loss)
    finally:
        model.compute_dtype = dtype


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


def to_json(value, **keys):
    """JSON, which has no NaN and no infinity: null stands for them."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None), **keys)


def duration(seconds):
    return str(timedelta(seconds=int(seconds)))
