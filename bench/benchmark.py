"""
Speed, as ratios from interleaved runs on one machine: median, and the range over the rounds.

  python -m bench.benchmark train configs/baseline_120m.py --gradient_accumulation_steps=4 --out results/bench.json
                                    training steps on random tokens: every variant of each config's shape, and a plain model
                                    of nn.Linear and nn.RMSNorm as the yardstick. --key=value is given to every config
  python -m bench.benchmark tokenize    prepare_data.py, from file to finished shards, against tiktoken's own batch call on texts that
                                    are in memory already; same text, same threads. Then the peak memory of a longer run
  python -m bench.benchmark loader      fetching a batch against a training step at the 120m shape (one sequence a step on a CPU)
"""
import argparse
import contextlib
import dataclasses
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

from bench.plain import NanoGPT, PlainGPT
from lib.config import load_config
from lib.data import Split, get_encoding, shard_header, window_numbers
from lib.disk import write_whole
from lib.process import Process, compile_model, to_device
from model import GPT
from optim import make_optimizer, param_groups
from prepare_data import find_files, prepare
from train import training_step

ROOT = Path(__file__).resolve().parent.parent
PEERS = {"nanoGPT": NanoGPT, "plain": PlainGPT}  # not of our modules; dense only
VARIANTS = {**dict.fromkeys(PEERS),
            "none": {"scale_vectors": False},
            "baseline": {},
            "HG": {"scale_heterogeneous": True},
            "HG+DP+OR": {"scale_heterogeneous": True, "scale_placement": "dual", "scale_reparam": "original"},
            "unified": {"scale_heterogeneous": True, "scale_placement": "dual_norm", "scale_reparam": "original"}}
# Linux's own count for a process; getrusage would count its parent, too
PEAK = """import prepare_data
prepare_data.main()
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def timed(function, clock=time.perf_counter):
    """Seconds that function() takes, the device's work included."""
    started = clock()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def median_and_range(values, form=".2f"):
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}}, {len(values)} rounds)"


def machine():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores, {platform.machine()}"


