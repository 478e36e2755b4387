"""
Remake a result of the paper, or try an idea beside it: run what is missing, then table, figure and one JSON.

  python -m study.run studies/figure_5_step_by_step.py --scale=cpu --jobs=2
  python -m study.run studies/figure_5_step_by_step.py --scale=cpu --print       the plain train.py line of each run
  python -m study.run studies/track.py configs/mine.py --scale_lr=3              your idea beside baseline and unified
  python -m study.run --docs                                                     write the results' numbers into docs and README

A study is a plain file of data: see studies/common.py. Its runs are train.py's, one folder each under out/studies/<scale>, shared by all
studies. What is finished stays; what was interrupted is resumed; Ctrl-C ends the runs after they have saved. Results are written to
results/<study>_<scale>.json and .png from the runs that there are, and never in place of results that hold a run, or more of
one, which these lack.

Learning rates: the first row is tuned on its grid, on the scale's tuning seeds (the first seed, if it names none), and every row runs at
that rate with every seed, the paper's protocol. Then each row is tuned in the same way, and runs at its own best rate, ours.
"""
import argparse
import hashlib
import itertools
import math
import re
import runpy
import shlex
import signal
import sys
import time
from pathlib import Path

from lib.config import BUILTIN, known_key, load_config, parse_value, read_config_file
from lib.disk import write_whole
from prepare_data import prepare_builtin
from study import evidence
from study.evidence import best_rate, fill, rows_of, tuning_seeds
from study.results import collect, has_intervals, runs_in, worth, write_results
from study.runs import ROOT, Pool, RunFolders, code

NAMES = ("title", "question", "rows", "comparisons", "scales", "panels", "picture", "rule", "yours", "matrices", "measured_by")
PICTURES = ("relative loss", "learning rates", "scaling", "matrix norms")


# ---------------------------------------------------------------------------------------------------------------------
# the study

def load_study(path, scale, extra=()):
    """The names of a study file, completed and checked. extra: keys of the row "yours", for a study that has one.
    Raises ValueError, one line."""
    if not Path(path).is_file():
        raise ValueError(f"study not found: {path}")
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} does not run: {reason}") from None
    study = {"comparisons": {}, "picture": "relative loss", **{k: v for k, v in names.items() if k in NAMES}, "name": Path(path).stem}
    for key in {"title", "question"} | (set() if "measured_by" in study else {"rows", "scales"}):
        if key not in study:
            raise ValueError(f"{path} has no {key}: see studies/common.py")
    if "measured_by" in study:
        return study
    check_shape(path, study)
    check_scale(path, study, scale)
    if study["picture"] not in PICTURES:
        raise ValueError(f"{path}: picture={study['picture']!r} is unknown: choose one of {', '.join(PICTURES)}")
    if extra and "yours" not in study:
        raise ValueError(f"{study['name']} has no row of yours for {' '.join(f'{k}={v}' for k, v in extra.items())}: use studies/track.py")
    if extra:
        said = re.sub(r"[^a-z0-9.]+", "_", "_".join(f"{k}_{v}" for k, v in extra.items()).lower()).strip("_")
        study["name"] += f"_{said[:60]}_{hashlib.sha256(repr(extra).encode()).hexdigest()[:6]}"  # two ideas may begin alike
        study["rows"] = {**study["rows"], "yours": extra}
        study["comparisons"] = {**study["comparisons"], **{("yours", other): {} for other in study["yours"]}}
    own = study["scales"][scale].get("rows", {})  # keys that a row has at this scale only
    study["rows"] = {row: {**keys, **own.get(row, {})} for row, keys in study["rows"].items()}
    for row in (*own, *sum(study["comparisons"], ()), *sum(study.get("panels", []), [])):
        if row not in study["rows"]:
            raise ValueError(f"{path} compares or draws a row {row!r} that it does not have")
    return study


def needs(path, what, holds):
    """Raises ValueError, one line, unless `what` holds of the study at `path`."""
    if not holds:
        raise ValueError(f"{path}: {what}: see studies/common.py")


