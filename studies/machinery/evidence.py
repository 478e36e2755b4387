"""
From losses to what they show: differences paired by seed, their intervals, best rates, scaling.

  paired           mean and 95% t-interval of the differences between two rows
  pooled           the same of a weighted sum over sizes
  p_value, holm    of the t-test that belongs to such an interval; of several tests together
  bootstrap        an interval over seeds and validation documents
  best_rate        the learning rate of least mean loss on the tuning seeds
  own_rate         for a row of its own: the better of that and the tuned rate
  summarize        every row against the row it is compared with, by two protocols
  fit_scaling      L = a C^-b over sizes, the compute multiplier, the pooled gain and its trend
  verdict, judge   does it agree with the paper; does an idea count as better

`losses` maps a Cell to a terminal validation loss, infinite where the run diverged.
"""
import math
import statistics

import numpy as np

# the 0.975 quantile of Student's t for 1 to 29 degrees of freedom; above, the last, which is safe
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010,
         2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739,
         2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452)


def t_975(freedom):
    return T_975[min(max(int(freedom), 1), len(T_975)) - 1]


def shared_differences(losses, others):
    """[losses[s] - others[s]] over the seeds s of both."""
    return [losses[s] - others[s] for s in sorted(losses.keys() & others.keys())]


def paired(losses, others):
    """{"difference", "low", "high", "seeds", "of"} of losses[s] - others[s] over the seeds s of
    both: mean ± t(0.975; n - 1) s / √n, s the sample standard deviation; no interval for one seed.
    "of": the mean of others[s], for a relative difference. If runs diverged, all are None but the
    seeds, and "diverged" counts them. None without a seed."""
    differences = shared_differences(losses, others)
    if not differences:
        return None
    if diverged := sum(not math.isfinite(d) for d in differences):
        return {"difference": None, "low": None, "high": None, "seeds": len(differences),
                "diverged": diverged}
    mean = statistics.mean(others[s] for s in losses.keys() & others.keys())
    return {**pooled([1], [differences]), "seeds": len(differences), "of": mean}


def pooled(weights, groups):
    """{"difference", "low", "high"} of Σ_i w_i mean(group_i): a t-interval from all values of all
    groups, each with a variance of its own (Welch and Satterthwaite's degrees of freedom, rounded
    down). The interval is None unless every group has two values."""
    mean = sum(w * statistics.mean(g) for w, g in zip(weights, groups))
    if min(map(len, groups)) < 2:
        return {"difference": mean, "low": None, "high": None}
    parts = [w ** 2 * statistics.variance(g) / len(g) for w, g in zip(weights, groups)]
    rest = sum(p ** 2 / (len(g) - 1) for p, g in zip(parts, groups))
    half = t_975(sum(parts) ** 2 / rest + 1e-9) * math.sqrt(sum(parts)) if rest else 0.0
    return {"difference": mean, "low": mean - half, "high": mean + half}


def half_width(found):
    """Half the length of the interval of `paired`; None if there is none."""
    return (found["high"] - found["low"]) / 2 if found and found["low"] is not None else None


def p_value(found):
    """Two-sided, of the t-test whose 95% interval `paired` gives; None without an interval. With ν
    degrees of freedom the density of θ = atan(t / √ν) is proportional to cos^(ν - 1) θ."""
    half = half_width(found)
    if not half:
        return None
    freedom = found["seeds"] - 1
    x, weights = np.polynomial.legendre.leggauss(64)

    def beyond(theta):
        width = (math.pi / 2 - theta) / 2
        return width * weights @ np.cos(theta + width * (1 + x)) ** (freedom - 1)
    t = abs(found["difference"]) / half * t_975(freedom)
    return float(beyond(math.atan(t / math.sqrt(freedom))) / beyond(0.0))


def holm(p_values):
    """Each p-value adjusted for all of them: with k of n at most as small, n - k + 1 times the
    value, and no less than the adjusted values below it."""
    order, adjusted, least = sorted(range(len(p_values)), key=p_values.__getitem__), {}, 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = least
    return [adjusted[i] for i in range(len(p_values))]


