"""Proves that the report draws what the logs say: curves and panels are read back from the figure's own data."""
import json

import pytest
from conftest import run

from tools.report import by_branch, read_log, smooth, table

matplotlib = pytest.importorskip("matplotlib", reason="needs the optional package matplotlib")


def test_report(undisturbed, tmp_path):
    out, _ = undisturbed
    said = run("tools/report.py", out, "--out", tmp_path / "r.png").stdout
    summary = json.loads((out / "summary.json").read_text())
    assert f"{summary['val_loss']:.4f}" in said and f"{summary['params']:,}" in said
    from matplotlib.image import imread
    assert min(imread(tmp_path / "r.png").shape[:2]) > 300


def test_branches_are_told_apart(undisturbed):
    branches = by_branch(read_log(undisturbed[0])["scale"])
    expected = {f"{b} {side}" for b in ("q", "k", "v", "gate", "up") for side in ("in", "out")} | {"head in"}
    assert set(branches) == expected
    assert set(branches["q in"]) == {0, 1} and [r["step"] for r in branches["q in"][1]] == [0, 5, 10, 12]
    norms = by_branch([{"name": "layers.3.attn.q_norm.scale"}, {"name": "layers.0.attn_post_norm.scale"}])
    assert set(norms) == {"q_norm", "attn_post_norm"}


def test_smooth():
    assert smooth([1.0, 3.0, 5.0], share=2 / 3) == [1.0, 2.0, 4.0]
    assert smooth([1.0, None, 3.0], share=0.1)[0] == 1.0


def test_errors(tmp_path):
    done = run("tools/report.py", tmp_path, check=False)
    assert done.returncode == 1 and "is no run folder of train.py" in done.stderr
    (tmp_path / "log.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="line 1: not a log record"):
        read_log(tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="no training step"):
        read_log(tmp_path)
    assert "not finished" in table([tmp_path])
