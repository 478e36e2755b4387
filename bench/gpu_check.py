"""
Measurements that want a GPU; a CPU runs them at toy shapes. bench/gpu_check.sh has their order.

  python -m bench.gpu_check head      writes studies/results/gpu_head.json

Each check is a function (process, toy) -> a dict of numbers, or a race of RACES. What compares is a
test: tests/test_cuda.py.
"""
import argparse
import contextlib
import dataclasses
import gc
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch._inductor import config as inductor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.benchmark import VARIANTS, Contestant, race, table
from bench.timing import timed, versions
from lib.config import BUILTIN, load_config
from lib.disk import write_whole
from lib.output import say
from lib.process import Process, compile_model
from model import GPT
from optim import make_optimizer, param_groups
from train import main as train

TOY_SHAPE = ["--n_layer=2", "--n_head=2", "--n_embd=64", "--block_size=64"]
TOY = [*TOY_SHAPE, "--vocab_size=256", "--batch_size=2", "--d_ff=0", "--d_expert=0"]


def as_trained(model, process):
    """The model in the dtype of training, compiled if training compiles."""
    model.compute_dtype = process.dtype
    if process.compile:
        compile_model(model)
    return model


def release(process):
    """Forget a finished model: its graphs, which count towards PyTorch's limit for the next one,
    and its memory on the device."""
    torch._dynamo.reset()
    gc.collect()
    if process.device.type == "cuda":
        torch.cuda.empty_cache()


# ---- is it right? --------------------------------------------------------------------------------

