"""
Remake a result of the paper, or try an idea beside it: run what is missing, then table, figure and one JSON.

  python -m tools.study studies/figure_5_step_by_step.py --scale=cpu --jobs=2
  python -m tools.study studies/figure_5_step_by_step.py --scale=cpu --print       the plain train.py line of each run
  python -m tools.study studies/track.py configs/mine.py --scale_lr=3              your idea beside baseline and unified
  python -m tools.study --docs                                                     write the results' numbers into docs and README

A study is a plain file of data: see studies/common.py. Its runs are train.py's, one folder each under out/studies/<scale>, shared by all
studies. What is finished stays; what was interrupted is resumed; Ctrl-C ends the runs after they have saved. Results are written to
results/<study>_<scale>.json and .png from the runs that there are, and the table says which are missing. Results of more runs are kept.

Learning rates: the first row is tuned on its grid, on the scale's tuning seeds (the first seed, if it names none), and every row runs at
that rate with every seed, the paper's protocol. Then each row is tuned in the same way, and runs at its own best rate, ours.
"""
import argparse
import itertools
import json
import math
import platform
import runpy
import shlex
import signal
import sys
import time
from pathlib import Path

from config import BUILTIN, known_key, load_config, meta_model, parse_value, read_config_file, tokens_per_step
from disk import write_whole
from prepare_data import prepare_builtin
from tools.evidence import best_rate, fill, fit_scaling, judge, rows_of, summarize, table, tuning_seeds
from tools.runs import ROOT, Pool, RunFolders

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
    except Exception as error:
        raise ValueError(f"{path} does not run: {type(error).__name__}: {error}") from None
    study = {"comparisons": {}, "picture": "relative loss", **{k: v for k, v in names.items() if k in NAMES}, "name": Path(path).stem}
    for key in {"title", "question"} | (set() if "measured_by" in study else {"rows", "scales"}):
        if key not in study:
            raise ValueError(f"{path} has no {key}: see studies/common.py")
    if "measured_by" in study:
        return study
    check_shape(path, study, scale)
    if study["picture"] not in PICTURES:
        raise ValueError(f"{path}: picture={study['picture']!r} is unknown: choose one of {', '.join(PICTURES)}")
    if extra and "yours" not in study:
        raise ValueError(f"{study['name']} has no row of yours for {' '.join(f'{k}={v}' for k, v in extra.items())}: use studies/track.py")
    if extra:
        study["rows"] = {**study["rows"], "yours": extra}
        study["comparisons"] = {**study["comparisons"], **{("yours", other): {} for other in study["yours"]}}
    own = study["scales"][scale].get("rows", {})  # keys that a row has at this scale only
    study["rows"] = {row: {**keys, **own.get(row, {})} for row, keys in study["rows"].items()}
    for row in (*own, *sum(study["comparisons"], ()), *sum(study.get("panels", []), [])):
        if row not in study["rows"]:
            raise ValueError(f"{path} compares or draws a row {row!r} that it does not have")
    return study


def check_shape(path, study, scale):
    """Raises ValueError, one line, if rows, or the scale of that name, are not of the shape that studies/common.py gives."""
    def need(holds, what):
        if not holds:
            raise ValueError(f"{path}: {what}: see studies/common.py")

    def table(value):  # not empty
        return isinstance(value, dict) and bool(value)

    rows, scales = study["rows"], study["scales"]
    need(table(rows) and all(isinstance(keys, dict) for keys in rows.values()), "rows must be {label: {key: value}}, one row or more")
    need(table(scales), "scales must be {name: {...}}, one scale or more")
    if scale not in scales:
        raise ValueError(f"{path} has no scale {scale!r}: choose one of {', '.join(scales)}")
    spec, where = scales[scale], f"scale {scale!r}"
    need(isinstance(spec, dict), f"{where} must be {{'seeds': ..., 'models': ...}}")
    seeds = spec.get("seeds")
    need(isinstance(seeds, (tuple, list)) and seeds, f"{where} needs 'seeds', one or more, such as (1, 2, 3)")
    need(table(spec.get("models")), f"{where} needs 'models', one or more")
    for name, model in spec["models"].items():
        model, whose = model if isinstance(model, dict) else {}, f"{where}, model {name!r}"
        rates = model.get("learning_rates")
        need(isinstance(model.get("config"), str), f"{whose} needs 'config', the path of a config file")
        need(isinstance(model.get("keys"), dict), f"{whose} needs 'keys', such as {{}}")
        need(isinstance(rates, (tuple, list)) and rates, f"{whose} needs 'learning_rates', one or more, such as (2e-3, 4e-3)")
        need(set(model.get("rows", rows)) <= set(rows), f"{whose} names rows that the study does not have")


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
    """Raises ValueError, one line, if train.py would refuse a row: before any run, though a row's own may come hours later."""
    for spec in scale["models"].values():
        for row in rows_of(study, spec):
            keys = {**spec["keys"], **study["rows"][row]}
            try:
                load_config([str(ROOT / spec["config"]), *(f"--{k}={v}" for k, v in keys.items())])
            except ValueError as error:
                raise ValueError(f"row {row!r}: {error}") from None


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
                loss = run.read("summary.json")["val_loss"] if run.state == "done" else None
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
        active = {run.folder for run, _, _ in pool.children.values()}
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


