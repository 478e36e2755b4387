"""
The pictures of a study, from its results' JSON alone: relative loss over tokens as the paper draws it, losses over learning rates, scaling
fits, norms of matrices. At most 1000 pixels wide.
"""
import statistics

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from lib.disk import write_whole  # noqa: E402
from study.evidence import paired, paper_value  # noqa: E402

DPI, WIDTH = 100, 10  # 1000 pixels


def draw(results, path):
    """Write the picture that the study asks for."""
    drawn = {"relative loss": relative_loss, "learning rates": learning_rates, "scaling": scaling, "matrix norms": matrix_norms}
    figure = drawn[results["picture"]](results)
    figure.suptitle(f"{results['title']} ({results['scale']} scale)", fontsize=11)
    write_whole(path, lambda f: figure.savefig(f, dpi=DPI, format="png"))
    plt.close(figure)


def curves_of(results, model, row, rate):
    """{seed: {tokens: validation loss}}, without losses that were not finite."""
    return {run["seed"]: {t: loss for t, loss in run["curve"] if loss is not None} for run in results["runs"] if run["state"] == "done"
            and (run["model"], run["row"], run["learning_rate"]) == (model, row, rate)}


def diverged(results, model, row, rate):
    """How many runs of a row at a learning rate diverged."""
    return sum((r["model"], r["row"], r["learning_rate"], r["state"]) == (model, row, rate, "diverged") for r in results["runs"])


def relative_loss(results):
    """A panel for each model and each of the study's panels: validation loss minus that of the panel's first row, paired by seed, its mean
    over seeds, at the tuned rate, and at the end its 95% interval; the paper's terminal difference as a mark beyond the edge. Rows that
    train for longer than the first are not drawn: their curves cannot be compared token by token."""
    panels = [(model, rows) for model in results["results"] for rows in results["panels"]]
    columns, lines = min(2, len(panels)), -(-len(panels) // 2)
    figure, axes = plt.subplots(lines, columns, figsize=(WIDTH, 3.4 * lines), layout="constrained", squeeze=False)
    for axis, (model, rows) in zip(axes.flat, panels):
        rate, ends = results["results"][model]["tuned_rate"], []
        reference = curves_of(results, model, rows[0], rate)
        axis.axhline(0, color="black", linewidth=1, label=rows[0])
        for place, row in enumerate(rows[1:]):
            color = (list(results["rows"]).index(row) - 1) % 10  # a row has one colour in all panels
            others = curves_of(results, model, row, rate)
            tokens = sorted(set.intersection(*(set(c) for c in (*others.values(), *reference.values())))) if others and reference else []
            if tokens and any(max(c) != tokens[-1] for c in others.values()):
                continue
            points = [(t, paired({s: c[t] for s, c in others.items()}, {s: c[t] for s, c in reference.items()})) for t in tokens]
            points = [(t, p) for t, p in points if p]
            if not points:
                continue
            lost = diverged(results, model, row, rate) + diverged(results, model, rows[0], rate)
            axis.plot([t for t, _ in points], [p["difference"] for _, p in points], color=f"C{color}",
                      label=f"{row}, without {lost} diverged" if lost else row)
            tokens, last = points[-1]
            if last["low"] is not None and not lost:
                axis.plot([tokens * (1.01 + 0.012 * place)] * 2, [last["low"], last["high"]], color=f"C{color}", linewidth=1.5)
                ends += [last["low"], last["high"]]
            ends.append(last["difference"])
            for c in results["results"][model]["comparisons"]:
                if (c["row"], c["other"]) == (row, rows[0]) and c["paper"]:
                    ends.append(paper_value(c["paper"], model))
                    axis.plot([1.0, 1.04], [ends[-1]] * 2, color=f"C{color}", linewidth=3, clip_on=False,
                              transform=axis.get_yaxis_transform())
        if ends:  # early losses differ by far more than the last ones, which are the matter
            low, high = min(0, *ends), max(0, *ends)
            margin = 0.2 * (high - low) + 0.004
            axis.set_ylim(low - margin, high + margin)
        axis.set(xlabel="tokens", ylabel=f"loss minus that of {rows[0]}", title=model if len(results["results"]) > 1 else None)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes.flat[len(panels):]:
        axis.remove()
    figure.supxlabel("bars at the end: 95% interval of the difference, paired by seed; marks beyond the edge: the paper's", fontsize=8)
    return figure


def learning_rates(results):
    """Terminal loss over the learning rate, a line a row, its seeds as dots; no line to a rate at which a run diverged."""
    figure, axes = plt.subplots(1, len(results["results"]), figsize=(WIDTH, 4.5), layout="constrained", squeeze=False)
    for axis, model in zip(axes.flat, results["results"]):
        for color, row in enumerate(results["rows"]):
            runs = [r for r in results["runs"] if (r["model"], r["row"], r["state"]) == (model, row, "done")]
            rates = sorted(rate for rate in {r["learning_rate"] for r in runs} if not diverged(results, model, row, rate))
            means = [statistics.mean(r["val_loss"] for r in runs if r["learning_rate"] == rate) for rate in rates]
            axis.plot(rates, means, color=f"C{color}", label=row)
            axis.plot([r["learning_rate"] for r in runs], [r["val_loss"] for r in runs], "o", color=f"C{color}", markersize=3, alpha=0.6)
        axis.set(xscale="log", xlabel="peak learning rate", ylabel="terminal validation loss", title=model)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def scaling(results):
    """Terminal loss over compute, both axes logarithmic, with the fits L = a C^-b."""
    figure, axis = plt.subplots(figsize=(WIDTH * 0.7, 4.5), layout="constrained")
    for color, row in enumerate(list(results["rows"])[:2]):
        points = [(results["models"][model]["flops"], found["rows"][row]["tuned"]["loss"]) for model, found in results["results"].items()
                  if found["rows"][row].get("tuned", {}).get("loss")]
        axis.plot(*zip(*points) if points else ([], []), "o", color=f"C{color}", label=row)
        if results["fit"] and points:
            a, b = results["fit"][("baseline", "improved")[color]]
            ends = [min(c for c, _ in points), max(c for c, _ in points)]
            axis.plot(ends, [a * c ** -b for c in ends], "--", color=f"C{color}", linewidth=1, label=f"{a:.3g} C^−{b:.4f}")
    axis.set(xlabel="training compute (FLOPs)", ylabel="terminal validation loss")
    if results["runs"]:
        axis.set(xscale="log", yscale="log")
    axis.xaxis.set_minor_formatter("")
    axis.yaxis.set_major_formatter("{x:.2f}")
    axis.yaxis.set_minor_formatter("{x:.2f}")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    return figure


def matrix_norms(results):
    """‖W‖ over steps for the matrices that the study names, and its growth a step; a line a matrix, of the first seed."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 4), layout="constrained")
    run = next((r for r in results["runs"] if r.get("norms")), {"norms": {}})
    for name, points in run["norms"].items():
        steps, norms = zip(*points)
        label = f"W_{name.rpartition('.')[2].upper()}"
        axes[0].plot(steps, norms, label=label)
        axes[1].plot(steps[1:], [(b - a) / (t - s) for (s, a), (t, b) in zip(points, points[1:])], label=label)
    axes[0].set(xlabel="step", ylabel="Frobenius norm")
    axes[1].set(xlabel="step", ylabel="growth of the norm a step")
    axes[1].axhline(0, color="black", linewidth=0.5)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure
