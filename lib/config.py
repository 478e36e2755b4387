"""
Every key of a run, and how `CONFIG --key=value ...` becomes one checked configuration.

  TrainConfig       the keys of training, and `.model`, the model's own (model.GPTConfig)
  load_config       command line -> TrainConfig; read_config_file does the file
  flat              TrainConfig -> {key: value}, as config.json holds it and --key=value sets it
  meta_model        the model without its memory, to count parameters
  tokens_per_step, share_batch   the global batch, and each process's share of it
"""
import ast
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import torch

from model import GPT, GPTConfig
from norms import SCALE_DECAY_POLICIES
from optim import DECAY_SHAPES, OPTIMIZERS, SCHEDULES

BUILTIN = "data/stdlib"  # the dataset that is made on the spot if it is missing


@dataclass
class TrainConfig:
    """The configuration of a run. Raises ValueError, one line, on values that are impossible alone or together."""
    # the run's folder
    out_dir: str = "out/run"
    resume: bool = False  # continue the run in out_dir; with nothing there, start it
    overwrite: bool = False  # discard the run in out_dir, once the first step of this one is made
    checkpoint_interval: int = 1000  # steps; 0: only at the end
    keep_checkpoints: int = 2  # the newest so many stay
    # data
    dataset: str = BUILTIN  # a folder of token shards: see prepare_data.py
    batch_size: int = 16  # sequences a process holds at once
    gradient_accumulation_steps: int = 1  # times this is the global batch; processes share it
    seed: int = 1337  # of the initial weights and of the data order
    # how long
    max_iters: int = 0  # steps; 0: from tokens_per_param
    tokens_per_param: float = 100.0  # training tokens for each parameter that a token meets; the paper's
    # optimizer
    optimizer: str = "adamw"  # or "muon": hidden matrices by Muon, the rest by AdamW
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    scale_weight_decay: str = "all"  # which scale vectors decay: all, none, input_norm (IWD), output_norm, absorbable
    scale_lr: float = 1.0  # multiplies the learning rate of scale vectors
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
    min_lr: float = -1.0  # where the schedule ends; -1: the paper's, learning_rate/20 for cosine and 0 for wsd
    decay_share: float = 0.2  # wsd: the last share of the steps
    decay_shape: str = "linear"  # wsd: or "cosine", "sqrt"
    # watching
    eval_interval: int = 250  # steps; 0: only at the end
    eval_iters: int = 50  # x 8 validation windows, the same ones whatever batch_size and the number of processes are
    log_interval: int = 10  # steps between progress lines; log.jsonl has every step
    sample_tokens: int = 0  # length of the sample shown at the end
    sample_prompt: str = "\n"
    wandb_project: str = ""  # log to Weights & Biases too (needs wandb)
    # machine
    device: str = "auto"  # cuda, mps or cpu
    dtype: str = "auto"  # of activations: bfloat16 on CUDA, float32 elsewhere
    compile: bool | str = "auto"  # torch.compile: on CUDA
    # not keys
    model: GPTConfig = field(default_factory=GPTConfig)
    token_budget: float = 0.0  # tokens_per_param x parameters where max_iters=0 asked for it, or 0

    def __post_init__(self):
        check_values(self)
        self.out_dir, self.dataset = (home(key, getattr(self, key)) for key in ("out_dir", "dataset"))
        if self.min_lr == -1:
            self.min_lr = self.learning_rate / 20 if self.schedule == "cosine" else 0.0
        if self.max_iters == 0:
            if not self.tokens_per_param > 0:
                raise ValueError(f"tokens_per_param={self.tokens_per_param} with max_iters=0 makes no step: set one of them")
            self.token_budget = self.tokens_per_param * meta_model(self).num_params("active")
            self.max_iters = math.ceil(self.token_budget / tokens_per_step(self))
        check_schedule(self)


CHOICES = {"optimizer": OPTIMIZERS, "scale_weight_decay": tuple(SCALE_DECAY_POLICIES), "schedule": SCHEDULES,
           "decay_shape": DECAY_SHAPES, "device": ("auto", "cuda", "mps", "cpu"), "dtype": ("auto", "float32", "bfloat16"),
           "compile": ("auto", True, False)}
