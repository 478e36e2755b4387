"""
What a study is: a plain file of data in studies/, completed, checked, and laid out as cells.

  Model, Study   what studies/common.py describes, as dataclasses that check themselves
  Cell           one run of a study
  load_study     a study file at one scale, with your row if it takes one
  read_idea      your row, from a config and from --key=value

First the first row's learning rate is tuned on its grid, on the tuning seeds (one, unless the scale
names more). Then every row runs at that rate with every seed, the paper's protocol. By protocol
"both" each row is tuned in the same way, and also runs at its own best rate.
"""
import hashlib
import itertools
import re
import runpy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

from lib.config import known_key, load_config, parse_value, read_config_file

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "studies" / "results"
PICTURES = ("relative loss", "learning rates", "scaling", "matrix norms", "forest")
# all rows of a study share these and eval_*: a row may differ from the others in its strategy only
SHARED_KEYS = {"dataset", "vocab_size", "block_size", "batch_size", "gradient_accumulation_steps",
               "max_iters", "tokens_per_param", "seed", "learning_rate", "min_lr", "warmup_iters",
               "schedule", "decay_share", "decay_shape", "max_bad_steps", "resume",
               "device", "dtype", "compile"}


class Cell(NamedTuple):
    """One run of a study. tuning: it has the model's tuning keys, such as fewer steps."""
    model: str
    row: str
    learning_rate: float
    seed: int
    tuning: bool = False


@dataclass
class Model:
    """One model of a scale: a config file, keys on top of it, and the grid of learning rates."""
    config: str
    keys: dict
    learning_rates: tuple
    rows: tuple = ()  # labels; without them the model runs all rows
    tuning: dict = field(default_factory=dict)  # keys that replace the others while tuning
    more_rates: dict = field(default_factory=dict)  # {row: rates beyond the grid}

    def __post_init__(self):
        require(isinstance(self.config, str), "'config' must be the path of a config file")
        require(all(isinstance(keys, dict) for keys in (self.keys, self.tuning)),
                "'keys' and 'tuning' must be {key: value}")
        rates = self.learning_rates
        require(isinstance(rates, (tuple, list)) and rates and all(map(is_number, rates)),
                "'learning_rates' must be one rate or more, such as (2e-3, 4e-3)")


