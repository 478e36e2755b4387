"""
Speed, as ratios from interleaved runs on one machine: the median, and the range over the rounds.

  python -m bench.benchmark train configs/baseline_120m.py --gradient_accumulation_steps=4 \\
      --out studies/results/bench.json
      Training steps on random tokens: every variant of each config's shape beside two peers that
      use none of our modules, nanoGPT's block and the baseline in nn.Linear and nn.RMSNorm
      (plain). --key=value is given to every config.
  python -m bench.benchmark cpu --rounds=40 --threads=1,2
      The files that docs/performance.md quotes: a model of 0.92M parameters, compiled and eager,
      for each number of threads (default: 1), in studies/results/ or the folder of --out.
"""
import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from bench.plain import NanoGPT, PlainGPT
from bench.timing import machine, spread, timed, versions
from lib.config import load_config
from lib.count import flops_per_token
from lib.disk import write_whole
from lib.output import say
from lib.process import Process, compile_model
from model import GPT
from optim import make_optimizer, param_groups
from train import training_step

ROOT = Path(__file__).resolve().parent.parent
PEERS = {"nanoGPT": NanoGPT, "plain": PlainGPT}  # dense only
HG = {"scale_heterogeneous": True}
UNIFIED = {**HG, "scale_placement": "dual_norm", "scale_reparam": "original"}
VARIANTS = {
    "none": {"scale_vectors": False},
    "baseline": {},
    "HG": HG,
    "HG+DP+OR": {**HG, "scale_placement": "dual", "scale_reparam": "original"},
    "unified": UNIFIED,
    "Q/K-norm": {"qk_norm": True},
    "unified but the head": {**UNIFIED, "scale_placement_on": "q,k,v,gate,up"},
}
NAMES = [*PEERS, *VARIANTS]
CPU_CONFIG = ["configs/quickstart_baseline.py", "--device=cpu", "--n_layer=4", "--n_head=4",
              "--n_embd=128", "--d_ff=384", "--block_size=256", "--batch_size=8"]
ATTENTION = "aten::_scaled_dot_product_"  # what the names of its kernels begin with


# ---- one contestant ------------------------------------------------------------------------------

class RandomBatches:
    """The part of train.Batches that a step uses, with tokens drawn once."""

    def __init__(self, config, device):
        self.micro_steps = config.gradient_accumulation_steps
        generator = torch.Generator().manual_seed(0)
        shape = config.batch_size, config.model.block_size + 1
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
        self.x, self.y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def fetch(self):
        pass


class Contestant:
    """A model ready to take steps. Variants share their matrices, and AdamW's moments of them, with
    `first`, so that the largest fit beside each other."""

    def __init__(self, name, config, process, first=None):
        self.name, self.config, self.process = name, config, process
        torch.manual_seed(0)
        with process.device:
            if name in PEERS:
                self.model = PEERS[name](config.model)
                groups = self.model.groups(config.weight_decay)
            else:
                self.model = GPT(dataclasses.replace(config.model, **VARIANTS[name]))
                shared = self.share_matrices(first.model) if first else []
                groups = param_groups(self.model, config.weight_decay)
        self.model.compute_dtype = process.dtype
        self.optimizer = make_optimizer(groups, config.optimizer, 1e-5)
        if first and config.optimizer == "adamw":
            self.optimizer.state.update({p: first.optimizer.state[p] for p in shared})
        self.batches = RandomBatches(config, process.device)
        if process.compile:
            compile_model(self.model)

    def share_matrices(self, model):
        """Put another variant's matrices in place of our own. Returns them."""
        matrices = {n: p for n, p in model.named_parameters() if n.endswith(".weight")}
        for name, p in matrices.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, p)
        return list(matrices.values())

    def step(self):
        loss, norm, _, _ = training_step(self.model, self.model, self.optimizer, self.batches, 1e-5,
                                         self.config.grad_clip, self.process, False)
        if not (np.isfinite(loss) and np.isfinite(norm)):
            raise FloatingPointError(f"{self.name}: loss {loss}, gradient norm {norm}: a step that "
                                     f"is not finite makes no update, and its time means nothing")

    def memory(self):
        """Peak bytes of a step, {"allocated", "reserved"}; None on a CPU."""
        if self.process.device.type != "cuda":
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return {"allocated": torch.cuda.max_memory_allocated(),
                "reserved": torch.cuda.max_memory_reserved()}

    def attention(self):
        """The kernels that PyTorch has chosen for attention, by the profiler."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            self.step()
        kernels = {event.key for event in profile.key_averages()}
        return sorted(k.removeprefix(ATTENTION) for k in kernels
                      if k.startswith(ATTENTION) and not k.endswith("backward"))


# ---- the race ------------------------------------------------------------------------------------

def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def line_up(config, names, process):
    """The contestants, each after two steps: the first compiles and makes AdamW's moments."""
    # PyTorch silently runs eagerly after too many variants of one function: forget other races',
    # and be told
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    contestants = []
    for name in names:
        first = next((c for c in contestants if c.name in VARIANTS), None)
        contestant = Contestant(name, config, process, first if name in VARIANTS else None)
        say(f"  {name}: first step {timed(contestant.step):.1f} s")
        contestant.step()
        contestants.append(contestant)
    return contestants