def ceilings(process, toy):
    """The best that the card itself reaches: a product of two bfloat16 matrices, and a copy."""
    n, size, repeats = (256, 2 ** 20, 2) if toy else (8192, 2 ** 30, 20)
    a, b = (torch.randn(n, n, device=process.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(size, dtype=torch.uint8, device=process.device)
    target = torch.empty_like(source)

    def best(work):
        work()
        return min(timed(lambda: [work() for _ in range(repeats)]) / repeats for _ in range(5))

    return {"product_tflops": 2 * n ** 3 / best(lambda: a @ b) / 1e12,
            "copy_gb_per_s": 2 * size / best(lambda: target.copy_(source)) / 1e9}


def training_losses(*argv):
    """Run train.py without its output. Returns the loss of every step, and the validation loss."""
    out = next(arg.partition("=")[2] for arg in argv if arg.startswith("--out_dir="))
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = train([argv[0], "--eval_windows=8", "--sample_tokens=0", *argv[1:]])
    if status:
        raise RuntimeError(f"train.py ended with status {status}: {output.getvalue()[-500:]}")
    lines = Path(out, "log.jsonl").read_text("utf-8").splitlines()
    losses = [r["loss"] for r in map(json.loads, lines) if r["event"] == "train"]
    return losses, json.loads(Path(out, "summary.json").read_text("utf-8"))["val_loss"]


def training(process, toy):
    """Some three minutes of training at 0.12B on the built-in data, 65,536 bytes a step: one seed,
    and a rate that nobody has tuned. Compare the variants with each other, and all with another
    card's file."""
    steps, warmup = (6, 2) if toy else (400, 10)
    keys = [f"--dataset={BUILTIN}", "--batch_size=16", "--gradient_accumulation_steps=4",
            "--learning_rate=1e-3", f"--max_iters={steps}", f"--warmup_iters={warmup}",
            "--eval_interval=0", "--eval_windows=256", "--checkpoint_interval=0"]
    if toy:
        keys += [*TOY_SHAPE, "--vocab_size=257", "--batch_size=2"]
    found = {}
    for name, config in (("baseline", ["configs/baseline_120m.py"]),
                         ("none", ["configs/baseline_120m.py", "--scale_vectors=False"]),
                         ("unified", ["configs/unified_120m.py"])):
        with tempfile.TemporaryDirectory() as folder:
            losses, validation = training_losses(*config, f"--out_dir={folder}/run", *keys)
        release(process)
        last = losses[-max(1, steps // 10):]
        found[name] = {"losses": losses[::max(1, steps // 10)], "validation": validation,
                       "mean_of_the_last_tenth": sum(last) / len(last)}
    return found


# ---- is it fast? ---------------------------------------------------------------------------------

PAIR = ["baseline", "unified"]
AT_1B = ["configs/baseline_1b.py", "--batch_size=4"]


class Race(NamedTuple):
    """bench/benchmark.py's race at one shape."""
    argv: list  # a config, and keys
    names: list  # the contestants
    rounds: int = 7
    inductor: dict = {}  # Inductor's keys that are changed
    attention: Callable = contextlib.nullcontext  # PyTorch's choice of a kernel, changed


# One of the two attention kernels is PyTorch's own choice: how far its race is from race_1b's is
# noise. By default the gradients of q, k and v are written by one kernel, which computes each
# branch for each element; race_120m_slices has one for each.
RACES = {
    "race_120m": Race(["configs/baseline_120m.py"],
                      ["nanoGPT", "plain", *PAIR, "unified but the head"]),
    "race_120m_slices": Race(
        ["configs/baseline_120m.py"], ["nanoGPT", "plain", *PAIR, "unified but the head"],
        inductor={"max_pointwise_cat_inputs": 0, "max_complex_pointwise_cat_inputs": 0}),
    "race_120m_parts": Race(["configs/baseline_120m.py"], ["none", "baseline", "HG", "HG+DP+OR"]),
    "race_500m": Race(["configs/baseline_500m.py", "--batch_size=4"], ["plain", *PAIR]),
    "race_moe_500m": Race(["configs/baseline_moe_500m.py"], PAIR),
    "race_moe_1b": Race(["configs/baseline_moe_1b.py", "--batch_size=4"], PAIR),
    "race_1b": Race(AT_1B, PAIR, rounds=3),
    "race_1b_parts": Race(AT_1B, ["plain", "baseline", "HG+DP+OR", "unified"]),
    "race_1b_small": Race(["configs/baseline_1b.py", "--batch_size=2"], PAIR),
    "race_1b_no_mix": Race(AT_1B, PAIR, inductor={"triton.mix_order_reduction": False}),
    "race_1b_flash": Race(
        AT_1B, PAIR, attention=lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)),
    "race_1b_cudnn": Race(
        AT_1B, PAIR, attention=lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)),
}


def run_race(name, toy):
    entry = RACES[name]
    if missing := [key for key in entry.inductor if not hasattr(inductor, key)]:
        return f"not run: PyTorch {torch.__version__} has no Inductor key {missing[0]}"
    config = load_config([*entry.argv, *(TOY if toy else []), "--gradient_accumulation_steps=2"])
    with inductor.patch(entry.inductor), entry.attention():
        found = race(config, entry.names, 2 if toy else entry.rounds)
    say(table(found))
    return found


def head(process, toy):
    """The final norm, the output projection and the loss, forward and backward, of 16k tokens of
    0.12B: milliseconds, and the kernels."""
    config, found = load_config(["configs/baseline_120m.py", *(TOY if toy else [])]), {}
    for name in PAIR:
        keys = {"n_layer": 1, **VARIANTS[name]}
        model = GPT(dataclasses.replace(config.model, **keys)).to(process.device)
        as_trained(model, process)
        shape = config.batch_size, config.model.block_size, config.model.n_embd
        x = torch.randn(shape, device=process.device, dtype=process.dtype).requires_grad_()
        y = torch.randint(config.model.vocab_size, shape[:2], device=process.device)

        def work(model=model, x=x, y=y):
            model.cross_entropy(model, x, y).backward()

        work()
        found[name] = {"ms": min(timed(work) for _ in range(2 if toy else 10)) * 1e3,
                       **kernels(work, process)}
    return found


def optimizers(process, toy):
    """One update by AdamW and by Muon: milliseconds."""
    found = {}
    for label, path in (("0.12B", "configs/unified_120m.py"),
                        ("MoE-0.5B", "configs/unified_moe_500m.py")):
        config = load_config([path, *(TOY if toy else [])])
        with process.device:
            model = GPT(config.model)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for name in ("adamw", "muon"):
            optimizer = make_optimizer(param_groups(model, 0.1), name, 1e-4)
            optimizer.step()
            seconds = min(timed(optimizer.step) for _ in range(1 if toy else 10))
            found[f"{label}, {name}"] = seconds * 1e3
            del optimizer
    return found


def kernels(work, process):
    """The device's microseconds in work(), and the 25 largest kernels: microseconds and calls. On a
    CPU PyTorch's operations."""
    cuda, activity = process.device.type == "cuda", torch.profiler.ProfilerActivity
    time_of = "self_device_time_total" if cuda else "self_cpu_time_total"
    with torch.profiler.profile(activities=[activity.CPU, *[activity.CUDA] * cuda]) as seen:
        timed(work)
    # on CUDA not the operations, whose time is that of their kernels once more
    times = {e.key: (getattr(e, time_of), e.count) for e in seen.key_averages()
             if e.device_type == torch.autograd.DeviceType.CUDA or not cuda}
    largest = sorted(times.items(), key=lambda item: -item[1][0])[:25]
    return {"microseconds": sum(microseconds for microseconds, _ in times.values()),
            "kernels": {name[:100]: list(row) for name, row in largest}}


def profile(process, toy):
    """The largest kernels of a step of baseline and of unified at 1B."""
    found = {}
    for name in PAIR:
        config = load_config([*AT_1B, *(TOY if toy else []), "--gradient_accumulation_steps=2"])
        contestant = Contestant(name, config, process)
        contestant.step()
        contestant.step()
        found[name] = kernels(contestant.step, process)
        del contestant
        release(process)
    return found


# ---- the command ---------------------------------------------------------------------------------

CHECKS = {check.__name__: check for check in (ceilings, training, head, optimizers, profile)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=[*CHECKS, *RACES])
    parser.add_argument("--out", default="studies/results",
                        help="a folder (default: %(default)s; of --toy out/gpu_check)")
    parser.add_argument("--toy", action="store_true", help="toy shapes, on any machine")
    args = parser.parse_args()
    process = Process()
    process.start(load_config(["configs/quickstart.py"]))
    if args.toy and args.out == parser.get_default("out"):
        args.out = "out/gpu_check"  # toy numbers must not stand among the results
    path = Path(args.out, f"gpu_{args.check}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    say(f"{args.check}: {versions()}")
    started = time.monotonic()
    if args.check in RACES:
        found = run_race(args.check, args.toy)
    else:
        found = CHECKS[args.check](process, args.toy)
    seconds = round(time.monotonic() - started, 1)
    results = {"versions": versions(), "toy": args.toy, "seconds": seconds, args.check: found}
    say(json.dumps(found)[:1000])
    write_whole(path, json.dumps(results, indent=1) + "\n", "choose another --out")


if __name__ == "__main__":
    main()