AT_LEAST_1 = ("batch_size", "gradient_accumulation_steps", "keep_checkpoints", "eval_iters", "log_interval",
              "max_bad_steps", "dist_timeout")
AT_LEAST_0 = ("checkpoint_interval", "max_iters", "learning_rate", "weight_decay", "grad_clip", "warmup_iters",
              "eval_interval", "sample_tokens", "seed", "scale_lr")
FIELDS = {f.name: f for f in (*dataclasses.fields(TrainConfig), *dataclasses.fields(GPTConfig)) if f.name not in ("model", "token_budget")}


def check_values(c):
    """Raise ValueError if a value is out of its range, or two exclude each other."""
    for key, allowed in CHOICES.items():
        value = getattr(c, key)
        if value not in allowed:
            raise ValueError(f"{key}={value!r} is unknown: choose one of {', '.join(map(str, allowed))}"
                             f"{nearest(str(value), map(str, allowed))}")
    for keys, least in ((AT_LEAST_1, 1), (AT_LEAST_0, 0)):
        for key in keys:
            if not getattr(c, key) >= least:
                raise ValueError(f"{key}={getattr(c, key)} must be at least {least}")
    for key in ("beta1", "beta2", "muon_momentum", "decay_share"):
        if not 0 <= getattr(c, key) <= (1 if key == "decay_share" else 1 - 1e-9):
            raise ValueError(f"{key}={getattr(c, key)} must be between 0 and 1")
    if c.seed >= 2 ** 63:
        raise ValueError(f"seed={c.seed} must be less than 2^63, which torch's generators take")
    if c.min_lr < 0 and c.min_lr != -1:
        raise ValueError(f"min_lr={c.min_lr} must be at least 0, or -1 for the paper's")
    if c.resume and c.overwrite:
        raise ValueError("resume=True and overwrite=True: continue the run in out_dir or discard it, not both")


def check_schedule(c):
    """Raise ValueError if the learning rate would never reach its peak, or would end above it."""
    if c.warmup_iters > c.max_iters:
        raise ValueError(f"warmup_iters={c.warmup_iters} is more than max_iters={c.max_iters}: the learning rate would never reach "
                         f"{c.learning_rate:g}; set --warmup_iters={c.max_iters // 10} or so")
    if c.min_lr > c.learning_rate:
        raise ValueError(f"min_lr={c.min_lr:g} is above learning_rate={c.learning_rate:g}: the schedule ends at min_lr, so lower it")


# ---------------------------------------------------------------------------------------------------------------------
# from text to configuration

def load_config(argv):
    """The resolved TrainConfig of `[CONFIG] [--key=value ...]`; a bare --key means True.
    Raises ValueError, one line, on anything that is not a key, not of its type, or impossible. Allocates nothing."""
    values, files = {}, [a for a in argv if not a.startswith("--")]
    if len(files) > 1:
        raise ValueError(f"one config file at most, and here are {len(files)}: {' '.join(files)} (write --key=value, with the =)")
    if files:
        values.update(read_config_file(home("config", files[0])))
    for arg in argv:
        if arg.startswith("--"):
            key, given, text = arg[2:].partition("=")
            values[key] = parse_value(known_key(key, "the command line"), text if given else "True")
    values = {key: check_type(key, value) for key, value in values.items()}
    model = {f.name: values.pop(f.name) for f in dataclasses.fields(GPTConfig) if f.name in values}
    return TrainConfig(**values, model=GPTConfig(**model))


def flat(config):
    """{key: value} of every key, the model's among them."""
    return {key: getattr(config.model if hasattr(config.model, key) else config, key) for key in FIELDS}