def filled(value):
    """True for a dict that is not empty."""
    return isinstance(value, dict) and bool(value)


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_shape(path, study):
    """Raises ValueError, one line, if rows, comparisons or panels are not of the shape that studies/common.py gives."""
    rows, comparisons, panels = study["rows"], study["comparisons"], study.get("panels", [])
    needs(path, "rows must be {label: {key: value}}, one row or more", filled(rows) and all(isinstance(v, dict) for v in rows.values()))
    needs(path, "a row's label must be a string without a comma, which --rows puts between labels",
          all(isinstance(row, str) and "," not in row for row in rows))
    needs(path, "title and question must be strings", isinstance(study["title"], str) and isinstance(study["question"], str))
    needs(path, "comparisons must be {(row, other row): {model: the paper's difference}}, with {} where the paper has none",
          isinstance(comparisons, dict) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in comparisons)
          and all(isinstance(paper, dict) and all(map(is_number, paper.values())) for paper in comparisons.values()))
    needs(path, "panels must be lists of rows, [['a', 'b'], ['a', 'c']]",
          isinstance(panels, list) and all(isinstance(panel, list) and panel and all(isinstance(row, str) for row in panel)
                                           for panel in panels))


def check_scale(path, study, scale):
    """Raises ValueError, one line, if the scale of that name is not of the shape that studies/common.py gives."""
    rows, scales = study["rows"], study["scales"]
    needs(path, "scales must be {name: {...}}, one scale or more", filled(scales))
    if scale not in scales:
        raise ValueError(f"{path} has no scale {scale!r}: choose one of {', '.join(scales)}")
    spec, where = scales[scale], f"scale {scale!r}"
    needs(path, f"{where} must be {{'seeds': ..., 'models': ...}}", isinstance(spec, dict))
    seeds, own = spec.get("seeds"), spec.get("rows", {})
    needs(path, f"{where} needs 'seeds', one or more, such as (1, 2, 3)", isinstance(seeds, (tuple, list)) and seeds)
    needs(path, f"{where}: 'tuning_seeds' must be how many seeds choose the rates",
          type(spec.get("tuning_seeds", 1)) is int and spec.get("tuning_seeds", 1) > 0)
    needs(path, f"{where} needs 'models', one or more", filled(spec.get("models")))
    needs(path, f"{where}: 'rows' must be {{row: its keys}}", isinstance(own, dict) and all(isinstance(v, dict) for v in own.values()))
    for name, model in spec["models"].items():
        model, whose = model if isinstance(model, dict) else {}, f"{where}, model {name!r}"
        rates, its = model.get("learning_rates"), model.get("rows", rows)
        needs(path, f"{whose} needs 'config', the path of a config file", isinstance(model.get("config"), str))
        needs(path, f"{whose} needs 'keys', such as {{}}", isinstance(model.get("keys"), dict))
        needs(path, f"{whose} needs 'learning_rates', one or more, such as (2e-3, 4e-3)",
              isinstance(rates, (tuple, list)) and rates and all(map(is_number, rates)))
        needs(path, f"{whose} names no row, or one that the study does not have", its and set(its) <= set(rows))


def only(study, scale, rows, seeds):
    """The study cut to some rows and seeds; the first row stays, for its learning rate is everyone's, and so do rows compared with."""
    cut = {**study["scales"][scale]}
    if seeds:
        cut["seeds"] = seeds
    if rows:
        for row in rows:
            if row not in study["rows"]:
                raise ValueError(f"{study['name']} has no row {row!r}: choose among {', '.join(study['rows'])}")
        kept = {next(iter(study["rows"])), *rows, *(other for row, other in study["comparisons"] if row in rows)}
        study = {**study, "rows": {r: k for r, k in study["rows"].items() if r in kept},
                 "comparisons": {pair: paper for pair, paper in study["comparisons"].items() if kept.issuperset(pair)}}
        study["panels"] = [panel for p in study.get("panels", [list(study["rows"])]) if len(panel := [r for r in p if r in kept]) > 1]
        cut["models"] = {name: {**model, "rows": [r for r in rows_of(study, model) if r in kept]} for name, model in cut["models"].items()}
    return study, cut


