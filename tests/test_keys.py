"""
Proves that every key of a configuration does in a run what it promises. CASES has each key with
values that are not its default. A run with them is held against the same steps in bare torch: loss
and gradients by tests/reference.py, AdamW and Muon by torch.optim, one parameter at a time; or
against the files and lines that the key is about. A key without a case fails.
"""
import copy
import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from conftest import losses, randomize_scales, read_log, refused, tiny_batch, train, trained
from test_data import llmc_shard
from torch.nn import functional as F

import train as program
from lib.config import FIELDS
from lib.data import get_encoding, window_numbers
from norms import named_scale_vectors
from optim import learning_rate
from sample import generate

BASE = dict(n_layer=2, n_head=2, n_embd=24, d_ff=45, block_size=16, vocab_size=257, init_std=0,
            batch_size=3, gradient_accumulation_steps=2, max_iters=4, warmup_iters=2,
            learning_rate=1e-2, eval_interval=0, eval_windows=2, log_interval=1, device="cpu")
# 64 tokens, so that float32 has the experts' shares exactly
MIXTURE = dict(n_expert=5, n_expert_active=2, d_expert=13, load_balance_coef=0.5,
               router_z_coef=0.25, batch_size=4)
DUAL, DNP = {"scale_placement": "dual"}, {"scale_placement": "dual_norm", "norm_eps": 1e-12}
MUON = {"optimizer": "muon", "weight_decay": 2.0}
WSD = {"schedule": "wsd", "decay_share": 0.75, "warmup_iters": 1}


def keys_of(keys):
    """All keys by name: the defaults, BASE's and these, and what 0 and -1 stand for."""
    c = SimpleNamespace(**{**{key: field.default for key, field in FIELDS.items()}, **BASE, **keys})
    c.n_kv_head, c.head_dim = c.n_kv_head or c.n_head, c.n_embd // c.n_head
    if c.min_lr < 0:
        c.min_lr = c.learning_rate / 20 if c.schedule == "cosine" else 0.0
    return c


class Runs:
    """run(**keys): a run of train.py in float64 whose scale vectors start at random, as a
    namespace: its folder, `text` (what it printed), `first` (the model as it started), `model`, and
    `read` (rows, length and mode of each forward pass)."""
    ends = {}  # {keys: weights} of runs whose keys are no case's

    def __init__(self, dataset, folder, monkeypatch, two):
        self.dataset, self.folder, self.monkeypatch, self.two = dataset, folder, monkeypatch, two
        self.number = itertools.count()

    def end(self, keys):
        name = str(sorted(keys.items()))
        if name not in self.ends:
            self.ends[name] = self(**keys).model.state_dict()
        return self.ends[name]

    def arguments(self, keys):
        out = self.folder / str(next(self.number))
        keys = {"out_dir": out, "dataset": self.dataset, **BASE, **keys}
        return [f"--{key}={value}" for key, value in keys.items()]

    def __call__(self, double=True, **keys):
        found, read, set_up = [], [], program.set_up

        def watched(*args):
            found.append(set_up(*args))
            model = randomize_scales(found[0].model)
            if double:
                model.double().compute_dtype = torch.float64
            found.append(copy.deepcopy(model))
            model.register_forward_pre_hook(lambda m, args: read.append(
                (*args[0].shape, m.training)))
            return found[0]

        arguments = self.arguments(keys)
        with self.monkeypatch.context() as patch:
            patch.setattr(program, "set_up", watched)
            text = trained(*arguments)
        run, first = found
        return SimpleNamespace(folder=run.log.out, text=text, first=first, model=run.model,
                               read=read)

    def tokens(self, split, dataset=None):
        [path] = (dataset or self.dataset).glob(f"{split}*.bin")
        return torch.from_numpy(np.fromfile(path, "<u2", offset=1024).astype(np.int64))


