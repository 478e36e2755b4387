"""
From runs to what they show: differences paired by seed, their intervals, best learning rates, scaling fits.

  paired           mean and 95% t-interval of the differences between two rows over the seeds both have
  best_rate        the learning rate of least mean loss
  summarize        every row against the row it is compared with, by two protocols
  power_law, compute_multiplier, bootstrap    L = a C^-b
  table            the summary as Markdown
  fill             the numbers of committed results in a text, between markers

A cell is (model, row, learning rate, seed); `losses` maps cells to terminal validation losses, infinite where a run diverged.
scipy is needed for the t-intervals alone: without it they are None.
"""
import json
import math
import re
import statistics
from pathlib import Path

import numpy as np

try:
    from scipy import stats
except ImportError:
    stats = None

ROOT = Path(__file__).resolve().parent.parent
CONFIDENCE, RESAMPLES = 0.95, 2000


def paired(losses, others):
    """Mean and t-interval of losses[s] - others[s] over the seeds s of both: {"difference", "low", "high", "seeds"}.
    The interval is mean ± t(0.975; n - 1) s / √n, s the sample standard deviation; None for one seed. If a run diverged on either side,
    the difference is None, too, and "diverged" says for how many seeds. None if no seed is shared."""
    seeds = sorted(losses.keys() & others.keys())
    differences = [losses[s] - others[s] for s in seeds]
    if not seeds:
        return None
    if diverged := sum(not math.isfinite(d) for d in differences):
        return {"difference": None, "low": None, "high": None, "seeds": len(seeds), "diverged": diverged}
    mean, low, high = statistics.mean(differences), None, None
    if len(seeds) > 1 and stats:
        half = stats.t.ppf((1 + CONFIDENCE) / 2, len(seeds) - 1) * statistics.stdev(differences) / math.sqrt(len(seeds))
        low, high = mean - half, mean + half
    return {"difference": mean, "low": low, "high": high, "seeds": len(seeds)}


def by_seed(losses, model, row, rate):
    """{seed: loss} of a row at a learning rate."""
    return {cell[3]: loss for cell, loss in losses.items() if cell[:3] == (model, row, rate)}


def best_rate(losses, model, row, rates, seeds):
    """The rate of least mean loss over the seeds, all of which every rate must have; else None. All diverged: the smallest rate."""
    means = {}
    for rate in rates:
        found = by_seed(losses, model, row, rate)
        if not found.keys() >= set(seeds):
            return None
        means[rate] = statistics.mean(found[s] for s in seeds)
    return min(means, key=means.get)


def summarize(study, scale, losses):
    """{model: {"tuned_rate", "rows": {row: {"tuned": {...}, "own": {...}}}, "comparisons": [...]}}. "tuned": at the rate that is best for
    the first row, the paper's protocol. "own": each row at its own best rate. Rates are chosen on the tuning seeds. A comparison has
    "row", "other", the paper's values and the paired differences by both protocols."""
    out = {}
    for model, spec in scale["models"].items():
        rates, seeds = spec["learning_rates"], tuning_seeds(scale)
        best = {row: best_rate(losses, model, row, rates, seeds) for row in rows_of(study, spec)}
        tuned, rows, comparisons = best[next(iter(best))], {}, []
        for row in best:
            rows[row] = {}
            for protocol, rate in (("tuned", tuned), ("own", best[row])):
                found = by_seed(losses, model, row, rate)
                if rate is None or not found:
                    continue
                mean = statistics.mean(found.values())
                rows[row][protocol] = {"learning_rate": rate, "loss": mean if math.isfinite(mean) else None, "seeds": len(found),
                                       "diverged": sum(not math.isfinite(loss) for loss in found.values())}
        for (row, other), paper in study["comparisons"].items():
            if not best.keys() >= {row, other}:
                continue
            differences = {protocol: paired(*(by_seed(losses, model, r, rate) for r, rate in zip((row, other), rates)))
                           for protocol, rates in (("tuned", (tuned, tuned)), ("own", (best[row], best[other]))) if None not in rates}
            comparisons.append({"row": row, "other": other, "paper": paper, **differences})
        out[model] = {"tuned_rate": tuned, "rows": rows, "comparisons": comparisons}
    return out


def rows_of(study, spec):
    """The labels of the rows that a model runs: all, or those it names."""
    return list(spec.get("rows", study["rows"]))


def tuning_seeds(scale):
    """The seeds on which learning rates are chosen."""
    return scale["seeds"][:scale.get("tuning_seeds", 1)]


def verdict(paper, found):
    """"agrees" or "differs" if the interval lies on one side of 0, the paper's or the other; else "cannot tell"."""
    if not found or found["low"] is None or not paper:
        return "cannot tell"
    if found["low"] <= 0 <= found["high"]:
        return "cannot tell"
    return "agrees" if (found["difference"] < 0) == (paper < 0) else "differs"


