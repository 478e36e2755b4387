"""
Proves that docs/studies.md has the table of sizes that the configs make, and holds these against
the paper's tables 4 and 5, and the scale vectors' share against its title: negligible. And that
every config has the paper's shape and recipe.
"""
import re

import pytest
from conftest import ROOT

from bench.table import SIZES, table
from lib.config import load_config, to_dict, tokens_per_step

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


def test_figures_that_the_paper_gives_in_full(rows):
    """Llama-1B's scale vectors; and unified's 0.11985B, met only with DNP on the output projection
    and without the β that OR adds for each γ_a: 5 a layer and the head's."""
    assert rows["baseline_1b"][3].split()[0] == "80640"
    assert f"{(int(rows['unified_120m'][1]) - 31) / 1e9:.5f}" == "0.11985"


# section 4, tables 4 and 5, appendix B. 350m is ours
SHAPES = {  # n_embd, n_head, n_layer, block_size, learning rate
    "120m": (768, 12, 6, 1024, 4e-3), "250m": (1024, 16, 12, 1024, 2e-3),
    "350m": (1024, 16, 20, 1024, 2e-3),
    "500m": (1280, 20, 18, 4096, 2e-3), "750m": (1536, 24, 21, 4096, 2e-3),
    "1b": (1792, 28, 22, 4096, 1e-3),
    "moe_250m": (640, 10, 6, 1024, 3e-3), "moe_500m": (768, 12, 9, 1024, 2e-3),
    "moe_800m": (960, 15, 10, 4096, 2e-3), "moe_1b": (1024, 16, 12, 4096, 1e-3),
    "moe_2b": (1280, 20, 15, 4096, 6e-4)}
MUON, WSD = {"optimizer": "muon"}, {"schedule": "wsd", "decay_share": 0.2, "decay_shape": "linear"}
RECIPES = {"120m_muon": {**MUON, "learning_rate": 5e-3}, "120m_wsd": {**WSD, "learning_rate": 3e-3},
           "moe_500m_muon": {**MUON, "learning_rate": 4e-3},
           "moe_500m_wsd": {**WSD, "learning_rate": 2e-3}}
UNIFIED = {"scale_heterogeneous": True, "scale_placement": "dual_norm", "scale_reparam": "original",
           "scale_weight_decay": "input_norm", "scale_placement_on": "q,k,v,gate,up,head"}
OTHERS = {"gemma_500m": {**MUON, "learning_rate": 4e-3, "qk_norm": True, "post_norm": True,
                         "max_iters": 5000},
          "large_120m": {"d_ff": 2048 + 8}}


@pytest.mark.parametrize("name", [*(f"{strategy}_{size}" for strategy in ("baseline", "unified")
                                    for size in (*SHAPES, *RECIPES)), *OTHERS])
def test_recipes(name):
    strategy, _, size = name.partition("_")
    *shape, rate = SHAPES[size.removesuffix("_muon").removesuffix("_wsd")]
    expected = {
        **dict(zip(("n_embd", "n_head", "n_layer", "block_size"), shape)), "learning_rate": rate,
        "d_ff": int(8 * shape[0] / 3), "tokens_per_param": 100.0,
        "optimizer": "adamw", "schedule": "cosine", "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0,
        "weight_decay": 0.1, "muon_momentum": 0.95, "scale_vectors": True,
        "scale_heterogeneous": False, "scale_placement": "input", "scale_reparam": "none",
        "scale_weight_decay": "all", "qk_norm": False, "post_norm": False,
        **(UNIFIED if strategy == "unified" else {}), **RECIPES.get(size, {}),
        **OTHERS.get(name, {})}
    if size.startswith("moe"):
        expected |= {"n_expert": 32, "n_expert_active": 4, "d_expert": int(2 * shape[0] / 3),
                     "d_shared_expert": int(8 * shape[0] / 3)}
    config = load_config([str(ROOT / "configs" / f"{name}.py")])
    found = to_dict(config)
    assert {key: found[key] for key in expected} == expected
    assert tokens_per_step(config) == 512 * config.model.block_size  # section 4: 512 sequences
    ends = {"cosine": config.learning_rate / 20, "wsd": 0.0}
    assert config.min_lr == ends[config.schedule]
