"""
Proves that the examples of README.md, docs/fork.md and docs/your_model.md run as they are written:
each is put where the text says, its test passes, and each new entry keeps to one function; and that
every file, module, config key and link that a page names exists.
"""
import importlib.util
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import MIXTURE, ROOT, randomize_scales, run, tiny_gpt
from test_every_entry import check_claims, check_one_function
from torch.nn.utils.parametrizations import orthogonal
from torch.nn.utils.parametrize import remove_parametrizations

import model
import norms
from hf.export import stock_architecture
from lib.config import FIELDS, load_config
from optim import param_groups

DICTS = (norms.PLACEMENTS, norms.REPARAMS, norms.SCALE_DECAY_POLICIES)


def blocks(page, heading=None):
    """The Python blocks of a page, or of the part under one heading."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if heading:
        text = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)[1]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def namespace():
    """norms.py's and model.py's names; what an example adds to the dicts goes when it is done."""
    before = [dict(entries) for entries in DICTS]
    yield {**vars(norms), **vars(model), "param_groups": param_groups,
           "stock_architecture": stock_architecture}
    for entries, old in zip(DICTS, before):
        entries.clear()
        entries.update(old)


FORK = (ROOT / "docs/fork.md").read_text(encoding="utf-8")
PATCHES = [part for part in re.split(r"^## ", FORK, flags=re.MULTILINE) if "```diff" in part]
HEADINGS = [heading for heading in re.findall(r"^## (.*)$", FORK, re.MULTILINE)
            if not any(part.startswith(heading) for part in PATCHES)]


@pytest.mark.parametrize("heading", HEADINGS)
def test_fork(heading, namespace):
    """Its blocks and the tests in them run; each entry that they add keeps to one function."""
    known = [set(entries) for entries in DICTS]
    for code in blocks("docs/fork.md", heading):
        names = set(namespace)
        exec(code, namespace)
        for name in set(namespace) - names:
            if name.startswith("test_"):
                namespace[name]()
    placements, reparams, _ = (set(entries) - old for entries, old in zip(DICTS, known))
    for name in placements:
        check_claims(name)
        for keys in ({}, {"scale_heterogeneous": True, "scale_reparam": "original"}, MIXTURE):
            check_one_function(scale_placement=name, **keys)
        stock, why = stock_architecture(tiny_gpt(n_layer=1, scale_placement=name))
        assert stock is None and name in why
    for name in reparams:
        for placement in ("input", "dual_norm"):
            check_one_function(scale_reparam=name, scale_placement=placement,
                               scale_heterogeneous=True)


def copy_of_the_code(folder):
    """What tests of a fork need."""
    for name in ("lib", "hf", "configs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.slow
def test_patches(tmp_path):
    """The page's two patches in one copy of the code: its tests, and test_every_entry's of their
    keys, pass there."""
    copy, keys = copy_of_the_code(tmp_path), []
    for part in PATCHES:
        [patch] = re.findall(r"```diff\n(.*?)```", part, re.DOTALL)
        subprocess.run(["git", "apply", "-"], input=patch, text=True, cwd=copy, check=True)
        names, *tests = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
        keys += eval(names.removeprefix("FORK_KEYS = "))[1:]
        [test] = tests
        path = copy / "tests" / f"test_of_fork_{len(keys)}.py"
        path.write_text("import torch\nfrom conftest import *\n" + test, "utf-8")
    conftest = (copy / "tests" / "conftest.py").read_text("utf-8")
    assert conftest.count("FORK_KEYS = [{}]\n") == 1
    patched = conftest.replace("FORK_KEYS = [{}]\n", f"FORK_KEYS = {keys}\n")
    (copy / "tests" / "conftest.py").write_text(patched, "utf-8")
    some = ("of_fork or attn_gate and (shared or mixture or promises or compiled)"
            " or learned_positions and (shared or promises)")
    done = run("-m", "pytest", "-q", "-x", "-k", some, "tests/test_every_entry.py",
               "tests/test_keys.py", *sorted(copy.glob("tests/test_of_fork_*.py")), cwd=copy)
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 40, done.stdout


@pytest.mark.slow
def test_a_change_that_is_always_on_gets_one_sentence(tmp_path):
    copy = copy_of_the_code(tmp_path)
    model = (copy / "model.py").read_text("utf-8")
    (copy / "model.py").write_text(model.replace("F.silu(gate)", "F.gelu(gate)"), "utf-8")
    done = run("-m", "pytest", "-q", "tests/test_model.py", cwd=copy, check=False)
    assert done.returncode == 1 and "give your change a key that is off by default" in done.stdout
    assert "Tensor-likes" not in done.stdout


def small_model(namespace):
    exec(blocks("docs/your_model.md", "A small GPT")[0], namespace)
    return lambda model, idx: model(idx)


def llama(namespace):
    pytest.importorskip("transformers", reason="needs the optional package transformers")
    for code in blocks("docs/your_model.md", "A transformers Llama"):
        exec(code, namespace)
    return lambda model, idx: model(idx).logits


@pytest.mark.parametrize("make", [small_model, llama])
def test_your_model(make, namespace, tmp_path):
    """Each example trains every vector with IWD, folds to the same outputs, leaves the vectors that
    the page names, and runs in bfloat16; the small one compiled too, the Llama saved and loaded."""
    torch.manual_seed(0)
    logits, idx = make(namespace), torch.randint(61, (2, 16))
    yours, optimizer = namespace["model"], namespace["optimizer"]
    before = {name: p.clone() for name, p in yours.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits(yours, idx).flatten(0, 1), idx.flatten())
        loss.backward()
        optimizer.step()
    for name, p in yours.named_parameters():
        assert (p != before[name]).any() == p.requires_grad, name
    decayed = {g["name"]: g for g in optimizer.param_groups}["scale_decayed"]["param_names"]
    assert decayed and all(name.endswith(".scale_in.alpha") for name in decayed)

    exact, folded = logits(yours, idx).detach(), norms.fold_scale_vectors(yours)
    torch.testing.assert_close(logits(folded, idx), exact, rtol=0, atol=1e-5)
    left = {name.split(".")[-2] for name, _ in norms.named_scale_vectors(folded)}
    assert {re.sub("_proj|lm_", "", name) for name in left} == {"q", "k", "gate", "head"}
    if make is small_model:
        compiled = torch.compile(yours, backend="eager", fullgraph=True)
        torch.testing.assert_close(logits(compiled, idx), exact, rtol=0, atol=1e-5)
    else:
        assert torch.equal(logits(namespace["save_and_load"](yours, tmp_path), idx), exact)

        check_stock_llama(namespace, idx, tmp_path / "stock")

    with torch.autocast("cpu", torch.bfloat16):
        assert (logits(yours, idx).float() - exact).norm() < 0.05 * exact.norm()
    assert (logits(yours.bfloat16(), idx).float() - exact).norm() < 0.05 * exact.norm()


def test_a_tied_llama_is_saved_and_loaded(namespace, tmp_path):
    llama(namespace)
    namespace["config"].tie_word_embeddings = True
    torch.manual_seed(0)
    model = namespace["add_unified"](namespace["LlamaForCausalLM"](namespace["config"]))
    torch.nn.init.normal_(model.lm_head.scale_out.alpha)
    assert model.lm_head.tied and model.lm_head.weight is model.model.embed_tokens.weight
    again, idx = namespace["save_and_load"](model, tmp_path), torch.randint(61, (2, 16))
    assert torch.equal(again(idx).logits, model(idx).logits)


@pytest.mark.parametrize("on, keeps", [("q,k,v,gate,up", False), ("v,gate,up", True)])
def test_a_qwen3_takes_unified_beside_its_qk_norm_or_in_its_place(on, keeps, namespace):
    """But the head: γ_b alone. After remove_qk_norm no vector of q_norm is left."""
    llama(namespace)
    from transformers import Qwen3Config, Qwen3ForCausalLM
    config = Qwen3Config(vocab_size=61, hidden_size=32, intermediate_size=48, head_dim=8,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = Qwen3ForCausalLM(config)
    if not keeps:
        namespace["remove_qk_norm"](model)
    yours = namespace["add_unified"](model, on=on)
    idx = torch.randint(61, (2, 16))
    yours(idx).logits.sum().backward()
    assert any("q_norm" in name for name, _ in yours.named_parameters()) == keeps
    attn = yours.model.layers[1].self_attn
    assert (attn.q_proj.scale_out is None) == (attn.k_proj.scale_out is None) == keeps
    assert attn.v_proj.scale_out is not None
    assert all(p.grad is not None for p in yours.parameters() if p.requires_grad)
    assert yours.lm_head.scale_in is not None and yours.lm_head.scale_out is None


def check_stock_llama(namespace, idx, folder):
    """Without DNP the page's Llama becomes one of transformers' own."""
    Llama = namespace["LlamaForCausalLM"]
    yours = randomize_scales(namespace["add_unified"](Llama(namespace["config"]), "dual"))
    namespace["to_stock_llama"](yours, folder)
    stock = Llama.from_pretrained(folder)
    torch.testing.assert_close(stock(idx).logits, yours(idx).logits, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_fsdp2_and_muon():
    script = ROOT / "tests" / "two_shards.py"
    printed = run(script, processes=2, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}).stdout
    assert printed.count("as the page says") == 2


def test_a_parametrization_is_folded(namespace):
    small_model(namespace)
    yours, idx = namespace["model"], torch.randint(61, (2, 16))
    before = yours(idx)
    changed = orthogonal(yours.blocks[0].o) and yours(idx)
    assert (changed - before).norm() > 0.01 * before.norm()
    remove_parametrizations(yours.blocks[0].o, "weight")
    torch.testing.assert_close(norms.fold_scale_vectors(yours)(idx), changed, rtol=0, atol=1e-5)


# ---- the README ----------------------------------------------------------------------------------

def test_norms_can_be_copied_alone():
    """It imports torch and the standard library only. README's example is one that test_fork
    runs."""
    assert blocks("README.md", "Fork it") == blocks("docs/fork.md", "A placement")[:1]
    source = (ROOT / "norms.py").read_text(encoding="utf-8")
    modules = set(re.findall(r"^\s*(?:import|from) (\w+)[^\n]*$", source, re.MULTILINE))
    assert modules - sys.stdlib_module_names == {"torch"}


def test_the_readmes_five_lines():
    """They are a unified ScaledLinear, and what decays is what weight_decay_groups decays."""
    layer, x = norms.ScaledLinear((128, 64), "dual_norm", reparam="original"), torch.randn(64)
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    names = {"norm": norms.rms_norm, "x": x, "W": layer.weight, "alpha_b": layer.scale_in.alpha,
             "alpha_a": layer.scale_out.alpha, "beta": layer.scale_out.beta}
    code = blocks("README.md")[0]
    assert code.count("\n") == 5
    exec(code, names)
    torch.testing.assert_close(layer(x), names["y"])
    groups = norms.weight_decay_groups(layer, 0.1, "input_norm")
    decayed = [p for g in groups if g["weight_decay"] for _, p in g["params"]]
    assert all(a is b for a, b in zip(decayed, names["decay"], strict=True))


def test_every_row_of_the_readmes_variants_exists():
    """Its third column is a configuration that loads, its fourth names what norms.py defines."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*\|$", text.split("## The variants")[1].split("\n## ")[0], re.MULTILINE)
    assert len(rows) > 10
    for row in rows[2:]:
        _, _, _, config, code, _ = row.split("|")
        values = {}
        exec("\n".join(re.findall("`(.*?)`", config)), values)
        keys = {key: value for key, value in values.items() if key in FIELDS}
        assert keys or config.strip() == "the defaults", row
        load_config(["--max_iters=500", *(f"--{key}={value}" for key, value in keys.items())])
        for name in re.findall(r"`(\w+)`", code):
            assert hasattr(norms, name) or hasattr(norms.ScaledLinear((2, 2), "input"), name), name


