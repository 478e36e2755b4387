"""
Proves that the examples of README.md, docs/fork.md and docs/your_model.md run as they are written:
each is put where the text says, its test passes, and each new entry keeps to one function; and that
every file, module, config key and link that a page names exists.
"""
import importlib.util
import re
import sys

import pytest
import torch
from conftest import MIXTURE, ROOT, tiny_gpt
from test_every_entry import check_claims, check_one_function

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


FORK = re.findall(r"^## (.*)$", (ROOT / "docs/fork.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("heading", FORK)
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


# ---- the README ----------------------------------------------------------------------------------

def test_norms_can_be_copied_alone(namespace):
    """It imports torch and the standard library only. In the README's example of it γ_b decays, γ_a
    does not, and folding keeps the outputs. Its other example is one that test_fork runs."""
    assert blocks("README.md", "Fork it") == blocks("docs/fork.md", "A placement")[:1]
    source = (ROOT / "norms.py").read_text(encoding="utf-8")
    modules = set(re.findall(r"^\s*(?:import|from) (\w+)[^\n]*$", source, re.MULTILINE))
    assert modules - sys.stdlib_module_names == {"torch"}

    [example] = blocks("README.md", "Use it in your own model")
    exec(example, namespace)
    layer, groups = namespace["layer"], namespace["optimizer"].param_groups
    found = {g["name"]: (g["param_names"], g["weight_decay"]) for g in groups}
    assert found["scale_decayed"] == (["scale_in.alpha"], 0.1)
    assert found["scale"] == (["scale_out.alpha", "scale_out.beta"], 0.0)
    x = torch.randn(3, 64)
    torch.testing.assert_close(norms.fold_scale_vectors(layer)(x), layer(x))


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
