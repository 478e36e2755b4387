"""
Proves that the examples of docs/fork.md, docs/your_model.md and the README run as they are written:
each is put where the text says, its test passes, and each new entry keeps to one function.
"""
import re

import pytest
import torch
from conftest import MIXTURE, ROOT
from test_every_entry import check_claims, check_one_function

import model
import norms
from hf.export import stock_architecture
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


def run_example(codes, namespace):
    """Execute blocks, and the tests in them. Returns the names that they added to the dicts."""
    known = [set(entries) for entries in DICTS]
    for code in codes:
        names = set(namespace)
        exec(code, namespace)
        for name in set(namespace) - names:
            if name.startswith("test_"):
                namespace[name]()
    return [sorted(set(entries) - old) for entries, old in zip(DICTS, known)]


FORK = re.findall(r"^## (.*)$", (ROOT / "docs/fork.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("heading", FORK)
def test_fork(heading, namespace, monkeypatch):
    placements, reparams, _ = run_example(blocks("docs/fork.md", heading), namespace)
    for name in placements:
        check_claims(name)
        for keys in ({}, {"scale_heterogeneous": True, "scale_reparam": "original"}, MIXTURE):
            check_one_function(monkeypatch, scale_placement=name, **keys)
        stock, why = stock_architecture(model.GPT(model.GPTConfig(n_layer=1, scale_placement=name)))
        assert stock is None and name in why
    for name in reparams:
        for placement in ("input", "dual_norm"):
            check_one_function(monkeypatch, scale_reparam=name, scale_placement=placement,
                               scale_heterogeneous=True)


def test_a_wrong_claim_is_found(namespace, monkeypatch):
    """The suite sees it: a LayerNorm does not keep zeros, and tanh does not undo a factor."""
    run_example(blocks("docs/fork.md", "A placement"), namespace)
    for name, claim in (("dual_layer_norm", {"keeps_zeros": True}),
                        ("dual_tanh", {"undoes_factor": True})):
        norms.PLACEMENTS[name] = norms.PLACEMENTS[name]._replace(**claim)
        with pytest.raises(AssertionError):
            check_claims(name)
    assert torch.get_default_dtype() == torch.float32


def small_model(namespace):
    exec(blocks("docs/your_model.md", "A small GPT")[0], namespace)
    return lambda model, idx: model(idx)


def llama(namespace):
    pytest.importorskip("transformers", reason="needs the optional package transformers")
    for code in blocks("docs/your_model.md", "A transformers Llama"):
        exec(code, namespace)
    return lambda model, idx: model(idx).logits


@pytest.mark.parametrize("make", [small_model, llama])
def test_your_model(make, namespace):
    """Each example trains every vector with IWD, folds to the same outputs, leaves the vectors that
    the page names, and runs under autocast, compiled, and in bfloat16."""
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
    compiled = torch.compile(yours, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, idx), exact, rtol=0, atol=1e-5)

    with torch.autocast("cpu", torch.bfloat16):
        assert (logits(yours, idx).float() - exact).norm() < 0.05 * exact.norm()
    assert (logits(yours.bfloat16(), idx).float() - exact).norm() < 0.05 * exact.norm()


def test_a_llama_is_saved_and_loaded(namespace, tmp_path):
    logits = llama(namespace)
    yours, idx = namespace["model"], torch.arange(16)[None]
    for _, vector in norms.named_scale_vectors(yours):
        torch.nn.init.normal_(vector.alpha, mean=1.0, std=0.3)
    again = namespace["save_and_load"](yours, tmp_path)
    assert torch.equal(logits(again, idx), logits(yours, idx))
