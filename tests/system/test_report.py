"""Proves that the report draws what the logs say, keeps runs apart, and passes over a half-written
line."""
import json
import re

import pytest

from studies.machinery.report import curves, draw, log_of, main, smooth

image = pytest.importorskip("matplotlib.image", reason="needs the optional package matplotlib")
SCALES = ("layers.0.attn.q.scale_out", "layers.0.attn.q.scale_in", "layers.1.attn.q.scale_in",
          "layers.0.attn.norm.scale", "norm.scale")


def write_run(folder, loss=1.5, names=SCALES, **more):
    """A run folder as train.py leaves it. more: further values of its events."""
    folder.mkdir(parents=True)
    records = [{"event": "train", "step": s, "loss": loss + 1 / (1 + s)} for s in range(20)]
    for step in (0, 10, 20):
        of_step = [{"event": "eval", "tokens": step * 8, "val_loss": loss + step / 100},
                   {"event": "matrix", "name": "layers.0.attn.q.weight", "norm": 3.0 + step},
                   *({"event": "scale", "name": name, "mean": 1 + step / 50, "std": 0.1,
                      "beta": None} for name in names)]
        records += [{"step": step, **record, **more} for record in of_step]
    write_log(folder, records)
    summary = {"val_loss": loss, "params": 1234, "scale_params": 5, "tokens": 160,
               "tokens_per_s": 10.0}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def write_log(folder, records):
    with open(folder / "log.jsonl", "a", encoding="utf-8") as f:
        f.write("".join(json.dumps(r) + "\n" for r in records))


def test_two_runs_are_written_and_told_apart(tmp_path, capsys):
    runs = [str(write_run(tmp_path / "a")), str(write_run(tmp_path / "b", 1.25))]
    (tmp_path / "b" / "summary.json").unlink()
    main(runs)
    said = capsys.readouterr().out
    assert re.search(r"/a +1\.5000 +1,234", said) and "b not finished" in said
    height, width, _ = image.imread(tmp_path / "report.png").shape  # above the first
    assert width <= 1000 and height > 300


def test_the_picture_is_of_the_logs_numbers(tmp_path, monkeypatch):
    """Also of those that only some logs hold, here of one of two runs: the logits' scale. A map
    that both have is one panel."""
    runs = [write_run(tmp_path / "a", logit_scale=5.0),
            write_run(tmp_path / "b", 2.0, names=SCALES[4:])]
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda f, *a, **k: figures.append(f))
    draw({run.name: log_of(run) for run in runs}, tmp_path / "r.png")
    steps, logits, difference, *panels = figures[0].axes
    assert [list(line.get_ydata()) for line in steps.lines[1::2]] == [[1.5, 1.6, 1.7],
                                                                      [2.0, 2.1, 2.2]]
    assert list(difference.lines[1].get_ydata()) == pytest.approx([0.5] * 3)
    assert [list(line.get_ydata()) for line in logits.lines] == [[5.0] * 3, []]
    titles = ["γ of attn.norm", "γ_b of attn.q", "γ_a of attn.q", "γ of norm", "attn.q"]
    assert [panel.get_title() for panel in panels] == titles
    assert all(list(line.get_ydata()) == [1.0, 1.2, 1.4] for p in panels[:4] for line in p.lines)
    assert [len(p.lines) for p in panels] == [1, 2, 1, 2, 2]  # a line for each layer and run
    assert len({p.get_ylim() for p in panels[:4]}) == 1
    assert list(panels[4].lines[0].get_ydata()) == [1.0, 13 / 3, 23 / 3]


def test_what_is_not_a_number_is_left_out(tmp_path):
    """The same of a last line that is cut within a character, and of α where it is γ."""
    folder = write_run(tmp_path / "a", alpha=2.0, beta=1.0)
    whole = log_of(folder)
    write_log(folder, [
        {"event": "eval", "step": 30, "tokens": 240, "val_loss": None},
        {"event": "matrix", "step": 30, "name": "layers.0.attn.q.weight", "norm": None}])
    with open(folder / "log.jsonl", "ab") as f:
        f.write('{"event": "train", "step": 20, "loss": "é'.encode()[:-1])
    main([str(folder)])
    log = log_of(folder)
    assert log["train"] == whole["train"]
    assert curves(log["matrix"], "norm") == curves(whole["matrix"], "norm")
    sizes = curves(log["scale"], "alpha")["γ_b of attn.q"][0]
    assert sizes == [(0, 2.0, 0.0), (10, 2.0, 0.0), (20, 2.0, 0.0)]
    plain = [{**record, "beta": None} for record in log["scale"]]
    assert curves(plain, "alpha") == {}
    assert smooth([*range(200)])[-1] == sum(range(150, 200)) / 50


def test_errors_are_one_line(tmp_path):
    def error():
        with pytest.raises(SystemExit) as stopped:
            main([str(tmp_path)])
        return stopped.value.code
    assert re.fullmatch("error: .* is no run folder of train.py", error())
    for text in ("", "{}\n", '{"event": "train", "step": 3}\n'):
        (tmp_path / "log.jsonl").write_text(text, encoding="utf-8")
        assert re.fullmatch("error: .*log.jsonl has no training step yet", error())
