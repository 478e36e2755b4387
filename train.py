"""
Pre-training, on one CPU, one GPU, or many under torchrun.

  python train.py configs/quickstart.py
  python train.py configs/quickstart.py --learning_rate=3e-3 --out_dir=out/x
  torchrun --nproc_per_node=8 train.py configs/unified_350m.py
  torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py configs/unified_350m.py

A config is a plain Python file of assignments to the keys below; --key=value overrides it, and a bare --key means True.
The global batch is batch_size x gradient_accumulation_steps sequences however many processes share it, and step s sees the
same sequences on 1, 2 or 8. A step's number is the count of updates made before it.
"""
import ast
import collections
import dataclasses
import difflib
import json
import math
import os
import runpy
import signal
import sys
import time
import types
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from checkpoint import checkpoints, load_checkpoint, newest_checkpoint, save_checkpoint
from data import Dataset, get_encoding, window_numbers
from model import GPT, GPTConfig
from norms import named_scale_vectors
from optim import DECAY_SHAPES, OPTIMIZERS, SCALE_DECAY_POLICIES, SCHEDULES, cosine, make_optimizer, param_groups, wsd
from prepare_data import prepare_builtin
from sample import stream_text

BUILTIN = "data/stdlib"  # the dataset that is made on the spot if it is missing
EXIT_STOPPED = 75  # exit status after SIGTERM or SIGINT, once the checkpoint is saved ("try again" in sysexits.h)
SPIKE_WINDOW, SPIKE_STD = 128, 6.0  # see is_spike


# ---------------------------------------------------------------------------------------------------------------------
# configuration

@dataclass
class TrainConfig:
    """Everything but the model (its keys are model.GPTConfig's)."""
    # the run's folder
    out_dir: str = "out/run"
    resume: bool = False  # continue the run in out_dir; with nothing there, start it
    overwrite: bool = False  # discard the run in out_dir
    checkpoint_interval: int = 1000  # steps; 0: only at the end
    keep_checkpoints: int = 2  # the newest so many stay
    # data
    dataset: str = BUILTIN  # a folder of token shards: see prepare_data.py
    batch_size: int = 16  # sequences a process holds at once
    gradient_accumulation_steps: int = 1  # times this is the global batch; processes share it
    seed: int = 1337  # of the initial weights and of the data order
    # how long
    max_iters: int = 0  # steps; 0: from tokens_per_param
    tokens_per_param: float = 20.0  # training tokens for each parameter
    # optimizer
    optimizer: str = "adamw"  # or "muon": hidden matrices by Muon, the rest by AdamW
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    scale_weight_decay: str = "none"  # which scale vectors decay: none, all, absorbable (IWD), input_norm, not_absorbable
    decay_embeddings: bool = True
    beta1: float = 0.9
    beta2: float = 0.95
    muon_momentum: float = 0.95
    grad_clip: float = 1.0  # the gradient's norm is cut to this; 0: never
    max_bad_steps: int = 10  # steps in a row whose loss or gradient is not finite (no update is made) before the run stops
    dist_timeout: float = 600.0  # seconds a process waits for the others before it gives up
    # learning-rate schedule
    schedule: str = "cosine"  # or "wsd": warmup, stable, decay
    warmup_iters: int = 100
    min_lr: float = 0.0  # where the schedule ends
    decay_share: float = 0.2  # wsd: the last share of the steps
    decay_shape: str = "linear"  # wsd: or "cosine", "sqrt"
    # watching
    eval_interval: int = 250  # steps; 0: only at the end
    eval_iters: int = 50  # batches of batch_size windows, the same at every evaluation
    log_interval: int = 10  # steps between progress lines; log.jsonl has every step
    sample_tokens: int = 0  # length of the sample shown at the end
    sample_prompt: str = "\n"
    plot: bool = False  # draw out_dir/report.png at the end (needs matplotlib)
    wandb_project: str = ""  # log to Weights & Biases too (needs wandb)
    # machine
    device: str = "auto"  # cuda, mps or cpu
    dtype: str = "auto"  # of activations: bfloat16 on CUDA, float32 elsewhere
    compile: bool | str = "auto"  # torch.compile: on CUDA