def plan(study, scale, losses, protocol="both"):
    """The cells (model, row, rate, seed) that the study needs by what is known so far, most important first: the first row's grid, then
    every row at its best rate, then every row's grid and own best rate. Grows as losses come in."""
    cells, later, tuning = [], [], tuning_seeds(scale)
    for model, spec in scale["models"].items():
        rows, rates = rows_of(study, spec), spec["learning_rates"]
        cells += [(model, rows[0], rate, seed) for rate in rates for seed in tuning]
        tuned = best_rate(losses, model, rows[0], rates, tuning)
        if tuned is None:
            continue
        cells += [(model, row, tuned, seed) for seed in scale["seeds"] for row in rows]
        if protocol == "both":
            later += [(model, row, rate, seed) for row in rows for rate in rates for seed in tuning]
            own = {row: best_rate(losses, model, row, rates, tuning) for row in rows}
            later += [(model, row, rate, seed) for row, rate in own.items() if rate for seed in scale["seeds"]]
    return list(dict.fromkeys(cells + later))


def check_rows(study, scale):
    """The datasets of all rows. Raises ValueError, one line, if train.py would refuse a row at a rate: before any run, though a row's own
    may come hours later."""
    datasets = set()
    for spec in scale["models"].values():
        for row, rate in itertools.product(rows_of(study, spec), spec["learning_rates"]):
            keys = {**spec["keys"], **study["rows"][row], "learning_rate": rate}
            try:
                config = load_config([str(ROOT / spec["config"]), *(f"--{k}={v}" for k, v in keys.items())])
            except ValueError as error:
                raise ValueError(f"row {row!r}: {error}") from None
            datasets.add(config.dataset)
    return datasets


def run_of(folders, study, scale, cell):
    """The Run of a cell: the model's config and keys, the row's keys, rate and seed."""
    model, row, rate, seed = cell
    spec = scale["models"][model]
    return folders.find(row, spec["config"], {**spec["keys"], **study["rows"][row], "learning_rate": rate, "seed": seed})


def losses_of(folders, study, scale, protocol="both"):
    """({cell: terminal validation loss, infinite if diverged}, {cell: Run} of all that the plan needs): the plan is followed as far as the
    runs that there are tell."""
    losses, runs = {}, {}
    while True:
        new = [cell for cell in plan(study, scale, losses, protocol) if cell not in runs]
        if not new:
            return losses, runs
        for cell in new:
            runs[cell] = run = run_of(folders, study, scale, cell)
            if run.state in ("done", "diverged"):
                loss = run.summary()["val_loss"] if run.state == "done" else None
                losses[cell] = math.inf if loss is None else loss


# ---------------------------------------------------------------------------------------------------------------------
# running

def duration(seconds):
    return f"{seconds:.0f}s" if seconds < 60 else f"{seconds / 60:.0f}m" if seconds < 5400 else f"{seconds / 3600:.1f}h"


