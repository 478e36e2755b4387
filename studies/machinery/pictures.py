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
from studies.machinery.tables import OURS, comparisons_of, signed  # noqa: E402

DPI, WIDTH = 100, 10  # inches
# the rows that several studies have; a study's other rows take what is left, in their order
COLORS = {"baseline": "black", "baseline without decay on γ": "gray", "unified": "C0",
          "no scale vectors": "C5", "HG": "C2", "HG + DNP": "C1", "HG + DNP + OR": "C4",
          "unified but the head": "C9", "Q/K-norm without decay on γ": "C3",
          "HG + DNP + IWD": "C8", "HG + DP + OR": "C6"}
OTHERS = ("darkgreen", "deeppink", "gold", "navy", "salmon", "purple", "teal", "olive", "peru",
          "crimson", "steelblue", "orchid", "darkkhaki", "sienna", "slategray")


def color_of(results, row):
    others = [label for label in results["rows"] if label not in COLORS]
    return COLORS.get(row) or OTHERS[others.index(row) % len(OTHERS)]


def draw(results, path):
    """Write the picture that the study asks for."""
    makers = {"relative loss": relative_loss, "learning rates": learning_rates, "scaling": scaling,
              "matrix norms": matrix_norms, "forest": forest}
    figure = makers[results["picture"]](results)
    figure.suptitle(f"{results['title']} ({results['scale']} scale)", fontsize=11)
    write_whole(path, lambda f: figure.savefig(f, dpi=DPI, format="png"))
    plt.close(figure)


def finish(axis, columns=2, **words):
    """Labels, a grid, and the legend below the axes, where it covers no curve."""
    axis.set(**words)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=columns, fontsize=8,
                    frameon=False)


def runs_at(results, model, row, rate):
    """{seed: run} of the finished runs of a row at a learning rate."""
    return {run["seed"]: run for run in results["runs"] if not run.get("tuning") and (
        run["model"], run["row"], run["learning_rate"], run["state"]) == (model, row, rate, "done")}


# ---- differences with their intervals ------------------------------------------------------------

def forest_panel(axis, results, lines):
    """A line a comparison: the mean difference, its 95% interval, and a cross at the paper's value.
    lines [(model, row, other row, paired, paper's value or None)], the first on top."""
    axis.axvline(0, color="black", linewidth=1)
    models, others = {model for model, *_ in lines}, {other for _, _, other, *_ in lines}
    labels = []
    for place, (model, row, other, found, paper) in enumerate(lines):
        color = color_of(results, row)
        if found["low"] is not None:
            axis.plot([found["low"], found["high"]], [place, place], color=color, linewidth=2)
        axis.plot(found["difference"], place, "o", color=color, markersize=5)
        if paper is not None:
            axis.plot(paper, place, "x", color="black", markersize=6)
        # what all lines share stands below them, or nowhere
        label = row
        if len(models) > 1:
            label = f"{model}: {label}"
        if len(others) > 1:
            label += f" against {other}"
        labels.append(f"{label}\n{signed(found['difference'])}, {found['seeds']} seeds")
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    what = "difference"
    if len(others) == 1:
        what = f"difference from {others.pop()}"
    what += f", {OURS}, and its 95% over seeds"
    if any(paper is not None for *_, paper in lines):
        what += "\n×: the paper's, as the same part of the loss"
    axis.set_xlabel(what, fontsize=8)
    axis.xaxis.set_major_locator(plt.MaxNLocator(5))
    axis.grid(alpha=0.3, axis="x")


def compared(results, protocol="tuned", others=()):
    """The comparisons of a study as forest_panel takes them; others: only those against these."""
    lines = []
    for model, c in comparisons_of(results):
        found = c.get(protocol) or c.get("tuned")
        if found and found["difference"] is not None and (not others or c["other"] in others):
            # the paper's value in its own unit says nothing here: the same part of the loss
            where = model if model in c["paper"] else next(iter(c["paper"]), None)
            whole = results["paper_losses"].get(where)
            paper = c["paper"][where] / whole * found["of"] if whole else None
            lines.append((model, c["row"], c["other"], found, paper))
    return lines


