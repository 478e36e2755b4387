"""
The pictures of a study, drawn from its results' JSON only, 1000 pixels wide: loss relative to a row
over tokens, differences with their intervals, losses over learning rates, scaling fits, norms of
matrices. All losses are in nats a byte. A row has one colour in all pictures.
"""
import statistics

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from lib.disk import write_whole  # noqa: E402
from studies.machinery.evidence import paired  # noqa: E402
from studies.machinery.tables import OURS, signed  # noqa: E402

DPI, WIDTH = 100, 10  # inches
# the rows that several studies have; a study's other rows take what is left, in their order
COLORS = {"baseline": "black", "baseline without decay on γ": "gray", "unified": "C0",
          "no scale vectors": "C5", "HG": "C2", "HG + DNP": "C1", "HG + DNP + OR": "C4",
          "unified but the head": "C9", "Q/K-norm without decay on γ": "C3",
          "HG + DNP + IWD": "C8", "HG + DP + OR": "C6"}
OTHERS = ("darkgreen", "deeppink", "gold", "navy", "salmon", "purple", "teal", "olive", "peru",
          "crimson", "steelblue", "orchid", "darkkhaki", "sienna", "slategray")


def color_of(results, row):
    """The colour of a row."""
    if row in COLORS:
        return COLORS[row]
    others = [label for label in results["rows"] if label not in COLORS]
    return OTHERS[others.index(row) % len(OTHERS)]


def draw(results, path):
    """Write the picture that the study asks for."""
    figure = {"relative loss": relative_loss, "learning rates": learning_rates, "scaling": scaling,
              "matrix norms": matrix_norms, "forest": forest}[results["picture"]](results)
    figure.suptitle(f"{results['title']}\n{setting(results)}", fontsize=11)
    write_whole(path, lambda f: figure.savefig(f, dpi=DPI, format="png"))
    plt.close(figure)


def setting(results):
    """Size, seeds and tokens of the runs, as the title has them."""
    def span(values, text):
        low, high = min(values), max(values)
        return text(low) if text(low) == text(high) else f"{text(low)} to {text(high)}"

    def size(n):
        return count(float(f"{n:.2g}"))
    runs = [run for run in results["runs"] if "params" in run and not run.get("tuning")]
    if not runs:
        return f"no runs yet, {results['scale']} scale"
    seeds = [at["seeds"] for found in results["results"].values()
             for row in found["rows"].values() if (at := row.get("tuned"))] or [0]
    return (f"{span([r['params'] for r in runs], size)} parameters, {span(seeds, str)} seeds, "
            f"{span([r['tokens'] for r in runs], count)} tokens ({results['scale']} scale)")


def count(n, _=None):
    """0.5M for 500,000, as a formatter of an axis"""
    for size, letter, least in ((1e9, "B", 1e8), (1e6, "M", 1e4)):
        if n >= least:
            return f"{n / size:.3g}{letter}"
    return f"{n:g}"


