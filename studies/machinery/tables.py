"""
A study's results as Markdown: the tables in docs/ and the table of results in README.md.

  table       all rows and all differences of one study
  readme      a few rows that say what holds at the smallest scale
  fill        a text with its generated blocks written anew
"""
import json
import re
import statistics
from pathlib import Path

from studies.machinery.evidence import half_width, holm, p_value, paired, verdict
from studies.machinery.plan import RESULTS

OURS, PAPERS = "nats a byte", "nats a subword token"  # the units of ours and of the paper's losses
EDGE = "\\* an end of its grid of rates, so perhaps not the best."
# the table of results in README.md: words, results, what is compared, at which rates
README_ROWS = (
    ("1: no scale vectors, against the baseline", "figure_1_necessity_cpu",
     "no scale vectors", "baseline", "tuned"),
    ("5: HG, against the baseline", "figure_5_step_by_step_cpu", "HG", "baseline", "tuned"),
    ("5: unified, against the baseline", "figure_5_step_by_step_cpu", "unified", "baseline",
     "tuned"),
    ("ours: unified, against a baseline that does not decay γ, a better one at this size",
     "figure_5_step_by_step_cpu", "unified", "baseline without decay on γ", "tuned"),
    ("ours: the same on fresh seeds, all windows", "adopt_cpu", "unified",
     "baseline without decay on γ", "own"),
    ("ours: and at 20 tokens a parameter in place of 5.6", "adopt_long", "unified",
     "baseline without decay on γ", "own"),
    ("ours: unified, against Q/K-norm without decay on γ, each at the rate of ten seeds, on thirty "
     "other seeds", "adopt_confirm", "unified", "Q/K-norm without decay on γ", "own"),
    ("ours: and at 20 tokens a parameter, at the same rates, on ten seeds", "adopt_long", "unified",
     "Q/K-norm without decay on γ", "tuned"),
    ("ours: at 5.6 tokens again, each at the rate of two seeds, on ten", "adopt_cpu", "unified",
     "Q/K-norm without decay on γ", "own"),
    ("ours: and at 20 tokens a parameter", "adopt_long", "unified",
     "Q/K-norm without decay on γ", "own"),
    ("ours: and on English, at 5.6 tokens", "adopt_english", "unified",
     "Q/K-norm without decay on γ", "own"),
    ("ours: and under Muon", "adopt_muon", "unified", "Q/K-norm without decay on γ", "own"),
    ("ours: and on Python at 5.6 tokens, where Q/K-norm makes 16% more steps", "adopt_cpu",
     "unified", "Q/K-norm without decay for 16% more steps", "own"),
    ("ours: DNP + OR + IWD, against unified, which has HG besides", "adopt_cpu", "DNP + OR + IWD",
     "unified", "tuned"),
    ("ours: unified but the head, against Q/K-norm without decay on γ, each at the rate of two "
     "seeds", "adopt_cpu", "unified but the head", "Q/K-norm without decay on γ", "own"),
    ("ours: and at 20 tokens a parameter", "adopt_long", "unified but the head",
     "Q/K-norm without decay on γ", "own"))


def markdown(header, rows):
    """The lines of a Markdown table, without the columns in which every cell is empty."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    if not kept:
        return []
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


def relative(found):
    """The difference as a part of the other row's loss"""
    if not found or found["difference"] is None:
        return ""
    return part(found["difference"], found["of"])


def multiplier(fit):
    if not fit:
        return ""
    ends = f" [{fit['low']:.2f}, {fit['high']:.2f}]" if fit["low"] is not None else ""
    return f"{fit['multiplier']:.2f}{ends}"


def extra_parameters(results, model, row):
    """", +1.4% parameters", where a row has more or fewer than the first row; else ""."""
    counts = {run["row"]: run["params"] for run in results["runs"]
              if run["model"] == model and "params" in run}
    first = counts.get(next(iter(results["results"][model]["rows"])))
    more = counts.get(row, first) / first - 1 if first else 0
    return f", {more:+.1%} parameters".replace("-", "−") if abs(more) >= 0.0005 else ""


def comparisons_of(results):
    """[(model, comparison), ...] of all models."""
    return [(model, c) for model, at in results["results"].items() for c in at["comparisons"]]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------
# one study