def collect(study, scale, scale_name, folders, command, protocol="both"):
    """What the results' JSON holds: the study's names, summary and fits, and each run with its evaluation curve."""
    losses, runs = losses_of(folders, study, scale, protocol)
    records, made_by = [], []
    for cell, run in runs.items():
        if run.state not in ("done", "diverged"):
            continue
        record = dict(zip(("model", "row", "learning_rate", "seed"), cell), state="done" if math.isfinite(losses[cell]) else "diverged")
        if record["state"] == "done":
            summary = run.read("summary.json")
            record |= {key: summary[key] for key in ("val_loss", "steps", "tokens", "params", "scale_params")}
            record["seconds"] = round(summary["seconds"])
        record |= curves(run.folder / "log.jsonl", study.get("matrices"))
        records.append(record)
        if (run.folder / "made_by.json").is_file():
            made_by.append(run.read("made_by.json"))
    flops = {model: flops_of(spec) for model, spec in scale["models"].items()}
    models = {model: {**spec, "flops": flops[model]} for model, spec in scale["models"].items()}
    return {"study": study["name"], "title": study["title"], "question": study["question"], "scale": scale_name, "command": command,
            "devices": sorted({m["device"] for m in made_by}), "torch": sorted({m["torch"] for m in made_by}),
            "python": platform.python_version(), "picture": study["picture"], "panels": study.get("panels") or [list(study["rows"])],
            "rows": study["rows"], "seeds": list(scale["seeds"]), "tuning_seeds": list(tuning_seeds(scale)), "models": models,
            "missing": len(runs) - len(records), "rule": study.get("rule"), "results": summarize(study, scale, losses),
            "fit": fit_scaling(study, scale, losses, flops), "runs": records}


def flops_of(spec):
    """Floating-point operations of one run of a model."""
    config = load_config([str(ROOT / spec["config"]), *(f"--{k}={v}" for k, v in spec["keys"].items())])
    return meta_model(config).flops_per_token() * config.max_iters * tokens_per_step(config)


def curves(log, matrices):
    """{"curve": [[tokens, validation loss], ...]}, and of the matrices whose names start with `matrices` {"norms": {name: [[step, norm]]}}.
    A half-written line is passed over, and so is a norm that was not finite; such a loss is None."""
    curve, norms = [], {}
    for line in log.read_text(errors="replace").splitlines() if log.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["event"] == "eval":
            loss = record["val_loss"]
            curve.append([record["tokens"], None if loss is None else round(loss, 5)])
        elif record["event"] == "matrix" and matrices and record["name"].startswith(matrices) and record["norm"] is not None:
            norms.setdefault(record["name"], []).append([record["step"], round(record["norm"], 4)])
    return {"curve": curve, **({"norms": norms} if norms else {})}


def as_text(results):
    """The results as JSON with one run a line, so that a commit shows which runs are new."""
    head = json.dumps({k: v for k, v in results.items() if k != "runs"}, indent=1, ensure_ascii=False)
    runs = ",\n".join(json.dumps(run, separators=(",", ":")) for run in results["runs"])
    return f'{head[:-2]},\n "runs": [\n{runs}\n]\n}}\n'


