"""
Proves that prepare_data loses and adds nothing: documents decode to their text, the held-out split stays put, the output
does not depend on the number of workers or on interruptions, what is skipped is said, bad input leaves nothing that looks
finished, and nothing is ever removed that prepare_data did not write.
"""
import errno
import gzip
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
from conftest import ROOT, run, write_texts

import prepare_data
from lib.data import Dataset, get_encoding
from lib.documents import HubInput, Input, is_validation, read_documents
from lib.verify import verify
from prepare_data import find_files, foreign, main, prepare

needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs the optional package pyarrow")


def documents_of(folder, split, encoding="bytes"):
    """The set of texts in a split, by decoding its shards."""
    tokens = np.concatenate([block.astype(np.int64) for s in getattr(Dataset(folder, 1), split).shards for block in s.blocks()])
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
    (folder / "d.TXT.GZ").write_bytes(gzip.compress(next(rest).encode()))
    (folder / "e.JSONL").write_text("\ufeff" + "".join(json.dumps({"text": next(rest), "id": i}) + "\n" for i in range(18)) + "\n")
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


def test_gpt2(texts, tmp_path, needs_gpt2):
    main([str(texts), "--encoding", "gpt2", "--out", str(tmp_path / "out"), "--val-fraction", "0.1"])
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["vocab_size"] == 50257
    assert sorted(documents_of(tmp_path / "out", "train", "gpt2") + documents_of(tmp_path / "out", "val", "gpt2")) == \
        sorted(p.read_text() for p in texts.iterdir())


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"", "a.txt: empty: no document in it"),
    ("a.txt", b"text\0more", "a.txt: has NUL bytes: binary"),
    ("a.txt", b"\x00\xff\xfe", "a.txt: not UTF-8 text: binary, or another encoding"),
    ("a.txt", "text".encode("utf-16"), "a.txt: not UTF-8 text but, by its byte-order mark, UTF-16"),
    ("a.jsonl", '{"text": "x"}'.encode("utf-16"), "a.jsonl: not UTF-8 text but, by its byte-order mark, UTF-16"),
    ("a.jsonl", b"\n\n", "a.jsonl: empty: no document in it"),
    ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a.jsonl, line 2: not JSON"),
    ("a.jsonl", b'{"body": "x", "id": 1}\n', r"line 1: no text in field 'text' \(it has: body, id\): name another with --field"),
    ("a.jsonl", b'{"text": "x"}\n["x"]\n', r"line 2: no text in field 'text' \(it has: list\)"),
    ("a.jsonl", b'{"text": null, "a\\nb": 1}\n', r"line 1: no text in field 'text' \(it has: text \(null\), a\\nb\): .*--skip-bad"),
    ("a.jsonl", b'{"text": "x"}\n' + b"[" * 100_000, "a.jsonl, line 2: not JSON"),
    ("a.json", b'[{"text": "x"}, {"text": "y"}]', "a.json: a JSON array, not one JSON object a line"),
    ("a.jsonl", b'[\n{"text": "x"}\n]', "a.jsonl: a JSON array, not one JSON object a line"),
    ("a.json", b'{\n "text": "x"\n}', "a.json: not one JSON object a line"),
    pytest.param("a.parquet", b"PAR1 and no more", "a.parquet: not a whole parquet file", marks=needs_pyarrow),
    ("a.txt.gz", b"not gzip", "a.txt.gz: not a complete .gz file"),
    ("a.txt.gz", gzip.compress(b"text" * 1000)[:-10], "a.txt.gz: not a complete .gz file"),
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