CHOICES = {"optimizer": OPTIMIZERS, "scale_weight_decay": tuple(SCALE_DECAY_POLICIES), "schedule": SCHEDULES,
           "decay_shape": DECAY_SHAPES, "device": ("auto", "cuda", "mps", "cpu"), "dtype": ("auto", "float32", "bfloat16"),
           "compile": ("auto", True, False)}
AT_LEAST_1 = ("batch_size", "gradient_accumulation_steps", "keep_checkpoints", "eval_iters", "log_interval",
              "max_bad_steps", "dist_timeout")
AT_LEAST_0 = ("checkpoint_interval", "max_iters", "learning_rate", "weight_decay", "grad_clip", "warmup_iters", "min_lr",
              "eval_interval", "sample_tokens", "seed")
FIELDS = {f.name: f for f in (*dataclasses.fields(TrainConfig), *dataclasses.fields(GPTConfig))}


def load_config(argv):
    """The resolved configuration, a namespace with every key, from `[CONFIG] [--key=value ...]`.
    Raises ValueError, one line, on anything that is not a key, not of its type, or impossible. Allocates nothing."""
    values, files = {}, [a for a in argv if not a.startswith("--")]
    if len(files) > 1:
        raise ValueError(f"one config file at most, and here are {len(files)}: {' '.join(files)} (write --key=value, with the =)")
    if files:
        values.update(read_config_file(files[0]))
    for arg in argv:
        if arg.startswith("--"):
            key, given, text = arg[2:].partition("=")
            values[key] = parse_value(known_key(key, "the command line"), text if given else "True")
    resolved = {name: check_type(name, values.get(name, field.default)) for name, field in FIELDS.items()}
    for key, allowed in CHOICES.items():
        if resolved[key] not in allowed:
            raise ValueError(f"{key}={resolved[key]!r} is unknown: choose one of {', '.join(map(str, allowed))}"
                             f"{nearest(str(resolved[key]), map(str, allowed))}")
    for keys, least in ((AT_LEAST_1, 1), (AT_LEAST_0, 0)):
        for key in keys:
            if not resolved[key] >= least:
                raise ValueError(f"{key}={resolved[key]} must be at least {least}")
    for key in ("beta1", "beta2", "muon_momentum", "decay_share"):
        if not 0 <= resolved[key] <= (1 if key == "decay_share" else 1 - 1e-9):
            raise ValueError(f"{key}={resolved[key]} must be between 0 and 1")
    if resolved["resume"] and resolved["overwrite"]:
        raise ValueError("resume=True and overwrite=True: continue the run in out_dir or discard it, not both")
    resolved.update(dataclasses.asdict(GPTConfig(**{f.name: resolved[f.name] for f in dataclasses.fields(GPTConfig)})))
    config = types.SimpleNamespace(**resolved)
    if config.max_iters == 0:
        if not config.tokens_per_param > 0:
            raise ValueError(f"tokens_per_param={config.tokens_per_param} with max_iters=0 makes no step: set one of them")
        config.max_iters = math.ceil(config.tokens_per_param * meta_model(config).num_params("active") / tokens_per_step(config))
    return config


