"""
Proves that a configuration is read as it is written, that what follows from it follows, and that
whatever is wrong with it ends, before any work, in one line that names the key, its value and what
to do.
"""
import json
import sys

import pytest
from conftest import ROOT, UNIFIED_CONFIG, refused, run

from lib.config import FIELDS, load_config, meta_model, share_batch, to_dict

SHORT = ["--max_iters=500"]  # nothing to work out


@pytest.mark.parametrize("arguments, message", [
    (["--learning_rat=1"], "'learning_rat' in the command line; did you mean learning_rate?"),
    (["--xyzzy=1"], "unknown key 'xyzzy'"),
    (["--n_layer=two"], "n_layer='two' is of the wrong type: it takes int, such as 6"),
    (["--n_layer=2.5"], "n_layer=2.5 is of the wrong type"),
    (["--n_layer=True"], "n_layer=True is of the wrong type"),
    (["--scale_heterogeneous=1"], "scale_heterogeneous=1 is of the wrong type: it takes bool"),
    (["--learning_rate=nan"], "learning_rate='nan' is of the wrong type"),
    (["--learning_rate=1e999"], "learning_rate=inf is of the wrong type"),
    (["--learning_rate=-1"], "learning_rate=-1.0 must be at least 0"),
    (["--batch_size=0"], "batch_size=0 must be at least 1"),
    (["--seed=9223372036854775808"], "seed must be below 2**63"),
    (["--n_embd=1e300"], "n_embd must be below 2**63"),
    (["--learning_rate=1" + 400 * "0"], "learning_rate must be below 2**63"),
    (["--seed=-1"], "seed=-1 must be at least 0"),
    (["--beta1=1"], "beta1=1.0 must be between 0 and 1"),
    (["--optimizer=adam"], "'adam' is unknown: choose one of adamw, muon; did you mean adamw?"),
    (["--compile=yes"], "compile='yes' is unknown: choose one of auto, True, False"),
    (["--n_embd=100", "--n_head=3"], "n_embd=100 is not divisible by n_head=3"),
    (["--max_iters=0", "--tokens_per_param=0"], "tokens_per_param=0.0 with max_iters=0 makes no"),
    (["configs/study_cpu.py", "--tokens_per_param=9"], "has no effect beside max_iters=2500"),
    (["configs/nothing.py"], "config file not found: configs/nothing.py"),
    (["configs/quickstart.py", "max_iters", "3"], "one config file at most"),
    (SHORT, "no dataset at data/none: make it with"),
    (["--min_lr=2e-3", *SHORT], "min_lr=0.002 is above learning_rate=0.001"),
    (["--out_dir=", *SHORT], "out_dir='' is empty"),
    (["--schedule=wsd", "--decay_share=0.81", *SHORT],
     "lets the decay begin at step 95, within warmup_iters=100: lower one of them"),
    (["--n_expert=4", "--n_embd=36", "--n_head=2", "--dtype=bfloat16", "--device=cpu", *SHORT],
     "n_embd=36 is no multiple of 8, as the experts' products in bfloat16 need it: choose"),
])
def test_bad_configuration(arguments, message):
    assert message in refused("--dataset=data/none", *arguments)


def test_no_configuration():
    assert "no config given: start with `python train.py configs/quickstart.py`" in refused()


@pytest.mark.parametrize("text, message", [
    ("n_layr = 3", "unknown key 'n_layr' in {}; did you mean n_layer? (a name of your own starts"),
    ("raise RuntimeError('a\\nb')", "{} does not run: RuntimeError: a"),
    ("exit()", "{} does not run: SystemExit"),
    ("n_layer = 3\nlearning_rate: 1e-5",
     "`learning_rate: 1e-05` assigns nothing: write `learning_rate = 1e-05`"),
    ("n_layer: 12\nn_head: 12\ndevice: cuda", "{} does not run: SyntaxError: `n_layer: 12` as"),
    ("_n_layer = 3", "{} assigns no key: a config is a Python file"),
    ("from math import *", "unknown key 'pi' in {}"),
    ("def n_layer(): return 3", "n_layer=<function n_layer"),
    ("import configs.unified\nn_layer = 3", "`import configs.unified` assigns nothing: write"),
    ("from configs import unified\nn_layer = 3", "write `from configs.NAME import *`"),
])
def test_bad_config_files(tmp_path, text, message):
    path = tmp_path / "config.py"
    path.write_text(text, "utf-8")
    assert message.format(path) in refused(str(path), "--dataset=data/none")


