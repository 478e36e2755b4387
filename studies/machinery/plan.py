"""
What a study is: a plain file of data in studies/, completed, checked, and laid out as cells.

  Model, Study   what studies/common.py describes
  Cell           one run of a study
  load_study     a study file at one scale, with your row if it takes one
  read_idea      your row, from a config and from --key=value

First the first row's learning rate is tuned on its grid, on the tuning seeds (one, unless the scale
names more). Then every row runs at that rate with every seed, the paper's protocol. Rows that are
tuned in the same way also run at their own best rate.
"""
import itertools
import re
import runpy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

from lib.config import known_key, load_config, parse_value, read_config_file

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "studies" / "results"
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
    tuning_seeds: tuple = ()
    tuned: tuple | None = None
    follows: dict = field(default_factory=dict)  # {row: the row whose own rate it takes over}
    own_rates_only: bool = False  # a row that is tuned does not run at the first row's rate
    panels: list = field(default_factory=list)
    picture: str = "relative loss"
    rule: dict = field(default_factory=dict)
    yours: tuple = ()
    matrices: tuple = ()
    costs: dict = field(default_factory=dict)
    paper_losses: dict = field(default_factory=dict)
    step_times: dict = field(default_factory=dict)
    primary: list = field(default_factory=list)  # comparisons that were named before any run
    every_window: bool = False  # the loss on all windows counts (machinery/windows.py)

    def __post_init__(self):
        self.models = {name: Model(**spec) if isinstance(spec, dict) else spec
                       for name, spec in self.models.items()}
        self.tuning_seeds = self.tuning_seeds or tuple(self.seeds[:1])
        self.panels = self.panels or [list(self.rows)]
        if any({"learning_rate", "seed"} & keys.keys() for keys in self.rows.values()):
            raise ValueError("a row sets learning_rate or seed: leave them to the models' grids "
                             "and 'seeds'")
        if self.every_window and set(self.tuning_seeds) & set(self.seeds):
            raise ValueError("every_window needs tuning seeds that do not count: rates are chosen "
                             "by the windows of the curves")
        models = [model.rows for model in self.models.values()]
        for row in itertools.chain(*self.comparisons, *self.primary, *self.panels, *models,
                                   self.tuned or (), *self.follows.items()):
            if row not in self.rows:
                raise ValueError(f"a comparison, panel or model names {row!r}, which is no row")

    def rows_of(self, model):
        return list(self.models[model].rows or self.rows)

    def counts(self, seed):
        """Does a seed count in the means? Tuning seeds that are none of `seeds` do not."""
        return seed in self.seeds or seed not in self.tuning_seeds

    def tuned_rows(self, model):
        """The rows whose grid of rates is tried: all, or the first and those in `tuned`."""
        labels = self.rows_of(model)
        if self.tuned is None:
            return labels
        return [row for row in labels if row in self.tuned or row == labels[0]]

    def rates_of(self, model, row):
        """The learning rates that are tried for a row."""
        spec = self.models[model]
        return (*spec.learning_rates, *spec.more_rates.get(row, ()))

    def keys(self, cell):
        """The keys of a cell on top of its model's config."""
        model = self.models[cell.model]
        keys = {**model.keys, **self.rows[cell.row]}
        if cell.tuning:
            keys |= model.tuning
        return {**keys, "learning_rate": cell.learning_rate, "seed": cell.seed}

    def tuning_cells(self, rows):
        """The grids of the tuned rows, as far as `rows` go."""
        return [Cell(name, row, rate, seed, bool(model.tuning))
                for name, model in self.models.items()
                for row in self.tuned_rows(name) if row in rows
                for rate, seed in itertools.product(self.rates_of(name, row), self.tuning_seeds)]

    def seed_cells(self, rows, seeds, best):
        """Every row at the first row's best rate, and at its own. best {(model, row): rate}"""
        cells = [Cell(model, row, best.get((model, tuned)), seed) for model in self.models
                 for seed in seeds for row in self.rows_of(model) if row in rows
                 for tuned in self.rates_from(model, row)]
        return list(dict.fromkeys(cell for cell in cells if cell.learning_rate is not None))

    def rates_from(self, model, row):
        """The rows whose best rates a row runs at."""
        if row in self.follows or self.own_rates_only and row in self.tuned_rows(model):
            return (row,)
        return (self.rows_of(model)[0], row)

    def select_rows(self, labels):
        """These rows, those they are compared with or whose rate they take over, and the first,
        whose rate is everyone's."""
        for row in labels or ():
            if row not in self.rows:
                raise ValueError(f"{self.name} has no row {row!r}: choose among "
                                 f"{', '.join(self.rows)}")
        wanted = {*(labels or self.rows), *(self.rows_of(model)[0] for model in self.models),
                  *(other for row, other in self.comparisons if row in (labels or ())),
                  *(other for row, other in self.follows.items() if row in (labels or ()))}
        return [row for row in self.rows if row in wanted]

    def check_rows(self):
        """Raises ValueError if train.py would refuse a row: before any run, though that row may
        come hours later. Or if two rows are one run."""
        known = {}
        for name, model in self.models.items():
            for row, rate in itertools.product(self.rows_of(name), model.learning_rates):
                keys = self.keys(Cell(name, row, rate, self.seeds[0]))
                try:
                    config = config_of(model.config, keys)
                except ValueError as error:
                    raise ValueError(f"row {row!r}: {error}") from None
                same = known.setdefault((name, repr(config)), row)
                if same != row:
                    raise ValueError(f"row {row!r} is the same run as {same!r}: its keys change "
                                     "nothing")


