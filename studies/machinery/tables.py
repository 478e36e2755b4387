"""
A study's results as Markdown: the tables in docs/ and the table of results in README.md.

  table       all rows and all differences of one study
  readme      five rows that say what holds at the smallest scale
  fill        a text with its generated blocks written anew
"""
import itertools
import json
import re
import statistics
from pathlib import Path

from studies.machinery.evidence import half_width, holm, p_value, paired, verdict
from studies.machinery.plan import RESULTS

OURS, PAPERS = "nats a byte", "nats a subword token"  # the units of ours and of the paper's losses
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
     "figure_5_step_by_step_cpu", "unified", "baseline without decay on γ", "difference"),
    ("ours: unified, against Q/K-norm without decay on γ, each at its own rate", "adopt_cpu",
     "unified", "Q/K-norm without decay on γ", "own"),
    ("ours: the same without DNP on the head", "adopt_cpu", "unified but the head",
     "Q/K-norm without decay on γ", "own"))
PAPER_MULTIPLIER = 1.22  # of figure 6, at 1B


def markdown(header, rows):
    """A Markdown table, without the columns in which every cell is empty."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [f"| {' | '.join(header[i] for i in kept)} |", "| --- " * len(kept) + "|",
            *(f"| {' | '.join(row[i] for i in kept)} |" for row in rows)]


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


def part(value, of):
    """−2.2%: a difference as a part of a loss"""
    return f"{value / of:+.1%}".replace("-", "−")


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


def relative(found):
    """−2.2%: a difference as a part of the other row's loss"""
    if not found or found["difference"] is None or not found.get("of"):
        return ""
    return part(found["difference"], found["of"])


def table(results):
    """The losses of all rows, and the differences of those that are compared."""
    lines, rows, absent = [], [], []
    if results["missing"]:
        lines = [f"{results['missing']} runs of this study, or more, are still to be made.", ""]
    for model, found in results["results"].items():
        for row, protocols in found["rows"].items():
            if not protocols:
                absent.append(f"{row} ({model})" if len(results["results"]) > 1 else row)
                continue
            cells, ends = [], grid_ends(results, model, row)
            for protocol in ("tuned", "own"):
                at = protocols.get(protocol)
                mark = " \\*" if at and at["learning_rate"] in ends else ""
                cells += [f"{loss(at)} at {at['learning_rate']:g}{mark}", str(at["seeds"])
                          ] if at else ["", ""]
            rows.append([model, row + extra_parameters(results, model, row), *cells])
    if absent:
        lines += [f"Not run yet: {', '.join(absent)}.", ""]
    lines += tuning_lines(results)
    lines += markdown(["model", "row", f"{OURS}, at the tuned rate", "seeds",
                       "at its own best rate", "seeds"], rows) if rows else []
    if any("\\*" in line for line in lines):
        lines += ["", EDGE]
    for found in results["results"].values():
        if len({row["tuned"]["seeds"] for row in found["rows"].values() if "tuned" in row}) > 1:
            lines += ["", UNEQUAL]
            break
    by_rate = rate_lines(results) if results["picture"] == "learning rates" else []
    return "\n".join([*lines, *by_rate, *comparison_lines(results), *fit_lines(results)])


PRIMARY = ["model", "row", "against", f"{OURS} [95%], own rates", "relative", "seeds",
           "over seeds and files [95%]", "p", "p by Holm"]


def primary_row(model, c, wanted, adjusted=None):
    found = c.get("own")
    documents = (found or {}).get("documents")
    p = p_value(found)
    return [model, c["row"], c["other"], interval(found) or "not run", relative(found),
            f"{found['seeds']} of {wanted}" if found else "",
            f"[{signed(documents[0])}, {signed(documents[1])}]" if documents else "",
            f"{p:.2g}" if p is not None else "", f"{adjusted:.2g}" if adjusted is not None else ""]


def primary_table(folder, name="adopt", scales=("cpu", "long")):
    """All primary comparisons of a study, with Holm's p-values, once each has all of its seeds."""
    found, whole = [], True
    for scale in scales:
        path = Path(folder) / f"{name}_{scale}.json"
        if not path.is_file():
            whole = False
            continue
        results = read(path)
        for model, at in results["results"].items():
            for c in at["comparisons"]:
                if [c["row"], c["other"]] in list(map(list, results["primary"])):
                    seeds = (c.get("own") or {}).get("seeds", 0)
                    whole = whole and seeds >= len(results["seeds"])
                    found.append((f"{model}, {scale}", c, len(results["seeds"])))
    if not found:
        return "Not run yet."
    adjusted = [None] * len(found)
    if whole:
        adjusted = holm([p_value(c["own"]) for _, c, _ in found])
    rows = [primary_row(*what, a) for what, a in zip(found, adjusted)]
    lines = markdown(PRIMARY, rows)
    if not whole:
        lines = ["Runs are still to be made: until all of them are there, these are exploratory.",
                 "", *lines]
    return "\n".join(lines)


