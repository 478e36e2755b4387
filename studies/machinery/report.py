"""
Draw runs: losses over steps, how runs differ, and how each scale vector and matrix moved.

  python -m studies report out/quickstart                        writes out/quickstart/report.png
  python -m studies report out/quickstart_baseline out/quickstart   compares: writes out/report.png

Reads log.jsonl and summary.json of each run folder. A map that several runs have is one panel: a
run is a colour, a layer a shade of it.
"""
import argparse
import json
import math
import re
import sys
from pathlib import Path

from lib.disk import write_whole

COLUMNS, WIDTH, DPI = 4, 10, 100  # inches
WINDOW = 50  # steps of the running mean of training losses
COLORS = ("Blues", "Oranges", "Greens", "Purples", "Reds", "Greys")  # of a run: maps of shades
# event, key, what the axis says, what the panels show and what to look for
SECTIONS = (
    ("scale", "mean", "γ",
     "Each scale vector: the mean of its entries, and a band of one standard deviation. Look for"
     " vectors that decay pulls to 0, and for bands that widen: entries that go their own ways."),
    ("scale", "alpha", "size of α",
     "The root mean square of α, where γ has a β, too. Under OR it has no effect on γ, but a"
     " short α turns faster: look for those that decay has shortened."),
    ("matrix", "norm", "norm / its start",
     "Each matrix's length, relative to its start. Look for maps of one layer that part: they have"
     " no use for one shared γ (HG)."),
    ("matrix", "update", "update / norm",
     "The length of the last step over the matrix's: its relative learning rate. Look for maps that"
     " stand still while others move."),
)


# ---- what the folders hold -----------------------------------------------------------------------

def read_log(path):
    """{event: [record, ...]} of a log.jsonl. A line that is no record, such as a last one that a
    killed run wrote in part, is passed over."""
    events = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
            events.setdefault(record["event"], []).append(record)
        except (ValueError, KeyError, TypeError):
            continue
    return events


def log_of(run):
    """{event: [record, ...]} of a run. Raises an error if it has no training step."""
    path = Path(run) / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {run} is no run folder of train.py")
    events = read_log(path)
    if not points(events, "train", "loss"):
        raise ValueError(f"{path} has no training step yet")
    return events


def points(log, event, key):
    """[(step, value), ...] of an event's records in which the key is a number."""
    return [(r["step"], r[key]) for r in log.get(event, []) if r.get(key) is not None]


