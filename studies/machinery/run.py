"""
Remake a result of the paper, or try an idea: make the runs, then table, picture and JSON.

  python -m studies figure_5_step_by_step --jobs=2        makes every run, into out/studies
  python -m studies figure_5_step_by_step --continue      goes on from the committed results
  python -m studies figure_5_step_by_step --print         each run as a train.py line
  python -m studies track configs/mine.py                 your idea beside the others
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
import shlex
import signal
import statistics
import sys
import time
from pathlib import Path

from lib.config import BUILTIN
from lib.disk import write_whole
from lib.log import duration
from prepare_data import prepare_builtin
from studies.machinery import results, windows
from studies.machinery.evidence import best_rates
from studies.machinery.plan import RESULTS, ROOT, load_study, read_idea
from studies.machinery.runs import code_now, find_run, outcome, start, stop_all, wait
from studies.machinery.tables import fill

OUT = ROOT / "out" / "studies"


class Work:
    """One study under way: its cells, the Run of each, and the losses that they have found."""

    def __init__(self, study, path, args):
        self.study, self.out, self.known = study, args.out, {}
        self.records = results.load_records(path)
        self.rows, self.seeds = study.select_rows(args.rows), args.seeds or study.seeds
        self.earlier = results.cells_before(path, study, self.find)

    def find(self, cell):
        """The Run of a cell. Of a row of yours only runs by today's code count, and of committed
        runs those that have what the study reads."""
        if cell not in self.known:
            label = cell.row if len(self.study.models) == 1 else f"{cell.model} {cell.row}"
            code = code_now() if cell.row == "yours" else ""
            needs = set()
            if self.study.matrices:
                needs.add("norms")
            if self.study.every_window and self.study.counts(cell.seed):
                needs.add("windows")
            self.known[cell] = find_run(self.out, self.records, label, self.study.models[
                cell.model].config, self.study.keys(cell), code, needs)
        return self.known[cell]

    def find_all(self, cells):
        return {cell: self.find(cell) for cell in cells}

    def cells(self, rows, seeds, whole=False):
        """The cells of some rows and seeds whose rates are known. whole: the second phase waits
        until every rate of a row's grid has been tried, and not only as many as the first row's."""
        tuning = self.find_all(self.study.tuning_cells(self.study.rows))
        best = best_rates(results.losses_of(self.study, tuning), self.study, whole)
        return list(dict.fromkeys([*self.study.tuning_cells(rows),
                                   *self.study.seed_cells(rows, seeds, best)]))

    def missing(self):
        """How many runs are to be made: those whose rate is known, and where it is not, at least
        one for each row and seed."""
        found = self.find_all(self.cells(self.rows, self.seeds))
        known = {(cell.model, cell.row, cell.seed) for cell in found if not cell.tuning}
        unknown = [(model, row, seed) for model in self.study.models
                   for row in self.study.rows_of(model) if row in self.rows for seed in self.seeds]
        return sum(not run.has_ended for run in found.values()) + len(set(unknown) - known)


def run_phase(runs, args, children):
    """Make those of the runs that have not ended. Returns the lines of runs that failed."""
    todo, failed = [run for run in runs if not run.has_ended], []
    begun, made, total = time.monotonic(), 0, len(todo)
    while todo or children:
        # as many at once as were asked for, each in a slot of its own, which chooses its GPU
        while todo and len(children) < args.jobs:
            run = todo.pop(0)
            verb = "resumes" if run.state == "interrupted" else "starts"
            print(f"  {verb}  {run.folder.name}", flush=True)
            slot = min(set(range(args.jobs)) - {child.slot for child in children})
            children.append(start(run, slot))

        # the next one that ends, however it ends
        child = wait(children)
        ended, line = outcome(child.run, child.returncode)
        where, took = child.run.folder, duration(time.monotonic() - child.started)
        made, result = made + 1, line if ended == "done" else f"{ended}: {line}"
        if ended in ("failed", "stopped"):
            failed.append(f"{where.name} {result} (its output: {where / 'output.txt'})")
        left = duration((total - made) * (time.monotonic() - begun) / made)
        print(f"[{made}/{total}] {where.name}  {result}  in {took}; about {left} left", flush=True)
    return failed


def announce(work, args):
    """Say how many runs there are to make, for how long, and on how many cores."""
    todo = work.missing()
    known = results.load_results(RESULTS / f"{work.study.name}_{args.scale}.json")
    seconds = [run["seconds"] for run in known["runs"] if "seconds" in run]
    print(f"{work.study.name}, scale {args.scale}: {todo} runs to make, or more, {args.jobs} at a "
          f"time on {os.cpu_count()} cores")
    if seconds and todo:
        each = statistics.median(seconds)
        print(f"ours took {duration(each)} each (median; busy machines and GPUs among them), so "
              f"about {duration(todo * each / args.jobs)}")
    print(f"runs go to {work.out}, results to {args.results}", flush=True)


def run_missing(work, args):
    """Tune, then run every seed. Returns the lines of runs that failed; Ctrl-C, or an error here,
    stops the runs once they have saved."""
    children = []
    announce(work, args)
    try:
        # first the grids of the rows that are tuned
        tuning = work.find_all(work.study.tuning_cells(work.rows)).values()
        failed = run_phase(tuning, args, children)

        # then every row with every seed, at the rates that these have found
        cells = work.find_all(work.cells(work.rows, work.seeds, whole=True)).values()
        return failed + run_phase([run for run in cells if run not in tuning], args, children)
    except BaseException:
        print(f"stopped: {stop_all(children)} runs saved; the same command resumes them",
              file=sys.stderr)
        raise


def show(work):
    """Print the train.py line of each run whose learning rate is known."""
    for cell, run in work.find_all(work.cells(work.rows, work.seeds, whole=True)).items():
        where = run.folder
        where = where.relative_to(ROOT) if where.is_relative_to(ROOT) else where
        command = shlex.join(["python", "train.py", *run.arguments, f"--out_dir={where}"])
        print(f"# {cell.model}, {cell.row}: {run.state}\n{command}")
    if not all(work.find(cell).has_ended for cell in work.study.tuning_cells(work.rows)):
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
    return tuple(map(int, text.split(",")))


def labels(text):
    return text.split(",")


OPTIONS = {
    "scale": ({"default": "cpu"}, "cpu, gpu, paper or another of the study (default: cpu)"),
    "jobs": ({"type": int, "default": 1}, "runs at once, shared out over the GPUs (default: 1)"),
    "rows": ({"type": labels}, "run only these rows, and those they are compared with"),
    "seeds": ({"type": whole_numbers}, "run these seeds instead of the study's"),
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
    if args.jobs < 1:
        parser.error(f"--jobs={args.jobs} must be at least 1")
    args.results = Path(args.results or (RESULTS if vars(args)["continue"] else OUT / "results"))
    args.out = Path(args.out or OUT / args.scale).absolute()
    return args


def run_study(args):
    """One study from its file to its results. Returns True if nothing failed."""
    name = args.files[0]
    file = Path(name).absolute() if name.endswith(".py") else ROOT / "studies" / f"{name}.py"
    study = load_study(file, args.scale, read_idea(args.files[1:], args.keys))
    study.check_rows()
    path = args.results / f"{study.name}_{args.scale}.json"
    work, failed = Work(study, path, args), []
    if args.print:
        show(work)
        return True
    if not args.evaluate:
        if not (ROOT / BUILTIN).exists():  # once, before runs side by side want it
            prepare_builtin(ROOT / BUILTIN)
            work = Work(study, path, args)  # runs in results count for equal data only
        failed = run_missing(work, args)
        work = Work(study, path, args)  # the same study may have ended elsewhere with other seeds
    planned = work.cells(study.rows, dict.fromkeys((*study.seeds, *work.seeds)))
    runs = work.find_all([*planned, *work.earlier])
    if study.every_window:
        windows.main([run.folder for run in runs.values() if run.state == "done"])
    results.write_results(results.collect(study, args.scale, runs, planned), path)
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
