"""
Proves that docs/lesson.md can be typed at a prompt as it stands: each block runs, prints what the
page shows, and has at most fifteen lines; its commands work; its numbers from studies are those of
docs/studies.md. tests/answers/ has its exercises.
"""
import code
import contextlib
import io
import re
import shlex
import sys

import pytest
from conftest import ROOT, trained

from studies.machinery.report import main

LESSON = (ROOT / "docs/lesson.md").read_text(encoding="utf-8")


def same_line(found, expected):
    """Equal words; a number may differ by one in the last digit that is shown."""
    pattern = r"[-+]?\d+\.\d+"
    assert re.sub(pattern, "#", found) == re.sub(pattern, "#", expected)
    for a, b in zip(re.findall(pattern, found), re.findall(pattern, expected)):
        assert abs(float(a) - float(b)) < 1.5 * 10 ** -len(b.partition(".")[2]), (found, expected)


def test_each_block_prints_what_the_page_shows(monkeypatch):
    monkeypatch.setattr(sys, "displayhook", lambda value: None)  # what a prompt echoes
    console, printed = code.InteractiveConsole(), ""
    for language, text in re.findall(r"```(\w+)\n(.*?)```", LESSON, re.DOTALL):
        if language == "python":
            assert text.count("\n") <= 15 and not printed, text
            with (contextlib.redirect_stdout(io.StringIO()) as out,
                  contextlib.redirect_stderr(io.StringIO()) as errors):
                for line in (*text.splitlines(), ""):
                    console.push(line)
            printed = out.getvalue()
            assert not errors.getvalue(), errors.getvalue()
        elif language == "text":
            for found, expected in zip(printed.splitlines(), text.splitlines(), strict=True):
                same_line(found, expected)
            printed = ""
    assert not printed


@pytest.mark.slow
def test_its_commands(dataset, tmp_path):
    """Train both, for two steps, and draw them together."""
    pytest.importorskip("matplotlib")
    [commands] = re.findall(r"```sh\n(.*?)```", LESSON, re.DOTALL)
    for number, line in enumerate(commands.splitlines()):
        python, *args = shlex.split(line)
        assert python == "python"
        if args[0] == "train.py":
            trained(*args[1:], "--max_iters=2", "--eval_windows=4", "--device=cpu",
                    f"--dataset={dataset}", f"--out_dir={tmp_path / str(number)}")
        else:
            assert args[:3] == ["-m", "studies", "report"]
            main([str(tmp_path / "0"), str(tmp_path / "1")])
            assert (tmp_path / "report.png").stat().st_size > 10_000


def test_its_numbers_stand_in_the_studies():
    studies = "".join((ROOT / path).read_text(encoding="utf-8")
                      for path in ("docs/studies.md", "docs/adopt.md"))
    found = re.findall(r"[−+][\d.]+ \[[−+][\d.]+, [−+][\d.]+\]", LESSON)
    assert len(found) == 10 and all(number in studies for number in found)