def smooth(values):
    """Running mean over WINDOW values."""
    windows = (values[max(0, end - WINDOW):end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def label_of(name):
    """("γ_b of attn.q", 3) of layers.3.attn.q.scale_in, ("attn.q", 3) of its weight; what is in no
    layer counts as layer 0."""
    layer = re.match(r"layers\.(\d+)\.", name)
    name = name[layer.end():] if layer else name
    for end, words in ((".scale_in", "γ_b of "), (".scale_out", "γ_a of "), (".scale", "γ of "),
                       (".weight", "")):
        if name.endswith(end):
            name = words + name.removesuffix(end)
            break
    return name, int(layer[1]) if layer else 0


def curves(records, key):
    """{label: {layer: [(step, value, half a band), ...]}} of the records in which the key is a
    number. The band is one standard deviation of γ; a norm is divided by its first. A vector
    without β has no curve of its α, which is γ."""
    out = {}
    for record in records:
        if record.get(key) is None or (key == "alpha" and record.get("beta") is None):
            continue
        label, layer = label_of(record["name"])
        band = record["std"] if key == "mean" else 0.0
        out.setdefault(label, {}).setdefault(layer, []).append((record["step"], record[key], band))
    for layers in out.values() if key == "norm" else ():
        for layer, found in layers.items():
            start = found[0][1]  # a matrix that starts at 0 has no relative norm
            layers[layer] = [(s, v / start, b) for s, v, b in found] if start else []
    return out


# ---- the picture ---------------------------------------------------------------------------------

def shade(run, layer=1, layers=1):
    """The colour of a layer of the run with this number: the first is pale, the last is dark."""
    from matplotlib import pyplot as plt
    return plt.get_cmap(COLORS[run % len(COLORS)])(0.4 + 0.5 * layer / max(1, layers))


def draw_losses(figure, logs):
    """The panels at the top: losses, the logits' deviation, and differences from the first run."""
    first_name, first_log = next(iter(logs.items()))
    titles = [f"loss, nats a token: validation (dots),\ntraining (mean of {WINDOW} steps)",
              "deviation of the logits: how sure\nthe model is of the next token",
              f"validation loss less that of {first_name}:\n"
              "below 0 is better; one seed proves little"]
    axes = figure.subplots(1, 3 if len(logs) > 1 else 2)
    first, shown = dict(points(first_log, "eval", "val_loss")), []
    for number, (name, log) in enumerate(logs.items()):
        dots = {"marker": "o", "markersize": 3, "color": shade(number)}
        losses = points(log, "train", "loss")
        smoothed = smooth([loss for _, loss in losses])
        shown += smoothed[len(smoothed) // 10:]
        axes[0].plot([step for step, _ in losses], smoothed, color=shade(number), alpha=0.5)
        found = dict(points(log, "eval", "val_loss"))
        end = f", {list(found.values())[-1]:.4f} at the end" if found else ""
        axes[0].plot(list(found), list(found.values()), label=name + end, **dots)
        logits = dict(points(log, "eval", "logit_scale"))
        axes[1].plot(list(logits), list(logits.values()), **dots)
        if len(logs) > 1:
            both = [step for step in found if step in first]
            axes[2].plot(both, [found[step] - first[step] for step in both], **dots)
    # the first tenth falls so far that the rest would look flat
    if shown:
        axes[0].set_ylim(min(shown) - 0.05, max(shown) + 0.05)
    for axis, title in zip(axes, titles):
        axis.set_title(title, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=2,
                  fontsize=8, frameon=False)


def draw_section(figure, words, caption, groups):
    """The panels of one kind, at most COLUMNS a row, all with the same axes. groups: the curves of
    each run, {label: {layer: points}}."""
    figure.suptitle(caption, fontsize=8, x=0.01, horizontalalignment="left", wrap=True)
    labels = sorted({label: None for panels in groups for label in panels}, key=order)
    axes = figure.subplots(-(-len(labels) // COLUMNS), COLUMNS, sharex=True, sharey=True,
                           squeeze=False)
    for axis, label in zip(axes.flat, labels):
        for number, panels in enumerate(groups):
            layers = panels.get(label, {})
            for layer, found in sorted(layers.items()):
                steps, values, bands = zip(*found) if found else ((), (), ())
                color = shade(number, layer, max(layers))
                axis.plot(steps, values, color=color, linewidth=1)
                axis.fill_between(steps, [v - b for v, b in zip(values, bands)],
                                  [v + b for v, b in zip(values, bands)], color=color, alpha=0.1)
        axis.set_title(label, fontsize=7, pad=2)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel(words, fontsize=7)
    for axis in axes.flat[len(labels):]:
        axis.remove()


def order(label):
    """Maps of one name side by side: γ_b of attn.q, then γ_a of attn.q."""
    return label.split(" of ")[-1], label[:3] == "γ_a"


def draw(logs, path):
    """Write the picture of the runs: losses on top, then a block for each kind of number."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    heights, blocks = [3.6], []
    for event, key, words, caption in SECTIONS:
        groups = [curves(log.get(event, []), key) for log in logs.values()]
        if labels := {label for panels in groups for label in panels}:
            heights.append(0.6 + 1.35 * math.ceil(len(labels) / COLUMNS))
            blocks.append((words, caption, groups))
    figure = plt.figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    draw_losses(parts[0], logs)
    for part, block in zip(parts[1:], blocks):
        draw_section(part, *block)
    figure.supxlabel("step; a line is a layer, pale the first, dark the last", fontsize=8)
    write_whole(path, lambda f: figure.savefig(f, dpi=DPI, format=Path(path).suffix[1:] or "png"))
    plt.close(figure)


# ---- the table -----------------------------------------------------------------------------------

def table(runs):
    """One line a run: what its summary.json says that it ended with."""
    width = max(3, *map(len, runs))
    lines = [f"{'run':<{width}} {'val_loss':>10} {'params':>13} {'scale':>9} {'tokens':>14} "
             f"{'tokens/s':>9}"]
    for run in runs:
        path = Path(run) / "summary.json"
        if not path.is_file():
            lines.append(f"{run:<{width}} not finished")
            continue
        s = json.loads(path.read_text(encoding="utf-8"))
        loss = "not finite" if s["val_loss"] is None else f"{s['val_loss']:.4f}"
        lines.append(f"{run:<{width}} {loss:>10} {s['params']:>13,} {s['scale_params']:>9,} "
                     f"{s['tokens']:>14,} {s['tokens_per_s']:>9,.0f}")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m studies report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    parser.add_argument("--out", help="the picture to write; otherwise report.png in the run's "
                                      "folder, or of several runs in the one above the first")
    args = parser.parse_args(argv)
    runs = list(dict.fromkeys(args.runs))
    try:
        logs = {run: log_of(run) for run in runs}
        print(table(runs))
        folder = Path(runs[0])
        if len(runs) > 1:
            folder = folder.resolve().parent
        out = args.out or folder / "report.png"
        draw(logs, out)
        print(f"wrote {out}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except ImportError:
        sys.exit("error: the picture needs matplotlib: pip install matplotlib")
