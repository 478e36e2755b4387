"""
A study's results as Markdown: the tables in docs/studies.md and the table of results in README.md.

  table       all rows and all differences of one study
  readme      five rows that say what holds at the smallest scale
  fill        a text with its generated blocks written anew
"""
import itertools
import json
import re
import statistics
from pathlib import Path

from studies.machinery.evidence import half_width, paired, seeds_needed, verdict
from studies.machinery.plan import RESULTS

UNEQUAL = ("Rows with different seeds cannot be compared by their means: the differences below are "
           "paired by seed.")
EDGE = "\\* an end of its grid of rates, so perhaps not the best."
# where, the paper's words for it, what is compared: the table of results in README.md
README_ROWS = (
    ("1: no scale vectors, against the baseline", "figure_1_necessity_cpu",
     "no scale vectors", "baseline", "difference"),
    ("5: HG, against the baseline", "figure_5_step_by_step_cpu", "HG", "baseline", "difference"),
    ("5: unified, against the baseline", "figure_5_step_by_step_cpu", "unified", "baseline",
     "difference"),
    ("6: how many times unified's compute the baseline needs for its loss",
     "figure_6_dense_scaling_long", "unified", "baseline", "multiplier"),
    ("ours: unified, against a baseline that does not decay γ, better at this size",
     "figure_5_step_by_step_cpu", "unified", "baseline without decay on γ", "difference"))
PAPER_MULTIPLIER = 1.22  # of figure 6, at 1B


def signed(value):
    return f"{value:+.4f}".replace("-", "−")


def interval(found):
    """−0.0158 [−0.0201, −0.0115], the difference and its interval"""
    if not found:
        return ""
    if found["difference"] is None:
        return f"diverged ({found['diverged']} of {found['seeds']} seeds)"
    ends = f" [{signed(found['low'])}, {signed(found['high'])}]" if found["low"] is not None else ""
    return signed(found["difference"]) + ends


def multiplier(fit):
    ends = f" [{fit['low']:.2f}, {fit['high']:.2f}]" if fit["low"] is not None else ""
    return f"{fit['multiplier']:.2f}{ends}"


def paper_value(paper, model):
    """The paper's number for a model: the one of its name, or the first; None if it gives none."""
    return paper.get(model, next(iter(paper.values()), None))


def loss(found):
    if found["loss"] is None:
        return f"diverged ({found['diverged']} of {found['seeds']})"
    return f"{found['loss']:.4f}"


def extra_parameters(results, model, row):
    """", +1.4% parameters", where a row has more or fewer than the first row; else ""."""
    counts = {run["row"]: run["params"] for run in results["runs"]
              if run["model"] == model and "params" in run}
    first = counts.get(next(iter(results["results"][model]["rows"])))
    more = counts.get(row, first) / first - 1 if first else 0
    return f", {more:+.1%} parameters".replace("-", "−") if abs(more) >= 0.0005 else ""


def table(results):
    """The losses of all rows, and the differences of those that are compared."""
    lines = ["| model | row | at the tuned rate | seeds | at its own best rate | seeds |",
             "| --- " * 6 + "|"]
    for model, found in results["results"].items():
        for row, protocols in found["rows"].items():
            cells, ends = [], grid_ends(results, model, row)
            for protocol, absent in (("tuned", "not run"), ("own", "")):
                at = protocols.get(protocol)
                mark = " \\*" if at and at["learning_rate"] in ends else ""
                cells += [f"{loss(at)} at {at['learning_rate']:g}{mark}", str(at["seeds"])
                          ] if at else [absent, ""]
            label = row + extra_parameters(results, model, row)
            lines.append(f"| {model} | {label} | {' | '.join(cells)} |")
    if any("\\*" in line for line in lines):
        lines += ["", EDGE]
    for found in results["results"].values():
        if len({row["tuned"]["seeds"] for row in found["rows"].values() if "tuned" in row}) > 1:
            lines += ["", UNEQUAL]
            break
    by_rate = rate_lines(results) if results["picture"] == "learning rates" else []
    more = ["", f"{results['missing']} runs of this study, or more, are still to be made."]
    return "\n".join([*lines, *by_rate, *comparison_lines(results), *fit_lines(results),
                      *(more if results["missing"] else ())])


