"""
The parts of bench/gpu_check.sh: measurements that want a GPU, written so that a CPU can run them at toy shapes.

Each check is a function of (process, toy) -> a dict of numbers; a check that fails leaves its error in the file instead, and the
others run. Differences are ‖found - expected‖ / ‖expected‖.
"""
import argparse
import contextlib
import dataclasses
import io
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.benchmark import VARIANTS, Contestant, graphs, race, table, timed, versions
from lib.config import BUILTIN, load_config
from lib.data import Dataset
from lib.disk import write_whole
from lib.process import Process, compile_model, to_device
from model import GPT, GPTConfig, MoE
from norms import named_scale_vectors
from optim import make_optimizer, param_groups
from prepare_data import prepare_builtin
from train import evaluate
from train import main as train

TOY = ["--n_layer=2", "--n_head=2", "--n_embd=64", "--block_size=64", "--vocab_size=256", "--batch_size=2", "--d_ff=0", "--d_expert=0"]
MIXTURE = {**VARIANTS["unified"], "n_expert": 8, "n_expert_active": 2, "d_shared_expert": 426}


def say(line):
    print(line, flush=True)


def difference(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def moved(model, seed=1):
    """The model with every scale vector off its start, as training leaves it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, scale in named_scale_vectors(model):
            for p in scale.parameters():
                p += 0.2 * torch.randn(p.shape, generator=generator).to(p)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# A: is it right?

def ceilings(process, toy):
    """What the card itself reaches: a product of two bfloat16 matrices, and a copy."""
    n, size, repeats = (256, 2 ** 20, 2) if toy else (8192, 2 ** 30, 20)
    a, b = (torch.randn(n, n, device=process.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(size, dtype=torch.uint8, device=process.device)
    target = torch.empty_like(source)
    best = []
    for work in (lambda: a @ b, lambda: target.copy_(source)):
        work()
        best.append(min(timed(lambda: [work() for _ in range(repeats)]) / repeats for _ in range(5)))  # noqa: B023
    return {"product_tflops": 2 * n ** 3 / best[0] / 1e12, "copy_gb_per_s": 2 * size / best[1] / 1e9}


def compiled_against_float64(process, toy):
    """The loss, and each parameter's gradient, of what training runs against eager float64 of the same weights."""
    shape = dict(n_layer=2, n_embd=64, n_head=2, block_size=32, vocab_size=512) if toy else dict(n_layer=3, block_size=256)
    found = {}
    for name, keys in (("baseline", {}), ("unified", VARIANTS["unified"]), ("mixture", MIXTURE)):
        losses, grads = [], []
        for exact in (True, False):
            torch.manual_seed(0)
            model = moved(GPT(GPTConfig(**shape, **keys))).to(process.device)
            if exact:
                model = model.double()
            else:
                model.compute_dtype = process.dtype
                if process.compile:
                    compile_model(model)
            tokens = torch.randint(model.config.vocab_size, (4, shape["block_size"] + 1), generator=torch.Generator().manual_seed(0))
            tokens = tokens.to(process.device)
            loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())[1]
            (loss + model.auxiliary_loss()).backward()
            losses.append(loss.item())
            grads.append({n: p.grad for n, p in model.named_parameters()})
        each = {n: difference(grads[1][n], g) for n, g in grads[0].items() if g.norm() > 0}
        everything = [torch.cat([g.double().flatten() for g in side.values()]) for side in grads]
        found[name] = {"loss": losses, "all_gradients": difference(everything[1], everything[0]),
                       "worst": dict(sorted(each.items(), key=lambda item: -item[1])[:10]), "median": sorted(each.values())[len(each) // 2]}
    return found


def grouped_against_looped(process, toy):
    """The routed layer at the paper's widths, bfloat16 grouped products against the float32 loop, with an expert that no token
    chooses: the output, and the gradient furthest off."""
    found = {}
    for width, C in ((21, 32), (42, 64)) if toy else ((426, 640), (682, 1024), (853, 1280)):
        torch.manual_seed(0)
        config = GPTConfig(n_embd=C, n_head=2, n_expert=8, n_expert_active=2, d_expert=width, d_shared_expert=width, init_std=0.0,
                           **VARIANTS["unified"])
        layer = MoE(config).to(process.device)
        with torch.no_grad():
            for name, p in layer.named_parameters():
                if name.endswith(".weight"):
                    p.normal_(std=C ** -0.5)
            layer.router.weight[7] = -10 * C ** -0.5
        x = torch.rand(512, C, device=process.device).bfloat16().float()  # so that both route alike
        results = []
        for dtype in (torch.float32, torch.bfloat16):
            layer.zero_grad()
            y, stats = layer(x.to(dtype))
            y.float().square().sum().backward()
            results.append((y.detach(), {n: p.grad for n, p in layer.named_parameters()}))
        each = {n: difference(results[1][1][n], g) for n, g in results[0][1].items() if g.norm() > 0}
        worst = max(each, key=each.get)
        found[width] = {"output": difference(results[1][0], results[0][0]), worst: each[worst],
                        "load_of_the_empty_expert": stats[-1].item()}
    return found


def runs(process, toy):
    """Two runs of one seed, and a third that resumes at half its steps: how far the losses are apart. On CUDA some sums have no
    fixed order, so the resumed run is as far from the first as a repeated one."""
    steps, losses = 4 if toy else 40, {}
    with tempfile.TemporaryDirectory() as folder:
        def run(name, *args):
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                status = train(["configs/quickstart.py", f"--out_dir={folder}/{name}", f"--max_iters={steps}", "--warmup_iters=2",
                                f"--checkpoint_interval={steps // 2}", "--eval_windows=8", "--sample_tokens=0",
                                *(TOY[:4] if toy else []), *args])
            if status:
                raise RuntimeError(f"train.py ended with status {status}: {said.getvalue()[-500:]}")
            log = [json.loads(line) for line in Path(folder, name, "log.jsonl").read_text("utf-8").splitlines()]
            losses[name] = [record["loss"] for record in log if record["event"] == "train"]
        run("first")
        run("again")
        shutil.copytree(f"{folder}/first", f"{folder}/resumed")
        max(Path(folder, "resumed").glob("ckpt_*.pt")).unlink()
        run("resumed", "--resume")
    return {"last_loss": losses["first"][-1],
            **{f"furthest_{name}": max(abs(a - b) for a, b in zip(losses["first"], losses[name])) for name in ("again", "resumed")}}


def partial_evaluation(process, toy):
    """Eight validation windows by micro-batches of three: one graph more than without, and the loss of window by window."""
    config = load_config(["configs/quickstart.py", "--batch_size=3", "--eval_windows=8", *(TOY[:4] if toy else [])])
    if not Path(BUILTIN).exists():
        prepare_builtin(BUILTIN)
    split = Dataset(BUILTIN, config.model.block_size, config.model.vocab_size).val
    torch.manual_seed(0)
    model = moved(GPT(config.model)).to(process.device)
    with torch.no_grad():
        alone = sum(model(*to_device(split[[i * len(split) // 8]], process.device))[1].item() for i in range(8)) / 8
    model.compute_dtype = process.dtype
    if process.compile:
        compile_model(model)
    before = graphs()
    return {"loss": evaluate(model, split, config, process), "window_by_window": alone, "graphs": graphs() - before}


# ---------------------------------------------------------------------------------------------------------------------
# B and C: is it fast?

def races(process, toy, entries):
    """bench/benchmark.py's race for [(label, config and keys, variants)]."""
    found = {}
    for label, argv, names in entries:
        config = load_config([*argv, *(TOY if toy else []), "--gradient_accumulation_steps=2"])
        found[label] = race(config, names, 2 if toy else 7, say)
        say(f"{label}\n{table(found[label])}")
    return found


FEW = ["baseline", "HG+DP+OR", "unified"]


def dense_and_mixture(process, toy):
    return races(process, toy, [("0.12B, 16 x 1024", ["configs/baseline_120m.py"], list(VARIANTS)),
                                ("0.5B, 4 x 4096", ["configs/baseline_500m.py", "--batch_size=4"], ["plain", *FEW]),
                                ("MoE-0.5B, 4 x 4096", ["configs/baseline_moe_500m.py", "--batch_size=4"], FEW)])


def largest(process, toy):
    return races(process, toy, [("1B, 4 x 4096", ["configs/baseline_1b.py", "--batch_size=4"], ["plain", *FEW]),
                                ("1B, 2 x 4096", ["configs/baseline_1b.py", "--batch_size=2"], ["baseline", "unified"]),
                                ("MoE-1B, 4 x 4096", ["configs/baseline_moe_1b.py", "--batch_size=4"], ["baseline", "unified"])])


def head(process, toy):
    """The final norm, the output projection and the loss, forward and backward, of 16k tokens of 0.12B: milliseconds."""
    config, found = load_config(["configs/baseline_120m.py", *(TOY if toy else [])]), {}
    for name in ("baseline", "unified"):
        model = GPT(dataclasses.replace(config.model, n_layer=1, **VARIANTS[name])).to(process.device)
        model.compute_dtype = process.dtype
        if process.compile:
            compile_model(model)
        x = torch.randn(config.batch_size, config.model.block_size, config.model.n_embd, device=process.device, dtype=process.dtype)
        x, y = x.requires_grad_(), torch.randint(config.model.vocab_size, x.shape[:2], device=process.device)

        def work(model=model, x=x, y=y):
            model.loss(x, y).backward()
        work()
        found[name] = min(timed(work) for _ in range(2 if toy else 10)) * 1e3
    return found


def optimizers(process, toy):
    """One update by AdamW and by Muon: milliseconds."""
    found = {}
    for label, path in (("0.12B", "configs/unified_120m.py"), ("MoE-0.5B", "configs/unified_moe_500m.py")):
        config = load_config([path, *(TOY if toy else [])])
        with process.device:
            model = GPT(config.model)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for name in ("adamw", "muon"):
            optimizer = make_optimizer(param_groups(model, 0.1), name, 1e-4, fused=process.device.type == "cuda")
            optimizer.step()
            found[f"{label}, {name}"] = min(timed(optimizer.step) for _ in range(2 if toy else 10)) * 1e3
            del optimizer
    return found


def profile(process, toy):
    """Where a step of unified 1B goes: the 25 largest kernels, in microseconds a step."""
    config = load_config(["configs/unified_1b.py", "--batch_size=4", *(TOY if toy else []), "--gradient_accumulation_steps=2"])
    contestant = Contestant("unified", config, process)
    contestant.step()
    contestant.step()
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (process.device.type == "cuda")
    with torch.profiler.profile(activities=activities) as seen:
        contestant.step()
    time_of = "self_device_time_total" if process.device.type == "cuda" else "self_cpu_time_total"
    kernels = sorted(seen.key_averages(), key=lambda e: -getattr(e, time_of))
    return {"all": sum(getattr(e, time_of) for e in kernels),
            "largest": {e.key[:100]: [getattr(e, time_of), e.count] for e in kernels[:25]}}


PARTS = {"A": (ceilings, compiled_against_float64, grouped_against_looped, runs, partial_evaluation),
         "B": (dense_and_mixture, head, optimizers),
         "C": (largest, profile)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", default="results")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    process = Process()
    process.start(load_config(["configs/quickstart.py"]))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    results, failed, started = {"versions": versions(), "toy": args.toy}, 0, time.time()
    for check in PARTS[args.part]:
        say(f"{args.part}, {check.__name__}, after {time.time() - started:.0f} s")
        torch._dynamo.reset()  # so that one check's graphs do not count towards another's limit of recompiles
        try:
            results[check.__name__] = check(process, args.toy)
        except Exception as error:  # GPU time is dear: what comes after is measured all the same
            results[check.__name__], failed = f"{type(error).__name__}: {error}", failed + 1
        say(str(results[check.__name__])[:3000])
        if process.device.type == "cuda":
            torch.cuda.empty_cache()
        results["seconds"] = time.time() - started
        write_whole(Path(args.out, f"gpu_{args.part}.json"), json.dumps(results, indent=1) + "\n", "choose another --out")
    sys.exit(f"error: {failed} of {len(PARTS[args.part])} checks failed" if failed else 0)


if __name__ == "__main__":
    main()
