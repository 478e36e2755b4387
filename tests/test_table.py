"""Keeps the table of sizes and the configs in step, holds the counts against the paper's tables 4 and 5, and the scale vectors' share
where the paper's title says: negligible."""
import pytest
from conftest import ROOT

from bench.table import SIZES, table
from lib.config import load_config, meta_model, tokens_per_step

PAPER = {"120m": 0.12, "250m": 0.25, "500m": 0.48, "750m": 0.75, "1b": 1.03, "moe_250m": 0.25, "moe_500m": 0.48, "moe_800m": 0.8,
         "moe_1b": 1.06, "moe_2b": 2.00}  # billions, as the paper rounds them


def test_docs_have_the_table():
    assert table() in (ROOT / "docs" / "studies.md").read_text(), "run `python -m bench.table` and paste it into docs/studies.md"


@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_shares(size):
    baseline, unified = (load_config([str(ROOT / "configs" / f"{kind}_{size}.py")]) for kind in ("baseline", "unified"))
    models = meta_model(baseline), meta_model(unified)
    assert models[0].num_params() / 1e9 == pytest.approx(PAPER.get(size, 0.35), rel=0.05)
    assert models[1].num_params("scale_vectors") / models[1].num_params() < 0.0025
    assert baseline.learning_rate == unified.learning_rate
    assert tokens_per_step(baseline) == 512 * baseline.model.block_size  # section 4: 512 sequences a step
    d = baseline.model.n_embd
    width = baseline.model.d_shared_expert if baseline.model.n_expert else baseline.model.d_ff
    assert width == int(8 * d / 3)