def forest(results):
    """Every row against the first, each at its own rate where it has one, and below that, hollow,
    both at the first row's rate where that is another difference."""
    first = next(iter(results["rows"]))
    lines = compared(results, "own", [first])
    figure, axis = plt.subplots(figsize=(WIDTH, 1.6 + 0.42 * max(4, len(lines))),
                                layout="constrained")
    forest_panel(axis, results, lines)
    tuned = {line[:2]: line[3] for line in compared(results, "tuned", [first])}
    hollow = [(place + 0.22, row, tuned[model, row])
              for place, (model, row, _, own, _) in enumerate(lines)
              if tuned.get((model, row), own)["difference"] != own["difference"]
              and tuned[model, row]["low"] is not None]
    for place, row, found in hollow:
        color = color_of(results, row)
        axis.plot([found["low"], found["high"]], [place, place], color=color, linewidth=1)
        axis.plot(found["difference"], place, "o", color=color, mfc="white", markersize=5)
    if hollow:
        axis.set_xlabel(f"{axis.get_xlabel()}\n○: at the rate of {first}", fontsize=8)
    if times := results["step_times"]:
        axis.text(1.02, 1.01, times["what"], fontsize=7, va="bottom", transform=axis.transAxes)
        for place, (_, row, *_) in enumerate(lines):
            axis.text(1.02, place, times.get(row, "–"), fontsize=7, va="center",
                      transform=axis.get_yaxis_transform())
    return figure


