"""
Draw runs: losses over steps, how runs differ, and how each scale vector and matrix moved.

  python -m studies report out/quickstart                        writes out/quickstart/report.png
  python -m studies report out/quickstart_baseline out/quickstart   compares: writes out/report.png

Reads log.jsonl and summary.json of each run folder. A map that several runs have is one panel: a
run is a colour, a layer a shade of it. What the log has not, or what would repeat another panel, is
not drawn. Runs whose folders have one name are told apart by the folders above them.
"""
import argparse
import json
import math
import re
import sys
from pathlib import Path

from lib.disk import write_whole

COLUMNS, PIXELS, DPI = 4, 1000, 100
WINDOW = 50  # steps of the running mean of training losses, the same for all runs
COLORS = ("Blues", "Oranges", "Greens", "Purples", "Reds", "Greys")  # of a run: maps of shades
# what is read of each event
LOGGED = {"train": ("step", "loss"), "eval": ("step", "tokens", "val_loss"),
          "scale": ("step", "name", "mean", "std"), "matrix": ("step", "name", "norm")}
# event, key, what the axis says, what the panels show and what to look for
SECTIONS = (
    ("scale", "mean", "γ",
     "Each scale vector: the mean of its entries, and a band of one standard deviation. Look for"
     " vectors that decay pulls to 0, and for bands that widen: entries that go their own ways."),
    ("scale", "beta", "β", "The length of γ as ER writes it, e^β: 0 is the start."),
    ("scale", "alpha", "size of α",
     "The root mean square of α, where γ is written with one. Under OR it has no effect on γ, but a"
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


def repeats(record, key):
    """Whether the mean ± deviation of γ tells it already: α of a plain γ, which is γ, and OR's β,
    which is its length."""
    if key not in ("alpha", "beta"):
        return False
    square = record["mean"] ** 2 + record["std"] ** 2
    return math.isclose(record[key] ** 2, square, rel_tol=0.01)


def curves(records, key):
    """{label: {layer: [(step, value, half a band), ...]}} of the records in which the key is a
    number. The band is one standard deviation of γ; a norm is divided by its first. A vector whose
    numbers repeat γ's at every step is left out."""
    out, new = {}, set()
    for record in records:
        if record.get(key) is None or record.get("std", 0) is None:
            continue
        label, layer = label_of(record["name"])
        band = record["std"] if key == "mean" else 0.0
        out.setdefault(label, {}).setdefault(layer, []).append((record["step"], record[key], band))
        if not repeats(record, key):
            new.add(label)
    out = {label: layers for label, layers in out.items() if label in new}
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


def evaluations(log, key="val_loss"):
    """{step: value} of the evaluations whose value is a number."""
    return {r["step"]: r[key] for r in log.get("eval", []) if r.get(key) is not None}


# ---- the picture ---------------------------------------------------------------------------------

def shade(run, layer=1, layers=1):
    """The colour of a layer of the run with this number: the first is pale, the last is dark."""
    from matplotlib import pyplot as plt
    return plt.get_cmap(COLORS[run % len(COLORS)])(0.4 + 0.5 * layer / max(1, layers))


def loss_panels(logs, runs, seconds):
    """[(draw(axis), title and what to look for, x axis)] of the panels at the top."""
    def losses(axis):
        shown = []
        for number, (name, log) in enumerate(logs.items()):
            steps, values = zip(*((r["step"], r["loss"]) for r in log["train"]))
            axis.plot(steps, smooth(values), color=shade(number), alpha=0.5, linewidth=1)
            points = evaluations(log)
            final = f", {list(points.values())[-1]:.4f} at the end" if points else ""
            axis.plot(*zip(*points.items()) if points else ((), ()), "o-", color=shade(number),
                      markersize=3, label=name + final)
            shown.extend(smooth(values)[len(values) // 10:])
        # the first tenth falls so far that the rest would look flat
        if all(map(math.isfinite, shown)):
            axis.set_ylim(min(shown) - 0.05, max(shown) + 0.05)

    def differences(axis):
        first = evaluations(next(iter(logs.values())))
        axis.axhline(0, color=shade(0), linewidth=1)
        for number, log in enumerate(logs.values()):
            points = {s: v - first[s] for s, v in evaluations(log).items() if s in first}
            if number and points:
                axis.plot(*zip(*points.items()), "o-", color=shade(number), markersize=3)

    def over_time(axis):
        for number, (name, log) in enumerate(logs.items()):
            points = evaluations(log)
            if times := seconds_at(runs[name], log, points):
                axis.plot(times, points.values(), "o-", color=shade(number), markersize=3)

    def logits(axis):
        for number, log in enumerate(logs.values()):
            points = evaluations(log, "logit_scale")
            axis.plot(*zip(*points.items()) if points else ((), ()), "o-", color=shade(number),
                      markersize=3)

    panels = [(losses, "loss, nats a token: validation (dots),\n"
                       f"training (mean of {WINDOW} steps)", "step")]
    if len(logs) > 1:
        panels.append((differences, f"validation loss less that of {next(iter(logs))}:\n"
                                    "below 0 is better; one seed proves little", "step"))
    if seconds:
        panels.append((over_time, "validation loss over time:\nlook here before you pay for it",
                       "seconds of training, at the mean speed"))
    if any(evaluations(log, "logit_scale") for log in logs.values()):
        panels.append((logits, "deviation of the logits: how sure\nthe model is of the next token",
                       "step"))
    return panels


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
            for layer, points in sorted(layers.items()):
                steps, values, bands = zip(*points) if points else ((), (), ())
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


def report(runs, path, seconds=False):
    """Write the picture of the runs: losses on top, then a block for each kind of number."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folders = names_of(runs)
    logs = {name: log_of(run) for name, run in folders.items()}
    blocks = []
    for event, key, words, caption in SECTIONS:
        groups = [curves(log.get(event, []), key) for log in logs.values()]
        labels = {label for panels in groups for label in panels}
        if labels:
            blocks.append((0.6 + 1.35 * -(-len(labels) // COLUMNS), words, caption, groups))
    heights = [3.6, *(block[0] for block in blocks)]
    figure = plt.figure(figsize=(PIXELS / DPI, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]

    panels = loss_panels(logs, folders, seconds)
    axes = parts[0].subplots(1, len(panels), squeeze=False)[0]
    for axis, (draw, title, words) in zip(axes, panels):
        draw(axis)
        axis.set_title(title, fontsize=8)
        axis.set_xlabel(words, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    handles = axes[0].get_legend_handles_labels()
    parts[0].legend(*handles, loc="outside lower center", ncol=2, fontsize=8, frameon=False)
    for part, (_, *block) in zip(parts[1:], blocks):
        draw_section(part, *block)
    if blocks:
        figure.supxlabel("step; a line is a layer, pale the first, dark the last", fontsize=8)
    write_whole(path, lambda f: figure.savefig(f, dpi=DPI, format=Path(path).suffix[1:] or "png"))
    plt.close(figure)


# ---- the table -----------------------------------------------------------------------------------

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
    parser = argparse.ArgumentParser(prog="python -m studies report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    parser.add_argument("--out", help="the picture to write; otherwise report.png in the run's "
                                      "folder, or of several runs in the one above the first")
    parser.add_argument("--seconds", action="store_true", help="a panel over time, too")
    args = parser.parse_args(argv)
    try:
        print(table(args.runs))
        folder = Path(args.runs[0])
        if len(names_of(args.runs)) > 1:
            folder = folder.parent
        out = args.out or folder / "report.png"
        report(args.runs, out, args.seconds)
        print(f"wrote {out}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except ImportError:
        sys.exit("error: the picture needs matplotlib: pip install matplotlib")
    except KeyboardInterrupt:
        sys.exit("stopped: nothing was written")
