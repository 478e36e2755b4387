"""Proves that the report draws what the logs say, keeps runs apart, and passes over a half-written
line."""
import json
import re

import pytest

from studies.machinery.report import (
    curves,
    log_of,
    main,
    names_of,
    report,
    seconds_at,
    smooth,
    table,
)

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
    write_summary(folder, val_loss=loss)
    return folder


def write_log(folder, records):
    with open(folder / "log.jsonl", "a", encoding="utf-8") as f:
        f.write("".join(json.dumps(r) + "\n" for r in records))


def write_summary(folder, **values):
    summary = {"val_bpb": None, "params": 1234, "scale_params": 5, "tokens": 160,
               "tokens_per_s": 10.0, **values}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")


def test_two_runs_are_written_and_told_apart(tmp_path, capsys):
    runs = [str(write_run(tmp_path / "a" / "one")), str(write_run(tmp_path / "b" / "one", 1.25))]
    main([*runs, f"--out={tmp_path / 'r.png'}"])
    said = capsys.readouterr().out
    assert "a/one" in said and "b/one" in said and "1.2500" in said and "1,234" in said
    height, width, _ = image.imread(tmp_path / "r.png").shape
    assert width <= 1000 and height > 300

    main([*runs, "--seconds"])
    assert [p.parent for p in tmp_path.rglob("report.png")] == [tmp_path / "a"]  # above the first
    a, b, c = (tmp_path / p for p in ("x/s1/run", "y/s1/run", "y/other"))
    assert list(names_of([a, b, c, a])) == ["x/s1/run", "y/s1/run", "other"]


def test_the_picture_is_of_the_logs_numbers(tmp_path, monkeypatch):
    """Also of those that only some logs hold, here of one of two runs: the logits' scale. A map
    that both have is one panel; time is drawn on request."""
    runs = [write_run(tmp_path / "a", logit_scale=5.0),
            write_run(tmp_path / "b", 2.0, names=SCALES[4:])]
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda f, *a, **k: figures.append(f))
    report(runs, tmp_path / "r.png", seconds=True)
    steps, difference, seconds, logits, *panels = figures[0].axes
    losses = [[1.5, 1.6, 1.7], [2.0, 2.1, 2.2]]
    assert [list(line.get_ydata()) for line in steps.lines[1::2]] == losses
    assert [list(line.get_ydata()) for line in seconds.lines] == losses
    assert list(seconds.lines[0].get_xdata()) == [0, 8, 16]  # 80 tokens at 10 tokens/s
    assert list(difference.lines[1].get_ydata()) == pytest.approx([0.5] * 3)
    assert [list(line.get_ydata()) for line in logits.lines] == [[5.0] * 3, []]
    titles = ["γ of attn.norm", "γ_b of attn.q", "γ_a of attn.q", "γ of norm", "attn.q"]
    assert [panel.get_title() for panel in panels] == titles
    assert all(list(line.get_ydata()) == [1.0, 1.2, 1.4] for p in panels[:4] for line in p.lines)
    assert [len(p.lines) for p in panels] == [1, 2, 1, 2, 2]  # a line for each layer and run
    assert len({p.get_ylim() for p in panels[:4]}) == 1
    assert list(panels[4].lines[0].get_ydata()) == [1.0, 13 / 3, 23 / 3]


def test_what_is_not_finite_is_left_out_and_reported(tmp_path, capsys):
    """The same of a key that a log does not have, as α and β of a plain γ."""
    folder = write_run(tmp_path / "a", beta=2.0)
    write_log(folder, [
        {"event": "eval", "step": 30, "tokens": 240, "val_loss": None},
        {"event": "scale", "step": 30, "name": SCALES[1], "mean": None, "std": None},
        {"event": "matrix", "step": 30, "name": "layers.0.attn.q.weight", "norm": None}])
    write_summary(folder, val_loss=None)
    main([str(folder)])
    assert (folder / "report.png").is_file() and "not finite" in capsys.readouterr().out
    log = log_of(folder)
    betas, norms = curves(log["scale"], "beta"), curves(log["matrix"], "norm")
    assert betas["γ_b of attn.q"][0] == [(0, 2.0, 0.0), (10, 2.0, 0.0), (20, 2.0, 0.0)]
    assert [step for step, *_ in norms["attn.q"][0]] == [0, 10, 20]
    assert curves(log["scale"], "alpha") == {}
    length = {"step": 0, "name": SCALES[0], "mean": 3.0, "std": 4.0, "beta": 5.0}
    assert curves([length], "beta") == {}  # OR's β is γ's length, which mean and deviation tell
    assert smooth([1.0, None, 3.0]) == [1.0, 1.0, 2.0]
    assert smooth([*range(200)])[-1] == sum(range(150, 200)) / 50


def test_a_run_under_way(tmp_path):
    """A last line cut within a character is passed over; the time is by the speed so far."""
    folder = write_run(tmp_path / "a")
    whole = log_of(folder)
    with open(folder / "log.jsonl", "ab") as f:
        f.write('{"event": "train", "step": 20, "loss": "é'.encode()[:-1])
    assert log_of(folder) == whole
    (folder / "summary.json").unlink()
    assert "not finished" in table([folder]) and seconds_at(folder, whole, [10]) is None
    whole["train"][-1]["tokens_per_s"] = 20.0
    assert seconds_at(folder, whole, [10]) == [4.0]


def test_errors_are_one_line(tmp_path):
    def error():
        with pytest.raises(SystemExit) as stopped:
            main([str(tmp_path)])
        return stopped.value.code
    assert re.fullmatch("error: .* is no run folder of train.py", error())
    for text in ("", "{}\n", '{"event": "train", "step": 3}\n'):
        (tmp_path / "log.jsonl").write_text(text, encoding="utf-8")
        assert re.fullmatch("error: .*log.jsonl has no training step yet", error())
    (tmp_path / "summary.json").write_text("{}", encoding="utf-8")
    assert "summary.json is not what train.py leaves" in error()