def read_config_file(path):
    """{key: value} of what a config, a Python file, assigns or takes over by `from ... import *`.

    Not keys but the file's own business: names that start with _, modules, functions, classes, and what it imports by name from
    elsewhere (`from math import pi`). Files beside it can be imported, as beside a script. Raises ValueError, one line, if the file
    does not run, assigns nothing, annotates a key instead of assigning it (`max_iters: 5`), or assigns what is no key."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config file not found: {path}")
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except Exception as error:
        raise ValueError(f"{path} is no Python: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from None
    imported = set()
    for node in statements(tree):
        if isinstance(node, ast.AnnAssign) and node.value is None:
            raise ValueError(f"{path}, line {node.lineno}: `{ast.unparse(node)}` assigns nothing: write "
                             f"`{ast.unparse(node.target)} = {ast.unparse(node.annotation)}`")
        if isinstance(node, ast.ImportFrom):
            imported |= {alias.asname or alias.name for alias in node.names} - set(FIELDS)
    names = run_config(tree, path)
    tools = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    values = {known_key(name, path): value for name, value in names.items() if name in FIELDS
              or not (name.startswith("_") or name in imported or isinstance(value, tools))}
    if not values:
        raise ValueError(f"{path} assigns no key: a config is a Python file with lines such as n_layer = 12")
    return values


def statements(tree):
    """Every statement of a parsed file, those within `if`, `for`, `with` and `try` too, those within functions and classes not."""
    found = list(tree.body)
    for node in found:  # which grows
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found += [n for n in ast.iter_child_nodes(node) if isinstance(n, (ast.stmt, ast.excepthandler, ast.match_case))]
    return found


def run_config(tree, path):
    """The names that a parsed config leaves, with its folder first among those that imports search, as for a script."""
    names, folder, before = {"__name__": "config", "__file__": str(path)}, str(path.resolve().parent), set(sys.modules)
    sys.path.insert(0, folder)
    try:
        exec(compile(tree, str(path), "exec"), names)
    except (Exception, SystemExit) as error:  # it is the user's code: anything can happen in it
        raise ValueError(f"{path} does not run: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from None
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
        for name in set(sys.modules) - before:  # another config may have another sibling of that name
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(folder + os.sep):
                del sys.modules[name]
    return names


def describe_keys():
    """Every key on a line with its default and the comment that stands beside it in the source."""
    lines = []
    for kind in (TrainConfig, GPTConfig):
        comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(kind), re.MULTILINE))
        lines += [f"  {f.name + '=' + repr(f.default):<34}  {comments.get(f.name, '')}".rstrip() for f in dataclasses.fields(kind)
                  if f.name in FIELDS]
    return "\n".join(lines)


def nearest(name, names):
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def known_key(key, where):
    if key not in FIELDS:
        hint = nearest(key, FIELDS) or ": `python train.py --help` lists every key"
        own = "" if where == "the command line" else " (a name of your own starts with _)"
        raise ValueError(f"unknown key {key!r} in {where}{hint}{own}")
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
    if float in allowed and type(value) is int and abs(value) < 2 ** 1000:
        value = float(value)
    if int in allowed and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) not in allowed or (type(value) is float and not math.isfinite(value)):
        raise ValueError(f"{key}={value!r} is of the wrong type: it takes {' or '.join(t.__name__ for t in allowed)}, "
                         f"such as {FIELDS[key].default!r}")
    return value


def home(key, path):
    """The path with ~ replaced by the home folder, which a shell does not do within --key=value."""
    full = os.path.expanduser(path)
    if not path or full.startswith("~"):
        raise ValueError(f"{key}={path!r} names {'no home folder' if path else 'nothing'}: give a path")
    return full


# ---------------------------------------------------------------------------------------------------------------------
# what follows from it

def meta_model(config):
    """The model without its memory: to count parameters."""
    with torch.device("meta"):
        return GPT(config.model)


def tokens_per_step(config):
    return config.batch_size * config.gradient_accumulation_steps * config.model.block_size


def share_batch(config, processes):
    """(micro-batch, accumulation steps) of each process. Raises ValueError if the global batch cannot be shared evenly."""
    total = config.batch_size * config.gradient_accumulation_steps
    micro_steps = math.ceil(total / processes / config.batch_size)
    if total % (processes * micro_steps):
        raise ValueError(f"the global batch of {total} sequences (batch_size={config.batch_size} x "
                         f"gradient_accumulation_steps={config.gradient_accumulation_steps}) does not divide by "
                         f"{processes} processes x {micro_steps} micro-batches: change one of the three")
    return total // (processes * micro_steps), micro_steps