def grid_ends(results, model, row):
    """The lowest and the highest rate at which a row was tuned, if there are several."""
    rates = {run["learning_rate"] for run in results["runs"]
             if (run["model"], run["row"]) == (model, row)}
    return (min(rates), max(rates)) if len(rates) > 1 else ()


def comparison_lines(results):
    compared = [(model, c) for model, found in results["results"].items()
                for c in found["comparisons"]]
    if not compared:
        return []
    lines = ["", "| model | row | against | difference [95%], tuned rate | own best rates | the "
             "paper's | |", "| --- " * 7 + "|"]
    for model, c in compared:
        paper = ", ".join(f"{signed(value)} ({where})" for where, value in c["paper"].items())
        says = verdict(paper_value(c["paper"], model), c.get("tuned")) if paper else ""
        lines.append(f"| {model} | {c['row']} | {c['other']} | {interval(c.get('tuned'))} | "
                     f"{interval(c.get('own'))} | {paper} | {says} |")
    seen = [c["tuned"] for _, c in compared if half_width(c.get("tuned"))]
    if seen:
        lines += ["", "Half the width of these intervals at the tuned rate is "
                  f"{spread(map(half_width, seen), '.4f')}. By the spread seen so far it would "
                  f"be 0.005 with {spread(map(seeds_needed, seen), 'd', ' seeds')}."]
    return lines