def test_what_a_folder_holds_besides_text_is_said(tmp_path, capsys):
    """Nothing is passed over without a word, and nothing hangs: a pipe would wait for ever to be opened."""
    with pytest.raises(ValueError, match=r"no .txt, .md, .py, .jsonl, .json, .parquet file in"):
        find_files([tmp_path])
    folder = write_texts(tmp_path / "in", 60)
    (write_texts(tmp_path / "elsewhere", 1) / "0000.txt").rename(tmp_path / "elsewhere" / "x.txt")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "zz.txt").symlink_to(tmp_path / "nowhere")
    (folder / "linked.txt").symlink_to(tmp_path / "elsewhere" / "x.txt")
    os.mkfifo(folder / "pipe.jsonl")
    for name, content in (("bad.txt", b"\xe9t\xe9"), ("utf16.md", "text".encode("utf-16")), ("empty.txt", b""), ("nul.py", b"a\0b"),
                          ("array.json", b'[{"text": "x"}]'), ("pretty.json", b'{\n"text": "x"}'), ("a.pdf", b""), ("b.html", b"")):
        (folder / name).write_bytes(content)
    (folder / "later.txt").write_bytes(b"good\n" * 9000 + b"\xff" + b"more\n" * 9000)
    meta = prepare(find_files([folder]), tmp_path / "out", "bytes", "x", val_fraction=0.2, max_document=1000)
    said = capsys.readouterr().out
    for line in (f"not read: 1 linked folder(s); name a folder to read it: {folder / 'linked'}",
                 f"not read: 1 dangling link(s): {folder / 'zz.txt'}",
                 f"not read: 1 pipe(s) or device(s): {folder / 'pipe.jsonl'}", "not read: 2 file(s) with other suffixes: ",
                 f"skipped 1 file(s), empty: no document in it: {folder / 'empty.txt'}",
                 f"skipped 1 file(s), not UTF-8 text: binary, or another encoding: {folder / 'bad.txt'}",
                 f"skipped 1 file(s), not UTF-8 text but, by its byte-order mark, UTF-16: {folder / 'utf16.md'}",
                 f"skipped 1 end(s) of file(s), not UTF-8 text: binary, or another encoding: {folder / 'later.txt'}",
                 f"skipped 1 file(s), has NUL bytes: binary, not text: {folder / 'nul.py'}",
                 f"skipped 1 file(s), a JSON array, not one JSON object a line (`jq -c '.[]' FILE` makes it so): {folder / 'array.json'}",
                 f"skipped 1 file(s), not one JSON object a line: {folder / 'pretty.json'}"):
        assert line in said
    found = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")
    assert len(found) == sum(s["documents"] for s in meta["splits"].values())
    whole = [p.read_text() for p in [*folder.glob("00*.txt"), folder / "linked.txt"]]
    assert set(whole) < set(found) and set("".join(found).split()) - set("".join(whole).split()) == {"good"}
    for name, what in (("zz.txt", "a dangling link"), ("pipe.jsonl", "a pipe or a device")):
        with pytest.raises(ValueError, match=f"{name} is not a regular file but {what}"):
            find_files([folder / name])


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b'{"body": "x"}\n', "a.jsonl, line 1: no text in field 'text' \\(it has: body\\): name another with --field"),
    ("a.jsonl", b"{", "a.jsonl, line 1: not JSON"), ("a.jsonl", b"\xff", "a.jsonl: not UTF-8 text"),
    ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: not a complete .gz file"),
    pytest.param("a.parquet", b"no parquet", "a.parquet: not a whole parquet file", marks=needs_pyarrow)])