# ---- the house -----------------------------------------------------------------------------------

FLOORS = ["norms", "fast", "model", "optim configs", "lib", "prepare_data sample", "train",
          "hf theory bench studies"]


def test_no_arrow_points_upward():
    """Each file imports only what is below it, or in its own folder."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names.split()}
    for path in (p for name in floor for p in [ROOT / f"{name}.py", *(ROOT / name).rglob("*.py")]):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        text = path.read_text("utf-8") if path.exists() else ""
        for name in re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE):
            assert name == own or floor.get(name, -1) < floor[own], f"{path} imports {name}"


# ---- every page ----------------------------------------------------------------------------------

@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))],
                         ids=lambda path: path.name)
def test_every_link_and_command_leads_somewhere(path):
    """In the README also every file and every key that it names."""
    text, made = path.read_text("utf-8"), ("data", "out", "exported")  # by the page's commands
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).exists(), target
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module), module
    for program in re.findall(r"(?:python|bash) (\w\S*\.(?:py|sh))\b", text):
        assert (ROOT / program).exists(), program
    if path.name != "README.md":
        return
    folders = "|".join(p.name for p in ROOT.iterdir() if p.is_dir() and p.name not in made)
    for name in re.findall(rf"(?<![\w/.-])(?:(?:{folders})/[\w/.]*|\w+\.py\b)", text):
        assert "_X" in name or (ROOT / name.rstrip(".")).exists(), name
    for key in re.findall(r"`(\w+) = |--((?:scale|qk|post)_\w+)=", text):
        assert "".join(key) in FIELDS, key
