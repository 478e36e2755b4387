"""
Draw runs: losses over steps and over time, and how each scale vector and matrix moved.

  python -m study.report out/quickstart                           writes out/quickstart/report.png
  python -m study.report out/baseline out/unified --out=both.png  compares runs

Reads log.jsonl and summary.json of each run folder. Where the log has them, it draws "alpha",
the size of α, and "beta" of `scale` events; "update", the size of a step over the matrix's, of
`matrix` events; "logit_scale" of `eval` events. Runs whose folders have one name are told apart by
the folders above them.
"""
import argparse
import json
import re
import sys
from pathlib import Path

from lib.disk import write_whole

COLUMNS, PIXELS, DPI = 4, 1000, 100
WINDOW = 50  # steps of the running mean of training losses, the same for all runs
# what is read of each event
LOGGED = {"train": ("step", "loss"), "eval": ("step", "tokens", "val_loss"),
          "scale": ("step", "name", "mean", "std"), "matrix": ("step", "name", "norm")}
# event, key, what the axis says
SECTIONS = (("scale", "mean", "γ: mean ± std"), ("scale", "beta", "β"), ("scale", "alpha", "α"),
            ("matrix", "norm", "norm / its start"), ("matrix", "update", "update / norm"))


def read_log(path):
    """{event: [record, ...]} of a log.jsonl. A line that is no record, such as a last one that a
    killed run wrote in part, is passed over."""
    events = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
            if all(key in record for key in LOGGED[record["event"]]):
                events.setdefault(record["event"], []).append(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return events


def log_of(run):
    """{event: [record, ...]} of a run. Raises an error if it has no training step."""
    path = Path(run) / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {run} is no run folder of train.py")
    events = read_log(path)
    if not events.get("train"):
        raise ValueError(f"{path} has no training step yet")
    return events


def names_of(runs):
    """{name: folder}: the end of each path, as long as it must be to differ from the others'. The
    same folder twice counts once."""
    paths = list(dict.fromkeys(Path(run).resolve() for run in runs))
    names = {}
    for path in paths:
        length = 1
        while any(o != path and o.parts[-length:] == path.parts[-length:] for o in paths):
            length += 1
        names["/".join(path.parts[-length:])] = path
    return names


def smooth(values):
    """Running mean over WINDOW values; None, a step that was not made, is left out."""
    out = []
    for end in range(1, len(values) + 1):
        known = [v for v in values[max(0, end - WINDOW):end] if v is not None]
        out.append(sum(known) / len(known) if known else float("nan"))
    return out


def split_name(name):
    """("attn.q.weight", 3) of layers.3.attn.q.weight; what is in no layer counts as layer 0."""
    layer = re.match(r"layers\.(\d+)\.", name)
    return name[layer.end() if layer else 0:], int(layer[1]) if layer else 0


def curves(records, key):
    """{name within a layer: {layer: [(step, value, half a band), ...]}} of the records in which the
    key is a number. The band is one standard deviation of γ; a norm is divided by its first."""
    out = {}
    for record in records:
        if record.get(key) is not None and record.get("std", 0) is not None:
            label, layer = split_name(record["name"])
            band = record["std"] if key == "mean" else 0.0
            points = out.setdefault(label, {}).setdefault(layer, [])
            points.append((record["step"], record[key], band))
    for layers in out.values() if key == "norm" else ():
        for layer, points in layers.items():
            start = points[0][1]  # a matrix that starts at 0 has no relative norm
            layers[layer] = [(s, v / start, b) for s, v, b in points] if start else []
    return out


def seconds_at(run, log, steps):
    """Seconds of training at these steps, at the run's mean speed; None if that is not known."""
    speed = (read_summary(run) or log["train"][-1]).get("tokens_per_s")
    tokens = {r["step"]: r.get("tokens") for r in log.get("eval", [])}
    if not speed or None in tokens.values():
        return None
    return [tokens[step] / speed for step in steps]


def draw_losses(axes, logs, runs):
    """Losses over steps; validation losses over time; the logits' scale, if the log has it."""
    for color, (name, log) in enumerate(logs.items()):
        steps, losses = zip(*((r["step"], r["loss"]) for r in log["train"]))
        axes[0].plot(steps, smooth(losses), color=f"C{color}", alpha=0.5, linewidth=1)
        evals = [r for r in log.get("eval", []) if r["val_loss"] is not None]
        final = f", {evals[-1]['val_loss']:.4f} at the end" if evals else ""
        steps, losses = [r["step"] for r in evals], [r["val_loss"] for r in evals]
        style = {"color": f"C{color}", "markersize": 3, "label": f"{name}{final}"}
        axes[0].plot(steps, losses, "o-", **style)
        if seconds := seconds_at(runs[name], log, steps):
            axes[1].plot(seconds, losses, "o-", **style)
        if len(axes) > 2:
            scales = [(r["step"], r["logit_scale"]) for r in evals if r.get("logit_scale")]
            axes[2].plot(*(zip(*scales) if scales else ([], [])), "o-", **style)
    tail = [r["loss"] for log in logs.values() for r in log["train"][len(log["train"]) // 10:]
            if r["loss"] is not None]
    for axis, words in zip(axes, ("step", "seconds of training, at the mean speed", "step")):
        axis.set_xlabel(words, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[:2] if tail else ():
        axis.set_ylim(min(tail) - 0.05, max(tail) + 0.05)
    axes[0].set_ylabel("loss (nats per token)", fontsize=8)
    axes[0].set_title(f"validation (dots), training (mean of {WINDOW} steps)", fontsize=8)
    axes[1].set_title("validation over time", fontsize=8)
    if len(axes) > 2:
        axes[2].set_title("scale of the logits", fontsize=8)


def draw_section(figure, heading, words, panels, limits):
    """A run's panels of one kind, at most COLUMNS a row, all with the same axes; a line a layer."""
    from matplotlib import pyplot as plt
    figure.suptitle(heading, fontsize=9, weight="bold", x=0.01, horizontalalignment="left")
    rows = -(-len(panels) // COLUMNS)
    axes = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
    for axis, (label, layers) in zip(axes.flat, panels.items()):
        for layer, points in sorted(layers.items()):
            color = plt.cm.viridis(layer / max(1, *layers))
            steps, values, bands = zip(*points) if points else ([], [], [])
            axis.plot(steps, values, color=color, linewidth=1)
            axis.fill_between(steps, [v - b for v, b in zip(values, bands)],
                              [v + b for v, b in zip(values, bands)], color=color, alpha=0.12)
        axis.set_title(label, fontsize=7, pad=2)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    axes[0, 0].set(xlim=limits[0], ylim=limits[1])
    for row in axes:
        row[0].set_ylabel(words, fontsize=7)
    for axis in axes.flat[len(panels):]:
        axis.remove()


def limits_of(groups):
    """((first step, last), (lowest value, highest)) over the panels of all runs."""
    points = [p for panels in groups for layers in panels.values()
              for of_layer in layers.values() for p in of_layer] or [(0, 1.0, 0.0)]
    steps = [step for step, _, _ in points]
    low, high = min(v - b for _, v, b in points), max(v + b for _, v, b in points)
    margin = 0.05 * (high - low) + 0.01
    return (min(steps), max(*steps, min(steps) + 1)), (low - margin, high + margin)


def report(runs, path):
    """Write the picture of the runs: losses on top, then a block for each run and kind."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folders = names_of(runs)
    logs = {name: log_of(run) for name, run in folders.items()}
    blocks = []
    for event, key, words in SECTIONS:
        groups = {name: curves(log.get(event, []), key) for name, log in logs.items()}
        limits = limits_of(groups.values())
        blocks += [(f"{name}: {words}", words, panels, limits)
                   for name, panels in groups.items() if panels]
    heights = [3.6, *(0.5 + 1.35 * -(-len(panels) // COLUMNS) for _, _, panels, _ in blocks)]
    figure = plt.figure(figsize=(PIXELS / DPI, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    has_scale = any("logit_scale" in r for log in logs.values() for r in log.get("eval", []))
    axes = parts[0].subplots(1, 3 if has_scale else 2)
    draw_losses(axes, logs, folders)
    handles = axes[0].get_legend_handles_labels()
    parts[0].legend(*handles, loc="outside lower center", ncol=2, fontsize=8, frameon=False)
    for part, block in zip(parts[1:], blocks):
        draw_section(part, *block)
    if blocks:
        figure.supxlabel("step; a line is a layer, dark the first, bright the last", fontsize=8)
    write_whole(path, lambda f: figure.savefig(f, dpi=DPI, format=Path(path).suffix[1:] or "png"))
    plt.close(figure)


def read_summary(run):
    """A run's summary.json; None if the run has not finished."""
    path = Path(run) / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return {key: summary[key] for key in ("val_loss", "val_bpb", "params", "scale_params",
                                              "tokens", "tokens_per_s")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} is not what train.py leaves at the end of a run: leave this run "
                         "out, or run it anew") from None


def table(runs):
    """One line a run: what it ended with."""
    names = names_of(runs)
    width = max(3, *map(len, names))
    lines = [f"{'run':<{width}} {'val_loss':>10} {'bits/byte':>9} {'params':>13} {'scale':>9} "
             f"{'tokens':>14} {'tokens/s':>9}"]
    for name, run in names.items():
        s = read_summary(run)
        if s is None:
            diverged = (Path(run) / "diverged.txt").is_file()
            lines.append(f"{name:<{width}} {'diverged' if diverged else 'not finished'}")
            continue
        loss = "not finite" if s["val_loss"] is None else f"{s['val_loss']:.4f}"
        bpb = f"{s['val_bpb']:.4f}" if s["val_bpb"] else "-"
        lines.append(f"{name:<{width}} {loss:>10} {bpb:>9} {s['params']:>13,} "
                     f"{s['scale_params']:>9,} {s['tokens']:>14,} {s['tokens_per_s']:>9,.0f}")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m study.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    parser.add_argument("--out", help="the picture to write (of one run: its report.png)")
    args = parser.parse_args(argv)
    if len(args.runs) > 1 and not args.out:
        parser.error("a picture of several runs needs a place: --out=PICTURE.png")
    try:
        print(table(args.runs))
        out = args.out or Path(args.runs[0]) / "report.png"
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