def config_of(config_file, keys):
    """The TrainConfig of these keys on top of a config file. Raises ValueError if it has none."""
    return load_config([str(ROOT / config_file), *(f"--{k}={v}" for k, v in keys.items())])


def load_study(path, scale, idea=None):
    """The Study of a file at a scale. idea: keys of the row "yours". Raises ValueError if something
    in the file is not as studies/common.py says."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"study not found: {path}")
    values = runpy.run_path(str(path))
    if "measured_by" in values:
        raise ValueError(f"{values['title']} is not a study of losses: run "
                         f"`{values['measured_by']}`")
    if scale not in values["scales"]:
        raise ValueError(f"{path}: no such scale: choose one of {', '.join(values['scales'])}")
    spec = dict(values["scales"][scale])
    own = spec.pop("rows", {})  # keys that a row has at this scale only
    known = {f.name for f in fields(Study)} - {"name", "seeds", "models"}
    rows = {row: {**keys, **own.get(row, {})} for row, keys in values["rows"].items()}
    values = {key: value for key, value in values.items() if key in known}
    try:
        study = Study(**{**values, **spec, "rows": rows, "name": path.stem})
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}, scale {scale!r}: {error}: see studies/common.py") from None
    if not idea:
        return study
    if not study.yours:
        raise ValueError(f"{path.stem} has no row of yours for {idea}: use the study track")
    words = re.sub(r"[^a-z0-9.]+", "_", "_".join(f"{k}_{v}" for k, v in idea.items()).lower())
    return replace(study, name=f"{path.stem}_{words[:100]}", panels=[],
                   rows={**study.rows, "yours": idea},
                   comparisons={**study.comparisons, **{("yours", row): {} for row in study.yours}})


def read_idea(configs, keys):
    """{key: value} of the row "yours": configs, then --key=value. Raises ValueError on a key that
    all rows share."""
    values = {}
    for path in configs:
        values |= read_config_file(path)
    for text in keys:
        key, given, value = text.removeprefix("--").partition("=")
        if not text.startswith("--"):
            raise ValueError(f"{text!r}: write --key=value with a key of train.py")
        known_key(key, "the command line")
        values[key] = parse_value(key, value if given else "True")
    values.pop("out_dir", None)
    for key in values:
        if key in SHARED_KEYS or key.startswith("eval_"):
            raise ValueError(f"{key} must be the same for every row: leave it out")
    return values