def versions():
    found = {"python": platform.python_version(), "torch": torch.__version__, "machine": machine(), "threads": torch.get_num_threads()}
    return {**found, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if torch.cuda.is_available() else found


# ---------------------------------------------------------------------------------------------------------------------
# train

class RandomBatches:
    """What train.Batches gives, of tokens drawn once."""

    def __init__(self, config, device):
        generator = torch.Generator().manual_seed(0)
        self.micro_steps = config.gradient_accumulation_steps
        tokens = torch.randint(config.model.vocab_size, (config.batch_size, config.model.block_size + 1), generator=generator).to(device)
        self.x, self.y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def fetch(self):
        pass


class Contestant:
    """A variant ready to take steps. All but `plain` share their matrices and AdamW's moments of them with `first`, so that the
    largest models fit beside each other."""

    def __init__(self, name, config, process, first=None):
        self.name, self.config, self.process, keys = name, config, process, VARIANTS[name]
        torch.manual_seed(0)
        with process.device:
            self.model = PEERS[name](config.model) if keys is None else GPT(dataclasses.replace(config.model, **keys))
        shares = keys is not None and first is not None
        if shares:
            matrices = {n: p for n, p in first.model.named_parameters() if n.endswith(".weight")}
            for n, p in matrices.items():
                parent, _, child = n.rpartition(".")
                setattr(self.model.get_submodule(parent), child, p)
        self.model.compute_dtype = process.dtype
        groups = self.model.groups(config.weight_decay) if keys is None else param_groups(self.model, config.weight_decay)
        self.optimizer = make_optimizer(groups, config.optimizer, 1e-5, fused=process.device.type == "cuda")
        if shares and config.optimizer == "adamw":
            self.optimizer.state.update({p: first.optimizer.state[p] for p in matrices.values()})
        self.batches = RandomBatches(config, process.device)
        if process.compile:
            compile_model(self.model)

    def step(self):
        loss, norm, _, _ = training_step(self.model, self.model, self.optimizer, self.batches, 1e-5, self.config.grad_clip,
                                         self.process, False)
        if not (np.isfinite(loss) and np.isfinite(norm)):
            raise FloatingPointError(f"{self.name}: loss {loss}, gradient norm {norm} were not finite: such a step makes no update")

    def memory(self):
        """Peak bytes of a step, {"allocated", "reserved"}; None on a CPU."""
        if self.process.device.type != "cuda":
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}

    def attention(self):
        """Which kernels F.scaled_dot_product_attention has chosen, by the profiler."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            self.step()
        return sorted({e.key.removeprefix("aten::_scaled_dot_product_") for e in profile.key_averages()
                       if e.key.startswith("aten::_scaled_dot_product_") and "backward" not in e.key})


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def interleave(contestants, rounds, say, clock=time.perf_counter):
    """{name: seconds of a step in each round}: one step of each in turn, each round begun by the next one."""
    seconds = {c.name: [] for c in contestants}
    for number in range(rounds):
        turn = number % len(contestants)
        for c in contestants[turn:] + contestants[:turn]:
            seconds[c.name].append(timed(c.step, clock))
        say(f"  round {number + 1}/{rounds}: " + ", ".join(f"{name} {times[-1]:.3f} s" for name, times in seconds.items()))
    return seconds


def race(config, names, rounds, say):
    """Times of the variants at one shape. -> a dict for JSON."""
    process = Process()
    process.start(config)
    torch._dynamo.reset()  # PyTorch goes over to eager, in silence, after so many variants of one function: forget other races, and
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # be told
    contestants, before = [], graphs()
    for name in names:
        first = next((c for c in contestants if VARIANTS[c.name] is not None), None)
        contestants.append(c := Contestant(name, config, process, first))
        say(f"  {name}: first step {timed(c.step):.1f} s")  # compiles, and makes AdamW's moments
        c.step()
    compiled = graphs()
    # on a CPU the processor's time in this process: other programs disturb it less
    clock = time.perf_counter if process.device.type == "cuda" else time.process_time
    seconds = interleave(contestants, rounds, say, clock)
    recompiled, tokens = graphs() - compiled, config.batch_size * config.gradient_accumulation_steps * config.model.block_size
    rows = {}
    for c in contestants:
        rate = tokens / statistics.median(seconds[c.name])
        rows[c.name] = row = {"seconds": seconds[c.name], "tokens_per_s": rate, "memory": c.memory()}
        for other in ("nanoGPT", "plain", "baseline"):
            if other in seconds:
                row[f"time_over_{other}"] = spread([a / b for a, b in zip(seconds[c.name], seconds[other])])
        if peak := process.peak_flops():
            row["mfu"], row["mfu_causal"] = (rate * c.model.flops_per_token(causal) / peak for causal in (False, True))
    model = dataclasses.asdict(config.model)
    return {"shape": {key: value for key, value in model.items() if not key.startswith("scale_")}, "batch_size": config.batch_size,
            "micro_steps": config.gradient_accumulation_steps, "optimizer": config.optimizer, "dtype": str(process.dtype)[6:],
            "clock": clock.__name__, "compiled": process.compile, "graphs": compiled - before, "recompiled_in_the_rounds": recompiled,
            "attention": contestants[0].attention(), "variants": rows}


def table(result):
    """The rows of a race, for people."""
    lines = [f"{'':24s} {'time / baseline':>28s} {'time / nanoGPT':>28s} {'tokens/s':>10s} {'MFU':>6s} {'causal':>6s} {'peak GB':>8s}"]
    for name, row in result["variants"].items():
        ratios = [f"{r['median']:.3f} ({r['min']:.3f} to {r['max']:.3f})" if (r := row.get(f"time_over_{other}")) else ""
                  for other in ("baseline", "nanoGPT")]
        mfu = [f"{row[key]:.1%}" if key in row else "" for key in ("mfu", "mfu_causal")]
        memory = f"{row['memory']['allocated'] / 1e9:.2f}" if row["memory"] else ""
        lines.append(f"{name:24s} {ratios[0]:>28s} {ratios[1]:>28s} {row['tokens_per_s']:10,.0f} {mfu[0]:>6s} {mfu[1]:>6s} {memory:>8s}")
    return "\n".join(lines)


def train(argv, names, rounds, out):
    """Race the variants at each config's shape; print tables, write JSON to `out` after each."""
    configs, keys = [a for a in argv if not a.startswith("--")], [a for a in argv if a.startswith("--")]
    if not configs:
        raise ValueError("which shape? Name one or more configs: python -m bench.benchmark train configs/quickstart_baseline.py")
    if unknown := [name for name in names if name not in VARIANTS]:
        raise ValueError(f"--variants names {unknown[0]!r}: choose among {','.join(VARIANTS)}")
    def say(line):
        print(line, flush=True)

    loaded, results = [load_config([path, *keys]) for path in configs], {"versions": versions(), "rounds": rounds, "races": {}}
    for path, config in zip(configs, loaded):
        usable = [n for n in names if n not in PEERS or not config.model.n_expert]
        say(f"{path}: {config.batch_size} x {config.model.block_size} tokens, {config.gradient_accumulation_steps} micro-steps")
        results["races"][path] = result = race(config, usable, rounds, say)
        say(f"{table(result)}\n{result['graphs']} graphs, {result['recompiled_in_the_rounds']} more in the rounds; "
            f"attention: {', '.join(result['attention'])}")
        if out:
            write_whole(out, json.dumps(results, indent=1) + "\n", "choose another --out")
    return results


