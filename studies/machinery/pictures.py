"""
The pictures of a study, drawn from its results' JSON only, 1000 pixels wide: loss relative to a row
over tokens, losses over learning rates, scaling fits, norms of matrices.
"""
import statistics

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from lib.disk import write_whole  # noqa: E402
from studies.machinery.evidence import half_width, paired  # noqa: E402
from studies.machinery.tables import paper_value  # noqa: E402

DPI, WIDTH = 100, 10  # inches


def draw(results, path):
    """Write the picture that the study asks for."""
    figure = {"relative loss": relative_loss, "learning rates": learning_rates, "scaling": scaling,
              "matrix norms": matrix_norms}[results["picture"]](results)
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
    return {run["seed"]: {t: loss for t, loss in run["curve"] if loss is not None}
            for run in runs_at(results, model, row, rate)}


def relative_loss(results):
    """A panel for each model and each of the study's panels: the validation loss minus that of the
    panel's first row, paired by seed, at the tuned rate."""
    panels = [(model, rows) for model in results["results"] for rows in results["panels"]
              if {*rows} & {*results["results"][model].get("rows", rows)}]
    columns, lines = min(2, len(panels)), -(-len(panels) // 2)
    figure, axes = plt.subplots(lines, columns, figsize=(WIDTH, 4.2 * lines), layout="constrained",
                                squeeze=False)
    figure.get_layout_engine().set(w_pad=0.12)
    marked = [relative_panel(axis, results, model, rows)
              for axis, (model, rows) in zip(axes.flat, panels)]
    for axis in axes.flat[len(panels):]:
        axis.remove()
    note = "bars at the end: 95% interval of the difference, paired by seed"
    figure.supxlabel(note + ("; marks beyond the edge: the paper's" if any(marked) else ""),
                     fontsize=8)
    return figure


def relative_panel(axis, results, model, rows):
    """Draw one panel: the mean over seeds, at the end its 95% interval, and the paper's difference
    beyond the edge. A row that trains for longer than the first is not drawn: it cannot be compared
    token by token. Returns whether there is a mark of the paper's."""
    first, rate = rows[0], results["results"][model]["tuned_rate"]
    reference, ends, marked = curves_of(results, model, first, rate), [0], False
    axis.axhline(0, color="black", linewidth=1, label=first)
    for place, row in enumerate(rows[1:]):
        color = f"C{(list(results['rows']).index(row) - 1) % 10}"  # the same one in all panels
        points = compared(curves_of(results, model, row, rate), reference)
        if not points:
            continue
        lost = sum(len(runs_at(results, model, r, rate, "diverged")) for r in (row, first))
        axis.plot(*zip(*((t, p["difference"]) for t, p in points)), color=color,
                  label=f"{row}, without {lost} diverged" if lost else row)
        end, last = points[-1]
        ends.append(last["difference"])
        if last["low"] is not None and not lost:
            axis.plot([end * (1.01 + 0.012 * place)] * 2, [last["low"], last["high"]], color=color)
            ends += [last["low"], last["high"]]
        for c in results["results"][model]["comparisons"]:
            if (c["row"], c["other"]) == (row, first) and c["paper"]:
                ends.append(paper_value(c["paper"], model))
                axis.plot([1.0, 1.04], [ends[-1]] * 2, color=color, linewidth=3, clip_on=False,
                          transform=axis.get_yaxis_transform())
                marked = True
    if marked:
        axis.plot([], [], color="gray", linewidth=3, label="the paper's, at its size")
    margin = 0.2 * (max(ends) - min(ends)) + 0.004  # early losses differ by far more than the last
    axis.set(ylim=(min(ends) - margin, max(ends) + margin), xlabel="tokens",
             ylabel=f"loss − loss of {first}",
             title=model if len(results["results"]) > 1 else None)
    axis.xaxis.set_major_formatter(count)
    legend(axis, 2)
    return marked


def compared(curves, reference):
    """[(tokens, `paired`)] of two rows' curves where both have a loss; [] if one is longer."""
    every = [*curves.values(), *reference.values()]
    tokens = sorted(set.intersection(*map(set, every))) if curves and reference else []
    if not tokens or any(max(c) != tokens[-1] for c in curves.values()):
        return []
    points = [(t, paired(*({s: c[t] for s, c in side.items()} for side in (curves, reference))))
              for t in tokens]
    return [(t, p) for t, p in points if p]


def learning_rates(results):
    """Terminal loss over the learning rate, a line a row, seeds as dots; the line stops before a
    rate at which a run diverged."""
    figure, axes = plt.subplots(1, len(results["results"]), figsize=(WIDTH, 5),
                                layout="constrained", squeeze=False)
    for axis, model in zip(axes.flat, results["results"]):
        grid = sorted({run["learning_rate"] for run in results["runs"]})
        for color, row in enumerate(results["rows"]):
            found = {rate: [run["val_loss"] for run in runs_at(results, model, row, rate)]
                     for rate in grid}
            whole = {rate: statistics.mean(losses) for rate, losses in found.items()
                     if losses and not runs_at(results, model, row, rate, "diverged")}
            axis.plot(whole.keys(), whole.values(), color=f"C{color}", label=row)
            dots = [(rate, loss) for rate, losses in found.items() for loss in losses]
            axis.plot(*(zip(*dots) if dots else ([], [])), "o", color=f"C{color}", markersize=3,
                      alpha=0.6)
        axis.set(xscale="log", xlabel="peak learning rate", title=model,
                 ylabel="terminal validation loss")
        axis.set_xticks(grid, [f"{rate:g}" for rate in grid])
        axis.minorticks_off()
        legend(axis, 3)
    return figure


def scaling(results):
    """Left: terminal loss over compute, both axes logarithmic, with the fits L = a C^-b. Right: the
    difference at each size with its 95% interval, dashed the mean over sizes."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 5), layout="constrained")
    for color, row in enumerate(results["rows"]):
        points = [(results["models"][model]["flops"], found["rows"][row]["tuned"]["loss"])
                  for model, found in results["results"].items()
                  if found["rows"].get(row, {}).get("tuned", {}).get("loss")]
        if points:
            axes[0].loglog(*zip(*points), "o", color=f"C{color}", label=row)
        laws = [law for fit in results["fits"] for law, name in
                zip(fit["laws"], (fit["other"], fit["row"])) if name == row]
        if laws and points:
            (a, b), compute = laws[0], [c for c, _ in points]
            ends = [min(compute), max(compute)]
            axes[0].plot(ends, [a * c ** -b for c in ends], "--", color=f"C{color}", linewidth=1,
                         label=f"{a:.3g} C^−{b:.4f}")
    axes[0].set(xlabel="training compute (FLOPs)", ylabel="terminal validation loss")
    axes[0].yaxis.set_major_locator(plt.MaxNLocator(8))
    axes[0].yaxis.set_major_formatter("{x:.2f}")
    axes[0].yaxis.set_minor_formatter("")
    legend(axes[0], 2)

    for place, fit in enumerate(results["fits"]):
        color = f"C{list(results['rows']).index(fit['other'])}"
        points = [(results["models"][model]["flops"] * 1.12 ** place, c["tuned"])
                  for model, found in results["results"].items() for c in found["comparisons"]
                  if (c["row"], c["other"]) == (fit["row"], fit["other"])]
        points = [(compute, p) for compute, p in points if half_width(p)]
        axes[1].errorbar([compute for compute, _ in points], [p["difference"] for _, p in points],
                         [half_width(p) for _, p in points], fmt="o", color=color,
                         label=f"{fit['row']} minus {fit['other']}")
        axes[1].axhline(fit["gain"]["difference"], color=color, linestyle="--", linewidth=1)
    axes[1].axhline(0, color="black", linewidth=1)
    axes[1].set(xscale="log", xlabel="training compute (FLOPs)", ylabel="difference of the loss",
                title="bars: 95% interval, dashed: the mean over sizes")
    axes[1].title.set_fontsize(9)
    legend(axes[1], 1)
    for axis in axes:
        axis.xaxis.set_minor_formatter("")
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