def test_config_files_are_python(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("from __future__ import annotations\nimport math, random, numpy, torch\n"
                    "import dataclasses\nfrom math import sqrt\n"
                    "from configs.unified import *\n"
                    "_width = 96  # é\n@dataclasses.dataclass\nclass Note:\n"
                    "  n_layer: int\ndef double(x): return 2 * x\n"
                    "n_embd = double(_width)\nlearning_rate: float = 1\nmax_iters = 1e3\n", "utf-8")
    config = load_config([str(path), "--n_layer=3", "--out_dir=5", "--resume", "--compile=False"])
    assert (config.model.n_embd, config.model.n_layer) == (192, 3)
    assert (config.learning_rate, config.max_iters, config.out_dir) == (1.0, 1000, "5")
    assert config.resume is True and config.compile is False
    assert config.model.scale_placement == "dual_norm"
    assert type(config.learning_rate) is float and type(config.max_iters) is int


def test_a_config_imports_its_neighbour(tmp_path, monkeypatch):
    """In a folder outside the repository, here the home folder, which ~ stands for."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my_base.py").write_text("n_layer = 3\nmax_iters = 500\n", "utf-8")
    (tmp_path / "mine.py").write_text("from my_base import *\nout_dir = '~/out'\n", "utf-8")
    config = load_config(["~/mine.py", "--dataset=~/data"])
    assert config.model.n_layer == 3 and str(tmp_path) not in sys.path
    assert (config.out_dir, config.dataset) == (f"{tmp_path}/out", f"{tmp_path}/data")

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "my_base.py").write_text("n_layer = 5\nmax_iters = 500\n", "utf-8")
    (tmp_path / "other" / "mine.py").write_text("from my_base import *\n", "utf-8")
    assert load_config(["~/other/mine.py"]).model.n_layer == 5  # of the same name
    (tmp_path / "my_base.py").write_text("n_layer = 3\nmax_iters: 500\n", "utf-8")
    assert "`max_iters: 500` assigns nothing" in refused("~/mine.py", "--dataset=data/none")


def test_another_package_called_configs(tmp_path):
    """On Python's path, and beside the config: ours is meant."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").touch()
    (tmp_path / "mine.py").write_text("from configs.unified import *\n", "utf-8")
    done = run("train.py", tmp_path / "mine.py", "--dataset=data/none", "--max_iters=500",
               env={"PYTHONPATH": str(tmp_path)}, check=False)
    assert "no dataset at data/none" in done.stderr


def test_config_json_given_back_as_keys_is_the_same_configuration():
    config = load_config([UNIFIED_CONFIG, "--n_layer=1", "--n_embd=24", "--n_head=2",
                          "--sample_prompt=a = 1", "--init_std=0"])
    stored = json.loads(json.dumps(to_dict(config)))
    again = load_config([f"--{key}={value}" for key, value in stored.items()])
    assert to_dict(again) == to_dict(config) and to_dict(config).keys() == FIELDS.keys()
    assert config.model.d_ff == 64 and config.model.init_std == 24 ** -0.5


def test_what_the_other_keys_leave_open():
    """A warmup beyond the run becomes a tenth of it; the schedule's end. Its length: test_keys."""
    for steps, warmup in ((100, 100), (99, 9), (3, 1)):
        assert load_config([f"--max_iters={steps}", "--warmup_iters=100"]).warmup_iters == warmup
    for keys, min_lr in (([], 4e-3 / 20), (["--schedule=wsd"], 0), (["--min_lr=1e-5"], 1e-5),
                         (["--min_lr=0"], 0)):
        assert load_config(["--learning_rate=4e-3", *SHORT, *keys]).min_lr == min_lr


def test_share_batch():
    config = load_config(["--batch_size=4", "--gradient_accumulation_steps=6", *SHORT])
    shares = {1: (4, 6), 2: (4, 3), 3: (4, 2), 4: (3, 2), 6: (4, 1), 8: (3, 1)}
    assert {n: share_batch(config, n) for n in shares} == shares
    for n in (5, 7, 48):
        with pytest.raises(ValueError, match=f"batch of 24 .* does not divide by {n} processes"):
            share_batch(config, n)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_every_config_asks_for_steps_of_a_model_that_can_be_built(path):
    config = load_config([str(path)])
    assert config.max_iters > 0 < config.learning_rate and meta_model(config)
