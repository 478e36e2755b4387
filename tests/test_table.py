"""
Proves that docs/studies.md has the table of sizes that the configs make, and holds these against
the paper's tables 4 and 5, and the scale vectors' share against its title: negligible.
"""
import re

import pytest
from conftest import ROOT

from bench.table import SIZES, table
from lib.config import load_config, tokens_per_step

# billions, as the paper rounds them; 350m is ours
PARAMETERS = {"120m": 0.12, "250m": 0.25, "350m": 0.35, "500m": 0.48, "750m": 0.75, "1b": 1.03,
              "moe_250m": 0.25, "moe_500m": 0.48, "moe_800m": 0.8, "moe_1b": 1.06, "moe_2b": 2.00}


@pytest.fixture(scope="module")
def rows():
    """{config: [its cells]}, without thousands' commas."""
    made = table()
    page = (ROOT / "docs" / "studies.md").read_text("utf-8")
    assert made in page, "run `python -m bench.table` and paste it into docs/studies.md"
    cells = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in made.splitlines()]
    return {name: [re.sub(r"(?<=\d),(?=\d)", "", cell) for cell in rest] for name, *rest in cells}


@pytest.mark.parametrize("size", SIZES)
def test_sizes(rows, size):
    _, baseline_total, _, _, baseline_rate, *_ = rows[f"baseline_{size}"]
    _, unified_total, _, vectors, unified_rate, *_ = rows[f"unified_{size}"]
    assert int(baseline_total) / 1e9 == pytest.approx(PARAMETERS[size], rel=0.05)
    assert int(vectors.split()[0]) / int(unified_total) < 0.0025
    assert baseline_rate == unified_rate

    config = load_config([str(ROOT / "configs" / f"baseline_{size}.py"), "--max_iters=1"])
    shape = config.model
    assert tokens_per_step(config) == 512 * shape.block_size  # section 4: 512 sequences a step
    width = shape.d_shared_expert if shape.n_expert else shape.d_ff
    assert width == int(8 * shape.n_embd / 3)


def test_figures_that_the_paper_gives_in_full(rows):
    """Llama-1B's scale vectors; and unified's 0.11985B, met only with DNP on the output projection
    and without the β that OR adds for each γ_a: 5 a layer and the head's."""
    assert rows["baseline_1b"][3].split()[0] == "80640"
    assert f"{(int(rows['unified_120m'][1]) - 31) / 1e9:.5f}" == "0.11985"
