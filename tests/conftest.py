"""Shared by all tests: a tiny model, a tiny dataset, and ways to run the real programs."""
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig
from norms import named_scale_vectors

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
TINY = dict(block_size=16, vocab_size=61, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, d_ff=48,
            init_std=0.0)
# a fork may add others, of which tests of formulas know nothing
OUR_PLACEMENTS = ("input", "after", "dual", "dual_norm", "after_norm", "weight_norm")
UNIFIED = dict(scale_heterogeneous=True, scale_placement="dual_norm", scale_reparam="original")
EVERYWHERE = "q,k,v,gate,up,head,o,down"
# one dense layer, then two mixtures; widths that must be padded, as 426, 682 and 853 must
MIXTURE = dict(n_layer=3, n_expert=3, n_expert_active=2, d_expert=21, d_shared_expert=27,
               n_dense_layer=1)

# a fork adds a dict of its own keys for each thing that it adds to the model, such as
# {"learned_positions": True}: test_every_entry runs over all of them
FORK_KEYS = [{}]

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # under nohup; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
# transformers copies code of exported folders there; no home folder need exist
HF_HOME = tempfile.TemporaryDirectory()
os.environ["HF_HOME"] = HF_HOME.name
# sums in one order, in this process as in those it starts: runs are compared bit for bit
torch.set_num_threads(1)


def tiny_gpt(dtype=torch.float32, seed=0, **keys):
    """A two-layer GPT with random matrices; scale vectors as they start."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**TINY, **keys})).to(dtype)


@pytest.fixture(scope="session", autouse=True)
def the_default_model_is_the_one_that_tests_know():
    """In place of an error in every test that compares the model with another: one sentence."""
    from reference import decoder
    model, (idx, _) = randomize_scales(tiny_gpt(torch.float64)), tiny_batch()
    try:
        same = torch.allclose(model(idx)[0], decoder(model, idx)[0], rtol=0, atol=1e-9)
    except (AttributeError, RuntimeError):
        same = False
    if not same:
        pytest.exit("with default keys GPT no longer computes what tests/reference.py does: give "
                    "your change a key that is off by default (docs/fork.md), or write it into "
                    "tests/reference.py too", returncode=1)


def gpt_with_idle(config):
    """A fork's model, with a matrix that the forward pass forgets."""
    model = GPT(config)
    model.layers[0].idle = torch.nn.Parameter(torch.ones(2, 2))
    return model


def randomize_scales(model, seed=1):
    """Move every scale vector away from all ones, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, scale in named_scale_vectors(model):
            for p in scale.parameters():
                p += 0.4 * torch.randn(p.shape, generator=generator).to(p)
    return model


def in_pieces(model, idx, first=5):
    """The logits of idx with a cache, as sampling computes them: of the first tokens at once, then
    of one at a time."""
    caches = [[] for _ in model.layers]
    pieces = [idx[:, :first], *idx[:, first:].split(1, dim=1)]
    return torch.cat([model(piece, caches=caches)[0] for piece in pieces], dim=1)


def tiny_batch(seed=0, batch=3, length=16, vocab=61):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (2, batch, length), generator=generator)


def write_texts(folder, documents=300, seed=0):
    """Small text files of our own: sums that a model can learn something of."""
    rng, folder = random.Random(seed), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for d in range(documents):
        pairs = [(rng.randrange(50), rng.randrange(50)) for _ in range(12)]
        lines = [f"{a} + {b} = {a + b}" for a, b in pairs]
        (folder / f"{d:04d}.txt").write_text(f"sums, part {d}\n" + "\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def dataset(texts, tmp_path_factory):
    """A byte-level dataset of about 60,000 tokens."""
    from prepare_data import find_files, prepare
    out = tmp_path_factory.mktemp("data") / "sums"
    prepare(find_files([texts]), out, "bytes", "sums", val_fraction=0.1)
    return out


@pytest.fixture(scope="session")
def needs_gpt2():
    """GPT-2's encoding. Tests that need it are skipped where its vocabulary can be had neither from
    TIKTOKEN_CACHE_DIR nor from the network."""
    from lib.data import get_encoding
    try:
        return get_encoding("gpt2")
    except ValueError as error:
        pytest.skip(str(error))


def run(program, *args, processes=0, check=True, **kwargs):
    """Run one of the project's programs as a user would. processes > 0: under torchrun."""
    command = command_of(program, *args, processes=processes)
    env = {**os.environ, "OMP_NUM_THREADS": "1", **kwargs.pop("env", {})}
    done = subprocess.run(command, cwd=kwargs.pop("cwd", ROOT), capture_output=True, text=True,
                          timeout=kwargs.pop("timeout", 300), env=env, **kwargs)
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def command_of(program, *args, processes=0, restarts=0):
    """The command line that starts a program, under torchrun for processes > 0."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                f"--max-restarts={restarts}"]
    return [sys.executable, *(torchrun if processes else []), str(program), *map(str, args)]


def launch(*args, processes=0, restarts=0, **kwargs):
    """Start train.py and return at once."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs}
    return subprocess.Popen(command_of("train.py", *args, processes=processes, restarts=restarts),
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, text=True,
                            **pipes)