def read_config_file(path):
    """{key: value} of the assignments in a config file; names that start with _ are the file's own business."""
    if not Path(path).is_file():
        raise ValueError(f"config file not found: {path}")
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as error:  # it is the user's code: anything can happen in it
        raise ValueError(f"{path} does not run: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from None
    return {known_key(name, path): value for name, value in names.items()
            if not name.startswith("_") and not isinstance(value, types.ModuleType)}


def nearest(name, names):
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def known_key(key, where):
    if key not in FIELDS:
        raise ValueError(f"unknown key {key!r} in {where}{nearest(key, FIELDS) or ': every key is in train.py and GPTConfig'}")
    return key


def parse_value(key, text):
    """The value of --key=text: a Python literal, or the text itself for a key that holds text."""
    if FIELDS[key].type is str:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # no literal
        return text


def check_type(key, value):
    """The value, with 1 taken for 1.0 where a float is wanted and 1e3 for 1000 where an int is."""
    allowed = getattr(FIELDS[key].type, "__args__", (FIELDS[key].type,))
    if float in allowed and type(value) is int:
        value = float(value)
    if int in allowed and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) not in allowed or (type(value) is float and not math.isfinite(value)):
        raise ValueError(f"{key}={value!r} is of the wrong type: it takes {' or '.join(t.__name__ for t in allowed)}, "
                         f"such as {FIELDS[key].default!r}")
    return value


def gpt_config(config):
    return GPTConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(GPTConfig)})


def meta_model(config):
    """The model without its memory: to count parameters."""
    with torch.device("meta"):
        return GPT(gpt_config(config))


def tokens_per_step(config):
    return config.batch_size * config.gradient_accumulation_steps * config.block_size


def share_batch(config, processes):
    """(micro-batch, accumulation steps) of each process. Raises ValueError if the global batch cannot be shared evenly."""
    total = config.batch_size * config.gradient_accumulation_steps
    micro_steps = math.ceil(total / processes / config.batch_size)
    if total % (processes * micro_steps):
        raise ValueError(f"the global batch of {total} sequences (batch_size={config.batch_size} x "
                         f"gradient_accumulation_steps={config.gradient_accumulation_steps}) does not divide by "
                         f"{processes} processes x {micro_steps} micro-batches: change one of the three")
    return total // (processes * micro_steps), micro_steps


# ---------------------------------------------------------------------------------------------------------------------
# processes and devices

class Process:
    """Which process this is, and its device. Alone, or one of torchrun's."""

    def __init__(self, config):
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.first = self.rank == 0
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        kind = next(k for k in available if available[k]) if config.device == "auto" else config.device
        if not available[kind]:
            raise ValueError(f"device={kind!r} is not available on this machine: use --device=auto")
        if kind == "mps" and self.count > 1:
            raise ValueError("device='mps' cannot run several processes: start without torchrun, or use --device=cpu")
        self.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            if self.device.index >= torch.cuda.device_count():
                raise ValueError(f"process {self.device.index} of this machine has no GPU of its own: there are "
                                 f"{torch.cuda.device_count()}; lower --nproc_per_node")
            torch.cuda.set_device(self.device)
        self.dtype = getattr(torch, config.dtype if config.dtype != "auto" else "bfloat16" if kind == "cuda" else "float32")
        self.compile = kind == "cuda" if config.compile == "auto" else config.compile
        # the timeout ends the others when one process is gone or stuck, instead of waiting for ever
        if self.count > 1:
            timeout = timedelta(seconds=config.dist_timeout)
            store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
            if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
                # torchrun keeps its store when it restarts the workers of a machine: do not meet those that are gone
                store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=self.rank, world_size=self.count,
                                    timeout=timeout)

    def sum(self, *values):
        """Each value summed over all processes. One all-reduce, one wait for the device."""
        total = torch.stack([torch.as_tensor(v, device=self.device, dtype=torch.float32) for v in values])
        if self.count > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value):
        """[value of process 0, of process 1, ...], on all."""
        values = [value]
        if self.count > 1:
            values = [None] * self.count
            dist.all_gather_object(values, value)
        return values

    def first_then_all(self, function):
        """function() on the first process, its result or its error on all."""
        if self.count == 1:
            return function()
        outcome = [None]
        if self.first:
            try:
                outcome = [(function(), None)]
            except (ValueError, OSError) as error:
                outcome = [(None, str(error))]
        dist.broadcast_object_list(outcome, src=0)
        result, error = outcome[0]
        if error:
            raise ValueError(error)
        return result

    def peak_flops(self):
        """Dense bf16 FLOP/s of the GPUs people train on, by their makers' data sheets; None where we do not know."""
        if self.device.type != "cuda" or self.dtype != torch.bfloat16:
            return None
        name = torch.cuda.get_device_name(self.device)
        known = (("B200", 2250e12), ("H200", 989e12), ("H100 PCIe", 756e12), ("H100", 989e12), ("A100", 312e12), ("L40S", 362e12),
                 ("4090", 165e12), ("3090", 71e12))
        return next((flops for part, flops in known if part in name), None)