@pytest.fixture
def runs(dataset, tmp_path, monkeypatch, request):
    return Runs(dataset, tmp_path, monkeypatch, lambda: request.getfixturevalue("two"))


# ---- the same steps in bare torch ----------------------------------------------------------------

def decay_of(name, p, vector, c):
    if vector is not None:
        decays = {"all": True, "none": False, "input_norm": vector.input_norm,
                  "output_norm": not vector.input_norm, "absorbable": vector.absorbable}
        return c.weight_decay if decays[c.scale_weight_decay] else 0.0
    return 0.0 if name == "embedding.weight" and not c.decay_embeddings else c.weight_decay


def optimizers(model, c):
    """torch.optim's, with a group for each parameter: an expert's matrix is one of its own."""
    vectors = {p: m for _, m in named_scale_vectors(model) for p in m.parameters()}
    muon, adamw = [], []
    for name, p in model.named_parameters():
        vector = vectors.get(p)
        group = {"params": [p], "weight_decay": decay_of(name, p, vector, c),
                 "scale": 1.0 if vector is None else c.scale_lr}
        if c.optimizer == "muon" and name.startswith("layers.") and vector is None:
            views = [torch.nn.Parameter(W) for W in p.detach().view(-1, *p.shape[-2:])]
            muon.append((p, {**group, "params": views}))
        else:
            adamw.append(group)
    result = [torch.optim.AdamW(adamw, betas=(c.beta1, c.beta2))]
    if muon:
        result.append(torch.optim.Muon([group for _, group in muon], momentum=c.muon_momentum,
                                       adjust_lr_fn="match_rms_adamw"))
    return result, [(p, group["params"]) for p, group in muon]


def steps(model, c, tokens):
    """Train the model by the keys c; gives [[loss, rate, gradient's norm], ...]."""
    made, stacks = optimizers(model, c)
    lines, T, batch = [], c.block_size, c.batch_size
    for step in range(c.max_iters):
        model.zero_grad()
        total = 0.0
        for micro in range(c.gradient_accumulation_steps):
            first = (step * c.gradient_accumulation_steps + micro) * batch
            starts = T * window_numbers(first, batch, (len(tokens) - 1) // T, c.seed)
            rows = torch.stack([tokens[s:s + T + 1] for s in starts])
            logits, (balance, z) = reference.decoder(model, rows[:, :-1], c)
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            objective = loss + c.load_balance_coef * balance + c.router_z_coef * z
            (objective / c.gradient_accumulation_steps).backward()
            total += loss.item() / c.gradient_accumulation_steps
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf).item()
        for p, views in stacks:
            for view, grad in zip(views, p.grad.view(-1, *p.shape[-2:])):
                view.grad = grad
        for group in (group for optimizer in made for group in optimizer.param_groups):
            group["lr"] = learning_rate(step, c) * group["scale"]
        for optimizer in made:
            optimizer.step()
        lines.append([total, learning_rate(step, c), norm])
    return lines


def trains(*values, **context):
    """A case: a run with each value makes exactly the steps of the formulas, and other ones than a
    run without. values: or {value: how many numbers all scale vectors have}."""
    counts = values[0] if isinstance(values[0], dict) else dict.fromkeys(values)

    def check(runs, key):
        ends = [runs.end(context)]
        for value, count in counts.items():
            keys = {**context, key: value}
            run, c = runs(**keys), keys_of(keys)
            vectors = [p for _, m in named_scale_vectors(run.first) for p in m.parameters()]
            assert count is None or sum(p.numel() for p in vectors) == count, value

            expected = steps(run.first, c, runs.tokens("train", keys.get("dataset")))
            logged = [[r["loss"], r["lr"], r["grad_norm"]] for r in read_log(run.folder, "train")]
            # Muon works in bfloat16, and a product of many matrices may round otherwise than of one
            share = 0.01 if c.optimizer == "muon" else 1e-6
            assert np.ravel(logged) == pytest.approx(np.ravel(expected), rel=share / 100), value
            for (name, p), q in zip(run.model.named_parameters(), run.first.parameters()):
                assert (p - q).abs().max() <= share * c.learning_rate, (name, value)
            ends.append(run.model.state_dict())
        for a, b in itertools.combinations(ends, 2):
            assert furthest(a, b) > 3 * share * BASE["learning_rate"], "no difference"
    return check