def table(results):
    """The losses of all rows, and the differences of those that are compared."""
    lines, rows = [], []
    if results["missing"]:
        lines = [f"{results['missing']} runs of this study, or more, are still to be made.", ""]
    for model, found in results["results"].items():
        for row, protocols in found["rows"].items():
            if protocols:
                cells = [cell for protocol in ("tuned", "own")
                         for cell in loss_cells(results, model, row, protocols.get(protocol))]
                rows.append([model, row + extra_parameters(results, model, row), *cells])
    lines += [*tuning_lines(results),
              *markdown(["model", "row", f"{OURS}, at the tuned rate", "seeds",
                         "at its own best rate", "seeds"], rows)]
    if any("\\*" in line for line in lines):
        lines += ["", EDGE]
    return "\n".join([*lines, *rate_lines(results), *comparison_lines(results),
                      *fit_lines(results)])


def loss_cells(results, model, row, found):
    """[loss and rate, seeds] of a row. A rate at an end of the row's grid has a mark."""
    if not found:
        return ["", ""]
    loss = f"diverged ({found['diverged']} of {found['seeds']})"
    if found["loss"] is not None:
        loss = f"{found['loss']:.4f}"
    rate, grid = found["learning_rate"], {run["learning_rate"] for run in results["runs"]
                                          if (run["model"], run["row"]) == (model, row)}
    mark = " \\*" if len(grid) > 1 and rate in (min(grid), max(grid)) else ""
    return [f"{loss} at {rate:g}{mark}", str(found["seeds"])]


def losses_by_rate(results, runs):
    """{(model, row): {learning rate: {seed: loss}}} of these runs, and the header and the rates of
    a table of them."""
    losses, rates = {}, sorted({run["learning_rate"] for run in runs})
    for run in runs:
        at = losses.setdefault((run["model"], run["row"]), {rate: {} for rate in rates})
        at[run["learning_rate"]][run["seed"]] = run.get("val_loss", float("inf"))
    return losses, ["model", "row", *(f"at {rate:g}" for rate in rates)]


def tuning_lines(results):
    """What the rows were tuned by, where the tuning seeds do not count: the mean at each rate."""
    seeds = results["tuning_seeds"]
    if set(seeds) & set(results["seeds"]):
        return []
    losses, header = losses_by_rate(results, [r for r in results["runs"] if r["seed"] in seeds])
    rows = [[*labels, *(f"{statistics.mean(at.values()):.4f}" if at else ""
                        for at in by_rate.values())] for labels, by_rate in losses.items()]
    return [f"Tuning, the mean of seeds {', '.join(map(str, seeds))}, which do not count below, in "
            f"{OURS}:", "", *markdown(header, rows), ""]


def rate_lines(results):
    """Every row against the first, at every rate that both have."""
    if results["picture"] != "learning rates":
        return []
    first = next(iter(results["rows"]))
    losses, header = losses_by_rate(results, results["runs"])
    rows = [[model, f"{row} against {first}", *(interval(paired(at, losses[model, first][rate]))
                                                for rate, at in by_rate.items())]
            for (model, row), by_rate in losses.items() if row != first]
    return ["", *markdown(header, rows)]


def comparison_lines(results):
    """The differences, their relative size, and the paper's; and what could not be seen."""
    rows, seen = [], []
    for model, c in comparisons_of(results):
        tuned, own = c.get("tuned"), c.get("own")
        paper = ", ".join(f"{signed(value)} ({where})" for where, value in c["paper"].items())
        where = model if model in c["paper"] else next(iter(c["paper"]), None)
        says = verdict(c["paper"].get(where), tuned, results["paper_losses"].get(where))
        if tuned or own:
            rows.append([model, c["row"], c["other"], interval(tuned), relative(tuned or own),
                         interval(own), paper, says])
            seen += filter(None, [half_width(tuned)])
    lines = ["", *markdown(["model", "row", "against", f"{OURS} [95%], tuned rate", "relative",
                            "own best rates", f"the paper's, {PAPERS}", "its sign"], rows)]
    if seen:
        lines += ["", "Half the width of these intervals at the tuned rate is "
                  f"{statistics.median_low(seen):.4f} in the median, {max(seen):.4f} at most: a "
                  "true effect of that size is missed about half the time."]
    return lines if rows else []


def fit_lines(results):
    """The scaling fits: compute multipliers gross, without the largest size, and of unified, whose
    step the costs are, net."""
    rows = []
    for fit in results["fits"]:
        net = ["" for cost in results["costs"]]
        if fit["row"] == "unified":
            net = [f"{fit['multiplier'] / cost:.2f}" for cost in results["costs"].values()]
        rows.append([fit["row"], fit["other"], f"{fit['sizes']}, to {fit['largest']}",
                     interval(fit["gain"]), interval(fit["trend"]), multiplier(fit),
                     multiplier(fit["without_largest"]), *net])
    lines = markdown(["row", "against", "sizes", "mean gain", "for ten times the compute",
                      "compute multiplier at the largest size", "without that size",
                      *(f"net of a step of {cost:.3f} times: {where}"
                        for where, cost in results["costs"].items())], rows)
    return ["", *lines] if rows else []