# ---------------------------------------------------------------------------------------------------------------------
# the run's folder

def open_run(config, lock, tokenizer):
    """Take out_dir for this run: lock it, refuse another run's, discard or resume it. For the first process.
    Returns the checkpoint to resume from, or None, and what the log says (History). Raises ValueError."""
    out = Path(config.out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(f"another process is training in out_dir={config.out_dir!r}: choose another --out_dir") from None
    except OSError as error:
        raise ValueError(f"out_dir={config.out_dir!r} cannot be written ({error.strerror}): choose another --out_dir") from None
    if config.overwrite:
        for path in (*checkpoints(out), *(out / name for name in ("log.jsonl", "config.json", "summary.json"))):
            path.unlink(missing_ok=True)
    elif not config.resume and (checkpoints(out) or (out / "log.jsonl").exists()):
        raise ValueError(f"out_dir={config.out_dir!r} holds a run: continue it with --resume, discard it with --overwrite, "
                         f"or choose another --out_dir")
    for path in out.glob("*.tmp"):  # what a killed run was writing
        path.unlink()
    found = newest_checkpoint(out) if config.resume else None
    if found:
        check_same_run(config, tokenizer, *found)
    return str(found[0]) if found else None, keep_log_before(out / "log.jsonl", found[1]["step"] if found else 0)


def check_same_run(config, tokenizer, path, state):
    """Raise ValueError if the checkpoint's model, optimizer or tokenizer is another than the configuration's."""
    was = {**state["config"], "optimizer": state["run_config"]["optimizer"], "tokenizer": state["tokenizer"]}
    now = {**dataclasses.asdict(gpt_config(config)), "optimizer": config.optimizer, "tokenizer": tokenizer}
    changed = [f"{k}={was.get(k)!r} (now {v!r})" for k, v in now.items() if was.get(k) != v and k != "scale_execution"]
    if changed:
        raise ValueError(f"{path} is a checkpoint of another run: {', '.join(changed)}: resume with its configuration, "
                         f"or choose another --out_dir")


@dataclass
class History:
    """What a resumed run must know of the log before it."""
    recent: list  # the last SPIKE_WINDOW finite losses
    spikes: int = 0  # counted so far
    bad_steps: int = 0  # not finite, in a row, at the end


def keep_log_before(path, step):
    """Drop from the log what the resumed run will write again, so that every step stands in it once. Returns its History."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    kept, recent, history = [], collections.deque(maxlen=SPIKE_WINDOW), History([])
    for line in lines:
        try:
            record = json.loads(line)
            if not record["step"] < step:
                continue
            if record["event"] == "train":
                loss, spikes = record["loss"], int(record["spikes"])
                if loss is not None:
                    recent.append(float(loss))
                history.bad_steps = history.bad_steps + 1 if loss is None else 0
                history.spikes = spikes
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # the last line of a killed run may be cut
        kept.append(line + "\n")
    write_whole(path, "".join(kept))
    history.recent = list(recent)
    return history


def is_spike(loss, recent):
    """A loss is a spike if it lies more than SPIKE_STD standard deviations above the mean of the SPIKE_WINDOW finite losses
    before it; False while there are fewer. (Our reading: the literature counts spikes in this way with various numbers.)"""
    return len(recent) >= SPIKE_WINDOW and loss > np.mean(recent) + SPIKE_STD * np.std(recent)


def write_whole(path, text):
    """Write a small file so that it is there in full or not at all."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "w") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written ({error.strerror}): make room and continue with --resume") from None


