"""
How fast data is prepared and fetched. The commands are those of bench/benchmark.py.

  tokenize    prepare_data.py, from file to finished shards, against tiktoken's own batch call
  loader      fetching a batch against a training step
"""
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from bench.timing import machine, median_and_range, timed
from lib.config import load_config
from lib.data import Split, get_encoding, window_numbers
from lib.process import Process, compile_model, to_device
from model import GPT
from prepare_data import find_files, prepare, standard_library

ROOT = Path(__file__).resolve().parent.parent
# Linux's own count for a process; getrusage would count its parent, too
PEAK = """import prepare_data
prepare_data.main()
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def write_documents(path, texts, copies=1):
    with open(path, "w", encoding="utf-8") as f:
        for _ in range(copies):
            f.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def tokenize(rounds, encoding_name, copies):
    """Print how fast prepare_data.py is in units of encode_ordinary_batch, with the same text and
    as many threads, and its peak memory on `copies` times the text."""
    encoding, cores = get_encoding(encoding_name), os.cpu_count()
    texts = [path.read_text("utf-8", "ignore") for path, _ in standard_library()]
    size = sum(len(t.encode()) for t in texts)
    ratios, speeds = [], []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "stdlib.jsonl")
        write_documents(source, texts)

        def prepare_it(out):
            with contextlib.redirect_stdout(io.StringIO()):
                prepare(find_files([source]), out, encoding_name, "bench", workers=cores)

        for number in range(rounds):
            batch = timed(lambda: encoding.encode_ordinary_batch(texts, num_threads=cores))
            ours = timed(lambda number=number: prepare_it(f"{folder}/{number}"))
            ratios.append(batch / ours)
            speeds.append(size / ours / 1e6)
            print(f"  round {number + 1}/{rounds}: tiktoken {batch:.2f} s, "
                  f"prepare_data {ours:.2f} s", flush=True)
        print(f"{encoding_name}, {size / 1e6:.0f} MB of text, {cores} threads, {machine()}: "
              f"prepare_data at {median_and_range(speeds, '.1f')} MB/s, "
              f"{median_and_range(ratios)} x encode_ordinary_batch")
        write_documents(source, texts, copies)
        for threads in sorted({cores, 16}):
            peak = peak_memory(source, encoding_name, f"{folder}/long{threads}", threads)
            print(f"peak memory on {copies * size / 1e6:.0f} MB of text with {threads} threads: "
                  f"{peak:.0f} MB")


def peak_memory(source, encoding_name, out, threads):
    """MB that prepare_data.py needs at most, in a process of its own."""
    command = [sys.executable, "-c", PEAK, source, "--encoding", encoding_name,
               "--out", out, "--workers", str(threads)]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) / 1024


def random_split(folder, shape, tokens=100_000_000):
    path = Path(folder, "train.bin")
    ids = np.random.default_rng(0).integers(shape.vocab_size, size=tokens, dtype=np.uint16)
    ids.tofile(path)
    return Split([path], shape.block_size, shape.vocab_size)


def loader(rounds):
    """Print the share of a training step at the 120m shape that fetching its batch takes, as if the
    device did not work meanwhile. A micro-batch is fetched whole; a CPU trains on its first
    sequence only, and the share is that of one sequence."""
    config, process = load_config([str(ROOT / "configs" / "baseline_120m.py")]), Process()
    process.start(config)
    device, shape = process.device, config.model
    fetched = config.batch_size
    trained = fetched if device.type == "cuda" else 1
    model = GPT(shape).to(device)
    model.compute_dtype = process.dtype
    if process.compile:
        compile_model(model)
    with tempfile.TemporaryDirectory() as folder:
        split, position = random_split(folder, shape), [0]

        def fetch():
            position[0] += fetched
            windows = window_numbers(position[0], fetched, len(split), seed=1)
            return to_device(split[windows], device)

        def step():
            model(*batch)[1].backward()
            model.zero_grad(set_to_none=True)

        batch = tuple(tensor[:trained] for tensor in fetch())
        step()
        fetches, shares = [], []
        for number in range(rounds):
            fetches.append(timed(lambda: [fetch() for _ in range(20)]) / 20)
            shares.append(fetches[-1] / fetched / (timed(step) / trained))
            print(f"  round {number + 1}/{rounds}: {fetches[-1] * 1e3:.3f} ms, "
                  f"{shares[-1]:.4%} of a step", flush=True)
    rate = fetched * shape.block_size / statistics.median(fetches)
    print(f"{fetched} x {shape.block_size} tokens, {machine()}: fetching takes "
          f"{median_and_range(shares, '.4%')} of a forward and backward pass.\n"
          f"{rate / 1e6:.0f}M tokens/s: under 2% of a step for every process that trains at less "
          f"than {rate / 50e6:.2f}M tokens/s")