def interleave(contestants, rounds, clock=time.perf_counter):
    """{name: seconds of a step in each round}: one step of each in turn; the next one begins the
    next round."""
    seconds = {c.name: [] for c in contestants}
    for number in range(rounds):
        turn = number % len(contestants)
        for c in contestants[turn:] + contestants[:turn]:
            seconds[c.name].append(timed(c.step, clock))
        last = ", ".join(f"{name} {times[-1]:.3f} s" for name, times in seconds.items())
        say(f"  round {number + 1}/{rounds}: {last}")
    return seconds


def choose_clock(device):
    """On one thread of a CPU the processor's time in this process: other programs disturb it less.
    Several threads spin while they wait, which that clock counts."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time
    return time.perf_counter


def describe(contestant, seconds, tokens):
    """The row of one contestant, from everyone's seconds."""
    own = seconds[contestant.name]
    rate = tokens / statistics.median(own)
    row = {"seconds": own, "tokens_per_s": rate, "memory": contestant.memory()}
    for other in ("nanoGPT", "plain", "baseline"):
        if other in seconds:
            ratios = [a / b for a, b in zip(own, seconds[other])]
            row[f"time_over_{other}"] = spread(ratios)
    if peak := contestant.process.peak_flops():
        row["mfu"] = rate * flops_per_token(contestant.model) / peak
        row["mfu_causal"] = rate * flops_per_token(contestant.model, causal=True) / peak
    return row


def race(config, names, rounds):
    """Times of the named contestants at one shape. -> a dict for JSON."""
    process = Process()
    process.start(config)
    before = graphs()
    contestants = line_up(config, names, process)
    compiled = graphs()
    clock = choose_clock(process.device)
    seconds = interleave(contestants, rounds, clock)
    recompiled = graphs() - compiled
    tokens = config.batch_size * config.gradient_accumulation_steps * config.model.block_size
    shape = {key: value for key, value in dataclasses.asdict(config.model).items()
             if not key.startswith("scale_")}
    return {
        "shape": shape,
        "batch_size": config.batch_size,
        "micro_steps": config.gradient_accumulation_steps,
        "optimizer": config.optimizer,
        "dtype": str(process.dtype).removeprefix("torch."),
        "clock": clock.__name__,
        "compiled": process.compile,
        "graphs": compiled - before,
        "recompiled_in_the_rounds": recompiled,
        "attention": contestants[-1].attention(),
        "variants": {c.name: describe(c, seconds, tokens) for c in contestants},
    }