def execute(study, scale, folders, pool, protocol):
    """Run what the plan needs and has not, until nothing is left to start. Returns the lines of runs that failed."""
    failed, seconds, made, begun = {}, [], 0, time.time()
    while True:
        _, runs = losses_of(folders, study, scale, protocol)
        active = {run.folder for run, *_ in pool.children.values()}
        todo = {run.folder: run for run in runs.values() if run.state in ("missing", "interrupted")
                and run.folder not in active and run.folder not in failed}
        for run in list(todo.values())[:pool.jobs - len(active)]:
            print(f"  {'resumes' if run.state == 'interrupted' else 'starts'}  {run.folder.name}", flush=True)
            pool.start(run)
            del todo[run.folder]
        if not pool.children:
            return list(failed.values())
        run, ended, line, took = pool.wait()
        made += 1
        if ended in ("failed", "stopped"):
            failed[run.folder] = f"{run.folder.name} {ended}: {line} (its output: {run.folder / 'output.txt'})"
        seconds.append(took)
        left = (len(todo) + len(pool.children)) * sum(seconds) / len(seconds) / pool.jobs
        result = line if ended == "done" else f"{ended}: {line}"
        print(f"[{made}/{made + len(todo) + len(pool.children)}] {run.folder.name}  {result}  in {duration(took)}; "
              f"{duration(time.time() - begun)} so far, about {duration(left)} left", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def write_docs(root=ROOT):
    """Fill the markers in README.md and docs/*.md. Returns the files that changed."""
    changed = []
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        text = path.read_text("utf-8")
        if (new := fill(text, root / "results")) != text:
            write_whole(path, new)
            changed.append(path)
    return changed


def whole_numbers(text):
    """(1, 2) of "1,2"."""
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers: write them as in 1,2,3") from None


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m study.run", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="STUDY", help="a study file; after studies/track.py, your config")
    parser.add_argument("--scale", default="cpu", help="cpu, gpu or paper (default: cpu)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; with GPUs, one a GPU (default: 1)")
    parser.add_argument("--nproc_per_node", type=int, default=0, help="each run under torchrun with so many processes")
    parser.add_argument("--rows", type=lambda text: text.split(","), help="only these rows, and those they are compared with")
    parser.add_argument("--seeds", type=whole_numbers, help="these seeds instead of the study's")
    parser.add_argument("--protocol", choices=("paper", "both"), default="both", help="paper: at the first row's best rate alone")
    parser.add_argument("--out", help="the runs' folders (default: out/studies/<scale>)")
    parser.add_argument("--results", default=str(ROOT / "results"), help="where JSON and picture go (default: results)")
    parser.add_argument("--print", action="store_true", dest="show", help="print the train.py lines, and run nothing")
    parser.add_argument("--evaluate", action="store_true", help="write the results of the runs that there are, and run nothing")
    parser.add_argument("--docs", action="store_true", help="write the results' numbers into docs/*.md and README.md")
    args, args.keys = parser.parse_known_args(argv)
    if not args.docs and not args.files:
        parser.error("name a study file, such as studies/figure_5_step_by_step.py")
    for key, least in (("jobs", 1), ("nproc_per_node", 0)):
        if getattr(args, key) < least:
            parser.error(f"--{key}={getattr(args, key)} must be at least {least}")
    return args


def yours(files, keys):
    """(study file, {key: value} of the row "yours"): the first file is the study, the others are configs, and --key=value comes last."""
    values, theirs = {}, ("learning_rate", "seed", "resume")
    for path in files[1:]:
        values |= read_config_file(path)
        if refused := [key for key in theirs if key in values]:
            raise ValueError(f"{path} sets {refused[0]}, which is the study's, the same for every row: leave it out")
    for text in keys:
        key, given, value = text.removeprefix("--").partition("=")
        if not text.startswith("--"):
            raise ValueError(f"{text!r}: write --key=value with a key of train.py")
        known_key(key, "the command line")
        if key in theirs:
            raise ValueError(f"{text}: {key} is the study's, the same for every row: leave it out")
        values[key] = parse_value(key, value if given else "True")
    return files[0], {key: value for key, value in values.items() if key != "out_dir"}


def run_missing(study, scale, folders, args, datasets):
    """Run what is missing. Returns the lines of runs that failed; Ctrl-C, or an error here, stops the runs once they have saved."""
    for dataset in datasets - {BUILTIN}:
        if not (ROOT / Path(dataset).expanduser()).is_dir():
            raise ValueError(f"no dataset at {dataset}: make it with prepare_data.py, or give another --dataset")
    if BUILTIN in datasets and not (ROOT / BUILTIN).exists():
        prepare_builtin(ROOT / BUILTIN)  # once, before runs side by side want it
    print(f"{study['name']}, scale {args.scale}, runs in {folders.out}", flush=True)
    pool = Pool(args.jobs, args.nproc_per_node)
    try:
        return execute(study, scale, folders, pool, args.protocol)
    except BaseException:
        print(f"stopped: {pool.stop()} runs saved; the same command resumes them", file=sys.stderr)
        raise


def show(study, scale, folders, protocol):
    """Print the train.py line of each run: of those that are known, then of those whose learning rate the others' losses will decide."""
    def line(model, row, arguments, folder, state):
        where = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
        done = f": {state}" if state != "missing" else ""
        print(f"# {model}, {row}{done}\n{shlex.join(['python', 'train.py', *arguments, f'--out_dir={where}'])}")

    losses, runs = losses_of(folders, study, scale, protocol)
    for (model, row, *_), run in runs.items():
        line(model, row, run.arguments, run.folder, run.state)
    for model, spec in scale["models"].items():
        rows, seeds = rows_of(study, spec), tuning_seeds(scale)
        if best_rate(losses, model, rows[0], spec["learning_rates"], seeds) is not None:
            continue
        print(f"\n# {model}: then these, with the rate of {rows[0]}'s least loss above in place of BEST")
        for seed, row in itertools.product(scale["seeds"], rows):
            if row != rows[0] or seed not in seeds:  # that run is above
                keys = {**spec["keys"], **study["rows"][row], "learning_rate": "BEST", "seed": seed}
                arguments = [spec["config"], *(f"--{k}={v}" for k, v in keys.items())]
                line(model, row, arguments, folders.free(row, "BEST", seed, str(arguments)), "missing")
    if protocol == "both" and any(cell not in losses for cell in runs):
        print("\n# then each row at its own best rate: --print, once the runs above are there, adds them (--protocol=paper: without them)")


def command_of(args):
    """The command that makes these results, without what does not change them."""
    rows = [f"--rows={','.join(args.rows)}"] if args.rows else []
    seeds = [f"--seeds={','.join(map(str, args.seeds))}"] if args.seeds else []
    protocol = [f"--protocol={args.protocol}"] if args.protocol != "both" else []
    files = [str(Path(f).relative_to(ROOT)) if Path(f).is_relative_to(ROOT) else f for f in args.files]
    return shlex.join(["python", "-m", "study.run", *files, f"--scale={args.scale}", *args.keys, *rows, *seeds, *protocol])


def run_study(path, args, extra):
    """One study from its file to its results. Returns True if nothing failed."""
    study = load_study(path, args.scale, extra)
    if "measured_by" in study:
        print(f"{study['title']}: {study['question']}\nrun `{study['measured_by']}`")
        return True
    study, scale = only(study, args.scale, args.rows, args.seeds)
    datasets = check_rows(study, scale)
    folders = RunFolders(Path(args.out or ROOT / "out" / "studies" / args.scale).absolute())
    if args.show:
        show(study, scale, folders, args.protocol)
        return True
    path = Path(args.results) / f"{study['name']}_{args.scale}.json"
    there = runs_in(path)
    failed = [] if args.evaluate else run_missing(study, scale, folders, args, datasets)
    results = collect(study, scale, args.scale, *losses_of(folders, study, scale, args.protocol), command_of(args))
    here = worth(results["runs"])
    lost = [cell for cell, known in there.items() if any(new < old for new, old in zip(here.get(cell, (False, -1, -1)), known))]
    if lost or (evidence.stats is None and has_intervals(path)):  # a look at a few rows or seeds, or a table without intervals
        why = f"holds runs that these lack ({len(lost)}), or more of them" if lost else "has intervals, which need scipy"
        print(f"\n{path} {why}, and stays as it is: these results go to {folders.out}")
        path = folders.out / (path.name if folders.out != path.parent.absolute() else f"part_of_{path.name}")
    write_results(results, path)
    if set(results["code"]) - {code()}:
        print("some of these runs were made before norms.py, model.py, optim.py, train.py or lib/data.py changed; a finished run is never "
              f"made again: if the change matters, move their folders out of {folders.out}")
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return not failed


def main(argv=None):
    args = parse(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C
        signal.signal(number, signal.default_int_handler)
    try:
        if args.docs:
            print("\n".join(f"wrote {path}" for path in write_docs()) or "docs and README agree with results/")
            return 0
        path, extra = yours(args.files, args.keys)
        return 0 if run_study(path, args, extra) else 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