# ---------------------------------------------------------------------------------------------------------------------
# data

def tokenize(rounds, encoding_name, copies):
    """Prints how fast prepare_data.py is in units of encode_ordinary_batch, and its peak memory on `copies` times the text."""
    encoding, cores = get_encoding(encoding_name), os.cpu_count()
    stdlib = find_files([sysconfig.get_paths()["stdlib"]], site_packages=False)
    texts = [path.read_text("utf-8", "ignore") for path, _ in stdlib if path.suffix == ".py"]
    size = sum(len(t.encode()) for t in texts)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "stdlib.jsonl")
        with open(source, "w", encoding="utf-8") as f:
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
        with open(source, "w", encoding="utf-8") as f:
            for _ in range(copies):
                f.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        for threads in sorted({cores, 16}):
            command = [sys.executable, "-c", PEAK, source, "--encoding", encoding_name,
                       "--out", f"{folder}/long{threads}", "--workers", str(threads)]
            peak = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
            print(f"peak memory on {copies * size / 1e6:.0f} MB of text with {threads} threads: "
                  f"{int(peak.stdout.split()[-1]) / 1024:.0f} MB")


def loader(rounds):
    """Prints which share of a training step fetching its batch takes, as if the device did not work meanwhile. A micro-batch is
    fetched whole; a CPU trains on its first sequence only, and the share is taken for each sequence."""
    config, process = load_config([str(ROOT / "configs" / "baseline_120m.py")]), Process()
    process.start(config)
    device, shape = process.device, config.model
    fetched, trained = config.batch_size, config.batch_size if device.type == "cuda" else 1
    model = GPT(shape).to(device)
    model.compute_dtype = process.dtype
    if process.compile:
        compile_model(model)
    with tempfile.TemporaryDirectory() as folder:
        path, tokens = Path(folder, "train.bin"), 100_000_000
        ids = np.random.default_rng(0).integers(shape.vocab_size, size=tokens, dtype=np.uint16)
        path.write_bytes(shard_header(tokens, 2) + ids.tobytes())
        split, position = Split([path], shape.block_size, shape.vocab_size), [0]

        def fetch():
            position[0] += fetched
            return to_device(split[window_numbers(position[0], fetched, len(split), seed=1)], device)

        def step():
            model(*batch)[1].backward()
            model.zero_grad(set_to_none=True)

        batch = tuple(tensor[:trained] for tensor in fetch())
        step()
        fetches, shares = [], []
        for number in range(rounds):
            fetches.append(timed(lambda: [fetch() for _ in range(20)]) / 20)
            shares.append(fetches[-1] / fetched / (timed(step) / trained))
            print(f"  round {number + 1}/{rounds}: {fetches[-1] * 1e3:.3f} ms, {shares[-1]:.4%} of a step", flush=True)
    rate = fetched * shape.block_size / statistics.median(fetches)
    print(f"{fetched} x {shape.block_size} tokens, {machine()}: fetching takes {median_and_range(shares, '.4%')} of a forward and "
          f"backward pass.\n{rate / 1e6:.0f}M tokens/s: under 2% of a step for every process that trains at less than "
          f"{rate / 50e6:.2f}M tokens/s")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "tokenize", "loader"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"train: which, of {', '.join(VARIANTS)} (default: all)")
    parser.add_argument("--out", help="train: a JSON file for every number")
    parser.add_argument("--encoding", default="gpt2", help="tokenize: bytes or a tiktoken name (default: gpt2)")
    parser.add_argument("--copies", type=int, default=8, help="tokenize: the memory run's text, in copies (default: 8)")
    args, rest = parser.parse_known_args(argv)
    try:
        if args.rounds < 1 or args.copies < 1:
            raise ValueError("--rounds and --copies must be at least 1")
        if rest and args.what != "train":
            raise ValueError(f"{args.what} does not know {rest[0]}")
        if args.what == "train":
            train(rest, [name.strip() for name in args.variants.split(",")], args.rounds, args.out)
        elif args.what == "tokenize":
            tokenize(args.rounds, args.encoding, args.copies)
        else:
            loader(args.rounds)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