@dataclass
class Study:
    """A study at one scale. See studies/common.py for what each name means."""
    name: str
    title: str
    question: str
    rows: dict
    seeds: tuple
    models: dict
    comparisons: dict = field(default_factory=dict)
    tuning_seeds: int | tuple = 1
    tuned: tuple = ()
    follows: dict = field(default_factory=dict)  # {row: the row whose own rate it takes over}
    protocol: str = "both"
    panels: list = field(default_factory=list)
    picture: str = "relative loss"
    rule: dict = field(default_factory=dict)
    yours: tuple = ()
    matrices: tuple = ()
    costs: dict = field(default_factory=dict)
    paper_losses: dict = field(default_factory=dict)
    step_times: dict = field(default_factory=dict)  # {row: text}, beside a forest
    primary: list = field(default_factory=list)  # comparisons that were named before any run
    every_window: bool = False  # the loss on all windows counts (machinery/windows.py)
    steps: int = 0  # --steps: every row is shortened to so many

    def __post_init__(self):
        rows = self.rows
        require(rows and all(isinstance(keys, dict) for keys in rows.values()),
                "rows must be {label: {key: value}}, one row or more")
        require(all(isinstance(row, str) and "," not in row for row in rows),
                "a row's label must be a string without a comma, which --rows puts between labels")
        require(not any({"learning_rate", "seed"} & keys.keys() for keys in rows.values()),
                "a row sets learning_rate or seed: leave them to the models' grids and 'seeds'")
        require(isinstance(self.seeds, (tuple, list)) and self.seeds and self.models,
                "'seeds' and 'models' must be one or more")
        if isinstance(self.tuning_seeds, int):
            self.tuning_seeds = tuple(self.seeds[:self.tuning_seeds])
        require(self.protocol in ("paper", "both") and self.tuning_seeds,
                "'protocol' is \"paper\" or \"both\", and 'tuning_seeds' 1 or more")
        paper = [value for values in self.comparisons.values() for value in values.values()]
        require(all(map(is_number, paper)), "comparisons must be "
                "{(row, other row): {model: the paper's difference}}")
        require(self.picture in PICTURES, f"picture must be one of {', '.join(PICTURES)}")
        self.models = {name: Model(**spec) if isinstance(spec, dict) else spec
                       for name, spec in self.models.items()}
        models = [model.rows for model in self.models.values()]
        named = itertools.chain(*self.comparisons, *self.panels, *models, self.tuned,
                                *self.follows.items())
        for row in named:
            require(row in rows, f"a comparison, panel or model names {row!r}, which is no row")
        require(set(self.primary) <= set(self.comparisons), "'primary' must name comparisons")
        self.panels = self.panels or [list(rows)]

    def rows_of(self, model):
        return list(self.models[model].rows or self.rows)

    def has_short_tuning(self, model):
        return bool(self.models[model].tuning and not self.steps)

    def counts(self, seed):
        """Does a seed count in the means? Tuning seeds that are none of `seeds` do not."""
        return seed in self.seeds or seed not in self.tuning_seeds

    def tuned_rows(self, model):
        """The rows whose grid of rates is tried: the first, and by protocol "both" every row, or
        those that `tuned` names."""
        labels = self.rows_of(model)
        if self.protocol == "paper":
            return labels[:1]
        return [row for row in labels if not self.tuned or row in self.tuned or row == labels[0]]

    def rates_of(self, model, row):
        """The learning rates that are tried for a row."""
        spec = self.models[model]
        return (*spec.learning_rates, *spec.more_rates.get(row, ()))

    def keys(self, cell):
        """The keys of a cell on top of its model's config."""
        model = self.models[cell.model]
        keys = {**model.keys, **self.rows[cell.row], **(model.tuning if cell.tuning else {})}
        if self.steps:
            keys |= {"max_iters": self.steps, "warmup_iters": max(1, self.steps // 25)}
        return {**keys, "learning_rate": cell.learning_rate, "seed": cell.seed}

    def tuning_cells(self, rows):
        """The grids of the first row and, by protocol "both", of all rows, as far as `rows` go."""
        return [Cell(name, row, rate, seed, self.has_short_tuning(name))
                for name, model in self.models.items()
                for row in self.tuned_rows(name) if row in rows
                for rate, seed in itertools.product(self.rates_of(name, row), self.tuning_seeds)]

    def seed_cells(self, rows, seeds, best):
        """Every row at the first row's best rate, and at its own. best {(model, row): rate}"""
        cells = [Cell(model, row, best.get((model, tuned)), seed) for model in self.models
                 for seed in seeds for row in self.rows_of(model) if row in rows
                 for tuned in ((row,) if row in self.follows else (self.rows_of(model)[0], row))]
        return list(dict.fromkeys(cell for cell in cells if cell.learning_rate is not None))

    def select_rows(self, labels):
        """These rows, those they are compared with, and the first, whose rate is everyone's."""
        if unknown := [row for row in labels or () if row not in self.rows]:
            raise ValueError(f"{self.name} has no row {unknown[0]!r}: choose among "
                             f"{', '.join(self.rows)}")
        wanted = {*(labels or self.rows), *(self.rows_of(model)[0] for model in self.models),
                  *(other for row, other in self.comparisons if row in (labels or ()))}
        return [row for row in self.rows if row in wanted]

    def check_rows(self):
        """The datasets of all rows. Raises ValueError if train.py would refuse a row: before any
        run, though that row may come hours later."""
        datasets, known = set(), {}
        for name, model in self.models.items():
            for row, rate in itertools.product(self.rows_of(name), model.learning_rates):
                keys = self.keys(Cell(name, row, rate, self.seeds[0]))
                try:
                    config = config_of(model.config, keys)
                except ValueError as error:
                    raise ValueError(f"row {row!r}: {error}") from None
                datasets.add(config.dataset)
                same = known.setdefault((name, repr(config)), row)
                if same != row:
                    raise ValueError(f"row {row!r} is the same run as {same!r}: its keys change "
                                     "nothing")
        return datasets


def require(holds, message):
    if not holds:
        raise ValueError(f"{message}: see studies/common.py")


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def config_of(config_file, keys):
    """The TrainConfig of these keys on top of a config file. Raises ValueError if it has none."""
    return load_config([str(ROOT / config_file), *(f"--{k}={v}" for k, v in keys.items())])


def read_study(path):
    """The names that a study file assigns. Raises ValueError if it does not run."""
    if not Path(path).is_file():
        raise ValueError(f"study not found: {path}")
    try:
        return runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} does not run: {reason}") from None


def load_study(path, scale, idea=None, steps=0, name=""):
    """The Study of a file at a scale. idea: keys of the row "yours"; steps: every row is shortened
    to so many, and no rule judges them. Raises ValueError if something in the file is not as
    studies/common.py says."""
    values, stem = read_study(path), Path(path).stem
    of_scale = {"seeds", "models", "tuning_seeds", "tuned", "follows", "protocol"}
    known = {f.name for f in fields(Study)} - {"name", "steps", *of_scale}
    try:
        if scale not in values["scales"]:
            raise ValueError(f"no such scale: choose one of {', '.join(values['scales'])}")
        spec = dict(values["scales"][scale])
        own = spec.pop("rows", {})  # keys that a row has at this scale only
        study = Study(**{k: v for k, v in values.items() if k in known}, **spec, name=stem)
        require(own.keys() <= study.rows.keys(), "'rows' of a scale names a row not there")
        study.rows = {row: {**keys, **own.get(row, {})} for row, keys in study.rows.items()}
    except (TypeError, AttributeError, KeyError) as error:
        reason = str(error).replace(".__init__()", "")
        raise ValueError(f"{path}, scale {scale!r}: {reason}: see studies/common.py") from None
    except ValueError as error:
        raise ValueError(f"{path}, scale {scale!r}: {error}") from None
    if idea:
        if not study.yours:
            raise ValueError(f"{stem} has no row of yours for {idea}: use the study track")
        words = re.sub(r"[^a-z0-9.]+", "_", "_".join(f"{k}_{v}" for k, v in idea.items()).lower())
        unique = hashlib.sha256(repr(idea).encode()).hexdigest()[:6]  # two ideas may begin alike
        study = replace(
            study, name=f"{stem}_{words[:60]}_{unique}", panels=[],
            rows={**study.rows, "yours": idea},
            comparisons={**study.comparisons, **{("yours", row): {} for row in study.yours}})
    study.name = f"{stem}_{name}" if name else study.name
    if steps and any("max_iters" in keys for keys in study.rows.values()):
        raise ValueError(f"a row of {stem} has a length of its own, which --steps would undo")
    return replace(study, steps=steps, name=f"{study.name}_{steps}_steps", rule={},
                   title=f"{study.title}, shortened to {steps} steps") if steps else study


def read_idea(configs, keys, base):
    """{key: value} of the row "yours": `base`, then configs, then --key=value. Raises ValueError on
    a key that all rows share."""
    values = dict(base)
    for path in configs:
        values |= check_idea(read_config_file(path), path)
    for text in keys:
        key, given, value = text.removeprefix("--").partition("=")
        if not text.startswith("--"):
            raise ValueError(f"{text!r}: write --key=value with a key of train.py")
        known_key(key, "the command line")
        values |= check_idea({key: parse_value(key, value if given else "True")}, text)
    values.pop("out_dir", None)
    return values


def check_idea(values, where):
    for key in values:
        if key in SHARED_KEYS or key.startswith("eval_"):
            hint = ", or shorten all rows with --steps" if key == "max_iters" else ""
            raise ValueError(f"{where}: {key} must be the same for every row: leave it out{hint}")
    return values
