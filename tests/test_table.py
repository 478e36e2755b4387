"""Keeps the README's table and the configs in step, and the scale vectors' share where the paper's title says: negligible."""
import pytest
from conftest import ROOT

from tools.table import SIZES, table
from train import load_config, meta_model


def test_readme_has_the_table(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert table() in (ROOT / "README.md").read_text(), "run `python tools/table.py` and paste it into README.md"


@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_shares(size, monkeypatch):
    monkeypatch.chdir(ROOT)
    for kind in ("baseline", "unified"):
        config = load_config([f"configs/{kind}_{size}.py"])
        model = meta_model(config)
        share = model.num_params("scale_vectors") / model.num_params()
        if size in ("350m", "1b", "2b"):
            assert share < 0.001
        assert config.learning_rate == pytest.approx(1e-3 * (123.6e6 / model.num_params("active")) ** 0.5, rel=0.02)
        assert config.batch_size * config.gradient_accumulation_steps * config.block_size == 2 ** 19
