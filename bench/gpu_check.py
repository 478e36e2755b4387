"""
The parts of bench/gpu_check.sh: measurements that want a GPU; a CPU runs them at toy shapes.

Each check is a function (process, toy) -> a dict of numbers. A check that fails leaves its error
in the file, and the others run. What compares is a test: tests/test_cuda.py.
"""
import argparse
import contextlib
import dataclasses
import gc
import io
import json
import sys
import tempfile
import time
from pathlib import Path

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


# ---- A: is it right? -----------------------------------------------------------------------------

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


# ---- B and C: is it fast? ------------------------------------------------------------------------

def races(process, toy, entries):
    """bench/benchmark.py's race for each (label, config and keys, contestants)."""
    found = {}
    for label, argv, names in entries:
        config = load_config([*argv, *(TOY if toy else []), "--gradient_accumulation_steps=2"])
        found[label] = race(config, names, 2 if toy else 7)
        say(f"{label}\n{table(found[label])}")
        release(process)
    return found


PAIR = ["baseline", "unified"]
AT_1B = ["configs/baseline_1b.py", "--batch_size=4"]


def dense_and_mixture(process, toy):
    return races(process, toy, [
        ("0.12B, 16 x 1024", ["configs/baseline_120m.py"],
         ["nanoGPT", "plain", "none", "baseline", "HG", "HG+DP+OR", "unified"]),
        ("0.5B, 4 x 4096", ["configs/baseline_500m.py", "--batch_size=4"], ["plain", *PAIR]),
        ("MoE-0.5B, 16 x 1024", ["configs/baseline_moe_500m.py"], PAIR)])


def one_billion(process, toy):
    return races(process, toy, [("1B, 4 x 4096", AT_1B, ["plain", "baseline", "HG+DP+OR",
                                                         "unified"])])


def two_sequences_and_mixture(process, toy):
    return races(process, toy, [
        ("1B, 2 x 4096", ["configs/baseline_1b.py", "--batch_size=2"], PAIR),
        ("MoE-1B, 4 x 4096", ["configs/baseline_moe_1b.py", "--batch_size=4"], PAIR)])


def choices_of_pytorch(process, toy):
    """1B as PyTorch chooses, and with one choice changed: without Inductor's mix-order reductions,
    and with each attention kernel. One of the two kernels is PyTorch's own choice: how far its race
    is from the first one is noise."""
    settings = {"as PyTorch chooses": contextlib.nullcontext()}
    if hasattr(inductor.triton, "mix_order_reduction"):  # not in PyTorch 2.9
        settings["no mix-order reductions"] = inductor.patch("triton.mix_order_reduction", False)
    settings["flash attention"] = sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    if process.device.type == "cuda":
        settings["cuDNN attention"] = sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
    found = {}
    for label, setting in settings.items():
        with setting:
            try:
                found |= races(process, toy, [(label, AT_1B, PAIR)])
            except RuntimeError as error:  # a card without this kernel
                found[label] = one_line(error)
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
            model.cross_entropy(model.logits, x, y).backward()

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

# what matters most comes first: bench/gpu_check.sh stops a part after ten minutes
PARTS = {
    "A": (ceilings, training),
    "B": (dense_and_mixture, head, optimizers),
    "C": (one_billion, choices_of_pytorch, profile, two_sequences_and_mixture),
}


def one_line(error):
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--only", help="some of the part's checks, such as head,optimizers")
    parser.add_argument("--out", help="a folder (studies/results; with --only out/gpu_check)")
    parser.add_argument("--toy", action="store_true", help="toy shapes, on any machine")
    args = parser.parse_args()
    checks = PARTS[args.part]
    if args.only:
        known = {check.__name__: check for check in checks}
        if unknown := [name for name in args.only.split(",") if name not in known]:
            parser.error(f"--only names {unknown[0]!r}: choose among {','.join(known)}")
        checks = [known[name] for name in args.only.split(",")]
    process = Process()
    process.start(load_config(["configs/quickstart.py"]))
    folder = args.out or ("out/gpu_check" if args.only else "studies/results")
    path = Path(folder, f"gpu_{args.part}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    results, failed, started = {"versions": versions(), "toy": args.toy}, 0, time.monotonic()
    say(str(results["versions"]))
    for check in checks:
        name = check.__name__
        say(f"{args.part}, {name}, after {time.monotonic() - started:.0f} s")
        try:
            results[name] = check(process, args.toy)
        except Exception as error:  # GPU time is dear: the checks after this one run all the same
            results[name] = one_line(error)
            failed += 1
        say(json.dumps(results[name])[:1000])
        release(process)
        results["seconds"] = round(time.monotonic() - started, 1)
        write_whole(path, json.dumps(results, indent=1) + "\n", "choose another --out")
    sys.exit(f"error: {failed} of {len(checks)} checks failed: see {path}" if failed else 0)


if __name__ == "__main__":
    main()
