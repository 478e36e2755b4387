"""
Run configs over keys and seeds, one after the other, and write down how each ended.

  python tools/sweep.py configs/quickstart_baseline.py configs/quickstart.py --learning_rate=2e-3,4e-3 --seed=1,2,3 --results results/q.json
  python tools/sweep.py configs/ablations/*.py --seed=1,2,3 --nproc_per_node=8

Every combination is one run of train.py in its own folder under --out. Seeds of one setting are reported together: mean,
spread (sample standard deviation) and each value. A run whose folder holds the same config and a summary is not run again,
so an interrupted sweep goes on where it stopped.
"""
import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from train import load_config  # noqa: E402

COPIED = ("val_loss", "val_bpb", "params", "scale_params", "tokens", "tokens_per_s")


def settings(configs, keys):
    """[(config file, {key: text})]: every combination."""
    return [(config, dict(zip(keys, values))) for config in configs for values in itertools.product(*keys.values())]


def is_finished(folder, config):
    """True if the run in this folder is the one asked for, and came to its end."""
    try:
        same = json.loads((folder / "config.json").read_text()) == {**vars(config), "overwrite": True}
        return same and (folder / "summary.json").is_file()
    except (OSError, ValueError):
        return False


def group_by_seed(runs):
    """One record for each setting: the seeds, and mean, spread and values of the validation loss over them."""
    groups = {}
    for run in runs:
        keys = {k: v for k, v in run["keys"].items() if k != "seed"}
        groups.setdefault((run["config"], json.dumps(keys)), []).append(run)
    out = []
    for (config, keys), members in groups.items():
        losses = [r["val_loss"] for r in members]
        out.append({"config": config, "keys": json.loads(keys), "seeds": [r["keys"].get("seed") for r in members],
                    "val_loss_mean": statistics.mean(losses), "val_loss_std": statistics.stdev(losses) if len(losses) > 1 else None,
                    "val_losses": losses})
    return out


def table(groups):
    lines = [f"{'setting':<64} {'val_loss':>9} {'spread':>8}  seeds"]
    for g in groups:
        name = " ".join([Path(g["config"]).stem, *(f"{k}={v}" for k, v in g["keys"].items())])
        spread = f"{g['val_loss_std']:.4f}" if g["val_loss_std"] is not None else "-"
        lines.append(f"{name:<64} {g['val_loss_mean']:>9.4f} {spread:>8}  {len(g['val_losses'])}")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--results", help="write all runs and the means to this JSON file")
    parser.add_argument("--out", default="out/sweep", help="the runs' folders (default: out/sweep)")
    parser.add_argument("--nproc_per_node", type=int, default=0, help="run under torchrun with so many processes")
    args, rest = parser.parse_known_args(argv)
    keys = {}
    for text in rest:
        key, given, values = text[2:].partition("=")
        if not text.startswith("--") or not given:
            parser.error(f"{text!r}: write --key=value,value with a key of train.py")
        keys[key] = values.split(",")
    try:
        planned = []
        for config, values in settings(args.configs, keys):
            name = "-".join([Path(config).stem, *(f"{k}={v}" for k, v in values.items())])
            folder = Path(args.out) / name
            arguments = [config, *(f"--{k}={v}" for k, v in values.items()), f"--out_dir={folder}"]
            planned.append((config, values, folder, arguments, load_config(arguments)))  # any mistake ends it here
    except ValueError as error:
        sys.exit(f"error: {error}")

    runs, started, made = [], time.time(), 0
    todo = sum(not is_finished(folder, config) for _, _, folder, _, config in planned)
    for config, values, folder, arguments, resolved in planned:
        if not is_finished(folder, resolved):
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.nproc_per_node}"]
            program = torchrun if args.nproc_per_node else []
            left = f", about {(time.time() - started) / made * (todo - made) / 60:.0f} minutes left" if made else ""
            print(f"[{made + 1}/{todo}] {folder.name}{left}", flush=True)
            done = subprocess.run([sys.executable, *program, "train.py", *arguments, "--overwrite"], cwd=ROOT, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"error: {folder.name} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            made += 1
        summary = json.loads((folder / "summary.json").read_text())
        runs.append({"config": config, "keys": values, **{key: summary[key] for key in COPIED}})
        if args.results:
            Path(args.results).parent.mkdir(parents=True, exist_ok=True)
            Path(args.results).write_text(json.dumps({"settings": group_by_seed(runs), "runs": runs}, indent=1) + "\n")
    print(table(group_by_seed(runs)))


if __name__ == "__main__":
    main()