class Log:
    """log.jsonl: one JSON object a line, in the file as soon as it is written."""

    def __init__(self, path):
        self.path, self.file = path, open(path, "ab", buffering=0)

    def write(self, record):
        line = (json.dumps(record) + "\n").encode()
        try:
            while line:
                line = line[self.file.write(line):]
        except OSError as error:
            raise OSError(f"{self.path} cannot be written ({error.strerror}): make room and continue with --resume; the "
                          f"checkpoints stand") from None

    def flush_to_disk(self):
        os.fsync(self.file.fileno())


# ---------------------------------------------------------------------------------------------------------------------
# training

def to_device(arrays, device):
    """numpy (x, y) -> tensors on the device; on CUDA the copy runs beside the computation."""
    tensors = (torch.from_numpy(a.copy()) for a in arrays)
    if device.type == "cuda":
        return tuple(t.pin_memory().to(device, non_blocking=True) for t in tensors)
    return tuple(t.to(device) for t in tensors)


@torch.no_grad()
def evaluate(model, split, config, process):
    """Mean loss, nats per token, over eval_iters x batch_size windows spread evenly over the split: the same windows at
    every evaluation and for every number of processes, which share them batch by batch."""
    count = min(len(split), config.eval_iters * config.batch_size)
    windows = [i * len(split) // count for i in range(count)]
    batches = [windows[i:i + config.batch_size] for i in range(0, count, config.batch_size)]
    total = torch.zeros((), device=process.device)
    model.eval()  # without a mixture's auxiliary losses
    for batch in batches[process.rank::process.count]:
        _, loss = model(*to_device(split[batch], process.device))
        total += loss * len(batch)
    model.train()
    return process.sum(total)[0] / count


def scale_statistics(model):
    """A dict for each scale vector: name, mean, std, min, max of γ, and β (None for a plain γ)."""
    out = []
    with torch.no_grad():
        for name, scale in named_scale_vectors(model):
            gamma = scale()
            stats = torch.stack((gamma.mean(), gamma.std(unbiased=False), gamma.min(), gamma.max())).tolist()
            out.append({"name": name, **dict(zip(("mean", "std", "min", "max"), stats)),
                        "beta": None if scale.reparam == "none" else scale.beta.item()})
    return out


def rng_state(device):
    """{device type: state} of the random-number generators that a process may draw from."""
    return {"cpu": torch.get_rng_state(), **({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})}


def set_rng_state(state, device):
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def optional(package, key):
    """Import an optional package that a key asks for."""
    try:
        return __import__(package)
    except ImportError:
        raise ValueError(f"{key} needs the package {package}: pip install {package}, or leave {key} unset") from None


def duration(seconds):
    seconds = int(seconds)
    return f"{seconds}s" if seconds < 60 else f"{seconds // 60}m{seconds % 60:02d}s" if seconds < 3600 else \
        f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def open_dataset(config, process):
    """The dataset, made first if it is the built-in one and missing. The first process checks all of it, the others
    only its headers."""
    def prepare_and_check():
        if config.dataset == BUILTIN and not Path(BUILTIN).exists():
            prepare_builtin(BUILTIN)
        Dataset(config.dataset, config.block_size, config.vocab_size)
    process.first_then_all(prepare_and_check)
    return Dataset(config.dataset, config.block_size, config.vocab_size, verify=False)


def learning_rate(step, config):
    if config.schedule == "cosine":
        return cosine(step, config.learning_rate, config.max_iters, config.warmup_iters, config.min_lr)
    return wsd(step, config.learning_rate, config.max_iters, config.warmup_iters, config.min_lr, config.decay_share,
               config.decay_shape)


def train(config, process):
    """Run the configuration to its end. Returns the exit status: 0, or EXIT_STOPPED after a signal."""
    # everything that can be wrong with the request comes first
    micro_batch, micro_steps = share_batch(config, process.count)
    wandb = optional("wandb", "wandb_project") if config.wandb_project else None
    if config.plot:
        optional("matplotlib", "plot")
    if config.n_expert and process.device.type == "cuda" and config.d_expert % 8:
        raise ValueError(f"d_expert={config.d_expert}: grouped products on CUDA need rows of 16 bytes, a multiple of 8: "
                         f"choose {(config.d_expert + 7) // 8 * 8}")
    dataset = open_dataset(config, process)
    encoding = get_encoding(dataset.tokenizer) if config.sample_tokens else None
    lock = filelock.FileLock(Path(config.out_dir) / "lock")  # held as long as this run lives
    resume_from, history = process.first_then_all(lambda: open_run(config, lock, dataset.tokenizer))
    say = print if process.first else lambda *args, **kwargs: None

    # the model, its optimizer, and what a checkpoint says of them
    torch.manual_seed(config.seed)
    raw_model = GPT(gpt_config(config)).to(process.device)  # initialized on the CPU: the same weights on every device
    raw_model.compute_dtype = process.dtype
    optimizer = make_optimizer(param_groups(raw_model, config.weight_decay, config.scale_weight_decay, config.decay_embeddings),
                               config.optimizer, config.learning_rate, (config.beta1, config.beta2), config.muon_momentum,
                               fused=process.device.type == "cuda")
    torch.manual_seed(config.seed + process.rank)  # nothing below draws random numbers; with dropout, say, a fork would
    global_batch = config.batch_size * config.gradient_accumulation_steps
    step, seconds_before, sequences_before = 0, 0.0, 0  # sequences seen in earlier steps, beyond step x global batch
    if resume_from:
        state = load_checkpoint(resume_from)
        raw_model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds_before = state["step"], state["seconds"]
        sequences_before = state["data"]["sequences"] - step * global_batch  # not 0 if the batch has another size now
        if len(state["rng"]) == process.count:
            set_rng_state(state["rng"][process.rank], process.device)
        say(f"resuming from {resume_from} at step {step}")
        now = {**vars(config), "train_tokens": dataset.train.tokens}
        was = {**state["run_config"], "train_tokens": state["data"]["train_tokens"]}
        changed = [f"{k}={v!r} (was {was.get(k)!r})" for k, v in now.items()
                   if was.get(k) != v and k not in ("out_dir", "resume", "overwrite")]
        if changed:
            say(f"changed since the checkpoint: {', '.join(changed)}")
    model = torch.compile(raw_model) if process.compile else raw_model
    ddp = DistributedDataParallel(model, device_ids=[process.device] if process.device.type == "cuda" else None,
                                  broadcast_buffers=False, gradient_as_bucket_view=True) if process.count > 1 else model

    params, scale_params = raw_model.num_params(), raw_model.num_params("scale_vectors")
    tokens_a_step, flops_a_token, peak = tokens_per_step(config), raw_model.flops_per_token(), process.peak_flops()
    moe_layers = [i for i, layer in enumerate(raw_model.layers) if layer.moe]
    active = f" ({raw_model.num_params('active'):,} active)" if moe_layers else ""
    say(f"{params:,} parameters{active}, {scale_params:,} of them in {len(named_scale_vectors(raw_model))} scale vectors "
        f"({scale_params / params:.4%})")
    say(f"{dataset.train.tokens:,} training tokens ({dataset.tokenizer}); {config.max_iters:,} steps of {tokens_a_step:,} tokens, "
        f"{config.max_iters * tokens_a_step / dataset.train.tokens:.2f} epochs")
    say(f"{process.count} x {process.device.type}, {str(process.dtype)[6:]}, {'compiled' if process.compile else 'not compiled'}, "
        f"{micro_steps} x {micro_batch} sequences of {config.block_size} in each process", flush=True)

    out, log = Path(config.out_dir), None
    if process.first:
        write_whole(out / "config.json", json.dumps(vars(config), indent=1))
        log = Log(out / "log.jsonl")
        if wandb:
            wandb.init(project=config.wandb_project, name=out.name, config=vars(config))

    def write_log(event, **values):
        if process.first:
            log.write({"event": event, **values})
            if wandb and event in ("train", "eval"):
                wandb.log({f"{event}/{key}": value for key, value in values.items() if key != "step"}, step=values["step"])

    def write_eval():
        val_loss = evaluate(model, dataset.val, config, process)
        per_byte = dataset.val_bytes_per_token
        val_bpb = val_loss / math.log(2) / per_byte if per_byte else None
        write_log("eval", step=step, val_loss=val_loss, val_bpb=val_bpb)
        for statistics in scale_statistics(raw_model):
            write_log("scale", step=step, **statistics)
        say(f"step {step:>6}  val_loss {val_loss:.4f} nats/token" + (f", {val_bpb:.4f} bits/byte" if val_bpb else ""), flush=True)
        return val_loss, val_bpb

    def write_routers(stats):
        """The load of each expert (its share of all choices) and the auxiliary losses, of this step's global batch."""
        stats = torch.tensor(process.sum(*stats.flatten())).view(stats.shape) / process.count
        for layer, (balance, z, *load) in zip(moe_layers, stats.tolist()):
            write_log("router", step=step, layer=layer, balance_loss=balance, z_loss=z, load=load, load_max=max(load), load_min=min(load))

    def write_checkpoint():
        rng = process.gather(rng_state(process.device))
        if process.first:
            log.flush_to_disk()  # no step of a checkpoint may be missing from the log
            save_checkpoint(out, step, {
                "model": raw_model.state_dict(), "optimizer": optimizer.state_dict(), "config": dataclasses.asdict(gpt_config(config)),
                "run_config": vars(config), "tokenizer": dataset.tokenizer, "seconds": seconds_before + time.time() - started,
                "data": {"sequences": sequences_before + step * global_batch, "train_tokens": dataset.train.tokens}, "rng": rng},
                config.keep_checkpoints)

    def batch(of_step, micro_step):
        """This process's share of one micro-batch of the global batch."""
        first = sequences_before + ((of_step * micro_steps + micro_step) * process.count + process.rank) * micro_batch
        return to_device(dataset.train[window_numbers(first, micro_batch, len(dataset.train), config.seed)], process.device)

    signals = []  # SIGTERM and SIGINT let the step finish
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: signals.append(received))

    first_step, saved_step, started = step, step, time.time()
    recent, spikes, bad_steps = collections.deque(history.recent, SPIKE_WINDOW), history.spikes, history.bad_steps
    shown_step, shown_time = step, started  # where the running throughput starts
    x, y = batch(step, 0)
    while True:
        last, pause = step >= config.max_iters, time.time()
        if last or (config.eval_interval and step % config.eval_interval == 0):
            val_loss, val_bpb = write_eval()
        if step > saved_step and (last or (config.checkpoint_interval and step % config.checkpoint_interval == 0)):
            write_checkpoint()
            saved_step = step
        shown_time += time.time() - pause
        if last:
            break

        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, router_stats = torch.zeros((), device=process.device), 0.0
        for micro_step in range(micro_steps):
            if process.count > 1:  # gradients meet once, in the last backward pass
                ddp.require_backward_grad_sync = micro_step == micro_steps - 1
            _, micro_loss = ddp(x, y)
            x, y = batch(*divmod(step * micro_steps + micro_step + 1, micro_steps))  # the next, while the device is busy
            (micro_loss / micro_steps).backward()
            loss += micro_loss.detach() / micro_steps
            if moe_layers:
                router_stats += raw_model.router_stats / micro_steps
                loss -= raw_model.auxiliary_loss(raw_model.router_stats) / micro_steps  # log the cross-entropy alone
        grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), config.grad_clip or math.inf)
        loss, grad_norm, stopping = process.sum(loss, grad_norm, len(signals))  # the one wait for the device in a step
        loss, grad_norm = loss / process.count, grad_norm / process.count
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        now = time.time()
        if finite:
            spike = is_spike(loss, recent)
            recent.append(loss)
            if spike:
                spikes += 1
                say(f"step {step:>6}  loss {loss:.4f} is a spike, the {spikes}. so far", flush=True)
        rate = tokens_a_step * (step + 1 - shown_step) / (now - shown_time)
        mfu = rate * flops_a_token / (peak * process.count) if peak else None
        write_log("train", step=step, loss=loss if finite else None, lr=lr, grad_norm=grad_norm if finite else None,
                  tokens_per_s=rate, mfu=mfu, spikes=spikes)
        bad_steps = 0 if finite else bad_steps + 1
        if not finite:
            say(f"step {step:>6}  loss {loss}, gradient norm {grad_norm}: no update made", flush=True)
            if bad_steps >= config.max_bad_steps:
                raise FloatingPointError(f"{bad_steps} steps in a row up to step {step} were not finite (max_bad_steps): stopped. "
                                         f"The last checkpoint is {(checkpoints(out) or ['none'])[-1]}; try a lower learning_rate")
        elif step % config.log_interval == 0 or step == config.max_iters - 1:
            left = (config.max_iters - step - 1) * (now - started) / (step + 1 - first_step)
            if moe_layers:
                write_routers(router_stats)
            say(f"step {step:>6}/{config.max_iters}  loss {loss:.4f}  lr {lr:.2e}  grad_norm {grad_norm:.2f}  {rate:,.0f} tokens/s  "
                + (f"mfu {mfu:.1%}  " if mfu else "") + f"{duration(left)} left", flush=True)
            shown_step, shown_time = step + 1, now
        step += 1
        if stopping and step < config.max_iters:
            write_checkpoint()
            say(f"stopped by a signal after {step} steps, and saved: continue with --resume")
            return EXIT_STOPPED

    seconds = seconds_before + time.time() - started
    tokens = (sequences_before + step * global_batch) * config.block_size
    summary = {"val_loss": val_loss, "val_bpb": val_bpb, "steps": step, "tokens": tokens, "params": params, "scale_params": scale_params,
               "seconds": seconds, "tokens_per_s": tokens / max(seconds, 1e-9), "spikes": spikes}
    if process.first:
        log.flush_to_disk()
        write_whole(out / "summary.json", json.dumps(summary, indent=1))
        say(f"done in {duration(seconds)}: {out}/ holds the last checkpoint, log.jsonl, config.json and summary.json")
        if config.plot:
            from tools.report import report
            report([out], out / "report.png")
        if encoding:
            say(f"\na sample, with the prompt {config.sample_prompt!r}:\n" + "-" * 80)
            stream_text(raw_model.eval(), encoding, config.sample_prompt, config.sample_tokens)
    if process.count > 1:
        dist.barrier()  # leave together: a process that is gone looks like a failure to the others
    return 0


def lost_contact(error):
    """True if this is how torch.distributed (an NCCL error, or gloo's plain RuntimeError) tells that a process is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def main(argv):
    if any(arg in ("-h", "--help") for arg in argv):
        print(__doc__ + "\nkeys and defaults:\n  " + "\n  ".join(f"{f.name}={f.default!r}" for f in FIELDS.values()))
        return 0
    process = None
    try:
        config = load_config(argv)
        process = Process(config)
        return train(config, process)
    except (ValueError, OSError, FloatingPointError) as error:
        if process is None or process.first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as error:
        if process is None or process.count == 1 or not lost_contact(error):
            raise
        print(f"error: process {process.rank} waited for another that has ended, or has been silent for dist_timeout="
              f"{config.dist_timeout:g} s ({str(error).splitlines()[0]}): continue with --resume", file=sys.stderr, flush=True)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