def legend(axis, columns):
    """The legend below the axes, where it covers no curve."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=columns, fontsize=8,
                    frameon=False)
    axis.grid(alpha=0.3)


def runs_at(results, model, row, rate, state="done"):
    return [run for run in results["runs"] if not run.get("tuning") and (
        run["model"], run["row"], run["learning_rate"], run["state"]) == (model, row, rate, state)]


def curves_of(results, model, row, rate):
    """{seed: {tokens: validation loss}}, without losses that were not finite."""
    curves = {run["seed"]: {t: loss for t, loss in run["curve"] if loss is not None}
              for run in runs_at(results, model, row, rate)}
    return {seed: curve for seed, curve in curves.items() if curve}


# ---- differences with their intervals ------------------------------------------------------------

def forest_panel(axis, results, comparisons):
    """A line a comparison: the mean difference, its 95% interval, and a cross at the paper's value.
    comparisons [(label, row, paired, paper's value or None)], the first on top."""
    axis.axvline(0, color="black", linewidth=1)
    labels = []
    for place, (label, row, found, paper) in enumerate(comparisons):
        color = color_of(results, row)
        if found["low"] is not None:
            axis.plot([found["low"], found["high"]], [place, place], color=color, linewidth=2)
        axis.plot(found["difference"], place, "o", color=color, markersize=5)
        if paper is not None:
            axis.plot(paper, place, "x", color="black", markersize=6)
        labels.append(f"{label}\n{signed(found['difference'])}, {found['seeds']} seeds")
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_xlabel(f"difference, {OURS}, and its 95% over seeds", fontsize=8)
    axis.xaxis.set_major_locator(plt.MaxNLocator(5))
    axis.grid(alpha=0.3, axis="x")


def compared(results, protocol="tuned", other=None):
    """The comparisons of a study as forest_panel takes them; other: only those against it."""
    lines = []
    for model, at in results["results"].items():
        prefix = f"{model}: " if len(results["results"]) > 1 else ""
        for c in at["comparisons"]:
            found = c.get(protocol) or c.get("tuned")
            if found and found["difference"] is not None and other in (None, c["other"]):
                against = "" if other else f" against {c['other']}"
                # the paper's value in its own unit says nothing here: the same part of the loss
                where = model if model in c["paper"] else next(iter(c["paper"]), None)
                scale = results["paper_losses"].get(where)
                paper = c["paper"][where] / scale * found["of"] if scale else None
                lines.append((f"{prefix}{c['row']}{against}", c["row"], found, paper))
    return lines


def forest(results):
    """Every row against the first, each at its own rate where it has one; at the right how long a
    step takes, as far as that has been measured."""
    first = next(iter(results["rows"]))
    lines = compared(results, "own", first)
    figure, axis = plt.subplots(figsize=(WIDTH, 1.6 + 0.42 * max(4, len(lines))),
                                layout="constrained")
    forest_panel(axis, results, lines)
    axis.set_title(f"against {first}", fontsize=9)
    times = results["step_times"]
    for place, (_, row, _, _) in enumerate(lines if times else ()):
        axis.text(1.02, place, times.get(row, "?"), fontsize=7, va="center",
                  transform=axis.get_yaxis_transform())
    if times:
        axis.text(1.02, 1.01, times["what"], fontsize=7, va="bottom", transform=axis.transAxes)
    return figure


def relative_loss(results):
    """A panel for each model and each of the study's panels: the validation loss minus that of the
    panel's first row over tokens, paired by seed, at the tuned rate. Below, all comparisons."""
    panels = [(model, rows) for model in results["results"] for rows in results["panels"]
              if {*rows} & {*results["results"][model].get("rows", rows)}]
    comparisons = compared(results)
    columns, lines = min(2, len(panels)), -(-len(panels) // 2)
    below = 0.8 + 0.36 * len(comparisons) if comparisons else 0
    figure = plt.figure(figsize=(WIDTH, 4.2 * lines + below), layout="constrained")
    grid = figure.add_gridspec(lines + bool(below), columns,
                               height_ratios=[4.2] * lines + ([below] if below else []))
    for place, (model, rows) in enumerate(panels):
        axis = figure.add_subplot(grid[place // columns, place % columns])
        relative_panel(axis, results, model, rows)
    if comparisons:
        forest_panel(figure.add_subplot(grid[lines, :]), results, comparisons)
    if any(paper is not None for *_, paper in comparisons):
        figure.supxlabel("×: the paper's value, as the same part of the loss", fontsize=8)
    return figure


def relative_panel(axis, results, model, rows):
    """Draw the mean over the seeds that all rows of the panel have. A row that trains for longer
    than the first is not drawn: it cannot be compared token by token."""
    first, rate = rows[0], results["results"][model]["tuned_rate"]
    curves = {row: curves_of(results, model, row, rate) for row in rows}
    last = max((max(c) for c in curves[first].values()), default=0)
    drawn = [row for row in rows if curves[row]
             and all(max(c) == last for c in curves[row].values())]
    seeds = set.intersection(*(set(curves[row]) for row in drawn)) if drawn else set()
    axis.axhline(0, color=color_of(results, first), linewidth=1, label=first)
    ends = [0]
    for row in drawn:
        lost = sum(len(runs_at(results, model, r, rate, "diverged")) for r in (row, first))
        sides = [{s: curves[r][s] for s in seeds} for r in (row, first)]
        tokens = sorted(set.intersection(*(set(c) for side in sides for c in side.values()))
                        if seeds else ())
        means = [paired(*({s: c[t] for s, c in side.items()} for side in sides))["difference"]
                 for t in tokens]
        if row != first and means:
            axis.plot(tokens, means, color=color_of(results, row),
                      label=f"{row}, without {lost} diverged" if lost else row)
            ends.append(means[-1])
    # early losses differ by far more than the last ones
    margin = 0.2 * (max(ends) - min(ends)) + 0.004
    title = f"{model}, " if len(results["results"]) > 1 else ""
    axis.set(ylim=(min(ends) - margin, max(ends) + margin), xlabel="tokens",
             ylabel=f"loss − loss of {first}, {OURS}")
    axis.set_title(f"{title}mean of {len(seeds)} seeds", fontsize=9)
    axis.xaxis.set_major_formatter(count)
    legend(axis, 2)


# ---- rates, sizes, norms -------------------------------------------------------------------------

def learning_rates(results):
    """Terminal loss over the learning rate, a line a row: the mean of the seeds that a row has at
    every rate, seeds as dots; the line stops before a rate at which a run diverged."""
    figure, axes = plt.subplots(1, len(results["results"]), figsize=(WIDTH, 5),
                                layout="constrained", squeeze=False)
    for axis, model in zip(axes.flat, results["results"]):
        grid = sorted({run["learning_rate"] for run in results["runs"]})
        for row in results["rows"]:
            color = color_of(results, row)
            found = {rate: {run["seed"]: run["val_loss"]
                            for run in runs_at(results, model, row, rate)} for rate in grid}
            found = {rate: losses for rate, losses in found.items() if losses}
            whole = {rate: losses for rate, losses in found.items()
                     if not runs_at(results, model, row, rate, "diverged")}
            seeds = set.intersection(*map(set, whole.values())) if whole else set()
            means = {rate: statistics.mean(losses[s] for s in seeds)
                     for rate, losses in whole.items() if seeds}
            axis.plot(list(means), list(means.values()), color=color, label=row)
            for rate, losses in found.items():
                axis.plot([rate] * len(losses), list(losses.values()), "o", color=color,
                          markersize=3, alpha=0.6)
        axis.set(xscale="log", xlabel="peak learning rate", title=model,
                 ylabel=f"terminal validation loss, {OURS}")
        axis.set_xticks(grid, [f"{rate:g}" for rate in grid])
        axis.minorticks_off()
        legend(axis, 3)
    return figure


def scaling(results):
    """Left: terminal loss over compute, both axes logarithmic, with the fits L = a C^-b, which end
    where their sizes end; a size that no fit has is hollow. Right: the difference at each size."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 5), layout="constrained",
                                width_ratios=(1, 1.3))
    laws, fitted = {}, set()
    for fit in results["fits"]:
        fitted |= set(fit["models"])
        for law, row in zip(fit["laws"], (fit["other"], fit["row"])):
            laws.setdefault(row, (law, fit["models"]))
    for row in results["rows"]:
        color, label = color_of(results, row), row
        for model, found in results["results"].items():
            at = found["rows"].get(row, {}).get("tuned", {})
            if at.get("loss"):
                face = color if model in fitted else "white"
                axes[0].loglog(results["models"][model]["flops"], at["loss"], "o", color=color,
                               markerfacecolor=face, label=label)
                label = None
        if row in laws:
            (a, b), models = laws[row]
            compute = [results["models"][model]["flops"] for model in models]
            ends = [min(compute), max(compute)]
            axes[0].plot(ends, [a * c ** -b for c in ends], "--", color=color, linewidth=1,
                         label=f"{a:.3g} C^−{b:.4f}")
    axes[0].set(xlabel="training compute (FLOPs)", ylabel=f"terminal validation loss, {OURS}")
    axes[0].yaxis.set_major_locator(plt.MaxNLocator(8))
    axes[0].yaxis.set_major_formatter("{x:.2f}")
    axes[0].yaxis.set_minor_formatter("")
    axes[0].xaxis.set_minor_formatter("")
    legend(axes[0], 2)
    pooled = [(f"mean of {fit['sizes']} sizes: {fit['row']} against {fit['other']}", fit["row"],
               {**fit["gain"], "seeds": "all"}, None) for fit in results["fits"]]
    forest_panel(axes[1], results, [*((label, row, found, None) for label, row, found, _ in
                                      compared(results)), *pooled])
    return figure


def matrix_norms(results):
    """‖W‖ over steps for the matrices that the study names, and its growth a step; a line a matrix,
    of the first seed."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 4.5), layout="constrained")
    run = next((run for run in results["runs"] if run.get("norms")), {"norms": {}})
    for name, points in run["norms"].items():
        steps, norms = zip(*points)
        axes[0].plot(steps, norms, label=f"W_{name.upper()}")
        growth = [(b - a) / (t - s) for (s, a), (t, b) in zip(points, points[1:])]
        axes[1].plot(steps[1:], growth, label=f"W_{name.upper()}")
    axes[0].set(xlabel="step", ylabel="Frobenius norm")
    axes[1].set(xlabel="step", ylabel="growth of the norm a step")
    axes[1].axhline(0, color="black", linewidth=0.5)
    for axis in axes:
        legend(axis, 3)
    return figure