def spread(values, how, unit=""):
    """9 to 230 seeds (median 26), or 9 seeds"""
    values = sorted(values)
    low, middle, high = (format(values[i], how) for i in (0, (len(values) - 1) // 2, -1))
    return f"{low} to {high}{unit} (median {middle})" if low != high else f"{low}{unit}"


def rate_lines(results):
    """Every row against the first, at every rate that both have."""
    first, *rows = results["rows"]
    rates = sorted({run["learning_rate"] for run in results["runs"]})
    lines = ["", f"| minus {first} | {' | '.join(f'at {rate:g}' for rate in rates)} |",
             "| --- " * (len(rates) + 1) + "|"]
    losses = {}
    for run in results["runs"]:
        value = run["val_loss"] if run["state"] == "done" else float("inf")
        cell = run["model"], run["row"], run["learning_rate"]
        losses.setdefault(cell, {})[run["seed"]] = value
    for model, row in itertools.product(results["results"], rows):
        cells = [interval(paired(losses.get((model, row, rate), {}),
                                 losses.get((model, first, rate), {}))) for rate in rates]
        label = f"{model}, {row}" if len(results["results"]) > 1 else row
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def fit_lines(results):
    lines = []
    for fit in results["fits"]:
        (_, b1), (_, b2) = fit["laws"]
        net = ", ".join(f"{fit['multiplier'] / cost:.2f} ({cost:.3f} times, {where})"
                        for where, cost in costs_of(results, fit).items())
        left_out = len(results["results"]) - fit["sizes"]
        of = f" of {len(results['results'])}" if left_out else ""
        lines += ["", f"{fit['row']} against {fit['other']}, {fit['sizes']}{of} sizes: the pooled "
                  f"gain is {interval(fit['gain'])}, and for ten times the compute it changes by "
                  f"{interval(fit['trend'])}. Fits L = a C^−b have b = {b1:.4f} for "
                  f"{fit['other']} and {b2:.4f} for {fit['row']}; the compute multiplier at "
                  f"{fit['largest']} is {multiplier(fit)}."
                  + (f" Divided by the time of a step it is {net}." if net else "")]
    return lines


def costs_of(results, fit):
    """{where: time of a step over that of the other row's}: the committed, and these runs' own at
    the largest size that has both rows."""
    costs = dict(results.get("costs", {}))
    for model, found in reversed(results["results"].items()):
        seconds = [[run["seconds"] for run in results["runs"] if run["state"] == "done" and
                    (run["model"], run["row"], run["learning_rate"], run.get("tuning", False))
                    == (model, row, found["tuned_rate"], False)]
                   for row in (fit["row"], fit["other"])]
        if all(seconds):
            if any(max(row) > 1.5 * min(row) for row in seconds):  # paused, or on a busy machine
                return costs
            own = statistics.median(seconds[0]) / statistics.median(seconds[1])
            return {f"these runs' median seconds at {model}": own, **costs}
    return costs


# ------------------------------------------------------------------------------------------------
# README and docs

def readme(folder):
    """The table of results in README.md."""
    lines = ["| figure | the paper | ours | |", "| --- | --- | --- | --- |"]
    for words, name, row, other, what in README_ROWS:
        path = Path(folder) / f"{name}.json"
        if not path.is_file():
            lines.append(f"| {words} | | not run yet | |")
            continue
        results = read(path)
        if what == "multiplier":
            fit = find(results["fits"], row, other)
            known = fit["low"] is not None
            says = "cannot tell" if not known or fit["low"] <= 1 <= fit["high"] else \
                "agrees" if fit["multiplier"] > 1 else "differs"
            cells = [f"{PAPER_MULTIPLIER} x, to 1B", f"{multiplier(fit)} x, to "
                     f"{fit['largest']}", says]
        else:
            model = next(iter(results["results"]))
            found = find(results["results"][model]["comparisons"], row, other)
            paper = paper_value(found["paper"], model)
            cells = [signed(paper) if paper else "", f"{interval(found.get('tuned'))}, "
                     f"{(found.get('tuned') or {}).get('seeds', 0)} seeds",
                     verdict(paper, found.get("tuned")) if paper else ""]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def quickstart(folder):
    """README's table of the two commands: their seed in figure 5's study, and all of its seeds."""
    path = Path(folder) / "figure_5_step_by_step_cpu.json"
    if not path.is_file():
        return "Not run yet."
    results, losses = read(path), {"baseline": {}, "unified": {}}
    tuned = results["results"]["0.23M"]["tuned_rate"]
    for run in results["runs"]:
        if run["row"] in losses and run["learning_rate"] == tuned and run["state"] == "done":
            losses[run["row"]][run["seed"]] = run["val_loss"]
    base, ours = losses.values()
    difference = paired(ours, base)
    means = [statistics.mean(row[seed] for seed in base.keys() & ours.keys())
             for row in (base, ours)]
    return "\n".join([
        "| validation loss, nats a byte | baseline | unified | difference |",
        "| --- | --- | --- | --- |",
        f"| these commands | {base[1]:.4f} | {ours[1]:.4f} | {signed(ours[1] - base[1])} |",
        f"| the mean of {difference['seeds']} seeds | {means[0]:.4f} | {means[1]:.4f} | "
        f"{interval(difference)} |"])


def find(entries, row, other):
    return next(e for e in entries if (e["row"], e["other"]) == (row, other))


def read(path):
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        table(results)
        return results
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError):
        raise ValueError(f"{path} does not hold a study's results: take it from the repository, or "
                         "run the study anew") from None


BLOCK = re.compile(r"<!-- (results|quickstart|study \S+) -->.*?<!-- end -->", re.DOTALL)


def fill(text, folder=RESULTS):
    """The text with its generated blocks written anew: between `<!-- study NAME_SCALE -->` and
    `<!-- end -->` the table of results/NAME_SCALE.json, between `<!-- results -->`, or
    `<!-- quickstart -->`, and `<!-- end -->` README's tables."""
    def write(match):
        what, _, name = match[1].partition(" ")
        path = Path(folder) / f"{name}.json"
        if what == "study":
            content = table(read(path)) if path.is_file() else "Not run yet."
        else:
            content = {"results": readme, "quickstart": quickstart}[what](folder)
        return f"<!-- {match[1]} -->\n{content}\n<!-- end -->"
    return BLOCK.sub(write, text)
