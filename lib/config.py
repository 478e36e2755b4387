"""
Every key of a run, and how `CONFIG --key=value ...` becomes one checked configuration.

  TrainConfig   the keys of training, and `.model`, the model's own (model.GPTConfig)
  load_config   command line -> TrainConfig; read_config_file reads the file
  to_dict       TrainConfig -> {key: value}, as config.json holds it and --key=value sets it
  share_batch   each process's share of the global batch
"""
import __future__

import ast
import dataclasses
import difflib
import inspect
import math
import os
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import torch

import configs  # before a config's folder, which may hold a package of this name, is on the path
from lib.count import active_params
from model import DEFAULT_PLACEMENTS, GPT, GPTConfig
from norms import PLACEMENTS, REPARAMS, SCALE_DECAY_POLICIES
from optim import DECAY_SHAPES, OPTIMIZERS, SCHEDULES


@dataclass
class TrainConfig:
    """The configuration of a run. Raises ValueError on impossible values."""
    # the run's folder
    out_dir: str = "out/run"
    resume: bool = False  # continue the run in out_dir; with nothing there, start it
    checkpoint_interval: int = 1000  # steps; 0: only at the end
    keep_checkpoints: int = 2  # the newest so many stay
    # data
    dataset: str = "data/stdlib"  # a folder of token shards: see prepare_data.py
    batch_size: int = 16  # sequences a process holds at once
    gradient_accumulation_steps: int = 1  # times this is the global batch; processes share it
    seed: int = 1337  # of the initial weights and of the data order
    # how long
    max_iters: int = 0  # steps; 0: from tokens_per_param
    tokens_per_param: float = 100.0  # training tokens for each active parameter; the paper's
    # optimizer
    optimizer: str = "adamw"  # or "muon": hidden matrices by Muon, the rest by AdamW
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    scale_weight_decay: str = "all"  # of scale vectors; or none, input_norm (IWD), output_norm, ...
    scale_lr: float = 1.0  # multiplies the learning rate of scale vectors
    decay_embeddings: bool = True
    beta1: float = 0.9
    beta2: float = 0.95
    muon_momentum: float = 0.95
    grad_clip: float = 1.0  # the gradient's norm is cut to this; 0: never
    max_bad_steps: int = 10  # the run stops after so many steps in a row that are not finite
    dist_timeout: float = 600.0  # seconds a process waits for the others before it gives up
    # learning-rate schedule
    schedule: str = "cosine"  # or "wsd": warmup, stable, decay
    warmup_iters: int = 100  # a run that is shorter warms up for a tenth of its steps
    min_lr: float = -1.0  # at the end; -1: the paper's, learning_rate/20 for cosine, 0 for wsd
    decay_share: float = 0.2  # wsd: the last share of the steps
    decay_shape: str = "linear"  # wsd: or "cosine", "sqrt"
    # watching
    eval_interval: int = 250  # steps; 0: only at the end
    eval_windows: int = 400  # validation windows, the same at every evaluation
    log_interval: int = 10  # steps between progress lines; log.jsonl has every step
    sample_tokens: int = 0  # length of the sample shown at the end
    sample_prompt: str = "\n"
    # machine
    device: str = "auto"  # cuda, mps or cpu
    dtype: str = "auto"  # of activations: bfloat16 where a GPU computes in it, else float32
    compile: bool | str = "auto"  # torch.compile: on CUDA
    # no key of its own: the keys of GPTConfig
    model: GPTConfig = field(default_factory=GPTConfig)

    def __post_init__(self):
        check_values(self)
        check_shape(self.model)
        check_scale_vectors(self.model)
        for key in ("out_dir", "dataset"):
            if not getattr(self, key):
                raise ValueError(f"{key}='' is empty: give a path")
            setattr(self, key, os.path.expanduser(getattr(self, key)))
        if self.min_lr < 0:
            self.min_lr = self.learning_rate / 20 if self.schedule == "cosine" else 0.0
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr:g} is above learning_rate="
                             f"{self.learning_rate:g}: the schedule ends at min_lr, so lower it")
        if self.max_iters == 0:
            if not self.tokens_per_param > 0:
                raise ValueError(f"tokens_per_param={self.tokens_per_param} with max_iters=0 makes "
                                 f"no step: set one of them")
            tokens = self.tokens_per_param * active_params(meta_model(self))
            self.max_iters = math.ceil(tokens / tokens_per_step(self))
        if self.warmup_iters > self.max_iters:
            self.warmup_iters = max(1, self.max_iters // 10)
        decay_begins = self.max_iters - round(self.decay_share * self.max_iters)
        if self.schedule == "wsd" and decay_begins < self.warmup_iters:
            raise ValueError(f"decay_share={self.decay_share:g} of max_iters={self.max_iters} lets "
                             f"the decay begin at step {decay_begins}, within warmup_iters="
                             f"{self.warmup_iters}: lower one of them")


BUILTIN = TrainConfig.dataset  # it is made on the spot if it is missing
CHOICES = {"optimizer": OPTIMIZERS, "scale_weight_decay": tuple(SCALE_DECAY_POLICIES),
           "schedule": SCHEDULES, "decay_shape": DECAY_SHAPES,
           "device": ("auto", "cuda", "mps", "cpu"), "dtype": ("auto", "float32", "bfloat16"),
           "compile": ("auto", True, False)}
AT_LEAST_1 = ("batch_size", "gradient_accumulation_steps", "keep_checkpoints", "max_bad_steps",
              "eval_windows", "log_interval", "dist_timeout")
RANGES = {**dict.fromkeys(AT_LEAST_1, (1, math.inf)), "decay_share": (0, 1),
          **dict.fromkeys(("beta1", "beta2", "muon_momentum"), (0, 1 - 1e-9)),
          "max_iters": (0, 1e12), "dist_timeout": (1, 1e9),  # what timedelta can hold
          "min_lr": (-1, math.inf)}  # of all others: at least 0
FIELDS = {f.name: f for f in (*dataclasses.fields(TrainConfig), *dataclasses.fields(GPTConfig))
          if f.name != "model"}


def check_values(c):
    """Raise ValueError if a value is out of its range."""
    for key, choices in CHOICES.items():
        check_choice(key, getattr(c, key), choices)
    for key, value in vars(c).items():
        least, most = RANGES.get(key, (0, math.inf))
        if type(value) in (int, float) and not least <= value <= most:
            limit = f"at least {least}" if most == math.inf else f"between {least} and {most:g}"
            raise ValueError(f"{key}={value} must be {limit}")


# ---------------------------------------------------------------------------------------------
# from text to configuration

def load_config(argv):
    """The TrainConfig of `[CONFIG] [--key=value ...]`; a bare --key means True. Raises ValueError
    on anything that is not a key, not of its type, or impossible. Allocates nothing."""
    if not argv:
        raise ValueError("no config given: start with `python train.py configs/quickstart.py`, "
                         "a minute or two on one core; configs/ holds others, and `python "
                         "train.py --help` lists every key")
    values, files = {}, [arg for arg in argv if not arg.startswith("--")]
    if len(files) > 1:
        raise ValueError(f"one config file at most, and here are {len(files)}: {' '.join(files)} "
                         f"(write --key=value, with the =)")
    if files:
        values.update(read_config_file(os.path.expanduser(files[0])))
    for arg in argv:
        if arg.startswith("--"):
            key, given, text = arg[2:].partition("=")
            known_key(key, "the command line")
            values[key] = parse_value(key, text if given else "True")
    values = {key: check_type(key, value) for key, value in values.items()}
    given = {arg[2:].partition("=")[0] for arg in argv}
    if values.get("max_iters") and "tokens_per_param" in given and "max_iters" not in given:
        raise ValueError(f"--tokens_per_param has no effect beside max_iters={values['max_iters']}"
                         f": add --max_iters=0")
    names = [f.name for f in dataclasses.fields(GPTConfig) if f.name in values]
    model = GPTConfig(**{name: values.pop(name) for name in names})
    return TrainConfig(**values, model=model)


def to_dict(config):
    """{key: value} of every key, the model's among them."""
    return {key: getattr(config.model if hasattr(config.model, key) else config, key)
            for key in FIELDS}


def read_config_file(path):
    """{key: value} of what a config file assigns or takes over by `from ... import *`. It is run
    as a script, which can import its neighbours.

    Ignored: names starting with `_`, modules, functions and classes. Raises ValueError, one line,
    if the file does not run or assigns no key."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config file not found: {path}")
    module, folder, before = types.ModuleType(str(path)), path.resolve().parent, set(sys.modules)
    module.__file__ = str(path)
    sys.modules[str(path)] = module  # a dataclass looks up where it was defined
    sys.path.insert(0, str(folder))
    try:
        exec(checked_code(path), vars(module))
        for neighbour in configs_since(before, folder):
            checked_code(neighbour)
    except (Exception, SystemExit) as error:  # it is the user's code: anything can happen in it
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"{path} does not run: {reason}") from None
    finally:
        sys.path.remove(str(folder))
        for name in configs_since(before, folder).values():  # neighbours of one name may differ
            del sys.modules[name]
    values = assigned(vars(module))
    if not values:
        raise ValueError(f"{path} assigns no key: a config is a Python file with lines such as "
                         f"n_layer = 12")
    for name in values:
        known_key(name, path)
    return values


def checked_code(path):
    """The code of a config file. Raises SyntaxError on a line that would assign nothing."""
    tree = ast.parse(path.read_bytes(), str(path))
    for line in tree.body:
        text = ast.unparse(line)
        if isinstance(line, ast.AnnAssign) and line.value is None:  # `n_layer: 12`
            raise SyntaxError(f"`{text}` assigns nothing: write `{text.replace(': ', ' = ', 1)}`")
        if text.startswith(("import configs.", "from configs import ")):
            raise SyntaxError(f"`{text}` assigns nothing: write `from configs.NAME import *`")
    return compile(tree, str(path), "exec")


def configs_since(before, folder):
    """{path: name} of the modules imported since, from a config's folder or from configs/."""
    new = {name: getattr(sys.modules[name], "__file__", None) for name in set(sys.modules) - before}
    places = folder, Path(configs.__file__).resolve().parent
    return {Path(file): name for name, file in new.items()
            if file and file.endswith(".py") and Path(file).resolve().parent in places}


def assigned(names):
    """{name: value} of the names that must be keys in a config."""
    own = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type,
           __future__._Feature)
    return {name: value for name, value in names.items()
            if name in FIELDS or not (name.startswith("_") or isinstance(value, own))}


