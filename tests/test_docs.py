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