def wait_for(process, text):
    """Read what a run prints up to the first line that holds this text, such as " 3/": step 3."""
    if not any(text in line for line in process.stdout):
        raise AssertionError(process.stderr.read())


# ---- runs of train.py ----------------------------------------------------------------------------

SMALL = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--d_ff=48", "--block_size=32", "--init_std=0",
         "--vocab_size=257", "--batch_size=4", "--gradient_accumulation_steps=2", "--max_iters=12",
         "--warmup_iters=3", "--learning_rate=1e-2", "--eval_interval=5", "--eval_windows=16",
         "--log_interval=1", "--device=cpu"]
MIXTURE_KEYS = ["--n_expert=4", "--n_expert_active=2", "--d_expert=24", "--d_shared_expert=16"]
# can stop at any step and go on; the balance loss is each process's own
CONSTANT = [*MIXTURE_KEYS, "--n_layer=3", "--n_dense_layer=1", "--optimizer=muon",
            "--load_balance_coef=0", "--schedule=wsd", "--decay_share=0", "--eval_interval=4",
            "--log_interval=5"]
UNIFIED_CONFIG = str(ROOT / "configs" / "unified.py")


def start(out, dataset, *args):
    """The command line of a small run, without the program."""
    return [*SMALL, f"--dataset={dataset}", f"--out_dir={out}", *map(str, args)]


def train(*argv):
    """train.py's main in this process. Returns (exit status, stdout, stderr)."""
    from train import main
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        status = main(list(argv))
    return status, printed.getvalue(), errors.getvalue()


def trained(*argv):
    """As `train`, for a run that must succeed: its stdout."""
    status, printed, errors = train(*argv)
    assert status == 0, errors
    return printed


def refused(*argv):
    """As `train`, for a request that must be refused in one line: that line."""
    status, printed, errors = train(*argv)
    assert status == 1 and errors.startswith("error: "), (status, printed, errors)
    assert errors.count("\n") == 1, errors
    return errors


def read_log(out, event=None):
    lines = (Path(out) / "log.jsonl").read_text("utf-8").splitlines()
    return [r for r in map(json.loads, lines) if event in (None, r["event"])]


def losses(out):
    return [r["loss"] for r in read_log(out, "train")]


def same_runs(a, b):
    """Weights, optimizer and log of two runs, bit for bit, times aside."""
    from lib.checkpoint import newest_checkpoint
    (_, state_a), (_, state_b) = newest_checkpoint(a), newest_checkpoint(b)
    for part in ("model", "optimizer"):
        torch.testing.assert_close(state_a[part], state_b[part], rtol=0, atol=0)
    assert state_a["step"] == state_b["step"] and state_a["data"] == state_b["data"]
    times = ("tokens_per_s", "mfu")
    logs = [[{k: v for k, v in r.items() if k not in times} for r in read_log(out)]
            for out in (a, b)]
    assert logs[0] == logs[1]


@pytest.fixture(scope="session")
def undisturbed(dataset, tmp_path_factory):
    """A whole run with the unified strategy, to compare others with, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    args = start(out, dataset, "--sample_tokens=5", "--checkpoint_interval=4")
    return out, trained(UNIFIED_CONFIG, *args)


@pytest.fixture(scope="session")
def two(undisturbed, dataset, tmp_path_factory):
    """Several runs on two processes: their folder, and {name: outcome} of each process. The window
    of process 1 at step 3 of the bad run has a token that no vocabulary has."""
    folder = tmp_path_factory.mktemp("two")
    bad = folder / "shards"
    bad.mkdir()
    from lib.data import window_numbers
    tokens = np.random.default_rng(0).integers(0, 250, 32 * 200 + 1).astype("<u2")
    tokens[:32 * 20 + 1].tofile(bad / "val.bin")
    tokens[window_numbers(3 * 8 + 4, 1, 200, 1337)[0] * 32 + 5] = 60_000
    tokens.tofile(bad / "train.bin")
    keys = {
        "half": [*CONSTANT, "--max_iters=6"],
        "resumed": [*CONSTANT, f"--out_dir={folder / 'half'}", "--resume"],
        "small": ["--batch_size=2", "--gradient_accumulation_steps=4", "--dist_timeout=77"],
        "mixture": CONSTANT,
        "idle": ["--max_iters=3"],
        "uneven": ["--batch_size=3", "--gradient_accumulation_steps=1"],
        "guarded": [f"--out_dir={undisturbed[0]}"],
        "bad": [f"--dataset={bad}", "--vocab_size=40000", "--dist_timeout=20"]}
    requests = {name: [UNIFIED_CONFIG, *start(folder / name, dataset, *more)]
                for name, more in keys.items()}
    (folder / "requests.json").write_text(json.dumps(requests), "utf-8")
    run(ROOT / "tests" / "two_processes.py", folder / "requests.json", folder, processes=2,
        timeout=120, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    return folder, [json.loads((folder / f"{rank}.json").read_text("utf-8")) for rank in (0, 1)]
