"""
Keeps the table of sizes and the configs in step, and holds the counts against the paper's tables 4
and 5, and the scale vectors' share against its title: negligible.
"""
import pytest
from conftest import ROOT

from bench.table import SIZES, table
from lib.config import load_config, meta_model, tokens_per_step

# billions, as the paper rounds them
PAPER = {"120m": 0.12, "250m": 0.25, "500m": 0.48, "750m": 0.75, "1b": 1.03, "moe_250m": 0.25,
         "moe_500m": 0.48, "moe_800m": 0.8, "moe_1b": 1.06, "moe_2b": 2.00}
OURS = {"350m": 0.35}


def test_docs_have_the_table():
    page = (ROOT / "docs" / "studies.md").read_text("utf-8")
    assert table() in page, "run `python -m bench.table` and paste it into docs/studies.md"


@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_shares(size):
    paths = [ROOT / "configs" / f"{kind}_{size}.py" for kind in ("baseline", "unified")]
    baseline, unified = (load_config([str(path)]) for path in paths)
    total = meta_model(baseline).num_params()
    assert total / 1e9 == pytest.approx((PAPER | OURS)[size], rel=0.05)
    ours = meta_model(unified)
    assert ours.num_params("scale_vectors") / ours.num_params() < 0.0025
    assert baseline.learning_rate == unified.learning_rate
    # section 4: 512 sequences a step
    assert tokens_per_step(baseline) == 512 * baseline.model.block_size
    shape = baseline.model
    width = shape.d_shared_expert if shape.n_expert else shape.d_ff
    assert width == int(8 * shape.n_embd / 3)