def describe_keys():
    """The keys, as the two classes list them: type, default, meaning."""
    return "\n".join(inspect.getsource(kind).partition("\n    def ")[0].rstrip()
                     for kind in (TrainConfig, GPTConfig))


def known_key(key, where):
    """The key, if it is one. Raises ValueError, with the nearest one, if not."""
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
    if int in allowed and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is int and abs(value) >= 2 ** 63:
        raise ValueError(f"{key} must be below 2**63")
    if float in allowed and type(value) is int:
        value = float(value)
    if type(value) not in allowed or (type(value) is float and not math.isfinite(value)):
        raise ValueError(f"{key}={value!r} is of the wrong type: it takes "
                         f"{' or '.join(t.__name__ for t in allowed)}, such as "
                         f"{FIELDS[key].default!r}")
    return value


# ---------------------------------------------------------------------------------------------
# what follows from it

def meta_model(config):
    """The model without its memory: to count parameters."""
    with torch.device("meta"):
        return GPT(config.model)


def tokens_per_step(config):
    return config.batch_size * config.gradient_accumulation_steps * config.model.block_size


def share_batch(config, processes):
    """(micro-batch, accumulation steps) of each process. Raises ValueError if the global batch
    cannot be shared evenly."""
    total = config.batch_size * config.gradient_accumulation_steps
    micro_steps = math.ceil(total / processes / config.batch_size)
    if total % (processes * micro_steps):
        raise ValueError(f"the global batch of {total} sequences (batch_size={config.batch_size} x "
                         f"gradient_accumulation_steps={config.gradient_accumulation_steps}) does "
                         f"not divide by {processes} processes x {micro_steps} micro-batches: "
                         f"change one of the three")
    return total // (processes * micro_steps), micro_steps