def bootstrap(losses, others, tokens, draws=4000):
    """(low, high): the middle 95% of the mean difference over draws of seeds and of documents, both
    with replacement. losses, others {seed: [nats a token of each document]}; tokens [of each
    document]. It stands beside the t-interval, not in its place: with few seeds it is too narrow,
    and below five there is none."""
    seeds, weights = sorted(losses.keys() & others.keys()), np.array(tokens, dtype=float)
    if len(seeds) < 5:
        return None
    sums = np.array([np.subtract(losses[s], others[s]) for s in seeds]) * weights
    rng = np.random.default_rng(0)
    means = []
    for _ in range(draws):
        rows = rng.integers(len(seeds), size=len(seeds))
        documents = rng.integers(len(weights), size=len(weights))
        means.append(sums[np.ix_(rows, documents)].sum() / (
            len(seeds) * weights[documents].sum()))
    return [float(x) for x in np.quantile(means, (0.025, 0.975))]


# ------------------------------------------------------------------------------------------------
# rates and rows

def by_seed(losses, model, row, rate, tuning=False):
    """{seed: loss} of a row at a learning rate."""
    return {cell.seed: loss for cell, loss in losses.items()
            if (*cell[:3], cell.tuning) == (model, row, rate, tuning)}


def best_rate(losses, study, model, row, whole=True):
    """The rate of least mean loss over the tuning seeds; None until every rate has them all. whole:
    every rate of its grid; otherwise those of them that the first row has tried so far. If all
    diverged, the smallest rate."""
    row = study.follows.get(row, row)

    def means(label):
        found = {rate: by_seed(losses, model, label, rate, bool(study.models[model].tuning))
                 for rate in study.rates_of(model, label)}
        return {rate: statistics.mean(at[s] for s in study.tuning_seeds)
                for rate, at in found.items() if at.keys() >= set(study.tuning_seeds)}
    rates = means(row)
    needed = set(study.rates_of(model, row))
    if not whole:
        needed &= means(study.rows_of(model)[0]).keys()
    return min(rates, key=rates.get) if rates and rates.keys() >= needed else None


def best_rates(losses, study, whole=True):
    """{(model, row): its best rate, or None}"""
    return {(model, row): best_rate(losses, study, model, row, whole)
            for model in study.models for row in study.rows_of(model)}


def own_rate(losses, study, model, row, best, tuned):
    """A row's own best rate: the one that the tuning seeds chose, unless these seeds count and the
    tuned rate has the lesser mean over the seeds that the row has at both."""
    at_best, at_tuned = (by_seed(losses, model, row, rate) for rate in (best, tuned))
    worse = sum(at_best[s] - at_tuned[s] for s in at_best.keys() & at_tuned.keys()) > 0
    return tuned if worse and all(map(study.counts, study.tuning_seeds)) else best


def summarize(study, losses):
    """{model: {"tuned_rate", "rows": {row: {"tuned", "own"}}, "comparisons": [...]}}. "tuned": at
    the rate that is best for the first row, the paper's protocol; "own": each row at its own best
    rate (`own_rate`), if more than one was tried. A comparison has "row", "other", the paper's
    values and `paired` by both protocols."""
    # rates come from the seeds that tune; all else from those that count
    best, out = best_rates(losses, study, whole=False), {}
    losses = {cell: loss for cell, loss in losses.items() if study.counts(cell.seed)}
    for model in study.models:
        # the paper's protocol, the first row's rate for all, and each row's own rate
        labels = study.rows_of(model)
        tuned = best[model, labels[0]]
        own = {row: own_rate(losses, study, model, row, best[model, row], tuned)
               for row in labels if len(study.rates_of(model, row)) > 1}
        rates = {"tuned": dict.fromkeys(labels, tuned), "own": own}
        found = {(protocol, row): by_seed(losses, model, row, rate)
                 for protocol, of_row in rates.items() for row, rate in of_row.items()}
        rows = {row: {protocol: describe(found[protocol, row], rates[protocol][row])
                      for protocol in rates if found.get((protocol, row))} for row in labels}

        # differences by both protocols, of the rows that have a rate in each
        comparisons = [{"row": row, "other": other, "paper": paper,
                        **{protocol: paired(found[protocol, row], found[protocol, other])
                           for protocol, of_row in rates.items()
                           if None not in (of_row.get(row), of_row.get(other))}}
                       for (row, other), paper in study.comparisons.items()
                       if {row, other} <= set(labels)]
        out[model] = {"tuned_rate": tuned, "rows": rows, "comparisons": comparisons}
    return out


def describe(found, rate):
    """Mean loss, seeds and diverged runs of a row at a rate. found {seed: loss}"""
    mean = statistics.mean(found.values())
    return {"learning_rate": rate, "loss": mean if math.isfinite(mean) else None,
            "seeds": len(found), "diverged": sum(not math.isfinite(x) for x in found.values())}


