"""
What a study is: a plain file of data in studies/, completed, checked, and laid out as cells.

  Model, Study   what studies/common.py describes, as dataclasses that check themselves
  load_study     a study file at one scale, with your row if it takes one
  Cell           one run of a study: model, row, learning rate, seed; a tuning run may be shorter
  read_idea      the row "yours" from a config and from --key=value

Learning rates: the first row is tuned on its grid, on the tuning seeds (the first seed, if the scale
names no number of them), and every row runs at that rate with every seed. That is the paper's
protocol. By protocol "both" each row is also tuned in the same way, and runs at its own best rate.
"""
import hashlib
import itertools
import re
import runpy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

from lib.config import known_key, load_config, parse_value, read_config_file

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ("relative loss", "learning rates", "scaling", "matrix norms")
# a row of yours may differ in its strategy, never in data, length, batch, learning rate or evaluation
SHARED_KEYS = {"dataset", "vocab_size", "block_size", "batch_size", "gradient_accumulation_steps",
               "max_iters", "tokens_per_param", "seed", "learning_rate", "min_lr", "warmup_iters",
               "schedule", "decay_share", "decay_shape", "max_bad_steps", "resume", "overwrite"}


class Cell(NamedTuple):
    """One run of a study. tuning: it has the model's tuning keys, such as a quarter of the steps."""
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
    tuning: dict = field(default_factory=dict)  # keys that replace the model's while rates are tuned

    def __post_init__(self):
        rates = self.learning_rates
        require(isinstance(self.config, str), "'config' must be the path of a config file")
        require(isinstance(self.keys, dict) and isinstance(self.tuning, dict),
                "'keys' and 'tuning' must be {key: value}")
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
    tuning_seeds: int = 1
    protocol: str = "both"
    panels: list = field(default_factory=list)
    picture: str = "relative loss"
    rule: dict = field(default_factory=dict)
    yours: tuple = ()
    matrices: tuple = ()
    costs: dict = field(default_factory=dict)
    steps: int = 0  # --steps: all rows are shortened to so many steps

    def __post_init__(self):
        rows, panels = self.rows, self.panels
        require(isinstance(rows, dict) and rows and all(isinstance(v, dict) for v in rows.values()),
                "rows must be {label: {key: value}}, one row or more")
        require(all(isinstance(row, str) and "," not in row for row in rows),
                "a row's label must be a string without a comma, which --rows puts between labels")
        require(isinstance(self.seeds, (tuple, list)) and self.seeds and self.tuning_seeds > 0,
                "'seeds' must be one seed or more, such as (1, 2, 3)")
        require(isinstance(self.models, dict) and self.models, "'models' must be one or more")
        require(isinstance(self.comparisons, dict) and all(
            isinstance(paper, dict) and all(map(is_number, paper.values()))
            for paper in self.comparisons.values()),
            "comparisons must be {(row, other row): {model: the paper's difference}}")
        require(isinstance(panels, list) and all(isinstance(p, list) and p for p in panels),
                "panels must be lists of rows, [['a', 'b'], ['a', 'c']]")
        require(self.picture in PICTURES, f"picture must be one of {', '.join(PICTURES)}")
        require(self.protocol in ("paper", "both"), "protocol must be 'paper' or 'both'")
        self.models = {name: Model(**spec) if isinstance(spec, dict) else spec
                       for name, spec in self.models.items()}
        named = [*itertools.chain(*self.comparisons, *panels, *(m.rows for m in self.models.values()))]
        for row in named:
            require(row in rows, f"a comparison, panel or model names {row!r}, which is no row")
        self.panels = panels or [list(rows)]

    def rows_of(self, model):
        return list(self.models[model].rows or self.rows)

    def has_short_tuning(self, model):
        return bool(self.models[model].tuning and not self.steps)

    def keys(self, cell):
        """The keys of a cell on top of its model's config."""
        model = self.models[cell.model]
        keys = {**model.keys, **self.rows[cell.row], **(model.tuning if cell.tuning else {})}
        if self.steps:
            keys |= {"max_iters": self.steps, "warmup_iters": max(1, self.steps // 25)}
        return {**keys, "learning_rate": cell.learning_rate, "seed": cell.seed}

    def tuning_cells(self, rows):
        """The grids of the first row and, by protocol "both", of all rows, as far as `rows` go."""
        for name, model in self.models.items():
            tuned = self.rows_of(name) if self.protocol == "both" else self.rows_of(name)[:1]
            for row, rate, seed in itertools.product(tuned, model.learning_rates,
                                                     self.seeds[:self.tuning_seeds]):
                if row in rows:
                    yield Cell(name, row, rate, seed, self.has_short_tuning(name))

    def seed_cells(self, rows, seeds, best):
        """Every row at the first row's best rate, then at its own. best {(model, row): rate}"""
        cells = [Cell(model, row, best.get((model, tuned)), seed) for model in self.models
                 for seed in seeds for row in self.rows_of(model) if row in rows
                 for tuned in dict.fromkeys((self.rows_of(model)[0], row))]
        return list(dict.fromkeys(cell for cell in cells if cell.learning_rate is not None))

    def select_rows(self, labels):
        """These rows, the first row, whose rate is everyone's, and the rows they are compared with."""
        for row in labels or ():
            if row not in self.rows:
                raise ValueError(f"{self.name} has no row {row!r}: choose among {', '.join(self.rows)}")
        if not labels:
            return list(self.rows)
        others = {other for row, other in self.comparisons if row in labels}
        firsts = {self.rows_of(model)[0] for model in self.models}
        return [row for row in self.rows if row in {*labels, *others, *firsts}]

    def check_rows(self):
        """The datasets of all rows. Raises ValueError if train.py would refuse a row: before any
        run, though that row may come hours later."""
        datasets = set()
        for name, model in self.models.items():
            for row, rate in itertools.product(self.rows_of(name), model.learning_rates):
                keys = self.keys(Cell(name, row, rate, self.seeds[0]))
                try:
                    datasets.add(config_of(model.config, keys).dataset)
                except ValueError as error:
                    raise ValueError(f"row {row!r}: {error}") from None
        return datasets


def require(holds, message):
    """Raise ValueError with the message and where to read on, unless `holds`."""
    if not holds:
        raise ValueError(f"{message}: see studies/common.py")


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def config_of(config_file, keys):
    """The TrainConfig of these keys on top of a config file. Raises ValueError on impossible keys."""
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
    """The Study of a file at a scale. idea: keys of the row "yours"; steps: all rows are shortened
    to so many. Raises ValueError if something in the file is not as studies/common.py says."""
    values, stem = read_study(path), Path(path).stem
    of_scale = {"seeds", "models", "tuning_seeds", "protocol"}
    known = {f.name for f in fields(Study)} - {"name", "steps", *of_scale}
    try:
        scales = values.pop("scales", None)
        require(isinstance(scales, dict) and scales, "scales must be {name: {...}}, one or more")
        if scale not in scales:
            raise ValueError(f"no scale {scale!r}: choose one of {', '.join(scales)}")
        spec = dict(scales[scale])
        own = spec.pop("rows", {})  # keys that a row has at this scale only
        study = Study(**{k: v for k, v in values.items() if k in known}, **spec, name=stem)
        require(own.keys() <= study.rows.keys(), f"scale {scale!r} gives keys to a row not there")
    except (TypeError, ValueError, AttributeError) as error:
        hint = "" if isinstance(error, ValueError) else ": see studies/common.py"
        reason = str(error).replace(".__init__()", "")
        raise ValueError(f"{path}, scale {scale!r}: {reason}{hint}") from None
    study.rows = {row: {**keys, **own.get(row, {})} for row, keys in study.rows.items()}
    if idea:
        study = with_idea(study, idea)
    if name:
        study.name = f"{stem}_{name}"
    return shortened(study, steps) if steps else study


def with_idea(study, idea):
    """The study with the row "yours", and a name of its own: two ideas may begin alike."""
    if not study.yours:
        raise ValueError(f"{study.name} has no row of yours for {' '.join(f'{k}={v}' for k, v in idea.items())}: "
                         "use studies/track.py")
    words = re.sub(r"[^a-z0-9.]+", "_", "_".join(f"{k}_{v}" for k, v in idea.items()).lower())
    name = f"{words.strip('_')[:60]}_{hashlib.sha256(repr(idea).encode()).hexdigest()[:6]}"
    return replace(study, name=f"{study.name}_{name}", rows={**study.rows, "yours": idea}, panels=[],
                   comparisons={**study.comparisons, **{("yours", row): {} for row in study.yours}})


def shortened(study, steps):
    """The study with so many steps in every row, which its name and title say."""
    if longer := [row for row, keys in study.rows.items() if "max_iters" in keys]:
        raise ValueError(f"row {longer[0]!r} has a length of its own, which --steps would undo")
    return replace(study, steps=steps, name=f"{study.name}_{steps}_steps",
                   title=f"{study.title}, shortened to {steps} steps")


def read_idea(configs, keys, base):
    """{key: value} of the row "yours": `base` first, then configs, then --key=value. Raises
    ValueError on a key that all rows of a study share."""
    values = dict(base)
    for path in configs:
        values |= check_idea(read_config_file(path), path)
    for text in keys:
        if not text.startswith("--"):
            raise ValueError(f"{text!r}: write --key=value with a key of train.py")
        key, given, value = text.removeprefix("--").partition("=")
        known_key(key, "the command line")
        values |= check_idea({key: parse_value(key, value if given else "True")}, text)
    return {key: value for key, value in values.items() if key != "out_dir"}


def check_idea(values, where):
    for key in values:
        if key in SHARED_KEYS or key.startswith("eval_"):
            hint = ", or shorten all rows with --steps" if key == "max_iters" else ""
            raise ValueError(f"{where}: {key} must be the same for every row: leave it out{hint}")
    return values