def relative_loss(results):
    """A panel for each model and each of the study's panels, and below all comparisons."""
    panels = [(model, rows) for model, at in results["results"].items()
              for rows in results["panels"] if set(rows) & set(at["rows"])]
    lines, height = compared(results), -(-len(panels) // 2)
    heights = [4.2] * height + [0.8 + 0.36 * len(lines)]
    figure = plt.figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(height + 1, min(2, len(panels)), height_ratios=heights)
    for place, (model, rows) in enumerate(panels):
        relative_panel(figure.add_subplot(grid[place // 2, place % 2]), results, model, rows)
    forest_panel(figure.add_subplot(grid[height, :]), results, lines)
    return figure


def relative_panel(axis, results, model, rows):
    """The validation loss minus that of the panel's first row over tokens, the mean over the seeds
    that both have, at the tuned rate. A row that trains for longer is not drawn: it cannot be
    compared token by token."""
    rate = results["results"][model]["tuned_rate"]
    curves = {row: {seed: dict(run["curve"]) for seed, run in
                    runs_at(results, model, row, rate).items()
                    if None not in dict(run["curve"]).values()} for row in rows}
    first, ends = curves[rows[0]], [0.0]
    axis.axhline(0, color=color_of(results, rows[0]), linewidth=1, label=rows[0])
    for row in rows[1:]:
        seeds = [seed for seed in first if seed in curves[row]]
        if seeds and all(max(curves[row][seed]) == max(first[seed]) for seed in seeds):
            tokens = list(first[seeds[0]])
            means = [statistics.mean(curves[row][seed][t] - first[seed][t] for seed in seeds)
                     for t in tokens]
            few = f", {len(seeds)} seeds" if len(seeds) < len(first) else ""
            axis.plot(tokens, means, color=color_of(results, row), label=row + few)
            ends.append(means[-1])
    # early losses differ by far more than the last ones
    margin = 0.2 * (max(ends) - min(ends)) + 0.004
    finish(axis, ylim=(min(ends) - margin, max(ends) + margin), xlabel="tokens",
           ylabel=f"loss − loss of {rows[0]}, {OURS}", title=f"{model}, {len(first)} seeds")


# ---- rates, sizes, norms -------------------------------------------------------------------------

def learning_rates(results):
    """Terminal loss over the learning rate, a line a row: the mean of the seeds that a row has at
    every rate, seeds as dots; the line leaves out a rate at which a run diverged."""
    figure, axes = plt.subplots(1, len(results["results"]), figsize=(WIDTH, 5),
                                layout="constrained", squeeze=False)
    rates = sorted({run["learning_rate"] for run in results["runs"]})
    for axis, model in zip(axes.flat, results["results"]):
        for row in results["rows"]:
            color = color_of(results, row)
            found = {rate: runs for rate in rates if (runs := runs_at(results, model, row, rate))}
            lost = {run["learning_rate"] for run in results["runs"]
                    if (run["model"], run["row"], run["state"]) == (model, row, "diverged")}
            whole = {rate: runs for rate, runs in found.items() if rate not in lost}
            seeds = set.intersection(*map(set, whole.values())) if whole else ()
            means = {rate: statistics.mean(runs[seed]["val_loss"] for seed in seeds)
                     for rate, runs in whole.items() if seeds}
            axis.plot(list(means), list(means.values()), color=color, label=row)
            for rate, runs in found.items():
                axis.plot([rate] * len(runs), [run["val_loss"] for run in runs.values()], "o",
                          color=color, markersize=3, alpha=0.6)
        axis.set_xscale("log")
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.minorticks_off()
        finish(axis, 3, xlabel="peak learning rate", title=model,
               ylabel=f"terminal validation loss, {OURS}")
    return figure


def scaling(results):
    """Left: terminal loss over compute, both axes logarithmic, with the fits L = a C^-b, which end
    where their sizes end; a size that no fit has is hollow. Right: the difference at each size."""
    lines = compared(results)
    height = max(5, 1.2 + 0.38 * (len(lines) + len(results["fits"])))
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, height), layout="constrained",
                                width_ratios=(1, 1.3))
    fits, fitted = results["fits"], {model for fit in results["fits"] for model in fit["models"]}
    for row in results["rows"]:
        color = color_of(results, row)
        for model, found in results["results"].items():
            at = found["rows"].get(row, {}).get("tuned", {})
            if at.get("loss"):
                axes[0].loglog(results["models"][model]["flops"], at["loss"], "o", color=color,
                               markerfacecolor=color if model in fitted else "white")
        law = next(((fit["laws"][side], fit["models"]) for fit in fits
                    for side, label in enumerate((fit["other"], fit["row"])) if label == row), None)
        if law:
            (a, b), models = law
            compute = sorted(results["models"][model]["flops"] for model in models)
            axes[0].plot(compute, [a * c ** -b for c in compute], "--", color=color, linewidth=1,
                         label=f"{row}: {a:.3g} C^−{b:.4f}")
    axes[0].yaxis.set_major_locator(plt.MaxNLocator(8))
    axes[0].yaxis.set_major_formatter("{x:.2f}")
    axes[0].yaxis.set_minor_formatter("")
    finish(axes[0], 1, xlabel="training compute (FLOPs)",
           ylabel=f"terminal validation loss, {OURS}")
    means = [(f"mean of {fit['sizes']} sizes", fit["row"], fit["other"],
              {**fit["gain"], "seeds": "all"}, None) for fit in fits]
    # where the paper's sizes are none of ours, it has no value to compare with
    forest_panel(axes[1], results, [*((*line[:4], None) for line in lines), *means])
    return figure


def matrix_norms(results):
    """‖W‖ over steps for the matrices that the study names, of the first seed."""
    figure, axis = plt.subplots(figsize=(WIDTH, 4.5), layout="constrained")
    run = next((run for run in results["runs"] if run.get("norms")), {"norms": {}})
    for name, points in run["norms"].items():
        axis.plot(*zip(*points), label=f"W_{name.upper()}")
    finish(axis, 3, xlabel="step", ylabel="Frobenius norm")
    return figure
