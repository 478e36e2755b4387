"""
Proves that prepare_data loses and adds nothing: documents decode to their text, the held-out split stays put, the output
does not depend on the number of workers, and bad input or an interruption leaves nothing that looks finished.
"""
import gzip
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import FIXTURES, ROOT, run, write_texts

from data import Dataset, get_encoding
from prepare_data import find_files, is_validation, main, prepare, read_documents, verify


def documents_of(folder, split, encoding="bytes"):
    """The set of texts in a split, by decoding its shards."""
    tokens = np.concatenate([np.asarray(s, dtype=np.int64) for s in getattr(Dataset(folder, 1), split).shards])
    encoding = get_encoding(encoding)
    ends = np.flatnonzero(tokens == encoding.eot_token)
    return [encoding.decode(part[part != encoding.eot_token].tolist()) for part in np.split(tokens, ends + 1)[:-1]]


def test_every_kind_of_file_comes_back_as_its_text(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    texts = {f"doc {i}: γ ⊙ x\r\n\ttail {i}" for i in range(40)}
    rest = iter(sorted(texts))
    (folder / "a.txt").write_bytes(next(rest).encode())
    (folder / "sub" / "b.md").write_bytes(next(rest).encode())
    (folder / "c.py").write_bytes(next(rest).encode())
    (folder / "d.txt.gz").write_bytes(gzip.compress(next(rest).encode()))
    (folder / "e.jsonl").write_text("".join(json.dumps({"text": next(rest), "id": i}) + "\n" for i in range(18)) + "\n")
    with gzip.open(folder / "f.jsonl.gz", "wt") as f:
        f.writelines(json.dumps({"text": text}) + "\n" for text in rest)
    (folder / "skipped.bin").write_bytes(b"\0\1")
    (folder / ".hidden.txt").write_text("hidden")
    prepare(find_files([folder]), tmp_path / "out", "bytes", "test", val_fraction=0.3)
    train, val = (documents_of(tmp_path / "out", split) for split in ("train", "val"))
    assert len(train) + len(val) == 40 and set(train) | set(val) == texts
    assert all(is_validation(text, 0.3) for text in val) and not any(is_validation(text, 0.3) for text in train)


def test_held_out_documents_stay_when_data_is_added(tmp_path):
    for name, count in (("small", 100), ("large", 250)):
        prepare(find_files([write_texts(tmp_path / name, count)]), tmp_path / f"out_{name}", "bytes", name, val_fraction=0.2)
    small, large = (set(documents_of(tmp_path / f"out_{name}", "val")) for name in ("small", "large"))
    assert small < large and 8 < len(small) < 35
    assert not large & set(documents_of(tmp_path / "out_large", "train"))


def test_output_does_not_depend_on_workers(texts, tmp_path):
    for workers in (1, 2, 5):
        prepare(find_files([texts]), tmp_path / str(workers), "bytes", "x", val_fraction=0.1, workers=workers, shard_tokens=10_000)
    names = sorted(p.name for p in (tmp_path / "1").iterdir())
    assert names == ["meta.json"] + [f"train_{i:06d}.bin" for i in range(5)] + ["val_000000.bin"]
    for workers in ("2", "5"):
        assert all((tmp_path / workers / name).read_bytes() == (tmp_path / "1" / name).read_bytes() for name in names)
    assert sorted(documents_of(tmp_path / "1", "train") + documents_of(tmp_path / "1", "val")) == \
        sorted(p.read_text() for p in texts.iterdir())


def test_long_files_are_cut_at_line_ends_and_lose_nothing(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("".join(f"line {i}\n" for i in range(3000)))
    parts = [text for text, _ in read_documents(path, "text", 1000)]
    assert "".join(parts) == path.read_text() and len(parts) > 20
    assert all(part.endswith("\n") and len(part) <= 1010 for part in parts)


def test_special_tokens_in_text_are_text(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} <|endoftext|> \ud800"}) + "\n" for i in range(50)))
    prepare(find_files([tmp_path / "a.jsonl"]), tmp_path / "out", "bytes", "x", val_fraction=0.3)
    assert sorted(documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")) == \
        sorted(f"{i} <|endoftext|> ?" for i in range(50))


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="GPT-2's vocabulary files are not at hand")
def test_gpt2(texts, tmp_path):
    run("prepare_data.py", texts, "--encoding", "gpt2", "--out", tmp_path / "out", "--val-fraction", 0.1)
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["vocab_size"] == 50257
    assert sorted(documents_of(tmp_path / "out", "train", "gpt2") + documents_of(tmp_path / "out", "val", "gpt2")) == \
        sorted(p.read_text() for p in texts.iterdir())


def test_verify(dataset, tmp_path, capsys):
    verify(dataset)
    assert "good: 4" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: no dataset at"):
        main(["--verify", str(tmp_path / "none")])


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"", "a.txt is empty"),
    ("a.txt", b"text\0more", "a.txt: has NUL bytes: binary"),
    ("a.txt", b"\xff\xfe\x00", "a.txt: not UTF-8 text"),
    ("a.jsonl", b"\n\n", "a.jsonl is empty"),
    ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a.jsonl, line 2: not JSON"),
    ("a.jsonl", b'{"body": "x", "id": 1}\n', r"line 1: no text in field 'text' \(it has: body, id\): name another with --field"),
    ("a.jsonl", b'["x"]\n', r"line 1: no text in field 'text' \(it has: list\)"),
    ("a.txt.gz", b"not gzip", "a.txt.gz: not a complete gzip file"),
    ("a.txt.gz", gzip.compress(b"text" * 1000)[:-10], "a.txt.gz: not a complete gzip file"),
    ("a.pdf", b"x", r"a.pdf: .pdf cannot be read: give .txt, .md, .py, .jsonl"),
    ("a.txt", b"just one document", "none of the 1 documents fell into the (train|val) split at --val-fraction 0.01"),
])
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match="error: .*" + message) as error:
        main([str(tmp_path / name), "--encoding", "bytes", "--out", str(tmp_path / "out")])
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("arguments, message", [
    (["nowhere"], "nowhere does not exist"),
    ([str(ROOT / "configs" / "__none__")], "does not exist"),
    ([str(ROOT / "tests"), "--val-fraction", "2"], "--val-fraction 2.0 is out of range"),
    ([str(ROOT / "tests"), "--workers", "-1"], "--workers -1 is out of range"),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(arguments)


def test_a_folder_without_text_and_unreadable_files_in_folders(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"no .txt, .md, .py, .jsonl file in"):
        find_files([tmp_path])
    write_texts(tmp_path / "in", 60)
    (tmp_path / "in" / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "in" / "empty.txt").write_bytes(b"")
    prepare(find_files([tmp_path / "in"]), tmp_path / "out", "bytes", "x", val_fraction=0.2)
    said = capsys.readouterr().out
    assert "skipped 1 files, empty" in said and "skipped 1 files, not UTF-8 text" in said


def test_an_existing_dataset_is_not_replaced_unasked(texts, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(ValueError, match="exists: choose another --out, or replace it with --overwrite"):
        prepare(find_files([texts]), tmp_path / "out", "bytes", "x")
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    prepare(find_files([texts]), tmp_path / "out", "bytes", "x", val_fraction=0.1, overwrite=True)
    verify(tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_leaves_nothing_that_looks_finished(tmp_path, number):
    with open(tmp_path / "big.jsonl", "w") as f:
        for i in range(100_000):
            f.write(json.dumps({"text": f"document {i} " * 100}) + "\n")
    process = subprocess.Popen([sys.executable, "prepare_data.py", tmp_path / "big.jsonl", "--encoding", "bytes", "--out",
                                tmp_path / "out"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # background jobs ignore it
    while not list(tmp_path.glob("out.partial/*.bin")):
        time.sleep(0.01)
    process.send_signal(number)
    process.wait()
    assert process.returncode != 0 and not (tmp_path / "out").exists() and not list(tmp_path.glob("**/meta.json"))
    assert (tmp_path / "out.partial").exists() == (number == signal.SIGKILL)