def furthest(a, b):
    """The largest difference of two models' weights; infinite for those of different shapes."""
    if {name: p.shape for name, p in a.items()} != {name: p.shape for name, p in b.items()}:
        return math.inf
    return max((p - b[name]).abs().max() for name, p in a.items())


# ---- the machine ---------------------------------------------------------------------------------

def dtype(runs, key):
    """Of the activations; weights and loss stay float32."""
    for value in ("float32", "bfloat16"):
        run = runs(dtype=value, double=False)
        seen = []
        run.model.layers[1].register_forward_hook(lambda m, x, y, seen=seen: seen.append(y[0]))
        _, loss = run.model(*tiny_batch())
        assert seen[0].dtype == getattr(torch, value) and loss.dtype == torch.float32
        assert {p.dtype for p in run.model.parameters()} == {torch.float32}
        assert f"1 x cpu, {value}, not compiled" in run.text


def recompute(runs, key):
    """A second forward pass of each block in the backward pass. Its function: test_model."""
    for value, times in ((False, 1), (True, 2)):
        model, calls = runs(recompute=value).model, []
        for layer in model.layers:
            layer.attn.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        model(*tiny_batch())[1].backward()
        assert len(calls) == times * len(model.layers)


def device(runs, key):
    assert {p.device.type for p in runs(device="cpu").model.parameters()} == {"cpu"}
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    for name in (name for name, found in there.items() if not found):
        line = refused(*runs.arguments({"device": name}))
        assert f"device='{name}' is not available" in line


def compiled(runs, key):
    """What test_graphs compiles; here no step is made."""
    runs.monkeypatch.setattr(program, "loop", lambda run, stops: found.append(run))
    for value in (True, False):
        found = []
        _, text, _ = train(*runs.arguments({"compile": value}))
        for layer in found[0].model.layers:
            assert (layer._compiled_call_impl is not None) == value
        assert (", compiled," in text) == value and (", not compiled," in text) != value


# ---- how long, and what a run reads --------------------------------------------------------------

def dataset(runs, key):
    folders = []
    for number in (1, 2):
        folders.append(runs.folder / f"data {number}")
        folders[-1].mkdir()
        tokens = np.random.default_rng(number).integers(0, 250, 500)
        for split in ("train", "val"):
            llmc_shard(folders[-1] / f"{split}.bin", tokens)
    trains(*folders)(runs, key)


def tokens_per_param(runs, key):
    """Of the parameters that a token meets."""
    for value, context in ((0.008, {}), (0.02, {}), (0.008, MIXTURE)):
        run = runs(max_iters=0, tokens_per_param=value, **context)
        active = round(sum(p.numel() * (2 / 5 if p.ndim == 3 else 1)
                           for p in run.first.parameters()))
        batch, steps = 2 * 16 * context.get("batch_size", 3), len(losses(run.folder))
        assert steps == math.ceil(value * active / batch) > 1
        assert not context or f" parameters ({active:,} active), " in run.text
        assert f"{steps * batch / len(runs.tokens('train')):.2f} epochs" in run.text


def max_bad_steps(runs, key):
    """Bad steps that are not in a row end no run. Those in a row: test_run."""
    losses, step = iter([1, math.inf, math.inf, 1, math.inf, 1]), program.training_step
    runs.monkeypatch.setattr(program, "training_step", lambda *a: (next(losses), *step(*a)[1:]))
    runs(max_bad_steps=3, max_iters=6)


def dist_timeout(runs, key):
    """What two processes wait for each other; see two_processes.py."""
    for rank in runs.two()[1]:
        assert [rank["timeouts"][name] for name in ("half", "small", "bad")] == [600, 77, 20]


