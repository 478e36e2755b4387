"""
Remake a result of the paper, or try an idea: make the runs, then table, picture and JSON.

  python -m studies figure_5_step_by_step --jobs=2        makes every run, into out/studies
  python -m studies figure_5_step_by_step --continue      goes on from the committed results
  python -m studies figure_5_step_by_step --print         each run as a train.py line
  python -m studies track configs/mine.py --on=unified    your idea beside the others
  python -m studies --docs                                write the tables of docs/ and README
  python -m studies report out/quickstart                 draw any run of train.py

First learning rates are tuned, then every row runs with every seed (machinery/plan.py says how).
Runs are train.py's, one folder each under out/studies/<scale>, shared by all studies. A run that
has ended, or that a JSON in the folder of results holds with the same settings, is not made again;
one that was interrupted is resumed; Ctrl-C ends the runs after they have saved. The results,
<study>_<scale>.json and a picture, keep every run that they hold, and new ones are added.
"""
import argparse
import os
import re
import shlex
import signal
import statistics
import sys
import time
from pathlib import Path

from lib.config import BUILTIN
from lib.disk import write_whole
from prepare_data import prepare_builtin
from studies.machinery import results, windows
from studies.machinery.evidence import best_rates
from studies.machinery.plan import RESULTS, ROOT, load_study, read_idea, read_study
from studies.machinery.runs import RunFolders, code, outcome, start, stop_all, wait
from studies.machinery.tables import fill

OUT = ROOT / "out" / "studies"


def duration(seconds):
    if seconds < 60:
        return f"{seconds:.0f}s"
    return f"{seconds / 60:.0f}m" if seconds < 5400 else f"{seconds / 3600:.1f}h"


class Work:
    """One study under way: its cells, the Run of each, and the losses that they have found."""

    def __init__(self, study, folders, args, before):
        self.study, self.folders = study, folders
        self.rows, self.seeds = study.select_rows(args.rows), args.seeds or study.seeds
        self.earlier = results.cells_before(before, study, self.find)

    def find(self, cell):
        """The Run of a cell. Of a row of yours only runs by today's code count."""
        label = cell.row if len(self.study.models) == 1 else f"{cell.model} {cell.row}"
        return self.folders.find(label, self.study.models[cell.model].config,
                                 self.study.keys(cell), code() if cell.row == "yours" else "")

    def find_all(self, cells):
        return {cell: self.find(cell) for cell in cells}

    def with_seeds(self, rows, seeds, whole=True):
        """The cells of the second phase, by the rates that the first has found (so far)."""
        tuning = self.find_all(self.study.tuning_cells(self.study.rows))
        losses = results.losses_of(self.study, tuning)
        return self.study.seed_cells(rows, seeds, best_rates(losses, self.study, whole))

    def planned(self, rows, seeds):
        """The cells of some rows and seeds, as far as their rates are known."""
        return dict.fromkeys([*self.study.tuning_cells(rows),
                              *self.with_seeds(rows, seeds, whole=False)])

    def to_come(self):
        """How many runs the second phase has at least that are not in the first."""
        known = {(c.model, c.row, c.seed) for c in self.planned(self.rows, self.seeds)
                 if not c.tuning and (c in self.study.tuning_cells(self.rows)
                                      or self.find(c).has_ended)}
        return sum((model, row, seed) not in known for model in self.study.models
                   for row in self.study.rows_of(model) if row in self.rows for seed in self.seeds)


def run_phase(name, runs, made, later, args, children):
    """Make the runs of a phase that have not ended. made: how many runs were made before; later:
    how many the next phase adds at least. Returns the lines of runs that failed."""
    todo, failed = [run for run in runs if not run.has_ended], []
    begun, first, total = time.monotonic(), made, made + len(todo) + later
    print(f"{name}: {len(todo)} of {len(runs)} runs to make"
          + (f", then {later} or more" if later else ""), flush=True)
    while todo or children:
        while todo and len(children) < args.jobs:
            run = todo.pop(0)
            if not run.has_ended:  # another tool at work here may have made it
                verb = "resumes" if run.state == "interrupted" else "starts"
                print(f"  {verb}  {run.folder.name}", flush=True)
                slot = min(set(range(args.jobs)) - {child.slot for child in children})
                children.append(start(run, slot, args.nproc_per_node))
        if not children:
            break
        child = wait(children)
        ended, line = outcome(child.run, child.returncode, child.before)
        where, took = child.run.folder, duration(time.monotonic() - child.started)
        made, result = made + 1, line if ended == "done" else f"{ended}: {line}"
        if ended in ("failed", "stopped"):
            failed.append(f"{where.name} {result} (its output: {where / 'output.txt'})")
        left = duration((total - made) * (time.monotonic() - begun) / (made - first))
        print(f"[{made}/{total}] {where.name}  {result}  in {took}; about {left} left", flush=True)
    return failed