def judge(rule, comparison):
    """Does the comparison meet the rule: by its protocol and over all its seeds, the whole interval below 0 and the mean at least that far
    below? "better", "does not count as better", or "not run with N seeds yet"."""
    found = comparison.get(rule["protocol"])
    if not found or found["seeds"] < rule["seeds"]:
        return f"not run with {rule['seeds']} seeds yet"
    better = found["high"] is not None and found["high"] < 0 and found["difference"] <= -rule["at_least"]
    return "better" if better else "does not count as better"


# ---------------------------------------------------------------------------------------------------------------------
# scaling

def power_law(compute, loss):
    """(a, b) of L = a C^-b: the least-squares line through (log C, log L). loss (sizes,), or (sizes, n) for n fits at once."""
    slope, intercept = np.polyfit(np.log(compute), np.log(loss), 1)
    return np.exp(intercept), -slope


def compute_multiplier(baseline, improved, compute):
    """How many times `compute` the baseline's curve needs for the loss that the improved curve has at `compute`.
    a_1 C'^-b_1 = a_2 C^-b_2, so C'/C = (a_1 / (a_2 C^-b_2))^(1/b_1) / C."""
    (a1, b1), (a2, b2) = baseline, improved
    return (a1 / (a2 * compute ** -b2)) ** (1 / b1) / compute


def bootstrap(compute, baseline, improved, seed=0):
    """Percentile interval of the compute multiplier at the largest compute: seeds drawn anew with replacement, the same for both rows.
    baseline, improved: one {seed: loss} a size. Returns {"baseline": (a, b), "improved": (a, b), "multiplier", "low", "high"}; None
    if no seed is in all."""
    seeds = sorted(set.intersection(*(set(d) for d in (*baseline, *improved))))
    if not seeds:
        return None
    losses = [np.array([[d[s] for s in seeds] for d in side]) for side in (baseline, improved)]  # (sizes, seeds) each
    draws = np.random.default_rng(seed).integers(len(seeds), size=(RESAMPLES, len(seeds)))

    def multiplier(means):
        laws = [power_law(compute, m) for m in means]
        return laws, compute_multiplier(*laws, max(compute))

    (first, second), value = multiplier([side.mean(1) for side in losses])
    _, resampled = multiplier([side[:, draws].mean(2) for side in losses])
    low, high = np.quantile(resampled, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)).tolist() if len(seeds) > 1 else (None, None)
    return {"baseline": list(map(float, first)), "improved": list(map(float, second)), "multiplier": float(value), "low": low, "high": high}


def fit_scaling(study, scale, losses, flops):
    """The fits of a scaling study at the tuned rates, over the models for which both rows are there; None below two models, or
    for a study that asks for none. flops: {model: FLOPs of a run}."""
    if study["picture"] != "scaling" or len(study["rows"]) < 2:
        return None
    baseline_row, improved_row = list(study["rows"])[:2]
    points = []
    for model, found in summarize(study, scale, losses).items():
        pair = [by_seed(losses, model, row, found["tuned_rate"]) for row in (baseline_row, improved_row)]
        if pair[0].keys() & pair[1].keys() and all(math.isfinite(loss) for side in pair for loss in side.values()):
            points.append((flops[model], *pair))
    return bootstrap(*zip(*points)) if len(points) >= 2 else None


# ---------------------------------------------------------------------------------------------------------------------
# text

def interval(found):
    """-0.0158 [-0.0201, -0.0115], the difference and its interval"""
    if not found:
        return ""
    if found["difference"] is None:
        return f"diverged ({found['diverged']} of {found['seeds']} seeds)"
    return signed(found["difference"]) + (f" [{signed(found['low'])}, {signed(found['high'])}]" if found["low"] is not None else "")


def paper_value(paper, model):
    """The paper's number for a model: the one of its name, or the first; None if it gives none."""
    return paper.get(model, next(iter(paper.values()), None))