def test_a_wrong_data_file_in_a_folder_ends_the_preparation_before_it_starts(tmp_path, name, content, message, monkeypatch, capsys):
    folder = write_texts(tmp_path / "in", 60)
    (folder / name).write_bytes(content)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "locked", lambda *_: pytest.fail("it started"))
        with pytest.raises(ValueError, match=message) as error:
            prepare(find_files([folder]), tmp_path / "out", "bytes", "x", val_fraction=0.2)
        assert "\n" not in str(error.value)
    prepare(find_files([folder]), tmp_path / "out", "bytes", "x", val_fraction=0.2, skip_bad=True)
    assert f"{folder / name}\n" in capsys.readouterr().out.partition("  skipped 1 ")[2]


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst", "A.PARQUET"])
def test_a_missing_package_ends_the_preparation_before_it_starts(tmp_path, name, monkeypatch):
    (write_texts(tmp_path / "in", 60) / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as Python says that it is not installed
    for skip_bad in (False, True):
        with pytest.raises(ValueError, match=f"{name}: reading .* needs the package pyarrow: pip install pyarrow"):
            prepare(find_files([tmp_path / "in"]), tmp_path / "out", "bytes", "x", val_fraction=0.2, skip_bad=skip_bad)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_bad_records_end_a_preparation_or_are_skipped_and_counted(tmp_path, capsys):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = write_texts(tmp_path / "in", 40)
    texts = [None if i % 10 == 3 else f"row {i}" for i in range(100)]
    parquet.write_table(pyarrow.table({"text": texts}), folder / "a.parquet")
    with open(folder / "b.jsonl", "w") as f:
        f.write('{"text": "good"}\n{"text": null}\nnot json\n{"text": 5}\n[1]\n{"body": "x"}\n{"text": "last"}\n')
    with pytest.raises(ValueError, match=r"a.parquet, row 4: null in column 'text'; --skip-bad skips such and counts them"):
        prepare(find_files([folder]), tmp_path / "out", "bytes", "x", val_fraction=0.2)
    prepare(find_files([folder]), tmp_path / "out", "bytes", "x", val_fraction=0.2, skip_bad=True)
    assert f"skipped 15 bad record(s): {folder / 'a.parquet'}, ..." in capsys.readouterr().out
    assert sorted(documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")) == sorted(
        [t for t in texts if t] + ["good", "last"] + [p.read_text() for p in folder.glob("*.txt")])


def test_a_parquet_row_that_is_not_utf8_is_one_bad_record(tmp_path):
    """It is named; with --skip-bad the rows after it, of the same batch and of the next, are read."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [b"row %d" % i for i in range(600)]
    rows[2] = b"\xff\xfe"
    texts = pyarrow.array(rows, pyarrow.binary())
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 600, texts.buffers())}), path)
    with pytest.raises(ValueError, match="a.parquet, row 3: not UTF-8; --skip-bad skips such and counts them"):
        list(read_documents(path, "text", 100))
    documents = Input(find_files([path]), "text", skip_bad=True)
    assert [text for text, _ in documents.documents()] == [row.decode() for row in rows[:2] + rows[3:]]
    assert list(documents.report()) == [f"1 bad record(s): {path}"]


def test_parquet_columns_that_hold_text(tmp_path):
    """Strings of every kind and dictionaries of them; not what only holds strings somewhere within, nor two columns of one name."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, string = tmp_path / "a.parquet", pyarrow.string()
    for kind in (string, pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), string)):
        parquet.write_table(pyarrow.table({"text": pyarrow.array(["a", "b", "a"]).cast(kind)}), path)
        assert [text for text, _ in read_documents(path, "text", 100)] == ["a", "b", "a"]
    for kind, value in ((pyarrow.list_(string), ["a"]), (pyarrow.struct({"a": string}), {"a": "a"})):
        parquet.write_table(pyarrow.table({"text": pyarrow.array([value], kind)}), path)
        with pytest.raises(ValueError, match="a.parquet: no text in column 'text' but (list|struct)<.*: name another with --field"):
            Input(find_files([path]), "text").check()
    parquet.write_table(pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(ValueError, match="a.parquet: 2 columns are called 'text': rename one, or name another with --field"):
        Input(find_files([path]), "text").check()


def test_what_was_skipped_is_counted_once_when_a_preparation_is_resumed(tmp_path):
    """From any document on, with any amount read ahead: the counts of an uninterrupted reading."""
    for name in "ab":
        lines = [json.dumps({"text": None if i % 3 == 0 else f"{name}{i}"}) + "\n" for i in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    files = find_files([tmp_path])
    whole = Input(files, "text", skip_bad=True)
    documents = list(whole.documents())
    for stop, (_, position) in enumerate(documents):
        for ahead in (0, 3, len(documents)):
            first, second = Input(files, "text", skip_bad=True), Input(files, "text", skip_bad=True)
            for _ in zip(range(stop + 1 + ahead), first.documents()):
                pass
            second.resume(json.loads(json.dumps(first.skipped_before(position))))
            assert [text for text, _ in second.documents(position)] == [text for text, _ in documents[stop + 1:]]
            assert list(second.report()) == list(whole.report())
    assert sum(whole.skipped.values()) == 7


def test_a_text_of_a_megabyte_has_a_validation_split(tmp_path, capsys):
    """At the default fraction: it is cut shorter until both splits have a document, saying so, and nothing is lost."""
    path = tmp_path / "novel.txt"
    path.write_text("".join(f"line {i} of a long novel without chapters\n" for i in range(30_000)))
    assert 1.2e6 < path.stat().st_size < 1.4e6
    main([str(path), "--encoding", "bytes", "--out", str(tmp_path / "out")])
    assert "text files are cut into documents of about " in capsys.readouterr().out
    train, val = (documents_of(tmp_path / "out", split) for split in ("train", "val"))
    assert val and sorted("".join(train + val).splitlines()) == sorted(path.read_text().splitlines())
    verify(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# nothing is lost

def everything(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob("*"))}


@pytest.mark.parametrize("out, message", [
    ("in", "would be, hold or lie inside the input"), ("in/sub/..", "would be, hold or lie inside"),
    ("in/out", "would be, hold or lie inside"),
    (".", "would be, hold or lie inside"), ("link", "would be, hold or lie inside"), ("link/out", "would be, hold or lie inside"),
    ("linked", "would be, hold or lie inside"),  # holds a file that a link in the input leads to
    ("mine", "exists and holds precious.txt, which is not part of a dataset made here"),
    ("mine/precious.txt", "is not a folder"),
    ("json", "exists and holds meta.json, which is not part of a dataset made here"),
    ("lock", "exists and holds lock, which is not part of a dataset made here"),
    ("work", "work.partial is where the work would be kept, but progress.json was not written here"),
    ("locked", "locked.partial is where the work would be kept, but lock was not written here"),
    ("file", "file.partial is where the work would be kept, but file.partial was not written here"),
    ("cwd", "is or holds the working directory"), ("/proc", "is a mount point|not part of a dataset"), ("/", "input|working directory")])
def test_nothing_is_removed_that_was_not_written_here(tmp_path, out, message, monkeypatch):
    folder = write_texts(tmp_path / "in", 30)
    (folder / "sub").mkdir()
    for name in ("mine/precious.txt", "linked/x.txt", "lock/lock", "locked.partial/lock", "work.partial/train_000000.bin", "file.partial",
                 "cwd/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name == "lock/lock" else "precious")
    for name in ("json/meta.json", "work.partial/progress.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"my": "own"}')
    (folder / "linked.txt").symlink_to(tmp_path / "linked" / "x.txt")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path / "cwd")
    before = everything(tmp_path)
    with pytest.raises(SystemExit, match=f"error: .*({message})") as error:
        main(["../in", "--encoding", "bytes", "--out", os.path.join("..", out) if out != "cwd" else ".", "--overwrite"])
    assert "\n" not in str(error.value) and everything(tmp_path) == before


def test_the_default_out_is_never_the_input(tmp_path, monkeypatch):
    """`prepare_data.py data/mytexts` once named data/mytexts as its own output, and then advised --overwrite."""
    write_texts(tmp_path / "data" / "mytexts", 30)
    monkeypatch.chdir(tmp_path)
    before = everything(tmp_path)
    for more in ([], ["--overwrite"]):
        with pytest.raises(SystemExit, match="hold or lie inside the input .*: choose another --out, such as .*/data/mytexts-tokens"):
            main(["data/mytexts", "--encoding", "bytes", *more])
    assert everything(tmp_path) == before


def test_the_default_out_always_has_a_name(tmp_path, monkeypatch):
    """`prepare_data.py .hid` once wrote into data/ itself."""
    write_texts(tmp_path / ".hid", 30)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    main(["../.hid", "--encoding", "bytes", "--val-fraction", "0.2"])
    assert [p.name for p in (tmp_path / "work" / "data").iterdir()] == ["hid"]
    for source in (["/"], ["--hf", ".."]):
        with pytest.raises(SystemExit, match="gives the dataset no name: choose one with --out"):
            main(source)


def test_an_existing_dataset_is_replaced_only_when_asked(texts, tmp_path):
    files, out = find_files([texts]), tmp_path / "out"
    out.mkdir()  # empty: nothing to lose
    prepare(files, out, "bytes", "x", val_fraction=0.1)
    before = everything(out)
    with pytest.raises(ValueError, match="exists: choose another --out, or replace it with --overwrite"):
        prepare(files, out, "bytes", "x", val_fraction=0.2)
    (out / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match="exists and holds notes.md, which is not part of a dataset made here"):
        prepare(files, out, "bytes", "x", val_fraction=0.2, overwrite=True)
    (out / "notes.md").unlink()
    assert everything(out) == before
    prepare(files, out, "bytes", "x", val_fraction=0.2, overwrite=True)
    assert everything(out) != before and [p.name for p in tmp_path.iterdir()] == ["out"]
    verify(out)


def test_out_may_be_a_link_and_may_begin_with_a_tilde(texts, tmp_path, monkeypatch):
    """The dataset is made where the link leads; ~ is the home folder, in PATH and --out, and for lib.verify."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "in").symlink_to(texts)
    (tmp_path / "home" / "out").symlink_to(tmp_path / "disk" / "out")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--overwrite"]):
        main(["~/in", "--encoding", "bytes", "--val-fraction", "0.1", "--out", "~/out", *more])
        verify("~/out")
        assert (tmp_path / "home" / "out").is_symlink() and [p.name for p in (tmp_path / "disk").iterdir()] == ["out"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "home"]


@pytest.mark.parametrize("what", ["dataset", "theirs", "empty", "file"])
def test_an_out_that_appears_meanwhile_is_not_replaced(texts, dataset, tmp_path, what, monkeypatch):
    """The finished work waits in OUT.partial; with --overwrite the same command moves it, if what appeared is a dataset."""
    files, out, original = find_files([texts]), tmp_path / "out", prepare_data.move_into_place

    def appear(partial, place, overwrite):
        if what == "dataset":
            shutil.copytree(dataset, out)
        elif what == "file":
            out.write_text("precious")
        else:
            out.mkdir()
            if what == "theirs":
                (out / "mine").write_text("precious")
        original(partial, place, overwrite)
    monkeypatch.setattr(prepare_data, "move_into_place", appear)
    options = {"val_fraction": 0.2, "shard_tokens": 10_000}
    if what == "empty":
        prepare(files, out, "bytes", "x", **options)
        return verify(out)
    with pytest.raises(ValueError, match=r"the new dataset is finished and waits in .*out.partial") as error:
        prepare(files, out, "bytes", "x", **options)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    if what == "dataset":
        assert everything(out) == everything(dataset)
        with monkeypatch.context() as patch:
            patch.setattr(prepare_data, "tokenize", None)  # nothing is left to be tokenized
            prepare(files, out, "bytes", "x", overwrite=True, **options)
    else:
        assert (out if what == "file" else out / "mine").read_text() == "precious"
        out.unlink() if what == "file" else shutil.rmtree(out)
        prepare(files, out, "bytes", "x", **options)
    verify(out)
    prepare(files, tmp_path / "straight", "bytes", "x", **options)
    same_files(tmp_path / "straight", out)


@pytest.mark.parametrize("point", range(8))
def test_a_stop_at_any_point_of_the_final_move_loses_nothing(texts, dataset, tmp_path, point, monkeypatch):
    """--overwrite, stopped as by a kill before the point-th call that changes a folder: the old dataset or the new one is there,
    whole, and the same command ends in the new one."""
    files, out, options = find_files([texts]), tmp_path / "out", {"val_fraction": 0.2, "shard_tokens": 10_000, "overwrite": True}
    prepare(files, tmp_path / "new", "bytes", "x", **options)
    shutil.copytree(dataset, out)
    calls, original = [], prepare_data.move_into_place

    class Kill(BaseException):
        pass

    def moving(*args):
        def counted(change):
            def step(self, *more, **options):
                if calls and len(calls) > point:
                    raise Kill
                calls.append(change.__name__)
                if len(calls) > point:
                    raise Kill
                return change(self, *more, **options)
            return step
        for name in ("rename", "unlink", "rmdir"):
            monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
        original(*args)
    monkeypatch.setattr(prepare_data, "move_into_place", moving)
    with pytest.raises(Kill):
        prepare(files, out, "bytes", "x", **options)
    monkeypatch.undo()
    places = [out, tmp_path / "out.partial", tmp_path / "out.partial" / "replaced", out / "replaced"]
    whole = [p for p in places if (p / "meta.json").exists()]
    shards = [{f.name: f.read_bytes() for f in p.glob("*.bin")} for p in whole]
    old, new = ({f.name: f.read_bytes() for f in p.glob("*.bin")} for p in (dataset, tmp_path / "new"))
    assert new in shards and (old in shards or point > 2), calls
    prepare(files, out, "bytes", "x", **options)
    same_files(tmp_path / "new", out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "out"]


def test_an_old_dataset_that_was_moved_aside_comes_back(texts, dataset, tmp_path):
    """Killed between the two renames of the final move; then a command that does not replace it, or fails."""
    files, out, partial = find_files([texts]), tmp_path / "out", tmp_path / "out.partial"
    for options, message in (({"val_fraction": 0.2}, "exists: choose another --out"), ({"val_fraction": 0.1, "overwrite": True}, "stop")):
        partial.mkdir()
        shutil.copytree(dataset, partial / "replaced")
        (partial / "progress.json").write_text('{"options": {"x": 1}, "writers": {"train": {"shards": [1]}}}')
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=message):
            patch.setattr(prepare_data.Preparation, "write", lambda *_: (_ for _ in ()).throw(ValueError("stop")))
            prepare(files, out, "bytes", "x", **options)
        assert everything(out) == everything(dataset)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(out)


def test_a_finished_dataset_that_waits_is_not_moved_when_the_input_has_grown(tmp_path, monkeypatch):
    source, out = write_texts(tmp_path / "in", 60), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="stop"):
        patch.setattr(prepare_data, "move_into_place", lambda *_: (_ for _ in ()).throw(ValueError("stop")))
        prepare(find_files([source]), out, "bytes", "x", val_fraction=0.2)
    (source / "zz.txt").write_text("one more")
    with pytest.raises(ValueError, match="holds an unfinished preparation of other input"):
        prepare(find_files([source]), out, "bytes", "x", val_fraction=0.2)


def same_files(a, b):
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    assert all((b / p.name).read_bytes() == p.read_bytes() for p in a.iterdir())


def many_documents(folder, files=4, documents=1500):
    folder.mkdir()
    for name in range(files):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", compresslevel=1) as f:
            for i in range(documents):
                f.write(json.dumps({"text": f"document {i} of {name}, " * (1 + i * 7 % 60)}) + "\n")
    (folder / "a_bad.txt").write_bytes(b"\xff")
    (folder / "b_empty.txt").write_bytes(b"")
    return folder


def test_killed_preparations_end_in_the_same_bytes(tmp_path):
    """Kills at random moments, the same command again each time, other numbers of threads: one result, byte for byte."""
    many_documents(tmp_path / "in", documents=4000)  # far more shards than the kills wait for
    command = [sys.executable, "prepare_data.py", tmp_path / "in", "--encoding", "bytes", "--shard-tokens", "100000",
               "--val-fraction", "0.1"]
    assert subprocess.run([*command, "--out", tmp_path / "straight"], cwd=ROOT, capture_output=True).returncode == 0
    rng, kills, resumed, out, partial = random.Random(3), 0, 0, tmp_path / "killed", tmp_path / "killed.partial"
    while kills < 6:
        process = subprocess.Popen([*command, "--out", out, "--workers", str(1 + kills % 3)], cwd=ROOT,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        goal = len(list(partial.glob("*.bin"))) + rng.randint(1, 5)
        while process.poll() is None and len(list(partial.glob("*.bin"))) < goal:
            time.sleep(rng.uniform(0, 0.004))
        process.kill()
        said, errors = process.communicate()
        assert not errors, errors
        if process.returncode == 0:  # on a busy machine it may reach its end before the kill: then from the start again
            same_files(tmp_path / "straight", out)
            shutil.rmtree(out)
            continue
        kills += 1
        resumed += "resuming " in said
        assert not out.exists()
    done = subprocess.run([*command, "--out", tmp_path / "killed"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and resumed >= 3 and not partial.exists()
    assert "skipped 1 file(s), empty" in done.stdout and "skipped 1 file(s), not UTF-8" in done.stdout
    same_files(tmp_path / "straight", tmp_path / "killed")
    verify(tmp_path / "killed")


def stop_after_some_shards(source, out, **options):
    """A preparation that ends in an error in its last file, after some finished shards."""
    with pytest.raises(ValueError, match="last.jsonl, line 2: not JSON"):
        prepare([*find_files([source]), *find_files([source.parent / "last.jsonl"])], out, "bytes", "x", shard_tokens=100_000, **options)


def test_an_unfinished_preparation_is_guarded(tmp_path, monkeypatch):
    """It is resumed only with the input and the options it began with, and when the bad file is mended, or its line skipped."""
    source, out = many_documents(tmp_path / "in"), tmp_path / "out"
    last = tmp_path / "last.jsonl"
    last.write_text('{"text": "good"}\n{')
    stop_after_some_shards(source, out)
    files = [*find_files([source]), *find_files([last])]
    other = "holds an unfinished preparation of other input or with other options, or a damaged one: .* --overwrite"
    for changed in ({"val_fraction": 0.02}, {"shard_tokens": 200_000}, {"max_document": 10}):
        with pytest.raises(ValueError, match=other):
            prepare(files, out, "bytes", "x", **{"shard_tokens": 100_000, **changed})
    with pytest.raises(ValueError, match=other):
        prepare(files[1:], out, "bytes", "x", shard_tokens=100_000)
    kept = shutil.copytree(tmp_path / "out.partial", tmp_path / "kept")
    prepare(files, out, "bytes", "x", shard_tokens=100_000, skip_bad=True)
    shutil.rmtree(out)
    kept.rename(tmp_path / "out.partial")
    with filelock.FileLock(tmp_path / "out.partial" / "lock"):
        done = run("prepare_data.py", source, "--encoding", "bytes", "--out", out, check=False)
        assert done.returncode == 1 and "another process is preparing" in done.stderr
    last.write_text('{"text": "mended"}\n')
    prepare(files, out, "bytes", "x", shard_tokens=100_000)
    prepare(files, tmp_path / "straight", "bytes", "x", shard_tokens=100_000)
    same_files(tmp_path / "straight", out)
    last.write_text('{"text": "good"}\n{')
    stop_after_some_shards(source, out, overwrite=True)
    assert (tmp_path / "out.partial").exists() and (out / "meta.json").exists()  # the finished one stays until it is replaced
    shutil.rmtree(out)
    shard = tmp_path / "out.partial" / "train_000000.bin"
    for damage in (lambda: os.truncate(shard, 5000), shard.unlink):  # a finished shard is not what it was
        damage()
        with pytest.raises(ValueError, match=other):
            prepare(files, out, "bytes", "x", shard_tokens=100_000)
    last.write_text('{"text": "mended"}\n')
    prepare(files, out, "bytes", "x", shard_tokens=100_000, overwrite=True)
    same_files(tmp_path / "straight", out)


def test_overwrite_resumes_what_can_be_resumed(tmp_path, capsys):
    """The bytes are those of a fresh start, so nothing is thrown away."""
    source = many_documents(tmp_path / "in", 2)
    (tmp_path / "last.jsonl").write_text('{"text": "good"}\n{')
    stop_after_some_shards(source, tmp_path / "out")
    (tmp_path / "last.jsonl").write_text('{"text": "good"}\n')
    files = [*find_files([source]), *find_files([tmp_path / "last.jsonl"])]
    prepare(files, tmp_path / "out", "bytes", "x", shard_tokens=100_000, overwrite=True)
    assert "resuming " in capsys.readouterr().out
    prepare(files, tmp_path / "straight", "bytes", "x", shard_tokens=100_000)
    same_files(tmp_path / "straight", tmp_path / "out")


@pytest.mark.parametrize("room", [100, 5_000, 350_000])
def test_a_full_disk_is_one_line_and_the_same_command_finishes(tmp_path, room, monkeypatch):
    """Full in the first progress file, in the first shard, after some shards."""
    source, out = many_documents(tmp_path / "in", 1, 1500), tmp_path / "out"
    arguments = [str(source), "--encoding", "bytes", "--shard-tokens", "20000", "--val-fraction", "0.1", "--out", str(out)]
    if room < 100_000:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    else:  # the operating system's error, where a limit for each file cannot raise it: after some finished shards
        original = prepare_data.Preparation.save
        def full(self):
            if self.tokens > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(self)
        monkeypatch.setattr(prepare_data.Preparation, "save", full)
    try:
        with pytest.raises(SystemExit, match="out.partial.* cannot be written .*: make room and give the same command again") as error:
            main(arguments)
    finally:
        if room < 100_000:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.undo()
    assert "\n" not in str(error.value) and not out.exists() and (tmp_path / "out.partial").exists() == (room > 100_000)
    main(arguments)
    verify(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_parquet_and_zst(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"γ row {i}\r\n" for i in range(700)]
    (tmp_path / "in").mkdir()
    parquet.write_table(pyarrow.table({"id": range(300), "text": texts[:300]}), tmp_path / "in" / "a.parquet", row_group_size=70)
    half = "".join(json.dumps({"text": t}) + "\n" for t in texts[300:500]).encode(), "".join(
        json.dumps({"text": t}) + "\n" for t in texts[500:]).encode()
    codec = pyarrow.Codec("zstd")
    (tmp_path / "in" / "b.json.zst").write_bytes(b"".join(codec.compress(h, asbytes=True) for h in half))  # two frames, as pzstd writes
    prepare(find_files([tmp_path / "in"]), tmp_path / "out", "bytes", "x", val_fraction=0.2)
    assert sorted(documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")) == sorted(texts)
    with pytest.raises(ValueError, match=r"a.parquet: no column 'body' \(it has: id, text\): name another with --field"):
        list(read_documents(tmp_path / "in" / "a.parquet", "body", 100))
    with pytest.raises(ValueError, match="a.parquet: no text in column 'id' but int64: name another with --field"):
        list(read_documents(tmp_path / "in" / "a.parquet", "id", 100))
    for name in ("a.parquet", "b.json.zst"):
        path = tmp_path / "in" / name
        whole = path.read_bytes()
        for content in (whole[:-20], whole[:len(whole) // 3], b"", b"nonsense " * 20):
            if name == "b.json.zst" and not content:
                continue
            path.write_bytes(content)
            with pytest.raises(ValueError, match=f"{name}: not a (whole parquet|complete .zst) file") as error:
                list(read_documents(path, "text", 100))
            assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The package `datasets`, told before its import to stay off the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield pytest.importorskip("datasets")


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_hugging_face_datasets(tmp_path, kind, hub, capsys, monkeypatch):
    """A local folder through the same library and the same streaming calls that read the hub."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts, folder = [f"row {i} γ" for i in range(600)], tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for part in range(3):
        rows = texts[part * 200:part * 200 + 200]
        rows += [None] * part
        if kind == "parquet":
            parquet.write_table(pyarrow.table({"text": rows}), folder / f"train-0000{part}-of-00003.parquet")
        else:
            (folder / f"train-0000{part}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
    monkeypatch.setattr(prepare_data, "CHUNK_CHARS", 100)
    arguments = ["--hf", str(tmp_path / "set"), "--encoding", "bytes", "--val-fraction", "0.2", "--shard-tokens", "500",
                 "--workers", "1", "--out"]
    for out, message in (("out", r"document 401: no text in field 'text' \(it has: text\): name another with --field; --skip-bad"),
                         ("set", "would be, hold or lie inside the input"), ("set/out", "would be, hold or lie inside the input")):
        with pytest.raises(SystemExit, match=message):
            main([*arguments, str(tmp_path / out)])
    main([*arguments, str(tmp_path / "out"), "--skip-bad"])  # resumes
    said = capsys.readouterr().out
    assert "resuming " in said and "skipped 3 bad record(s)" in said
    train, val = (documents_of(tmp_path / "out", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(texts)
    for name, more, message in ((str(tmp_path / "set"), ["--field", "body"], r"document 1: no text in field 'body' \(it has: text\)"),
                                ("nobody/nothing", [], "--hf nobody/nothing: ")):
        with pytest.raises(SystemExit, match="error: .*" + message) as error:
            main(["--hf", name, *more, "--encoding", "bytes", "--out", str(tmp_path / "x")])
        assert "\n" not in str(error.value)
    documents = HubInput(str(tmp_path / "set"), None, "train", None, "text", skip_bad=True)
    assert [t for t, _ in documents.documents((333, 0))] == texts[333:]  # where a preparation resumes
    (sorted(folder.iterdir())[-1]).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="^--hf .*: ") as error:
        list(documents.documents())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("shard_tokens", [100_000, 10 ** 8])
def test_an_interrupted_run_leaves_nothing_that_looks_finished(tmp_path, number, shard_tokens):
    """Ctrl-C: one line that says whether there is something to resume, and before the first finished shard no folder stays."""
    with open(tmp_path / "big.jsonl", "w") as f:
        for i in range(20_000):
            f.write(json.dumps({"text": f"document {i} " * 100}) + "\n")
    process = subprocess.Popen([sys.executable, "prepare_data.py", tmp_path / "big.jsonl", "--encoding", "bytes", "--out",
                                tmp_path / "out", "--workers", "1", "--shard-tokens", str(shard_tokens)], cwd=ROOT, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # background jobs ignore it
    wanted = "train_000001.bin" if shard_tokens == 100_000 else "train_000000.bin"
    while process.poll() is None and not list(tmp_path.glob(f"out.partial/{wanted}")):
        time.sleep(0.001)
    process.send_signal(number)
    said = process.communicate()[1]
    assert process.returncode == (130 if number == signal.SIGINT else -number), said
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("**/meta.json"))
    finished = shard_tokens == 100_000
    assert (tmp_path / "out.partial").exists() == (number == signal.SIGKILL or finished)
    if number == signal.SIGINT:
        kept = ": the same command resumes from the last finished shard" if finished else ", nothing unfinished was kept"
        assert said == f"interrupted{kept}\n"
    elif not finished:
        assert foreign(tmp_path / "out.partial") is None  # and so the same command may begin anew


def test_interrupts_anywhere_are_one_line(texts, tmp_path, monkeypatch, capsys):
    """While files are looked for, read, tokenized, saved, moved."""
    for name in ("find_files", "cut_for_both_splits", "tokenize", "write_whole", "move_into_place", "get_encoding"):
        def stop(*_, **__):
            raise KeyboardInterrupt
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(prepare_data, name, stop)
            main([str(texts), "--encoding", "bytes", "--val-fraction", "0.1", "--out", str(tmp_path / "out")])
        said = capsys.readouterr().err
        assert end.value.code == 130 and said.startswith("interrupted") and said.count("\n") == 1
        assert [p.name for p in tmp_path.iterdir()] == (["out.partial"] if name == "move_into_place" else [])
        if name == "move_into_place":
            shutil.rmtree(tmp_path / "out.partial")


def test_names_that_standard_output_cannot_show(tmp_path):
    (write_texts(tmp_path / "texts", 30) / "γ.txt").write_bytes(b"\xff")
    done = run("prepare_data.py", tmp_path / "texts", "--encoding", "bytes", "--val-fraction", "0.2", "--out", tmp_path / "out",
               env={"PYTHONIOENCODING": "ascii"})
    assert "skipped 1 file(s), not UTF-8 text" in done.stdout and "\\u03b3.txt" in done.stdout
