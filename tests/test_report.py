"""Proves that the report draws what the logs say, keeps runs apart, and passes over a half-written line."""
import json

import pytest
from conftest import run

from study.report import by_branch, by_matrix, finite, names_of, read_log, report, smooth, table

image = pytest.importorskip("matplotlib.image", reason="needs the optional package matplotlib")


def write_run(folder, loss=1.5, names=("layers.0.attn.qkv.scale_in.q", "layers.1.attn.qkv.scale_in.q", "head.scale_in.head")):
    """A run folder as train.py leaves it."""
    folder.mkdir(parents=True)
    records = [{"event": "train", "step": s, "loss": loss + 1 / (1 + s), "lr": 1e-3} for s in range(20)]
    for step in (0, 10, 20):
        records.append({"event": "eval", "step": step, "tokens": step * 8, "val_loss": loss + step / 100, "val_bpb": None})
        records += [{"event": "scale", "step": step, "name": n, "mean": 1 + step / 50, "std": 0.1, "min": 0, "max": 2, "beta": None}
                    for n in names]
        records.append({"event": "matrix", "step": step, "name": "layers.0.attn.qkv.weight.q", "norm": 3.0 + step})
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    summary = {"val_loss": loss, "val_bpb": None, "params": 1234, "scale_params": 5, "tokens": 160, "tokens_per_s": 10.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_report_as_a_program(tmp_path):
    runs = [write_run(tmp_path / "a" / "one"), write_run(tmp_path / "b" / "one", 1.25)]
    said = run("-m", "study.report", *runs, "--out", tmp_path / "r.png").stdout
    assert "a/one" in said and "b/one" in said and "1.2500" in said and "1,234" in said
    height, width, _ = image.imread(tmp_path / "r.png").shape
    assert width <= 1000 and height > 300


def test_the_picture_is_of_the_logs_numbers(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *args, **kwargs: figures.append(figure))
    report([write_run(tmp_path / "a"), write_run(tmp_path / "b", 2.0, names=("head.scale_in.head",))], tmp_path / "r.png")
    losses, *panels = figures[0].axes
    assert [list(line.get_ydata()) for line in losses.lines[1::2]] == [[1.5, 1.6, 1.7], [2.0, 2.1, 2.2]]
    scales, matrices = panels[:3], panels[3:]
    assert [a.get_title() for a in scales] == ["q in", "head in", "head in"]
    assert all(list(a.lines[0].get_ydata()) == [1.0, 1.2, 1.4] for a in scales) and len(scales[0].lines) == 3  # two layers and a line at 1
    assert len({(a.get_xlim(), a.get_ylim()) for a in scales}) == 1 == len({a.get_ylim() for a in matrices})
    assert list(matrices[0].lines[0].get_ydata()) == [1.0, 13 / 3, 23 / 3]


def test_what_is_not_finite_is_said_or_left_out(tmp_path):
    folder = write_run(tmp_path / "a")
    lines = [{"event": "eval", "step": 30, "tokens": 240, "val_loss": None},
             {"event": "scale", "step": 30, "name": "head.scale_in.head", "mean": None, "std": None},
             {"event": "matrix", "step": 30, "name": "layers.0.attn.qkv.weight.q", "norm": None}]
    with open(folder / "log.jsonl", "a") as f:
        f.write("".join(json.dumps(r) + "\n" for r in lines))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "val_loss": None}))
    assert "not finite" in table([folder])
    report([folder], tmp_path / "r.png")
    assert (tmp_path / "r.png").is_file() and finite(read_log(folder)["matrix"]) == read_log(folder)["matrix"][:-1]


def test_runs_of_one_name_are_kept_apart(tmp_path):
    a, b, c = (write_run(tmp_path / p) for p in ("x/s1/run", "y/s1/run", "y/other"))
    assert list(names_of([a, b, c, a])) == ["x/s1/run", "y/s1/run", "other"]
    assert len(table([a, b, c, a]).splitlines()) == 4


def test_names_are_told_apart():
    names = ["layers.0.attn.qkv.scale_in.q", "layers.0.attn.qkv.scale_out.q", "layers.3.attn.q_norm.scale", "layers.0.attn_post_norm.scale"]
    assert list(by_branch([{"name": n} for n in names])) == ["q in", "q out", "q_norm", "attn_post_norm"]
    names = ["layers.2.attn.qkv.weight.q", "embedding.weight", "head.weight.head", "layers.1.attn.qkv.weight.q"]
    matrices = by_matrix([{"name": n} for n in names])
    assert list(matrices) == ["‖W_q‖", "‖W_embedding‖", "‖W_head‖"] and set(matrices["‖W_q‖"]) == {2, 1}


def test_smooth():
    assert smooth([1.0, 3.0, 5.0], share=2 / 3) == [1.0, 2.0, 4.0]
    assert smooth([1.0, None, 3.0], share=0.1)[0] == 1.0


def test_a_half_written_last_line_is_passed_over(tmp_path):
    folder = write_run(tmp_path / "a")
    whole = read_log(folder)
    with open(folder / "log.jsonl", "ab") as f:
        f.write('{"event": "train", "step": 20, "loss": "é'.encode()[:-1])  # cut within a character
    assert read_log(folder) == whole


def test_errors(tmp_path):
    done = run("-m", "study.report", tmp_path, check=False)
    assert done.returncode == 1 and "is no run folder of train.py" in done.stderr and len(done.stderr.splitlines()) == 1
    (tmp_path / "log.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="line 1: not a log record"):
        read_log(tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="no training step"):
        read_log(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"event": "eval", "step": 3}\n')
    with pytest.raises(ValueError, match="line 1: not a log record"):
        read_log(tmp_path)
    assert "not finished" in table([tmp_path])
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="summary.json is not what train.py leaves"):
        table([tmp_path])