def runs_in(path):
    """How many runs a results JSON holds; 0 if there is none. Raises ValueError, one line, on a file that is no study's results."""
    try:
        return len(json.loads(path.read_text())["runs"])
    except FileNotFoundError:
        return 0
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a study's results: move it away, or give another --results") from None


def write_results(results, path):
    """The JSON and, with matplotlib, a .png of the same name. Prints the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, as_text(results))
    print(f"\n{results['title']}: {results['question']}\n\n{table(results)}\n")
    for found in results["results"].values() if results["rule"] else ():
        print(f"the rule: {results['rule']['says']}")
        for c in found["comparisons"]:
            print(f"  {c['row']} against {c['other']}: {'better' if judge(results['rule'], c) else 'does not count as better'}")
    if results["missing"]:
        print(f"{results['missing']} runs are missing: the same command runs them")
    try:
        from tools.pictures import draw
        draw(results, path.with_suffix(".png"))
        print(f"wrote {path} and {path.with_suffix('.png').name}")
    except ImportError:
        print(f"wrote {path}; the picture needs matplotlib: pip install matplotlib")
    try:
        import scipy  # noqa: F401
    except ImportError:
        print("the intervals need scipy: pip install scipy, and run the same command again")


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def write_docs(root=ROOT):
    """Fill the markers in README.md and docs/*.md. Returns the files that changed."""
    changed = []
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        text = path.read_text()
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
    parser = argparse.ArgumentParser(prog="python -m tools.study", description=__doc__, allow_abbrev=False,
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
    args, keys = parser.parse_known_args(argv)
    if not args.docs and not args.files:
        parser.error("name a study file, such as studies/figure_5_step_by_step.py")
    if args.jobs < 1:
        parser.error(f"--jobs={args.jobs} must be at least 1")
    return args, keys


def yours(files, keys):
    """(study file, {key: value} of the row "yours"): the first file is the study, the others are configs, and --key=value comes last."""
    values = {}
    for path in files[1:]:
        values |= read_config_file(path)
    for text in keys:
        key, given, value = text.removeprefix("--").partition("=")
        if not text.startswith("--"):
            raise ValueError(f"{text!r}: write --key=value with a key of train.py")
        known_key(key, "the command line")
        values[key] = parse_value(key, value if given else "True")
    return files[0], {key: value for key, value in values.items() if key != "out_dir"}


def run_missing(study, scale, folders, args):
    """Run what is missing. Returns the lines of runs that failed; Ctrl-C, or an error here, stops the runs once they have saved."""
    datasets = {run.settings["dataset"] for run in losses_of(folders, study, scale)[1].values()}
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
                line(model, row, [spec["config"], *(f"--{k}={v}" for k, v in keys.items())], folders.free(row, "BEST", seed), "missing")
    if protocol == "both" and any(cell not in losses for cell in runs):
        print("\n# then each row at its own best rate: --print, once the runs above are there, adds them (--protocol=paper: without them)")


def run_study(path, args, extra):
    """One study from its file to its results. Returns True if nothing failed."""
    study = load_study(path, args.scale, extra)
    if "measured_by" in study:
        print(f"{study['title']}: {study['question']}\nrun `{study['measured_by']}`")
        return True
    study, scale = only(study, args.scale, args.rows, args.seeds)
    check_rows(study, scale)
    folders = RunFolders(Path(args.out or ROOT / "out" / "studies" / args.scale).absolute())
    if args.show:
        show(study, scale, folders, args.protocol)
        return True
    path = Path(args.results) / f"{study['name']}_{args.scale}.json"
    there = runs_in(path)
    failed = [] if args.evaluate else run_missing(study, scale, folders, args)
    keys = "".join(f" --{k}={v}" for k, v in extra.items())
    command = f"python -m tools.study studies/{study['name']}.py --scale={args.scale}{keys}"
    results = collect(study, scale, args.scale, folders, command, args.protocol)
    if there > len(results["runs"]):  # a look at a few rows or seeds
        print(f"\n{path} holds {there} runs and stays as it is: these {len(results['runs'])} go to {folders.out}")
        path = folders.out / path.name
    write_results(results, path)
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return not failed


def main(argv=None):
    args, keys = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        if args.docs:
            print("\n".join(f"wrote {path}" for path in write_docs()) or "docs and README agree with results/")
            return 0
        path, extra = yours(args.files, keys)
        return 0 if run_study(path, args, extra) else 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
