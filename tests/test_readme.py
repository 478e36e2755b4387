"""
Proves that the README's examples run as they are written, that every file and config key it names exists, and that its table of
variants names functions that are there.
"""
import re

import pytest
import torch
from conftest import ROOT, tiny_gpt

import norms
from hf.export import stock_architecture
from lib.config import FIELDS
from norms import fold_scale_vectors

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_new_variant_and_its_test(monkeypatch):
    """"Fork it": the function goes into norms.py's own namespace; its test passes, a whole GPT takes it, folding and export respect it."""
    monkeypatch.setattr(norms, "PLACEMENTS", norms.PLACEMENTS)
    variant, test = (block for block in BLOCKS if "dual_tanh" in block)
    try:
        exec(variant, vars(norms))
        names = {"torch": torch, "ScaledLinear": norms.ScaledLinear}
        exec(test, names)
        names["test_dual_tanh_placement"]()
        idx = torch.arange(12).view(1, 12)
        for shape in ({}, {"n_expert": 3, "n_expert_active": 2}):
            model = tiny_gpt(scale_placement="dual_tanh", scale_heterogeneous=True, **shape)
            assert model(idx, idx)[1].isfinite()
            torch.testing.assert_close(fold_scale_vectors(model)(idx)[0], model(idx)[0], rtol=0, atol=1e-5)
            assert stock_architecture(model) == (None, "scale_placement='dual_tanh' is not a linear map")
    finally:
        del norms.PLACEMENTS["dual_tanh"]
        del norms.dual_tanh_placement


def test_norms_in_a_transformers_llama():
    """"Use norms.py in your own model": it trains, and q is what DNP's formula says."""
    pytest.importorskip("transformers", reason="needs the optional package transformers")
    names = {}
    exec(next(block for block in BLOCKS if "LlamaForCausalLM" in block), names)
    model, idx = names["model"], torch.arange(20).view(1, 20)
    model(idx, labels=idx).loss.backward()
    q = model.model.layers[0].self_attn.q_proj
    assert all(p.grad is not None and p.grad.isfinite().all() for p in q.parameters())
    x = torch.randn(3, 64)
    z = (x @ q.weight["q_proj"].T).view(3, 4, 16)
    torch.testing.assert_close(q(x), (z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()).view(3, 64), rtol=0, atol=1e-5)


def test_every_name_exists():
    for target in re.findall(r"\]\(([\w/.]+)\)", TEXT):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"`((?:configs|tools|studies|tests|figures)/[\w/.]+\.\w+)`", TEXT) + re.findall(r"`(\w+\.py)`", TEXT):
        assert "_X" in name or (ROOT / name).exists(), name
    for key in re.findall(r"`(scale_(?!out|in\b)\w+|qk_norm|post_norm|init_std)\b", TEXT):
        assert key in FIELDS, key
    for name in re.findall(r"`(\w+_(?:placement|reparam))`", TEXT):
        assert name.startswith("scale_") or callable(getattr(norms, name)), name


def test_every_link_of_the_docs_leads_somewhere():
    for page in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("command", re.findall(r"(?:train|prepare_data)\.py ([\w/.-]+\.py)", TEXT))
def test_every_config_named_in_a_command_exists(command):
    assert (ROOT / command).is_file()