def find_data(datasets):
    """Make the built-in dataset if it is missing, once, before runs side by side want it. Raises
    ValueError if another one is missing."""
    for dataset in datasets - {BUILTIN}:
        if not (ROOT / Path(dataset).expanduser()).is_dir():
            raise ValueError(f"no dataset at {dataset}: make it with prepare_data.py, or give "
                             "another --dataset")
    if BUILTIN in datasets and not (ROOT / BUILTIN).exists():
        prepare_builtin(ROOT / BUILTIN)


def announce(work, args):
    """Say how many runs there are to make, for how long, and on how many cores."""
    cells = work.find_all(work.planned(work.rows, work.seeds)).values()
    todo = sum(not run.has_ended for run in cells if run) + work.to_come()
    if recorded := sum(run.is_recorded for run in cells):
        print(f"{recorded} runs are taken from the results in {args.results}")
    known = results.load_results(RESULTS / f"{work.study.name}_{args.scale}.json").get("runs", ())
    seconds = [run["seconds"] for run in known if "seconds" in run]
    print(f"{work.study.name}, scale {args.scale}: some {todo} runs to make, {args.jobs} at a time "
          f"on {os.cpu_count()} cores")
    if seconds and todo and not work.study.steps:
        each = statistics.median(seconds)
        print(f"ours took {duration(each)} each (median; busy machines and GPUs among them), so "
              f"about {duration(todo * each / args.jobs)}")
    print(f"runs go to {work.folders.out}, results to {args.results}", flush=True)


def run_missing(work, args):
    """Tune, then run every seed. Returns the lines of runs that failed; Ctrl-C, or an error here,
    stops the runs once they have saved."""
    children = []
    announce(work, args)
    try:
        tuning = work.find_all(work.study.tuning_cells(work.rows)).values()
        made = sum(not run.has_ended for run in tuning)
        failed = run_phase("tuning", list(tuning), 0, work.to_come(), args, children)
        cells = work.find_all(work.with_seeds(work.rows, work.seeds)).values()
        return failed + run_phase("all seeds", list(cells), made, 0, args, children)
    except BaseException:
        print(f"stopped: {stop_all(children)} runs saved; the same command resumes them",
              file=sys.stderr)
        raise


def show(work):
    """Print the train.py line of each run whose learning rate is known."""
    tuning = work.study.tuning_cells(work.rows)
    cells = work.find_all([*tuning, *work.with_seeds(work.rows, work.seeds)])
    for cell, run in cells.items():
        where = run.folder
        where = where.relative_to(ROOT) if where.is_relative_to(ROOT) else where
        command = shlex.join(["python", "train.py", *run.arguments, f"--out_dir={where}"])
        print(f"# {cell.model}, {cell.row}: {run.state}\n{command}")
    if not all(work.find(cell).has_ended for cell in tuning):
        print("\n# then every row with every seed, at the learning rates that these have found")


# ------------------------------------------------------------------------------------------------
# the command line

def write_docs(root=ROOT):
    """Write the generated blocks of README.md and docs/*.md. Returns the files that changed."""
    changed = []
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        if (new := fill(text, root / "studies" / "results")) != text:
            write_whole(path, new)
            changed.append(path)
    return changed


