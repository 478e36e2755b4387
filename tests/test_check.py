"""
Proves lib/check.py: it names each mistake, made on purpose, and nothing in sound models.
"""
import re

import pytest
import torch
from conftest import EVERYWHERE, MIXTURE, UNIFIED, gpt_with_idle, tiny_batch, tiny_gpt
from torch import nn

import model as model_file
from lib.check import check, idle, map_table
from model import GPTConfig
from norms import OutputNorm, ScaledLinear, ScaleVector
from optim import param_groups


def found(model, batch=None):
    return check(model, tiny_batch()[0] if batch is None else batch)


@pytest.mark.parametrize("keys", [
    {}, UNIFIED, {**UNIFIED, **MIXTURE}, dict(qk_norm=True, scale_reparam="original"),
    dict(scale_placement="dual", scale_placement_on=EVERYWHERE, scale_reparam="exponential"),
    dict(scale_placement="after", tie_embeddings=True), dict(scale_vectors=False)])
def test_nothing_is_wrong_with_sound_models(keys):
    assert found(tiny_gpt(**keys)) == []


def test_a_norm_undoes_beta():
    """Two norms in a row, as where DNP meets a Q/K-norm, or DNP on v DNP on o. Only those β are
    named."""
    model = tiny_gpt(**UNIFIED)
    model.layers[1].attn.q_norm = OutputNorm(8)
    [line] = found(model)
    assert line.startswith("no effect has layers.1.attn.q.scale_out.beta: a norm follows")
    [line] = found(tiny_gpt(**UNIFIED, scale_placement_on=EVERYWHERE))
    assert re.findall(r"layers\.\d\.(\w+\.\w+)\.scale_out.beta", line) == ["attn.v", "mlp.up"] * 2


@pytest.mark.parametrize("reparam", ["original", "exponential"])
def test_a_beta_at_its_best_is_not_idle(reparam):
    """Its gradient is next to nothing, too, but another β changes the loss."""
    vector = ScaleVector((4,), True, True, reparam)
    slope = torch.tensor([1.0, -1.0, 0.5, -0.4999])

    def loss(vector, batch):
        gamma = vector()
        return (gamma.square().mean() - 1).square() + gamma @ slope + 1
    assert check(vector, None, loss) == []


class Yours(nn.Module):
    """Two maps behind a norm of PyTorch's and a shift, which is no scale vector, read twice;
    `between` stands between v and o."""

    def __init__(self, between):
        super().__init__()
        self.norm, self.between = nn.RMSNorm(16), between
        self.shift = nn.Parameter(torch.randn(16))
        self.v = ScaledLinear((8, 16), "dual_norm", reparam="original", norm_width=4)
        self.gate, self.o = ScaledLinear((8, 16), "dual"), ScaledLinear((4, 8), None)
        self.o.absorb(self.v)
        for m in (self.v, self.gate, self.o):
            nn.init.normal_(m.weight)

    def forward(self, x):
        xs = self.norm(x + self.shift), self.norm(x / 2 - self.shift)
        return {"y": [self.o(self.between(self.v(x) * self.gate(x).sigmoid())) for x in xs]}


def test_a_norm_in_front_and_a_wrong_absorption():
    x = torch.randn(5, 16)
    model = Yours(nn.Identity())
    [line] = found(model, {"x": x})
    assert line.startswith("norm.weight trains, and so does γ_b of v.scale_in, gate.scale_in")
    model.norm.weight.requires_grad_(False)
    assert found(model, (x,)) == []
    model.between = nn.Dropout()  # the same numbers each time
    assert found(model, (x,)) == []
    for between in (nn.Softmax(-1), lambda y: y.flip(-1)):
        model = Yours(between)
        model.norm.weight.requires_grad_(False)
        assert found(model, (x,)) == [
            "o absorbs γ_a of v, but something that is not channel-wise stands between them: take "
            "that absorb out"]

    model = tiny_gpt(n_embd=8, n_head=2, n_kv_head=1, scale_heterogeneous=True)
    model.layers[1].attn.norm = nn.RMSNorm(8)  # the ten maps of both layers would explain all
    [line] = found(model)
    assert line.startswith("layers.1.attn.norm.weight trains, and so does γ_b of ")
    assert re.findall(r"(\w)\.scale_in", line) == ["q", "k", "v"]


@pytest.mark.parametrize("value", [0.0, float("nan"), 1e-30, 1e20])
def test_a_weight_that_nobody_initialized(value):
    model = tiny_gpt()
    nn.init.constant_(model.layers[0].mlp.up.weight, value)
    assert [line[:55] for line in found(model)] == [
        "layers.0.mlp.up.weight was not initialized (its largest"]


def test_a_parameter_without_gradient():
    """One that is forgotten has none; a forgotten vector that is computed with others has zeros."""
    model = gpt_with_idle(GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=61, block_size=16,
                                    scale_reparam="zero_centered"))
    model.layers[0].spare = ScaleVector((8,), True, True, "zero_centered")
    assert idle(model, tiny_batch()[0]) == ["layers.0.idle", "layers.0.spare.alpha"]
    assert found(model)[0] == ("layers.0.idle gets no gradient: the loss does not depend on it, so "
                               "only decay can move it")
    assert len(found(model)) == 2


def test_init_weights_refuses_what_it_does_not_know(monkeypatch):
    class Forked(model_file.Block):
        def __init__(self, *args):
            super().__init__(*args)
            self.extra = nn.Linear(3, 3, bias=False)

    monkeypatch.setattr(model_file, "Block", Forked)
    with pytest.raises(ValueError, match="init_weights does not know layers.0.extra.weight"):
        tiny_gpt()


def test_the_table_of_maps():
    """A key without effect is seen: a baseline's maps share a γ, under HG each has its own."""
    rows = {}
    for name, keys in (("shared", {}), ("unified", UNIFIED)):
        model = tiny_gpt(**keys)
        decayed = {n for g in param_groups(model, 0.1, "input_norm") if g["weight_decay"]
                   for n, _ in g["params"]}
        rows[name] = {line.split()[0]: line.split()[1:] for line in map_table(model, decayed)}
    assert rows["shared"]["attn.q"] == ["input", "attn.norm's", "-", "-", "W"]
    assert rows["shared"]["attn.norm"] == ["-", "γ", "of", "q,", "k,", "v", "-", "x", "γ"]
    own = ["dual_norm", "own", "own", "each", "head", "W,", "γ_b"]
    assert rows["unified"]["attn.q"] == rows["unified"]["attn.k"] == own
    assert rows["unified"]["mlp.up"][2:6] == ["own,", "in", "W", "of"]
    assert rows["unified"]["attn.o"] == ["-", "-", "-", "-", "W"]
    assert "attn.k_norm" not in rows["shared"]
    assert "mlp.router" in str(map_table(tiny_gpt(**MIXTURE), set()))  # the last layer's
