"""
Draw runs: loss curves, how each scale vector moved, branch by branch, and the norms of the matrices.

  python -m study.report out/quickstart_baseline out/quickstart              writes the last run's report.png, prints a table
  python -m study.report out/quickstart --out figures/quickstart.png

Reads log.jsonl and summary.json of each run folder and nothing else. A last line that is half written, as a killed run leaves it, is
passed over. Runs whose folders have one name are told apart by the folders above them.
"""
import argparse
import json
import re
import sys
from pathlib import Path

from lib.disk import write_whole

COLUMNS, PIXELS, DPI = 4, 1000, 100
NEEDED = {"train": ("step", "loss"), "eval": ("step", "val_loss"), "scale": ("step", "name", "mean", "std"),
          "matrix": ("step", "name", "norm")}  # what is read of each event


def read_log(run):
    """{event: [record, ...]} of a run's log.jsonl. Raises ValueError, one line, on a line that is no record, but for an unfinished last."""
    path, events = Path(run) / "log.jsonl", {}
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {run} is no run folder of train.py")
    text = path.read_bytes().decode(errors="replace")
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
            for key in NEEDED.get(record["event"], ()):
                if not isinstance(record[key], str if key == "name" else (int, float, type(None))):  # KeyError if it is not there
                    raise TypeError(key)
            events.setdefault(record["event"], []).append(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            if number == len(lines):  # no newline after it: it is still being written, or never was in full
                break
            raise ValueError(f"{path}, line {number}: not a log record") from None
    if not events.get("train"):
        raise ValueError(f"{path} has no training step yet")
    return events


def names_of(runs):
    """A name for each run: the end of its path, as long as it must be to differ from the others'. The same folder twice counts once."""
    paths = list(dict.fromkeys(Path(run).resolve() for run in runs))
    names = {}
    for path in paths:
        length = 1
        while any(other != path and other.parts[-length:] == path.parts[-length:] for other in paths):
            length += 1
        names["/".join(path.parts[-length:])] = path
    return names


def smooth(values, share=0.02):
    """Running mean over a window of `share` of all values (None, a step that was not made, is left out)."""
    width, window, out = max(1, int(share * len(values))), [], []
    for value in values:
        window = (window + [value])[-width:]
        known = [v for v in window if v is not None]
        out.append(sum(known) / len(known) if known else float("nan"))
    return out


def finite(records):
    """The records of scale or matrix events without those that hold a mean, a deviation or a norm that was not finite (None), and without
    matrices of norm 0, which start nowhere."""
    return [r for r in records if all(r.get(key, 0) is not None for key in ("mean", "std")) and r.get("norm", 1)]


def layer_of(name):
    """The layer in a name such as layers.3.attn.qkv.scale_in.q, or 0."""
    layer = re.match(r"layers\.(\d+)\.", name)
    return int(layer[1]) if layer else 0


def by_branch(records):
    """{branch and side: {layer: [record, ...]}} from names such as layers.3.attn.qkv.scale_in.q or head.scale_in.head."""
    out = {}
    for record in records:
        side, _, branch = re.sub(r"^layers\.\d+\.", "", record["name"]).rpartition(".")
        label = f"{branch} {'in' if side.endswith('scale_in') else 'out'}" if "scale_" in side else side.rpartition(".")[2]
        out.setdefault(label, {}).setdefault(layer_of(record["name"]), []).append(record)
    return out


def by_matrix(records):
    """{"‖W_q‖": {layer: [record, ...]}} of the matrix events."""
    out = {}
    for record in records:
        parts = record["name"].split(".")
        branch = parts[-1] if parts[-1] != "weight" else parts[-2]
        out.setdefault(f"‖W_{branch}‖", {}).setdefault(layer_of(record["name"]), []).append(record)
    return out


def draw_losses(axis, logs):
    for color, (name, log) in enumerate(logs.items()):
        axis.plot([r["step"] for r in log["train"]], smooth([r["loss"] for r in log["train"]]), color=f"C{color}", alpha=0.5, linewidth=1)
        evals = [r for r in log.get("eval", []) if r["val_loss"] is not None]
        final = f", {evals[-1]['val_loss']:.4f} at the end" if evals else ""
        axis.plot([r["step"] for r in evals], [r["val_loss"] for r in evals], "o-", color=f"C{color}", markersize=3, label=f"{name}{final}")
    tail = [r["loss"] for log in logs.values() for r in log["train"][len(log["train"]) // 10:] if r["loss"] is not None]
    if tail:
        axis.set_ylim(min(tail) - 0.05, max(tail) + 0.05)
    axis.set(xlabel="step", ylabel="loss (nats per token)", title="validation loss (dots), and training loss as a running mean")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def draw_panels(plt, figure, grid, name, panels, limits, band):
    """Panels of one run, at most COLUMNS a row, all with the same axes. band: mean ± std of γ; otherwise a norm relative to its start."""
    for place, (branch, layers) in enumerate(panels.items()):
        axis = figure.add_subplot(grid[place // COLUMNS, place % COLUMNS])
        for layer, records in sorted(layers.items()):
            color = plt.cm.viridis(layer / max(layers) if max(layers) else 0.0)
            steps = [r["step"] for r in records]
            if band:
                mean, std = ([r[key] for r in records] for key in ("mean", "std"))
                axis.plot(steps, mean, color=color, linewidth=1)
                axis.fill_between(steps, [m - s for m, s in zip(mean, std)], [m + s for m, s in zip(mean, std)], color=color, alpha=0.12)
            else:
                axis.plot(steps, [r["norm"] / records[0]["norm"] for r in records], color=color, linewidth=1)
        axis.set_title(branch, fontsize=8, pad=2)
        axis.set(xlim=limits[0], ylim=limits[1])
        axis.tick_params(labelsize=7, labelleft=place % COLUMNS == 0, labelbottom=place + COLUMNS >= len(panels))
        axis.axhline(1, color="gray", linewidth=0.5)
        if place % COLUMNS == 0:
            axis.set_ylabel("γ: mean ± std" if band else "norm / its start", fontsize=7)
        if place == 0:
            heading = axis.annotate(name, (0, 1), (0, 13), xycoords="axes fraction", textcoords="offset points", fontsize=9, weight="bold")
            heading.set_in_layout(False)  # the panel does not widen with it


def limits_of(groups, band):
    """((first step, last), (lowest value, highest)) over the panels of all runs, so that they can be compared at a glance."""
    steps, values = [], []
    for panels in groups:
        for layers in panels.values():
            for records in layers.values():
                steps += [r["step"] for r in records]
                for r in records:
                    values += [r["mean"] - r["std"], r["mean"] + r["std"]] if band else [r["norm"] / records[0]["norm"]]
    low, high = min([1, *values]), max([1, *values])
    return (min(steps), max([*steps, min(steps) + 1])), (low - 0.05 * (high - low) - 0.01, high + 0.05 * (high - low) + 0.01)


def report(runs, path):
    """Write the picture of the runs to `path`: losses on top, then for each run a panel for each branch's γ, then one for each matrix; a
    line a layer. At most PIXELS wide."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    logs = {name: read_log(run) for name, run in names_of(runs).items()}
    blocks = []  # (name, panels, limits, band)
    for event, split, band in (("scale", by_branch, True), ("matrix", by_matrix, False)):
        groups = {name: panels for name, log in logs.items() if (panels := split(finite(log.get(event, []))))}
        if groups:
            limits = limits_of(groups.values(), band)
            blocks += [(f"{name}: {'scale vectors' if band else 'matrices'}", panels, limits, band) for name, panels in groups.items()]
    heights = [3.6, *(0.5 + 1.25 * -(-len(panels) // COLUMNS) for _, panels, _, _ in blocks)]
    figure = plt.figure(figsize=(PIXELS / DPI, sum(heights) + 0.4), layout="constrained")
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    draw_losses(figure.add_subplot(grid[0]), logs)
    for place, (name, panels, limits, band) in enumerate(blocks, 1):
        draw_panels(plt, figure, grid[place].subgridspec(-(-len(panels) // COLUMNS), COLUMNS), name, panels, limits, band)
    if blocks:
        figure.supxlabel("step; a line is a layer, dark the first, bright the last", fontsize=8)
    kind = Path(path).suffix[1:] or "png"
    write_whole(path, lambda f: figure.savefig(f, dpi=DPI, format=kind))
    plt.close(figure)


def table(runs):
    """One line a run: what it ended with. Raises ValueError, one line, if a summary.json is not train.py's."""
    names = names_of(runs)
    width = max(3, *map(len, names))
    lines = [f"{'run':<{width}} {'val_loss':>10} {'bits/byte':>9} {'params':>13} {'scale':>9} {'tokens':>14} {'tokens/s':>9}"]
    for name, run in names.items():
        path = run / "summary.json"
        if not path.is_file():
            lines.append(f"{name:<{width}} not finished")
            continue
        try:
            s = json.loads(path.read_text("utf-8"))
            loss = "not finite" if s["val_loss"] is None else f"{s['val_loss']:.4f}"
            bpb = f"{s['val_bpb']:.4f}" if s["val_bpb"] else "-"
            lines.append(f"{name:<{width}} {loss:>10} {bpb:>9} {s['params']:>13,} {s['scale_params']:>9,} "
                         f"{s['tokens']:>14,} {s['tokens_per_s']:>9,.0f}")
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path} is not what train.py leaves at the end of a run: leave this run out, or run it anew") from None
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m study.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    parser.add_argument("--out", help="the picture to write (default: report.png in the last run's folder)")
    args = parser.parse_args(argv)
    try:
        print(table(args.runs))
        out = args.out or Path(args.runs[-1]) / "report.png"
        report(args.runs, out)
        print(f"wrote {out}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except ImportError:
        sys.exit("error: the picture needs matplotlib: pip install matplotlib")
    except KeyboardInterrupt:
        sys.exit("stopped: nothing was written")


if __name__ == "__main__":
    main()