def table(result):
    """A race for people: a row for each contestant, and what was run."""
    lines = [f"{'':20s} {'time / baseline':>24s} {'time / nanoGPT':>24s} {'tokens/s':>10s} "
             f"{'MFU':>6s} {'causal':>6s} {'peak GB':>8s}"]
    for name, row in result["variants"].items():
        cells = [f"{name:20s}"]
        for other in ("baseline", "nanoGPT"):
            r = row.get(f"time_over_{other}")
            cells.append(f"{r['median']:.3f} ({r['min']:.3f} to {r['max']:.3f})" if r else "")
        mfu = [f"{row[key]:.1%}" if key in row else "" for key in ("mfu", "mfu_causal")]
        memory = f"{row['memory']['allocated'] / 1e9:.2f}" if row["memory"] else ""
        lines.append(f"{cells[0]} {cells[1]:>24s} {cells[2]:>24s} {row['tokens_per_s']:10,.0f} "
                     f"{mfu[0]:>6s} {mfu[1]:>6s} {memory:>8s}")
    lines.append(f"{result['dtype']}, attention: {', '.join(result['attention'])}; "
                 f"{result['graphs']} graphs, {result['recompiled_in_the_rounds']} more in the "
                 f"rounds")
    return "\n".join(lines)


# ---- the commands --------------------------------------------------------------------------------

def train(argv, names, rounds, out):
    """Race the contestants at each config's shape; print tables, write JSON to `out` after each."""
    paths = [arg for arg in argv if not arg.startswith("--")]
    keys = [arg for arg in argv if arg.startswith("--")]
    if not paths:
        raise ValueError("no config given: name one or more, such as "
                         "`python -m bench.benchmark train configs/quickstart_baseline.py`")
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(f"--variants names {unknown[0]!r}: choose among {','.join(NAMES)}")
    configs = {path: load_config([path, *keys]) for path in paths}
    results = {"versions": versions(), "rounds": rounds, "races": {}}
    say(f"{machine()}, threads: {torch.get_num_threads()}, PyTorch {torch.__version__}")
    if out:  # before the work: a place that cannot be made is reported at once
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    for path, config in configs.items():
        usable = [n for n in names if n not in PEERS or not config.model.n_expert]
        say(f"{path}: {config.batch_size} x {config.model.block_size} tokens, "
            f"{config.gradient_accumulation_steps} micro-steps")
        results["races"][path] = result = race(config, usable, rounds)
        say(table(result))
        if out:
            write_whole(Path(out), json.dumps(results, indent=1) + "\n", "choose another --out")
    return results


def cpu(keys, names, rounds, threads, folder):
    """The files of docs/performance.md, each by `train` in a process of its own."""
    for count in threads:
        for stem, compiled in (("bench_cpu", True), ("bench_cpu_eager", False)):
            suffix = "" if count == 1 else f"_{count}_threads"
            out = Path(folder, f"{stem}{suffix}.json").resolve()
            command = [sys.executable, "-m", "bench.benchmark", "train", *CPU_CONFIG,
                       f"--compile={compiled}", f"--variants={','.join(names)}",
                       f"--rounds={rounds}", f"--out={out}", *keys]
            environment = {**os.environ, "OMP_NUM_THREADS": str(count)}
            if status := subprocess.run(command, cwd=ROOT, env=environment).returncode:
                sys.exit(status)  # it has printed why
            say(f"wrote {out}")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "cpu"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--variants", default=",".join(NAMES),
                        help="train and cpu: some of the default's (default: %(default)s)")
    parser.add_argument("--threads", default="1", help="cpu: such as 1,2 (default: 1)")
    parser.add_argument("--out", help="train: a JSON file for every number; cpu: a folder")
    args, rest = parser.parse_known_args(argv)
    if args.rounds < 1:
        raise ValueError(f"--rounds={args.rounds} must be at least 1")
    if not all(part.isdigit() and int(part) for part in args.threads.split(",")):
        raise ValueError(f"--threads={args.threads} must be numbers of at least 1, such as 1,2")
    if args.command == "cpu":
        for arg in rest:
            if not arg.startswith("--"):
                raise ValueError(f"cpu does not know {arg}: its config is its own")
    return args, rest


def main(argv=None):
    try:
        args, rest = parse(argv)
        names = [name.strip() for name in args.variants.split(",")]
        if args.command == "train":
            train(rest, names, args.rounds, args.out)
        else:
            threads = [int(part) for part in args.threads.split(",")]
            cpu(rest, names, args.rounds, threads, args.out or ROOT / "studies" / "results")
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