def tuning_lines(results):
    """What the rows were tuned by, where the tuning seeds do not count: the mean at each rate."""
    seeds, losses = results["tuning_seeds"], {}
    if set(seeds) & set(results["seeds"]):
        return []
    for run in results["runs"]:
        if run["seed"] in seeds and run["state"] == "done":
            by_rate = losses.setdefault((run["model"], run["row"]), {})
            by_rate.setdefault(run["learning_rate"], []).append(run["val_loss"])
    rates = sorted({rate for by_rate in losses.values() for rate in by_rate})
    rows = [[model, row, *(f"{statistics.mean(by_rate[rate]):.4f}" if rate in by_rate else ""
                           for rate in rates)] for (model, row), by_rate in losses.items()]
    header = ["model", "row", *(f"at {rate:g}" for rate in rates)]
    return [f"Tuning, the mean of seeds {', '.join(map(str, seeds))}, which do not count below, in "
            f"{OURS}:", "", *markdown(header, rows), ""]


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
    rows = []
    for model, c in compared:
        if not c.get("tuned") and not c.get("own"):
            continue
        paper = ", ".join(f"{signed(value)} ({where})" for where, value in c["paper"].items())
        says = ""
        if paper:
            where = model if model in c["paper"] else next(iter(c["paper"]))
            says = verdict(c["paper"][where], c.get("tuned"), results["paper_losses"].get(where))
        rows.append([model, c["row"], c["other"], interval(c.get("tuned")),
                     relative(c.get("tuned") or c.get("own")), interval(c.get("own")), paper, says])
    if not rows:
        return []
    lines = ["", *markdown(["model", "row", "against", f"{OURS} [95%], tuned rate", "relative",
                            "own best rates", f"the paper's, {PAPERS}", "its sign"], rows)]
    seen = sorted(filter(None, (half_width(c.get("tuned")) for _, c in compared)))
    if seen:
        low, middle, high = (f"{seen[i]:.4f}" for i in (0, (len(seen) - 1) // 2, -1))
        width = low if low == high else f"{low} to {high} (median {middle})"
        lines += ["", f"Half the width of these intervals at the tuned rate is {width}: an effect "
                  "smaller than that could not be seen."]
    return lines


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
    """The scaling fits, a table: compute multipliers gross, without the largest size, and net."""
    if not results["fits"]:
        return []
    header, rows = ["row", "against", "sizes", "mean gain", "for ten times the compute",
                    "compute multiplier at the largest size", "without that size"], []
    for fit in results["fits"]:
        fewer = fit.get("without_largest")
        rows.append([fit["row"], fit["other"], f"{fit['sizes']}, to {fit['largest']}",
                     interval(fit["gain"]), interval(fit["trend"]), multiplier(fit),
                     multiplier(fewer) if fewer else ""])
    lines = ["", *markdown(header, rows), ""]
    header, rows = ["net of a step's time", *(f"{f['row']} against {f['other']}"
                                              for f in results["fits"])], {}
    for place, fit in enumerate(results["fits"]):
        for where, cost in costs_of(results, fit).items():
            cells = rows.setdefault(where, [f"{cost:.3f} times: {where}"]
                                    + [""] * len(results["fits"]))
            cells[place + 1] = f"{fit['multiplier'] / cost:.2f}"
    return [*lines, *markdown(header, rows.values())] if rows else lines[:-1]


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
    lines = [f"| figure | the paper, {PAPERS} (of its loss) | ours, {OURS} (of our loss) | |",
             "| --- | --- | --- | --- |"]
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
            fewer = fit.get("without_largest")
            if fewer and fewer["low"] is not None and fewer["low"] <= 1 <= fewer["high"]:
                says += ", by the largest size alone" if says != "cannot tell" else ""
            without = f"; without that size {multiplier(fewer)} x" if fewer else ""
            cells = [f"{PAPER_MULTIPLIER} x, to 1B", f"{multiplier(fit)} x, to "
                     f"{fit['largest']}{without}", says]
        else:
            model = next(iter(results["results"]))
            found = find(results["results"][model]["comparisons"], row, other)
            paper = paper_value(found["paper"], model)
            tuned = found.get("own" if what == "own" else "tuned")
            paper_loss = results["paper_losses"].get("0.12B")
            says = verdict(paper, tuned, paper_loss) if paper else ""
            cells = [signed(paper) if paper else "",
                     f"{interval(tuned)}, {tuned['seeds']} seeds" if tuned else "not run yet", says]
            if paper and paper_loss:
                cells[0] += f" ({part(paper, paper_loss)})"
            if tuned and tuned["low"] is not None:
                low, high = (part(tuned[end], tuned["of"]) for end in ("low", "high"))
                cells[1] += f" ({relative(tuned)} [{low}, {high}])"
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


def count_intervals(folder):
    """How many intervals the studies have, how many exclude zero, and how many of these Holm's
    procedure keeps. A comparison that several studies have counts once."""
    values = {}
    for path in sorted(Path(folder).glob("*.json")):
        if '"study"' in path.read_text(encoding="utf-8")[:100]:
            for found in read(path)["results"].values():
                for c in found["comparisons"]:
                    p = p_value(c.get("tuned"))
                    if p is not None:
                        values[c["row"], c["other"], c["tuned"]["difference"]] = p
    p_values = list(values.values())
    below = sum(p < 0.05 for p in p_values)
    kept = sum(p < 0.05 for p in holm(p_values))
    return (f"The tables have {len(p_values)} different intervals; {below} exclude zero, and if "
            f"Holm's procedure takes all of them together, {kept} do.")


BLOCK = re.compile(r"<!-- (results|quickstart|intervals|primary|study \S+) -->.*?<!-- end -->",
                   re.DOTALL)


def fill(text, folder=RESULTS):
    """The text with its generated blocks written anew: between `<!-- study NAME_SCALE -->` and
    `<!-- end -->` the table of results/NAME_SCALE.json; `results` and `quickstart` are README's
    tables, `intervals` a count of docs/studies.md, `primary` the table of docs/adopt.md."""
    makers = {"results": readme, "quickstart": quickstart, "intervals": count_intervals,
              "primary": primary_table}

    def write(match):
        what, _, name = match[1].partition(" ")
        path = Path(folder) / f"{name}.json"
        if what == "study":
            content = table(read(path)) if path.is_file() else "Not run yet."
        else:
            content = makers[what](folder)
        return f"<!-- {match[1]} -->\n{content}\n<!-- end -->"
    return BLOCK.sub(write, text)