# ---------------------------------------------------------------------------------------------
# checks of the model's keys

def nearest(name, names):
    """"; did you mean ...?", or nothing where no name is near."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def check_choice(key, value, choices):
    """Raise ValueError, with the nearest choice, if the value is none of them."""
    if value not in choices:
        names = [str(choice) for choice in choices]
        raise ValueError(f"{key}={value!r} is unknown: choose one of {', '.join(names)}"
                         f"{nearest(str(value), names)}")


def check_shape(c):
    """Raise ValueError if no model has this shape."""
    at_least_1 = ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "d_ff",
                  "n_expert_active", "d_expert")
    at_least_0 = ("n_expert", "d_shared_expert", "n_dense_layer", "load_balance_coef",
                  "router_z_coef")
    for least, keys in enumerate((at_least_0, at_least_1)):
        for key in keys:
            if getattr(c, key) < least:
                raise ValueError(f"{key}={getattr(c, key)} must be at least {least}")
            # beyond these a model is a slip of the finger, and takes minutes to count
            if getattr(c, key) > (most := 10 ** 4 if key == "n_layer" else 10 ** 7):
                raise ValueError(f"{key}={getattr(c, key)} must be at most {most}")
    for key in ("rope_theta", "norm_eps", "init_std"):
        if not getattr(c, key) > 0:
            raise ValueError(f"{key}={getattr(c, key)} must be above 0")

    if c.n_embd % c.n_head:
        nearest = max(1, round(c.n_embd / c.n_head)) * c.n_head
        raise ValueError(f"n_embd={c.n_embd} is not divisible by n_head={c.n_head}: "
                         f"choose n_embd={nearest} or another n_head")
    if c.head_dim % 2:
        raise ValueError(f"n_embd/n_head={c.head_dim} is odd: rotary positions need it even")
    if c.n_head % c.n_kv_head:
        raise ValueError(f"n_head={c.n_head} is not divisible by n_kv_head={c.n_kv_head}: each "
                         f"key/value head serves the same number of query heads")
    if c.n_expert and c.n_expert_active == 1:
        raise ValueError("n_expert_active=1: the weight of a single expert is always 1, so the "
                         "loss would not teach the router; choose 2 or more")
    if c.n_expert and c.n_expert_active > c.n_expert:
        raise ValueError(f"n_expert_active={c.n_expert_active} is more than n_expert={c.n_expert}")
    if c.d_shared_expert and not c.n_expert:
        raise ValueError(f"d_shared_expert={c.d_shared_expert} with n_expert=0: a shared expert "
                         f"needs routed ones beside it")


def check_scale_vectors(c):
    """Raise ValueError if the scale_* keys name something unknown, normalize twice, or want a γ
    shared by some of the maps that read a norm."""
    check_choice("scale_placement", c.scale_placement, PLACEMENTS)
    check_choice("scale_reparam", c.scale_reparam, REPARAMS)
    placement = PLACEMENTS[c.scale_placement]
    if "router" in c.placed_maps:
        raise ValueError("scale_placement_on cannot name the router: it keeps its γ_b")
    for key, maps in (("qk_norm", ("q", "k")), ("post_norm", ("o", "down"))):
        twice = [name for name in maps if name in c.placed_maps]
        if getattr(c, key) and twice and placement.undoes_factor:
            raise ValueError(f"{key}=True would normalize what "
                             f"scale_placement={c.scale_placement!r} has normalized: set "
                             f"{key}=False, or take {','.join(twice)} out of scale_placement_on")

    if c.scale_heterogeneous or not c.scale_vectors:
        return
    for maps in ("q", "k", "v"), ("router", "gate", "up"):
        if "router" in maps and c.d_shared_expert:
            maps = (*maps, "shared_gate", "shared_up")
        maps = [name for name in maps if name != "router" or c.n_expert]
        with_one = [name for name in maps if has_input_vector(c, name)]
        if 1 < len(with_one) < len(maps):
            raise ValueError(f"{' and '.join(with_one)} would share the γ of the norm that "
                             f"{', '.join(maps)} read, and the other would have none: set "
                             f"scale_heterogeneous=True, or treat them alike in scale_vectors_on "
                             f"and scale_placement_on")


def has_input_vector(c, name):
    """Does the map have a γ_b?"""
    name = name.removeprefix("shared_")
    placement = DEFAULT_PLACEMENTS[name]
    if name in c.placed_maps:
        placement = c.scale_placement
    return name in c.vector_maps and placement is not None and "v" in PLACEMENTS[placement].vectors