def resume(runs, key):
    arguments = runs.arguments({})
    trained(*arguments)
    assert "holds a run: continue it with --resume" in refused(*arguments)
    text = trained(*arguments, "--resume", "--max_iters=6")
    assert re.findall(r"^step +(\d+)/6 ", text, re.MULTILINE) == ["4", "5"]


# ---- files and lines -----------------------------------------------------------------------------

def out_dir(runs, key):
    for name in ("a", "b/c"):
        trained(*runs.arguments({"out_dir": runs.folder / name}))
        assert len(losses(runs.folder / name)) == 4


def leaves(expected, found, **context):
    """A case: {value: what found(run) gives}."""
    def check(runs, key):
        for value, wanted in expected.items():
            assert found(runs(**{**context, key: value})) == wanted, value
    return check


def checkpoints(run):
    return sorted(int(path.stem[5:]) for path in run.folder.glob("ckpt_*.pt"))


def evaluations(run):
    return [r["step"] for r in read_log(run.folder, "eval")]


def shown(run):
    return [int(step) for step in re.findall(r"^step +(\d+)/4 ", run.text, re.MULTILINE)]


def eval_windows(runs, key):
    """So many windows at equal distances, at most all, in whole micro-batches of 3."""
    tokens, T = runs.tokens("val"), BASE["block_size"]
    windows = (len(tokens) - 1) // T
    for value in (1, 5, 10 ** 6):
        run, count = runs(eval_windows=value), min(value, windows)
        # the validation loss and the logits' scale are read without a fork's dropout
        assert {(1, 16, False), (3, 16, False)} <= {*run.read} <= {
            (rows, 16, training) for rows in (1, 3) for training in (True, False)}
        starts = [T * (i * windows // count) for i in range(count)]
        rows = torch.stack([tokens[s:s + T + 1] for s in starts])
        logits = reference.decoder(run.model, rows[:, :-1])[0]
        expected = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
        found = [r["val_loss"] for r in read_log(run.folder, "eval")]
        assert found[-1] == pytest.approx(expected, rel=1e-6)


def sample(prompts, lengths):
    """A case: the prompt and as many tokens, of data whose tokens are shown as ids."""
    def check(runs, key):
        np.arange(900, dtype="<u2").__mod__(250).tofile(runs.folder / "train.bin")
        (runs.folder / "val.bin").write_bytes((runs.folder / "train.bin").read_bytes())
        for prompt, length in itertools.product(prompts, lengths):
            run = runs(dataset=runs.folder, sample_prompt=prompt, sample_tokens=length)
            ids = torch.tensor([get_encoding("ids").encode(prompt)])
            drawn = generate(run.model.eval(), ids, length, 0.8, 50,
                             torch.Generator().manual_seed(0))
            text = "".join(f" {token.item()}" for token in drawn)
            assert run.text.split("-" * 80)[1].split(")\n")[1] == f"{prompt}{text}\n"
    return check


CASES = {
    # the model's shape
    "block_size": trains(8, 24),
    "vocab_size": trains(259, 300),
    "n_layer": trains(1, 3),
    "n_head": trains(3, 4),
    "n_kv_head": trains(1, 3, n_head=6),
    "n_embd": trains(20, 36),
    "d_ff": trains(37, 64),
    "rope_theta": trains(10.0, 300.0),
    "norm_eps": trains(0.03, 0.3),
    "tie_embeddings": trains(True),
    "qk_norm": trains({True: 120 + 2 * 2 * 12}),
    "post_norm": trains({True: 120 + 2 * 2 * 24}),
    "init_std": trains(0.05, 0.4),
    "n_expert": trains(2, 3, **MIXTURE),
    "n_expert_active": trains(3, 4, **MIXTURE),
    "d_expert": trains(9, 24, **MIXTURE),
    "d_shared_expert": trains(9, 24, **MIXTURE),
    "n_dense_layer": trains(1, 2, **MIXTURE, n_layer=3),
    "load_balance_coef": trains(0.2, 3.0, **MIXTURE),
    "router_z_coef": trains(0.0, 2.0, **MIXTURE),
    # scale vectors: two Pre-Norms in each layer and one before the head, of width 24
    "scale_vectors": trains({False: 0}),
    "scale_vectors_on": trains({"k,up,head": 5 * 24, "q,v,down": 4 * 24},
                               scale_heterogeneous=True),
    "scale_heterogeneous": trains({True: (2 * 5 + 1) * 24}),
    "scale_placement": trains({"after": 2 * (3 * 24 + 2 * 45) + 257,
                               "dual": 120 + 2 * (3 * 24 + 2 * 45) + 257,
                               "dual_norm": 120 + 2 * (3 * 24 + 2 * 45) + 257,
                               "after_norm": 2 * (3 * 24 + 2 * 45) + 257,
                               "weight_norm": 120 + 2 * (3 * 24 + 2 * 45) + 257}, norm_eps=1e-12),
    "scale_placement_on": trains({"q,gate": 120 + 2 * (24 + 45),
                                  "o,down": 120 + 2 * (24 + 45) + 2 * (24 + 24)}, **DUAL),
    "scale_reparam": trains({"original": 120 + 5, "exponential": 120 + 5, "zero_centered": 120}),
    "recompute": recompute,
    # data and length
    "dataset": dataset,
    "batch_size": trains(2, 5),
    "gradient_accumulation_steps": trains(1, 3),
    "seed": trains(1, 2),
    "max_iters": trains(3, 6),
    "tokens_per_param": tokens_per_param,
    # the optimizer
    "optimizer": trains("muon", weight_decay=2.0),
    "learning_rate": trains(3e-3, 3e-2),
    "weight_decay": trains(0.0, 0.9),
    "scale_weight_decay": trains("none", "input_norm", "output_norm", "absorbable", **DNP,
                                 **MUON, tie_embeddings=True),
    "scale_lr": trains(0.2, 3.0),
    "decay_embeddings": trains(False, weight_decay=1.0),
    "beta1": trains(0.3, 0.8),
    "beta2": trains(0.3, 0.99),
    "muon_momentum": trains(0.3, 0.8, **MUON, **MIXTURE),
    "grad_clip": trains(0.0, 0.1, beta1=0.2),
    "max_bad_steps": max_bad_steps,
    "dist_timeout": dist_timeout,
    # the schedule
    "schedule": trains("wsd", max_iters=6, decay_share=0.3, warmup_iters=1, **MUON),
    "warmup_iters": trains(1, 3),
    "min_lr": trains(4e-3, 9e-3),
    "decay_share": trains(0.3, 0.5, **WSD),
    "decay_shape": trains("cosine", "sqrt", **WSD),
    # what a run leaves and shows
    "out_dir": out_dir,
    "resume": resume,
    "checkpoint_interval": leaves({1: [1, 2, 3, 4], 3: [3, 4]}, checkpoints, keep_checkpoints=9),
    "keep_checkpoints": leaves({1: [4], 3: [2, 3, 4]}, checkpoints, checkpoint_interval=1),
    "eval_interval": leaves({1: [0, 1, 2, 3, 4], 3: [0, 3, 4]}, evaluations),
    "eval_windows": eval_windows,
    "log_interval": leaves({2: [0, 2, 3], 3: [0, 3]}, shown),
    "sample_tokens": sample(["7"], [3, 6]),
    "sample_prompt": sample(["1 2", "33"], [4]),
    "device": device,
    "dtype": dtype,
    "compile": compiled,
}


@pytest.mark.parametrize("key", FIELDS)
def test_a_key_does_what_it_promises(key, runs):
    assert key in CASES, f"write a case for the key {key}"
    CASES[key](runs, key)