# ------------------------------------------------------------------------------------------------
# README and docs

def readme(folder):
    """The table of results in README.md."""
    rows = []
    for words, name, row, other, protocol in README_ROWS:
        results = read(Path(folder) / f"{name}.json")
        found, paper = next((c[protocol], c["paper"]) for _, c in comparisons_of(results)
                            if (c["row"], c["other"]) == (row, other))
        where, value = next(iter(paper.items()), (None, None))
        whole = results["paper_losses"].get(where)
        rows.append([words, f"{signed(value)} ({part(value, whole)})" if value else "",
                     f"{interval(found)}, {found['seeds']} seeds ({relative(found)})",
                     verdict(value, found, whole)])
    return "\n".join(markdown(["figure", f"the paper, {PAPERS} (of its loss)",
                               f"ours, {OURS} (of our loss)", "its sign"], rows))


def primary_of(folder, scales):
    """[(where, comparison, its difference at own rates, how many seeds it is to have), ...] of the
    primary comparisons of studies/adopt.py at these scales."""
    paths = [Path(folder) / f"adopt_{scale}.json" for scale in scales]
    return [(f"{model}, {results['scale']}", c, c.get("own"), len(results["seeds"]))
            for results in map(read, filter(Path.is_file, paths))
            for model, c in comparisons_of(results)
            if [c["row"], c["other"]] in results["primary"]]


def primary_table(folder):
    """The primary comparisons of studies/adopt.py, with Holm's p-values once all four have all of
    their seeds; below them the fifth, which was named later and stands alone."""
    found, fifth = (primary_of(folder, scales) for scales in (("cpu", "long"), ("confirm",)))
    whole = len(found) == 4 and all(own and own["seeds"] >= seeds for _, _, own, seeds in found)
    adjusted = [None] * len(found + fifth)
    if whole:  # a comparison with a run that diverged has no p, and takes part as if it were 1
        values = [p_value(own) for _, _, own, _ in found]
        adjusted[:4] = holm([1.0 if p is None else p for p in values])
    rows = []
    for (where, c, own, seeds), holms in zip(found + fifth, adjusted):
        documents = (own or {}).get("documents")
        p_values = [f"{p:.2g}" if p is not None else "" for p in (p_value(own), holms)]
        rows.append([where, c["row"], c["other"], interval(own) or "not run", relative(own),
                     f"{own['seeds']} of {seeds}" if own else "",
                     f"[{', '.join(map(signed, documents))}]" if documents else "", *p_values])
    lines = markdown(["model", "row", "against", f"{OURS} [95%], own rates", "relative", "seeds",
                      "over seeds and files [95%]", "p", "p by Holm"], rows)
    still = ("Some runs are still to be made. Holm's procedure over all four needs them, and until "
             "then these are exploratory.")
    return "\n".join(lines if whole else [still, "", *lines])


def count_intervals(folder):
    """How many intervals of differences the studies have, at the tuned rate and at own rates, how
    many exclude zero, and how many Holm's procedure keeps. One that several have counts once."""
    values = {}
    for path in sorted(Path(folder).glob("*.json")):
        results = read(path)
        for _, c in comparisons_of(results) if "study" in results else ():
            for found in (c.get("tuned"), c.get("own")):  # often the same
                if (p := p_value(found)) is not None:
                    values[c["row"], c["other"], found["difference"]] = p
    p_values = list(values.values())
    below = sum(p < 0.05 for p in p_values)
    kept = sum(p < 0.05 for p in holm(p_values))
    return (f"The tables have {len(p_values)} different intervals; {below} exclude zero, and if "
            f"Holm's procedure takes all of them together, {kept} do.")


BLOCK = re.compile(r"<!-- (results|intervals|primary|study \S+) -->.*?<!-- end -->", re.DOTALL)


def fill(text, folder=RESULTS):
    """The text with its generated blocks written anew: between `<!-- study NAME_SCALE -->` and
    `<!-- end -->` the table of results/NAME_SCALE.json; `results` is README's table, `intervals` a
    count of docs/studies.md, `primary` the table of docs/adopt.md."""
    makers = {"results": readme, "intervals": count_intervals, "primary": primary_table}

    def write(match):
        what, _, name = match[1].partition(" ")
        path = Path(folder) / f"{name}.json"
        if what == "study":
            content = table(read(path)) if path.is_file() else "Not run yet."
        else:
            content = makers[what](folder)
        return f"<!-- {match[1]} -->\n{content}\n<!-- end -->"
    return BLOCK.sub(write, text)