def whole_numbers(text):
    """(1, 2) of "1,2"."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of whole numbers: write them as in 1,2,3")
    return tuple(map(int, text.split(",")))


def labels(text):
    return text.split(",")


def file_name(text):
    if not re.fullmatch(r"[\w.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: use letters, digits, '.', '_' and '-'")
    return text


OPTIONS = {
    "scale": ({"default": "cpu"}, "cpu, gpu, paper or another of the study (default: cpu)"),
    "jobs": ({"type": int, "default": 1}, "runs at once, shared out over the GPUs (default: 1)"),
    "nproc_per_node": ({"type": int, "default": 0}, "each run under torchrun, so many processes"),
    "rows": ({"type": labels}, "run only these rows, and those they are compared with"),
    "seeds": ({"type": whole_numbers}, "run these seeds instead of the study's"),
    "steps": ({"type": int, "default": 0}, "shorten every row to so many steps, for a first look"),
    "protocol": ({"choices": ("paper", "both")}, "paper: only at the first row's best rate"),
    "on": ({"default": ""}, "your row has the keys of this row too, such as unified"),
    "name": ({"type": file_name, "default": ""}, "results go to <study>_NAME_<scale>.json"),
    "continue": ({"action": "store_true"}, "go on from studies/results, and write there"),
    "out": ({}, "the runs' folders (default: out/studies/<scale>)"),
    "results": ({}, "the folder of the JSONs (default: out/studies/results)"),
    "print": ({"action": "store_true"}, "print the train.py lines, and run nothing"),
    "evaluate": ({"action": "store_true"}, "write the results of the runs there are"),
    "docs": ({"action": "store_true"}, "write the tables of docs/*.md and README.md")}


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("files", nargs="*", metavar="STUDY",
                        help="a study of studies/, or your file; after track, your config")
    for option, (keywords, words) in OPTIONS.items():
        parser.add_argument(f"--{option}", help=words, **keywords)
    args, args.keys = parser.parse_known_args(argv)
    if not args.docs and not args.files:
        parser.error("name a study, such as figure_5_step_by_step")
    args.results = args.results or str(RESULTS if vars(args)["continue"] else OUT / "results")
    for key, least in (("jobs", 1), ("nproc_per_node", 0), ("steps", 0)):
        if getattr(args, key) < least:
            parser.error(f"--{key}={getattr(args, key)} must be at least {least}")
    return args


def study_file(name):
    """The file of a study: one of studies/ by its name, or any path that ends in .py."""
    return Path(name).absolute() if name.endswith(".py") else ROOT / "studies" / f"{name}.py"


def command_of(args):
    """The command that makes these results, without what does not change them."""
    configs = [str(Path(f).relative_to(ROOT)) if Path(f).is_relative_to(ROOT) else f
               for f in args.files[1:]]
    study = study_file(args.files[0])
    files = [study.stem if study.parent == ROOT / "studies" else str(study), *configs]
    given = [f"--{key}={','.join(map(str, v)) if isinstance(v, tuple) else v}"
             for key in ("seeds", "steps", "protocol", "on", "name") if (v := getattr(args, key))]
    return shlex.join(["python", "-m", "studies", *files, f"--scale={args.scale}", *args.keys,
                       *given])


def run_study(args):
    """One study from its file to its results. Returns True if nothing failed."""
    file = study_file(args.files[0])
    names = read_study(file)
    if "measured_by" in names:
        print(f"{names['title']}: {names['question']}\nrun `{names['measured_by']}`")
        return True
    base = names.get("rows", {}).get(args.on, {})
    if args.on and not base:
        raise ValueError(f"--on={args.on}: the study has no such row, or it has no keys")
    idea = read_idea(args.files[1:], args.keys, base)
    study = load_study(file, args.scale, idea, args.steps, args.name)
    study.protocol = args.protocol or study.protocol
    study.select_rows(args.rows)  # before any work
    datasets = study.check_rows()
    path = Path(args.results) / f"{study.name}_{args.scale}.json"
    out = Path(args.out or OUT / args.scale).absolute()

    def look():
        """The study as it stands now, and what its JSON holds."""
        before = {} if args.print else results.load_results(path)
        folders = RunFolders(out, results.load_records(path, bool(study.matrices)))
        return Work(study, folders, args, before), before
    if args.print:
        show(look()[0])
        return True
    failed = []
    if not args.evaluate:
        path.parent.mkdir(parents=True, exist_ok=True)
        find_data(datasets)  # runs in results count for equal data only
        failed = run_missing(look()[0], args)
    work, before = look()  # again: the same study may have ended elsewhere with other seeds
    planned = work.planned(study.rows, dict.fromkeys((*study.seeds, *work.seeds)))
    runs = work.find_all([*planned, *work.earlier])
    if study.every_window:
        windows.main([run.folder for run in runs.values()
                      if run.state == "done" and not run.is_recorded])
    found = results.collect(study, args.scale, runs, planned, command_of(args), before)
    asked = work.planned(work.rows, work.seeds)
    missing = sum(not work.find(cell).has_ended for cell in asked)
    results.write_results(found, path, missing)
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return not failed


def main(argv=None):
    args = parse(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C; nohup ignores the second
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        if args.docs:
            said = "\n".join(f"wrote {path}" for path in write_docs())
            print(said or "docs and README agree with studies/results/")
            return 0
        return 0 if run_study(args) else 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
