"""
Draw runs: loss curves, and how each scale vector moved, branch by branch.

  python tools/report.py out/quickstart_baseline out/quickstart              writes report.png, prints a table
  python tools/report.py out/quickstart --out figures/quickstart.png

Reads log.jsonl and summary.json of each run folder and nothing else.
"""
import argparse
import json
import re
import sys
from pathlib import Path


def read_log(run):
    """{event: [record, ...]} of a run's log.jsonl."""
    path, events = Path(run) / "log.jsonl", {}
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {run} is no run folder of train.py")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            events.setdefault(record["event"], []).append(record)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: not a log record") from None
    if not events.get("train"):
        raise ValueError(f"{path} has no training step yet")
    return events


def smooth(values, share=0.02):
    """Running mean over a window of `share` of all values (None, a step that was not made, is left out)."""
    width, window, out = max(1, int(share * len(values))), [], []
    for value in values:
        window = (window + [value])[-width:]
        known = [v for v in window if v is not None]
        out.append(sum(known) / len(known) if known else float("nan"))
    return out


def by_branch(records):
    """{branch and side: {layer: [record, ...]}} from names such as layers.3.attn.qkv.scale_in.q or head.scale_in.head."""
    out = {}
    for record in records:
        layer = re.match(r"layers\.(\d+)\.", record["name"])
        side, _, branch = re.sub(r"^layers\.\d+\.", "", record["name"]).rpartition(".")
        label = f"{branch} {'in' if side.endswith('scale_in') else 'out'}" if "scale_" in side else side.rpartition(".")[2]
        out.setdefault(label, {}).setdefault(int(layer[1]) if layer else 0, []).append(record)
    return out


def report(runs, path):
    """Write the picture of the runs to `path`: losses on top, then one row of panels a run, a panel a branch, a line a layer."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    logs = {Path(run).name: read_log(run) for run in runs}
    scales = {name: branches for name, log in logs.items() if (branches := by_branch(log.get("scale", [])))}
    columns = max([4, *map(len, scales.values())])
    figure = plt.figure(figsize=(1.9 * columns, 4.2 + 2.1 * len(scales)), layout="constrained")
    grid = figure.add_gridspec(1 + len(scales), columns, height_ratios=[2] + [1] * len(scales))

    losses = figure.add_subplot(grid[0, :])
    for color, (name, log) in enumerate(logs.items()):
        steps = [r["step"] for r in log["train"]]
        losses.plot(steps, smooth([r["loss"] for r in log["train"]]), color=f"C{color}", alpha=0.5, linewidth=1)
        evals = log.get("eval", [])
        final = f", {evals[-1]['val_loss']:.4f} at the end" if evals else ""
        losses.plot([r["step"] for r in evals], [r["val_loss"] for r in evals], "o-", color=f"C{color}", markersize=3,
                    label=f"{name}: validation{final}")
    tail = [r["loss"] for log in logs.values() for r in log["train"][len(log["train"]) // 10:] if r["loss"] is not None]
    if tail:
        losses.set_ylim(min(tail) - 0.05, max(tail) + 0.05)
    losses.set(xlabel="step", ylabel="loss (nats per token)", title="loss: validation, and training as a running mean")
    losses.legend()
    losses.grid(alpha=0.3)

    for row, (name, branches) in enumerate(scales.items(), 1):
        first = None
        for column, (branch, layers) in enumerate(branches.items()):
            panel = first = figure.add_subplot(grid[row, column], sharey=first)
            for layer, records in sorted(layers.items()):
                color = plt.cm.viridis(layer / max(1, *layers) if max(layers) else 0.0)
                steps, mean, std = ([r[key] for r in records] for key in ("step", "mean", "std"))
                panel.plot(steps, mean, color=color, linewidth=1)
                panel.fill_between(steps, [m - s for m, s in zip(mean, std)], [m + s for m, s in zip(mean, std)], color=color, alpha=0.12)
            panel.set_title(branch, fontsize=9)
            panel.tick_params(labelsize=7, labelleft=column == 0)
            panel.axhline(1, color="gray", linewidth=0.5)
            if column == 0:
                panel.set_ylabel(f"{name}\nγ: mean ± std", fontsize=8)
    if scales:
        figure.supxlabel("step; a line is a layer, dark the first, bright the last", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(runs):
    """One line a run: what it ended with."""
    lines = [f"{'run':<28} {'val_loss':>9} {'bits/byte':>9} {'params':>13} {'scale':>9} {'tokens':>14} {'tokens/s':>9}"]
    for run in runs:
        path = Path(run) / "summary.json"
        if not path.is_file():
            lines.append(f"{Path(run).name:<28} not finished")
            continue
        s = json.loads(path.read_text())
        bpb = f"{s['val_bpb']:.4f}" if s["val_bpb"] else "-"
        lines.append(f"{Path(run).name:<28} {s['val_loss']:>9.4f} {bpb:>9} {s['params']:>13,} {s['scale_params']:>9,} "
                     f"{s['tokens']:>14,} {s['tokens_per_s']:>9,.0f}")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    parser.add_argument("--out", default="report.png", help="the picture to write (default: report.png)")
    args = parser.parse_args(argv)
    try:
        print(table(args.runs))
        report(args.runs, args.out)
        print(f"wrote {args.out}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except ImportError:
        sys.exit("error: the picture needs matplotlib: pip install matplotlib")


if __name__ == "__main__":
    main()
