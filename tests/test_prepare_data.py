"""
Proves that prepare_data loses and adds nothing: documents decode to their text, the held-out split stays put, the output
does not depend on the number of workers, and bad input or an interruption leaves nothing that looks finished.
"""
import gzip
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time

import filelock
import numpy as np
import pytest
from conftest import FIXTURES, ROOT, run, write_texts

from data import Dataset, get_encoding
from prepare_data import HubInput, document_digests, find_files, is_validation, main, prepare, read_documents, verify


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


def test_a_folder_without_text_and_unreadable_files_in_folders(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"no .txt, .md, .py, .jsonl, .json, .parquet file in"):
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


def same_files(a, b):
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    assert all((b / p.name).read_bytes() == p.read_bytes() for p in a.iterdir())


def many_documents(folder, files=4, documents=2500):
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
    many_documents(tmp_path / "in")
    command = [sys.executable, "prepare_data.py", tmp_path / "in", "--encoding", "bytes", "--shard-tokens", "100000",
               "--val-fraction", "0.1"]
    assert subprocess.run([*command, "--out", tmp_path / "straight"], cwd=ROOT, capture_output=True).returncode == 0
    rng, went_on, partial = random.Random(3), 0, tmp_path / "killed.partial"
    for kill in range(6):
        process = subprocess.Popen([*command, "--out", tmp_path / "killed", "--workers", str(1 + kill % 3)], cwd=ROOT,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        goal = len(list(partial.glob("*.bin"))) + rng.randint(2, 8)
        while process.poll() is None and len(list(partial.glob("*.bin"))) < goal:
            time.sleep(rng.uniform(0, 0.004))
        process.kill()
        said, errors = process.communicate()
        assert not errors, errors
        went_on += "going on with" in said
        assert not (tmp_path / "killed").exists()
    done = subprocess.run([*command, "--out", tmp_path / "killed"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and went_on >= 4 and not partial.exists()
    assert "skipped 1 files, empty" in done.stdout and "skipped 1 files, not UTF-8" in done.stdout
    same_files(tmp_path / "straight", tmp_path / "killed")
    verify(tmp_path / "killed")


def stop_after_some_shards(source, out, **options):
    """A preparation that ends in an error in its last file, with finished shards behind it."""
    with pytest.raises(ValueError, match="last.jsonl, line 1: not JSON"):
        prepare([*find_files([source]), *find_files([source.parent / "last.jsonl"])], out, "bytes", "x", shard_tokens=100_000, **options)


def test_an_unfinished_preparation_is_guarded(tmp_path, monkeypatch):
    """It goes on only with the input and the options it began with, and when the bad file is mended."""
    source, out = many_documents(tmp_path / "in"), tmp_path / "out"
    last = tmp_path / "last.jsonl"
    last.write_text("{")
    stop_after_some_shards(source, out)
    files = [*find_files([source]), *find_files([last])]
    other = "holds an unfinished preparation of other input or with other options: .* --overwrite"
    for changed in ({"val_fraction": 0.02}, {"shard_tokens": 200_000}, {"field": "body"}, {"max_document": 10}):
        with pytest.raises(ValueError, match=other):
            prepare(files, out, "bytes", "x", **{"shard_tokens": 100_000, **changed})
    with pytest.raises(ValueError, match=other):
        prepare(files[1:], out, "bytes", "x", shard_tokens=100_000)
    with filelock.FileLock(tmp_path / "out.partial" / "lock"):
        done = run("prepare_data.py", source, "--out", out, check=False)
        assert done.returncode == 1 and "another process is preparing" in done.stderr
    last.write_text('{"text": "mended"}\n')
    prepare(files, out, "bytes", "x", shard_tokens=100_000)
    prepare(files, tmp_path / "straight", "bytes", "x", shard_tokens=100_000)
    same_files(tmp_path / "straight", out)
    last.write_text("{")
    stop_after_some_shards(source, out, overwrite=True)
    assert (tmp_path / "out.partial").exists() and (out / "meta.json").exists()  # the finished one stays until it is replaced
    shutil.rmtree(out)
    for text in ("", "{", "[]", "null"):
        (tmp_path / "out.partial" / "progress.json").write_text(text)
        with pytest.raises(ValueError, match=other):
            prepare(files, out, "bytes", "x", shard_tokens=100_000)


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
    with pytest.raises(ValueError, match="row 1: no text in column 'id' but int"):
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


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_hugging_face_datasets(tmp_path, kind, monkeypatch):
    """A local folder through the same library and the same streaming calls that read the hub."""
    pytest.importorskip("datasets")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts, folder = [f"row {i} γ" for i in range(600)], tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for part in range(3):
        rows = texts[part * 200:part * 200 + 200]
        if kind == "parquet":
            parquet.write_table(pyarrow.table({"text": rows}), folder / f"train-0000{part}-of-00003.parquet")
        else:
            (folder / f"train-0000{part}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    arguments = ["--hf", tmp_path / "set", "--encoding", "bytes", "--val-fraction", "0.2", "--shard-tokens", "1000"]
    run("prepare_data.py", *arguments, "--out", tmp_path / "out", env=environment)
    train, val = (documents_of(tmp_path / "out", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(texts)
    if kind == "parquet":
        done = run("prepare_data.py", *arguments, "--field", "body", "--out", tmp_path / "x", env=environment, check=False)
        assert done.returncode == 1 and "document 1: no text in field 'body' (it has: text): name another with --field" in done.stderr
        done = run("prepare_data.py", "--hf", "nobody/nothing", "--out", tmp_path / "x", env=environment, check=False)
        assert done.returncode == 1 and done.stderr.count("error: --hf nobody/nothing: ") == 1 and "Traceback" not in done.stderr
    documents = HubInput(str(tmp_path / "set"), None, "train", None, "text")
    assert [t for t, _ in documents.documents((0, 333))] == texts[333:]  # where a resumed preparation goes on


def test_leaked_documents_are_found(tmp_path):
    """A validation document that is also training data, there across two shards."""
    for name, tokens in (("x_train_0.bin", [1, 2, 256, 3, 4]), ("x_train_1.bin", [5, 256, 6, 6, 6]),
                         ("x_val_0.bin", [9, 9, 256, 3, 4, 5, 256])):
        header = np.zeros(256, dtype=np.int32)
        header[:3] = 20240520, 1, len(tokens)
        (tmp_path / name).write_bytes(header.tobytes() + np.asarray(tokens, dtype=np.uint16).tobytes())
    (train, val) = (Dataset(tmp_path, 1).train, Dataset(tmp_path, 1).val)
    digests = [list(document_digests(split, 256)) for split in (train, val)]
    assert [len(d) for d in digests] == [3, 2] and set(digests[0]) & set(digests[1]) == {digests[1][1]} and digests[0][1] == digests[1][1]


def test_verify_sees_leaks_and_damage(dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    meta = json.loads((copy / "meta.json").read_text())
    val, train = meta["splits"]["val"]["shards"][0], meta["splits"]["train"]["shards"][0]
    (copy / "extra.bin").write_bytes((copy / val["name"]).read_bytes())
    meta["splits"]["train"]["shards"].append({**val, "name": "extra.bin"})
    (copy / "meta.json").write_text(json.dumps(meta))
    documents = meta["splits"]["val"]["documents"]
    with pytest.raises(ValueError, match=f"{documents} of {documents} validation documents are in the training split, too"):
        verify(copy)
    path = copy / train["name"]
    tokens = np.frombuffer(path.read_bytes()[1024:], dtype=np.uint16).copy()
    tokens[77] = 300
    path.write_bytes(path.read_bytes()[:1024] + tokens.tobytes())
    train["sha256"] = hashlib.sha256(tokens).hexdigest()
    (copy / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="token id 300 is beyond bytes's 257"):
        verify(copy)


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