def table(results):
    """The summary as Markdown: the losses of all rows, and the differences of those that are compared."""
    lines, edges = ["| model | row | at the tuned rate | seeds | at its own best rate | seeds |", "| --- " * 6 + "|"], []
    for model, found in results["results"].items():
        rates = results["models"][model]["learning_rates"]
        for row, protocols in found["rows"].items():
            cells = []
            for protocol, absent in (("tuned", "not run"), ("own", "")):
                at = protocols.get(protocol)
                cells += [loss_and_rate(at) + edge(at, rates), str(at["seeds"])] if at else [absent, ""]
                edges += [at] if at and edge(at, rates) else []
            lines.append(f"| {model} | {row} | {' | '.join(cells)} |")
    if edges:
        lines += ["", "\\* an end of its grid of rates, so perhaps not the best."]
    compared = [(model, c) for model, found in results["results"].items() for c in found["comparisons"]]
    if compared:
        lines += ["", "| model | row | against | difference [95%], tuned rate | own best rates | the paper's | |",
                  "| --- | --- | --- | --- | --- | --- | --- |"]
    for model, c in compared:
        paper = ", ".join(f"{signed(value)} ({where})" for where, value in c["paper"].items())
        lines.append(f"| {model} | {c['row']} | {c['other']} | {interval(c.get('tuned'))} | {interval(c.get('own'))} | {paper} | "
                     f"{verdict(paper_value(c['paper'], model), c.get('tuned')) if paper else ''} |")
    if fit := results.get("fit"):
        lines += ["", f"Fits L = a C^−b: b = {fit['baseline'][1]:.4f} for {list(results['rows'])[0]}, {fit['improved'][1]:.4f} for "
                  f"{list(results['rows'])[1]}; compute multiplier at the largest size {multiplier(fit)}."]
    return "\n".join(lines)


def loss(found):
    return f"{found['loss']:.4f}" if found["loss"] is not None else f"diverged ({found['diverged']} of {found['seeds']})"


def loss_and_rate(found):
    return f"{loss(found)} at {found['learning_rate']:g}"


def edge(found, rates):
    """A mark where the learning rate is the first or last of several."""
    return " \\*" if len(rates) > 1 and found["learning_rate"] in (min(rates), max(rates)) else ""


def signed(value):
    return f"{value:+.4f}".replace("-", "−")


def multiplier(fit):
    return f"{fit['multiplier']:.2f}" + (f" [{fit['low']:.2f}, {fit['high']:.2f}]" if fit["low"] is not None else "")


MARKER = re.compile(r"<!-- study (\S+) (.*?) -->(.*?)<!-- end -->", re.DOTALL)


def fill(text, folder=ROOT / "results"):
    """The text with what stands between `<!-- study NAME_SCALE WHAT -->` and `<!-- end -->` written anew from results/NAME_SCALE.json.
    WHAT: `table`; `multiplier`; `ROW: loss`, `ROW: own loss`; `ROW against OTHER: difference`, `: own difference`, `: verdict`,
    `ROW against OTHER at RATE: difference`; before any of them `MODEL / `, where there are several.
    A study that has no results yet says so."""
    def write(match):
        name, what = match[1], match[2]
        if stats is None and what.endswith(": difference") and " at " in what:  # computed here, and the interval needs scipy
            return match[0]
        path = Path(folder) / f"{name}.json"
        if not path.is_file():
            return f"<!-- study {name} {what} -->not run yet<!-- end -->"
        try:
            value = quote(json.loads(path.read_text("utf-8")), what)
        except (KeyError, TypeError, AttributeError, StopIteration, RecursionError, json.JSONDecodeError, UnicodeDecodeError):
            raise ValueError(f"{path} is not a study's results: take it from the repository, or run the study anew") from None
        return f"<!-- study {name} {what} -->{value}<!-- end -->"
    return MARKER.sub(write, text)


def quote(results, what):
    """One number of the results as it stands in a sentence, or the whole table. Raises ValueError if there is no such thing."""
    if what == "table":
        return f"\n\n{table(results)}\n\n"
    if what == "multiplier":
        return multiplier(results["fit"]) if results.get("fit") else "not run yet"
    name, _, field = what.rpartition(": ")
    model, slash, name = name.rpartition(" / ")
    model = model if slash else next(iter(results["results"]))
    found = results["results"].get(model, {"rows": {}, "comparisons": []})
    pair, at, rate = name.rpartition(" at ")
    if at and field == "difference":
        row, _, other = pair.partition(" against ")
        sides = [{r["seed"]: r["val_loss"] if r["state"] == "done" else math.inf for r in results["runs"]
                  if (r["model"], r["row"], r["learning_rate"]) == (model, label, float(rate))} for label in (row, other)]
        return interval(paired(*sides)) or "not run yet"
    protocol = "own" if field.startswith("own ") else "tuned"
    if name in found["rows"] and field in ("loss", "own loss"):
        return loss(found["rows"][name][protocol]) if protocol in found["rows"][name] else "not run yet"
    for c in found["comparisons"]:
        if name == f"{c['row']} against {c['other']}" and field in ("difference", "own difference"):
            return interval(c[protocol]) if c.get(protocol) else "not run yet"
        if name == f"{c['row']} against {c['other']}" and field == "verdict" and c["paper"]:
            return verdict(paper_value(c["paper"], model), c.get("tuned"))
    raise ValueError(f"{results['study']} has no {what!r}: write `ROW: loss` or `ROW against OTHER: difference`, with rows as in its table")
