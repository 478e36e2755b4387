"""
Speed, as ratios from interleaved runs on one machine: median, and the range over the rounds.

  python tools/bench.py tokenize    prepare_data.py, from file to finished shards, against tiktoken's own batch call on texts that
                                    are in memory already; same text, same threads. Then the peak memory of a longer run.
  python tools/bench.py loader      fetching a batch against a training step at the 120m shape (one sequence a step on a CPU)
"""
import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import Split, get_encoding, shard_header, window_numbers  # noqa: E402
from model import GPT  # noqa: E402
from prepare_data import find_files, prepare  # noqa: E402
from train import gpt_config, load_config, to_device  # noqa: E402

# Linux's own count for a process; getrusage would count its parent, too
PEAK = """import prepare_data
prepare_data.main()
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def timed(function):
    """Seconds that function() takes, the device's work included."""
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def median_and_range(values, form=".2f"):
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}}, {len(values)} rounds)"


def machine():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores, {platform.machine()}"


def tokenize(rounds, encoding_name, copies):
    """Prints how fast prepare_data.py is in units of encode_ordinary_batch, and its peak memory on `copies` times the text."""
    encoding, cores = get_encoding(encoding_name), os.cpu_count()
    stdlib = find_files([sysconfig.get_paths()["stdlib"]], site_packages=False)
    texts = [path.read_text(errors="ignore") for path, _ in stdlib if path.suffix == ".py"]
    size = sum(len(t.encode()) for t in texts)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "stdlib.jsonl")
        with open(source, "w") as f:
            f.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        ratios, speeds = [], []
        for number in range(rounds):
            batch = timed(lambda: encoding.encode_ordinary_batch(texts, num_threads=cores))
            with contextlib.redirect_stdout(io.StringIO()):
                ours = timed(lambda: prepare(find_files([source]), f"{folder}/{number}", encoding_name, "bench", workers=cores))  # noqa: B023
            ratios.append(batch / ours)
            speeds.append(size / ours / 1e6)
            print(f"  round {number + 1}/{rounds}: tiktoken {batch:.2f} s, prepare_data {ours:.2f} s", flush=True)
        print(f"{encoding_name}, {size / 1e6:.0f} MB of text, {cores} threads, {machine()}: prepare_data at "
              f"{median_and_range(speeds, '.1f')} MB/s, {median_and_range(ratios)} x encode_ordinary_batch")
        with open(source, "w") as f:
            for _ in range(copies):
                f.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        for threads in sorted({cores, 16}):
            peak = subprocess.run([sys.executable, "-c", PEAK, source, "--encoding", encoding_name, "--out", f"{folder}/long",
                                   "--workers", str(threads), "--overwrite"], check=True, cwd=ROOT, capture_output=True, text=True)
            print(f"peak memory on {copies * size / 1e6:.0f} MB of text with {threads} threads: "
                  f"{int(peak.stdout.split()[-1]) / 1024:.0f} MB")


def loader(rounds):
    """Prints which share of a training step fetching its batch takes, as if the device did not work meanwhile. A micro-batch is
    fetched whole; a CPU trains on its first sequence only, and the share is taken for each sequence."""
    config = load_config([str(ROOT / "configs" / "baseline_120m.py")])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fetched, trained = config.batch_size, config.batch_size if device.type == "cuda" else 1
    model = GPT(gpt_config(config)).to(device)
    model.compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    step_of = torch.compile(model) if device.type == "cuda" else model
    with tempfile.TemporaryDirectory() as folder:
        path, tokens = Path(folder, "train.bin"), 100_000_000
        ids = np.random.default_rng(0).integers(config.vocab_size, size=tokens, dtype=np.uint16)
        path.write_bytes(shard_header(tokens, 2) + ids.tobytes())
        split, position = Split([path], config.block_size, config.vocab_size), [0]

        def fetch():
            position[0] += fetched
            return to_device(split[window_numbers(position[0], fetched, len(split), seed=1)], device)

        def step():
            step_of(*batch)[1].backward()
            model.zero_grad(set_to_none=True)

        batch = tuple(tensor[:trained] for tensor in fetch())
        step()
        fetches, shares = [], []
        for number in range(rounds):
            fetches.append(timed(lambda: [fetch() for _ in range(20)]) / 20)
            shares.append(fetches[-1] / fetched / (timed(step) / trained))
            print(f"  round {number + 1}/{rounds}: {fetches[-1] * 1e3:.3f} ms, {shares[-1]:.4%} of a step", flush=True)
    rate = fetched * config.block_size / statistics.median(fetches)
    print(f"{fetched} x {config.block_size} tokens, {machine()}: fetching takes {median_and_range(shares, '.4%')} of a forward and "
          f"backward pass.\n{rate / 1e6:.0f}M tokens/s: under 2% of a step for every process that trains at less than "
          f"{rate / 50e6:.2f}M tokens/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tokenize", "loader"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--encoding", default="gpt2", help="tokenize: bytes or a tiktoken name (default: gpt2)")
    parser.add_argument("--copies", type=int, default=8, help="tokenize: the memory run's text, in copies (default: 8)")
    args = parser.parse_args()
    if args.rounds < 1 or args.copies < 1:
        sys.exit("error: --rounds and --copies must be at least 1")
    try:
        tokenize(args.rounds, args.encoding, args.copies) if args.what == "tokenize" else loader(args.rounds)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