def verdict(paper, found, paper_loss=None):
    """"agrees" or "differs" if the interval lies on one side of 0, the paper's or the other; else
    "cannot tell". "" where the paper's value is below 0.003, whose sign says nothing. With the loss
    that the paper's value belongs to: whether the interval, as a part of our loss, leaves out the
    paper's value as a part of the paper's."""
    if paper is None or abs(paper) < 0.003:
        return ""
    if not found or found["low"] is None:
        return "cannot tell"
    says = "agrees" if (found["difference"] < 0) == (paper < 0) else "differs"
    if found["low"] <= 0 <= found["high"]:
        says = "cannot tell"
    if paper_loss:
        size = paper / paper_loss * found["of"]
        if not found["low"] <= size <= found["high"]:
            says += ", excludes the paper's size"
    return says


def judge(rule, comparison):
    """Does a comparison satisfy the rule: at the rows' own rates and over all its seeds, is the
    whole interval below 0, and the mean at least that far below?"""
    found = comparison.get("own")
    if not found or found["seeds"] < rule["seeds"]:
        return f"not run with {rule['seeds']} seeds yet"
    low_enough = found["high"] is not None and found["high"] < 0
    better = low_enough and found["difference"] <= -rule["at_least"]
    return "better" if better else "does not count as better"


# ------------------------------------------------------------------------------------------------
# scaling

def power_law(compute, loss):
    """(a, b) of L = a C^-b: the least-squares line through (log C, log L)."""
    slope, intercept = np.polyfit(np.log(compute), np.log(loss), 1)
    return float(np.exp(intercept)), float(-slope)


def compute_multiplier(compute, losses, others):
    """How many times the largest compute the curve of `others` needs for the loss that the curve of
    `losses` has there: {"laws", "multiplier", "low", "high"}. One {seed: loss} a size.

    With the fitted lines, C'/C = exp(g / b), b the exponent of `others` and g the difference of the
    lines in log L at the largest C, a weighted sum of the differences at all sizes. Its interval
    comes from all seeds of all sizes, paired; b is known far better than g, and is held fixed."""
    # the two fitted lines, each through the means of the seeds that both have
    seeds = [sorted(a.keys() & b.keys()) for a, b in zip(losses, others)]
    laws = [power_law(compute, [statistics.mean(d[s] for s in shared)
                                for d, shared in zip(side, seeds)]) for side in (others, losses)]

    # how far apart they are at the largest compute, and how sure that is
    x = np.log(compute) - np.mean(np.log(compute))
    weights = 1 / len(x) + x[np.argmax(x)] * x / (x @ x)  # of each size in the line's value there
    groups = [[math.log(b[s] / a[s]) for s in shared]
              for a, b, shared in zip(losses, others, seeds)]
    bounds = [None if g is None else math.exp(g / laws[0][1])
              for g in pooled(weights, groups).values()]
    return {"laws": laws, **dict(zip(("multiplier", "low", "high"), bounds))}


def fit_scaling(study, losses, found, flops):
    """The scaling fits of every comparison at the tuned rates, over the models that have both rows:
    `compute_multiplier`; "gain", the mean difference over sizes; and "trend", how much the
    difference grows with ten times the compute, the slope of a least-squares line through the means
    of the sizes. [] for other studies, or below two models. found: of `summarize`; flops: {model:
    FLOPs of a run}."""
    fits = []
    counting = {cell: loss for cell, loss in losses.items() if study.counts(cell.seed)}
    for row, other in study.comparisons if study.picture == "scaling" else ():
        points = []
        for model in study.models:
            rate = found[model]["tuned_rate"]
            a, b = (by_seed(counting, model, r, rate) for r in (row, other))
            if a.keys() & b.keys() and all(map(math.isfinite, (*a.values(), *b.values()))):
                points.append((model, flops[model], a, b))
        points.sort(key=lambda point: point[1])
        if len(points) > 1:
            models, compute, a, b = zip(*points)
            differences = [shared_differences(*pair) for pair in zip(a, b)]
            x = np.log10(compute) - np.mean(np.log10(compute))
            fewer = compute_multiplier(compute[:-1], a[:-1], b[:-1]) if len(points) > 2 else None
            fits.append({"row": row, "other": other, "sizes": len(points), "largest": models[-1],
                         "models": list(models), "without_largest": fewer,
                         "gain": pooled([1 / len(points)] * len(points), differences),
                         "trend": pooled((x / (x @ x)).tolist(), differences),
                         **compute_multiplier(compute, a, b)})
    return fits
