"""
Proves that prepare_data.py loses and adds nothing: documents decode to their text, the held-out
split stays put, and the output depends neither on the number of threads nor on kills. Bad input
leaves nothing that looks finished. Nothing is replaced or removed that was not written here.
"""
import gzip
import hashlib
import http.server
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import ROOT, command_of, run, write_texts

import prepare_data
from lib.data import Dataset
from lib.documents import FileInput, HubInput
from lib.tokenizer import get_encoding
from prepare_data import find_files, is_validation, main, prepare

BYTES = get_encoding("bytes")


def documents_of(folder, *splits, encoding=BYTES):
    """The texts of a dataset's splits, by decoding its shards."""
    texts = []
    for split in splits:
        shards = getattr(Dataset(folder, 1), split).shards
        tokens = np.concatenate([block for shard in shards for block in shard.blocks()])
        ends = np.flatnonzero(tokens == encoding.eot_token)
        for part in np.split(tokens, ends + 1)[:-1]:
            texts.append(encoding.decode(part[:-1].tolist()))
    return texts


def make(source, out, **options):
    """A small byte-level dataset of the files and folders in the list `source`."""
    return prepare(find_files(source), out, "bytes", "test", **{"val_fraction": 0.2, **options})


def write_lines(path, records):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(record) + "\n" for record in records)
    return path


def everything(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(Path(folder).rglob("*"))}


def refused(*arguments):
    """The one line with which main refuses its arguments."""
    with pytest.raises(SystemExit) as end:
        main(["--encoding", "bytes", *map(str, arguments)])
    line = str(end.value.code)
    assert line.startswith("error: ") and "\n" not in line
    return line


# ---- documents -----------------------------------------------------------------------------------

def test_every_kind_of_file_comes_back_as_its_text(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    texts = [f"doc {i}: γ ⊙ x <|endoftext|>\r\n\ttail {i}" for i in range(40)]
    for name, text in zip(("a.txt", "sub/b.md", "c.py"), texts):
        (folder / name).write_bytes(text.encode())
    (folder / "d.TXT.GZ").write_bytes(gzip.compress(texts[3].encode()))
    write_lines(folder / "e.jsonl.gz", [{"text": text} for text in texts[4:20]])
    lines = write_lines(folder / "f.JSONL", [{"text": text, "id": 1} for text in texts[20:]])
    lines.write_text(f'\ufeff{lines.read_text(encoding="utf-8")}\n{{"text": "\\ud800"}}\n',
                     encoding="utf-8")

    make([folder], tmp_path / "out", val_fraction=0.3)
    train, val = (documents_of(tmp_path / "out", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted([*texts, "?"])  # a lone surrogate is no UTF-8
    meta = json.loads((tmp_path / "out" / "meta.json").read_bytes())["splits"]
    for split, found in (("train", train), ("val", val)):
        assert meta[split]["bytes"] == sum(len(text.encode()) for text in found)
        assert meta[split]["documents"] == len(found)
    assert all(is_validation(text, 0.3) for text in val)
    assert not any(is_validation(text, 0.3) for text in train)


def test_the_bytes_stay_those_of_earlier_versions(tmp_path):
    """meta.json has the checksums of all shards. The number of threads changes nothing."""
    lines = [{"text": f"document {i}, " * (1 + i * 7 % 60)} for i in range(900)]
    source = [write_lines(tmp_path / "a.jsonl.gz", lines), tmp_path / "b.txt"]
    source[1].write_text("".join(f"line {i} of a novel\n" for i in range(9000)), encoding="utf-8")
    for workers in (1, 2, 5):
        out = tmp_path / str(workers)
        make(source, out, shard_tokens=100_000, workers=workers)
        assert len(everything(out)) == 8
        digest = hashlib.sha256((out / "meta.json").read_bytes()).hexdigest()
        assert digest[:16] == "e8170baa2ffb4741"


def test_a_long_file_is_cut_at_line_ends_and_has_a_validation_split(tmp_path, capsys):
    path, out = tmp_path / "novel.txt", tmp_path / "out"
    lines = [f"line {i} of a long novel without chapters\n" for i in range(30_000)]
    path.write_text("".join(lines), encoding="utf-8")
    main([str(path), "--encoding", "bytes", "--out", str(out)])
    documents = documents_of(out, "train", "val")
    assert sorted("".join(documents).splitlines(True)) == sorted(lines)
    assert all(text.endswith("\n") and len(text) < 1024 + 50 for text in documents)

    main(["--verify", str(out)])
    assert f"{out}: good: 1" in capsys.readouterr().out


def test_gpt2(texts, tmp_path, needs_gpt2):
    main([str(texts), "--out", str(tmp_path / "out"), "--val-fraction", "0.1"])
    assert Dataset(tmp_path / "out", 1).val.vocab_size == 50257
    expected = sorted(path.read_text(encoding="utf-8") for path in texts.iterdir())
    assert sorted(documents_of(tmp_path / "out", "train", "val", encoding=needs_gpt2)) == expected


def test_ids_beyond_65535_have_four_bytes(tmp_path, monkeypatch):
    """In an encoding of our own, because each one of so many ids needs a download."""
    large = tiktoken.Encoding("large", pat_str=r"\s|\S", special_tokens={"<|endoftext|>": 70_000},
                              mergeable_ranks={bytes([i]): 65_500 + i for i in range(256)})
    monkeypatch.setattr(prepare_data, "get_encoding", lambda name: large)
    make([write_texts(tmp_path / "in", 60)], tmp_path / "out", shard_tokens=900)
    expected = sorted(path.read_text("utf-8") for path in (tmp_path / "in").iterdir())
    assert sorted(documents_of(tmp_path / "out", "train", "val", encoding=large)) == expected


# ---- bad input -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name, content, options, message", [
    ("a.txt", b"", [], "no document fell into the train split"),
    ("a.txt", b"just one document", [], "no document fell into the val split: give more"),
    ("a.txt", b"text\0more", [], "a.txt: not text but binary: it has NUL bytes"),
    ("a.txt", "text".encode("utf-16"), [], "a.txt: not UTF-8 text, or damaged"),
    ("a.jsonl", b'{"body": "x", "a\\nb": 1}', [], "1: no text in field 'text' (it has: body, a"),
    ("a.jsonl", b'{"text": ["x"]}', [], "1: the field 'text' has the type list, and is no text"),
    ("a.jsonl", b'{"text": "x"}\n' + b"[" * 100_000, [], "a.jsonl, line 2: not JSON"),
    ("a.zst", b"x", [], "For parquet and other formats: python prepare_data.py --hf "),
    ("a.txt", b"x", ["nowhere"], "nowhere does not exist"),
    ("a.txt", b"x", ["--out", ""], "--out is missing: give the dataset's folder"),
    ("a.txt", b"x", ["--hf", "name"], "--hf name and a.txt: give one source at a time"),
    ("a.txt", b"x", ["--val-fraction", "0"], "0.0 must be above 0 and below 1"),
    ("a.txt", b"x", ["--shard-tokens", "0"], "--shard-tokens 0 must be"),
    ("a.txt", b"x", ["--max-document", "1048577"], "--max-document 1048577 must"),
    ("a.txt", b"x", ["--workers", "-1"], "--workers -1 must be above 0"),
    ("a.txt", b"x", ["--verify", ""], "holds no train shard"),
    ("a.txt", b"x", ["--encoding", "ids"], "ids cannot tokenize text"),
    ("a.txt", b"x", ["--encoding", "gpt3"], "unknown encoding 'gpt3': choose bytes or one of"),
    ("a.txt", b"x", ["--encoding", "r50k_base"], "or set TIKTOKEN_CACHE_DIR to a folder"),
])
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(
        tmp_path, monkeypatch, name, content, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "empty")
    for variable in ("HTTPS_PROXY", "https_proxy"):  # no encoding can be had
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    Path(name).write_bytes(content)
    assert message in refused("--out", "out", *options, name)
    assert os.listdir() == [name]


def test_a_folder_may_hold_other_things(tmp_path, capsys):
    """They are counted, and nothing hangs: a pipe would wait for ever to be opened."""
    folder, elsewhere = write_texts(tmp_path / "in", 60), write_texts(tmp_path / "elsewhere", 1)
    (folder / "linked.txt").symlink_to(elsewhere / "0000.txt")
    expected = {path.read_text(encoding="utf-8") for path in folder.iterdir()}
    for name, content in (("later.txt", b"good\n" * 9000 + b"\xff"), ("bad.txt", b"\xe9t\xe9"),
                          ("empty.txt", b""), (".hidden.txt", b"hidden"), ("a.pdf", b"")):
        (folder / name).write_bytes(content)
    (folder / "dangling.txt").symlink_to(tmp_path / "nowhere")
    (folder / "linked").symlink_to(elsewhere)
    os.mkfifo(folder / "pipe.jsonl")
    make([folder], tmp_path / "out", max_document=1000)
    said = capsys.readouterr().out
    assert f"  not read: 4 files and linked folders; the first is {folder / 'linked'}\n" in said
    assert f"  skipped 2 files or records: {folder / 'bad.txt'}: not UTF-8" in said
    found = documents_of(tmp_path / "out", "train", "val")
    assert set(found) == expected | {"good\n" * 201} and len(found) > 90

    new = str(tmp_path / "new")
    for name in ("dangling.txt", "pipe.jsonl"):
        assert f"{name} cannot be read: give a file" in refused(folder / name, "--out", new)
    (tmp_path / "empty").mkdir()
    assert "For other formats: --hf FOLDER" in refused(tmp_path / "empty", "--out", new)
    (tmp_path / "empty" / "latin-1.txt").write_bytes(b"caf\xe9")
    line = refused(tmp_path / "empty", "--out", new)
    assert "train split: give more documents" in line and "latin-1.txt: not UTF-8 text, or" in line


def test_bad_records_are_refused_or_counted_and_reading_resumes_at_any_document(tmp_path):
    for name in "ab":
        records = [{"text": (None, "", f"{name}{i}")[i % 3]} for i in range(12)]
        write_lines(tmp_path / f"{name}.jsonl", records)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 99)[:-9])
    source = FileInput(find_files([tmp_path]), skip_bad=True)
    documents = list(source.documents())
    assert len(documents) == 2 * 4 + 99 and source.skipped == 2 * 4 + 2
    assert source.first_skipped.startswith(f"{tmp_path / 'a.jsonl'}, line 1: no text in field")
    for number, (_, position) in enumerate(documents, 1):
        assert list(source.documents(position)) == documents[number:]

    for name in ("a.jsonl", "b.jsonl", "cut.jsonl.gz"):  # in this order, in a folder
        with pytest.raises(ValueError, match=f"{name}.* (line 1: no text|not UTF-8 text, or)"):
            list(FileInput(find_files([tmp_path])).documents())
        (tmp_path / name).unlink()
    assert not list(FileInput(find_files([tmp_path])).documents())


# ---- nothing is replaced -------------------------------------------------------------------------

@pytest.mark.parametrize("out, message", [
    ("in/out", "lies in the input"),
    ("link", "lies in the input"),
    ("mine", "mine is not an empty folder: choose another --out, or remove it"),
    ("dataset", "dataset holds a dataset: choose another --out, or remove it"),
    ("work", "work.partial cannot be resumed: 'position'. Give the command that it was begun with"),
    ("locked", "locked.partial/lock is not a lock file of this program: move it away"),
    ("file", "file.partial"),
])
def test_nothing_is_touched_that_was_not_written_here(tmp_path, dataset, out, message):
    folder = write_texts(tmp_path / "in", 30)
    (tmp_path / "link").symlink_to(folder)
    shutil.copytree(dataset, tmp_path / "dataset")
    for name in ("mine/precious.txt", "work.partial/progress.json", "file.partial",
                 "locked.partial/lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"my": "own"}', encoding="utf-8")
    before = everything(tmp_path)
    for given in (folder, tmp_path / "link"):
        assert message in refused(given, "--out", tmp_path / out)
    assert everything(tmp_path) == before


def test_out_may_be_empty_a_link_or_begin_with_a_tilde(texts, tmp_path, monkeypatch):
    """The dataset is made where the link leads."""
    (tmp_path / "home").mkdir()
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "home" / "in").symlink_to(texts)
    (tmp_path / "home" / "out").symlink_to(tmp_path / "disk" / "out")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    main(["~/in", "--encoding", "bytes", "--val-fraction", "0.1", "--out", "~/out"])
    assert (tmp_path / "home" / "out").is_symlink() and Dataset("~/out", 16).train
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["out", "out/mine"])
def test_an_out_that_appears_meanwhile_is_not_replaced(texts, tmp_path, name, monkeypatch):
    """The finished dataset waits in OUT.partial, and the same command moves it later."""
    out, original = tmp_path / "out", prepare_data.move_into_place

    def appear(partial, place):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"precious")
        original(partial, place)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "move_into_place", appear)
        with pytest.raises(ValueError, match="the finished dataset waits in .*out.partial"):
            make([texts], out, shard_tokens=10_000)
    assert (tmp_path / name).read_bytes() == b"precious"
    out.rename(tmp_path / "moved")
    make([texts], out, shard_tokens=10_000)
    make([texts], tmp_path / "straight", shard_tokens=10_000)
    assert everything(out) == everything(tmp_path / "straight")


# ---- kills and resumes ---------------------------------------------------------------------------

def many_documents(folder, documents):
    folder.mkdir()
    for name in range(2):
        write_lines(folder / f"{name}.jsonl.gz", [
            {"text": f"document {i} of {name}, " * (1 + i * 7 % 60)} for i in range(documents)])
    (folder / "γ.txt").write_bytes(b"\xff")
    return folder


@pytest.mark.parametrize("end, wanted, status, line", [
    (signal.SIGKILL, 3, -signal.SIGKILL, ""),
    (signal.SIGINT, 1, 130, "interrupted: give the same command again\n"),
], ids=["killed", "Ctrl-C"])
def test_an_ended_preparation_continues_to_the_same_bytes(tmp_path, end, wanted, status, line):
    """Ends at random moments, the same command again each time, other numbers of threads. Output
    that fails, or that cannot show a file's name, ends nothing."""
    source, straight = many_documents(tmp_path / "in", 2000), tmp_path / "straight"
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    options = [source, "--encoding=bytes", "--shard-tokens=50000", "--val-fraction=0.1"]
    with open("/dev/full", "wb") as full:
        subprocess.run(command_of("prepare_data.py", *options, "--out", straight), cwd=ROOT,
                       stdout=full, stderr=full, check=True)

    rng, resumed, ends = random.Random(3), 0, 0
    while ends < wanted or not resumed:
        process = subprocess.Popen(
            command_of("prepare_data.py", *options, "--out", out, "--workers", 1 + ends % 3),
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        goal = len(list(partial.glob("*.bin"))) + rng.randint(1, 4)
        while process.poll() is None and len(list(partial.glob("*.bin"))) < goal:
            time.sleep(rng.uniform(0, 0.004))
        process.send_signal(end)
        said, errors = process.communicate()
        if process.returncode == 0:  # a busy machine: it reached its end before
            assert everything(out) == everything(straight)
            shutil.rmtree(out)
            continue
        assert (process.returncode, errors) == (status, line) and not out.exists()
        ends += 1
        resumed += "resuming " in said
        assert ends < 12, "no resume"
    done = run("prepare_data.py", *options, "--out", out, env={"PYTHONIOENCODING": "ascii"})
    assert not partial.exists() and everything(out) == everything(straight)
    assert "skipped 1 files" in done.stdout and "\\u03b3.txt" in done.stdout


@pytest.fixture
def unfinished(tmp_path, monkeypatch):
    """(Files, OUT) of a preparation that ended at a bad line of a file that is shorter now."""
    monkeypatch.setattr(prepare_data, "CHUNK_CHARS", 1000)
    source, last = many_documents(tmp_path / "in", 200), tmp_path / "last.jsonl"
    last.write_text(9 * f'{{"text": "{"draft " * 200}"}}\n' + "{", encoding="utf-8")
    with pytest.raises(ValueError, match="last.jsonl, line 10: not JSON"):
        make([source, last], tmp_path / "out", shard_tokens=50_000, workers=1)
    last.write_text('{"text": "good"}\n', encoding="utf-8")
    return [source, last], tmp_path / "out"


def test_an_unfinished_preparation_keeps_its_options_and_input(unfinished, capsys, monkeypatch):
    """It needs neither nanoseconds, which some disks forget, nor the same spelling."""
    source, out = unfinished
    first, before = source[0] / "0.jsonl.gz", everything(out.parent)
    seconds = int(first.stat().st_mtime)

    os.utime(first, (seconds, seconds - 10))
    for message, given, fraction in (
            ("--val-fraction 0.2, not --val-fraction 0.3", source, 0.3),
            (".*0.jsonl.gz .*, not .*last.jsonl", source[1:], 0.2),
            (".*0.jsonl.gz .*, not .*0.jsonl.gz", source, 0.2)):
        with pytest.raises(ValueError, match=f"cannot be resumed: it was begun with {message}"):
            make(given, out, shard_tokens=50_000, val_fraction=fraction)
    assert everything(out.parent) == before

    os.utime(first, (seconds, seconds))
    monkeypatch.chdir(out.parent)
    make(["in/../in", "last.jsonl"], "out", shard_tokens=50_000)
    assert "resuming " in capsys.readouterr().out and "good" in documents_of(out, "train", "val")


@pytest.mark.parametrize("damage", [os.remove, lambda path: os.truncate(path, 1030)])
@pytest.mark.parametrize("name", ["train_000000.bin", "val_000000.bin", "progress.json"])
def test_a_damaged_preparation_is_not_resumed(unfinished, name, damage):
    source, out = unfinished
    partial = Path(f"{out}.partial")
    damage(partial / name)
    before = everything(partial)
    with pytest.raises(ValueError, match="out.partial cannot be resumed: .*move it away"):
        make(source, out, shard_tokens=50_000)
    assert everything(partial) == before


def test_a_full_disk_is_one_line_and_the_same_command_finishes(unfinished, tmp_path):
    """A limit for each file is no lack of room. In the first shard it leaves nothing."""
    source, out = unfinished
    limit = (resource.RLIMIT_FSIZE, (5000, 5000))
    done = run("prepare_data.py", *source, "--encoding=bytes", "--out", tmp_path / "limited",
               check=False, preexec_fn=lambda: resource.setrlimit(*limit))
    assert done.stderr == (f"error: {tmp_path / 'limited.partial'} cannot be written (File too "
                           f"large): give the same command again\n")
    assert not list(tmp_path.glob("limited*"))

    write_lines(source[1], [{"text": "more" * 20_000} for _ in range(9)])
    full = tmp_path / "out.partial" / "train_000004.bin"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match="out.partial .*No space left.*: make room and give the same"):
        make(source, out, shard_tokens=50_000)
    full.unlink()
    make(source, out, shard_tokens=50_000)
    assert len(documents_of(out, "train", "val")) == 2 * 200 + 9


def test_hugging_face_datasets(tmp_path, capsys, monkeypatch):
    """Three local parquet files, with three rows without text, through the same library and calls
    that read the hub. No test asks the network: five attempts with pauses take 23 s."""
    datasets = pytest.importorskip("datasets")
    for module in (datasets.config, pytest.importorskip("huggingface_hub").constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(prepare_data, "CHUNK_CHARS", 100)
    folder, texts = tmp_path / "set", [f"row {i} γ" for i in range(600)]
    parts = [folder / "data" / f"train-0000{part}-of-00003.parquet" for part in range(3)]
    for part, path in enumerate(parts):
        rows = texts[200 * part:200 * part + 200] + [None] * part
        datasets.Dataset.from_dict({"text": rows, "id": range(len(rows))}).to_parquet(path)

    options = ["--val-fraction=0.2", "--shard-tokens=500", "--workers=1", "--out", tmp_path / "out"]
    for source, message in (
            ([folder, "--out", folder / "out"], "lies in the input"),
            (["nobody/nothing"], "--hf nobody/nothing: "),
            ([folder, "--field=body"], "record 1: no text in field 'body' (it has: text, id)"),
            ([folder], "record 401: no text in field 'text' (it has: text, id): name")):
        assert message in refused(*options, "--hf", *source)
    main(["--encoding=bytes", *map(str, options), "--hf", str(folder), "--skip-bad"])
    said = capsys.readouterr().out
    assert "resuming " in said and f"skipped 3 files or records: --hf {folder}" in said
    assert sorted(documents_of(tmp_path / "out", "train", "val")) == sorted(texts)

    shutil.rmtree(tmp_path / "out")
    refused(*options, "--hf", folder)
    (folder / "README.md").touch()
    assert "cannot be resumed: it was begun with " in refused(*options, "--hf", folder)
    (folder / "README.md").unlink()
    os.utime(parts[0], (1e9, 1e9))
    assert "-00003.parquet (" in refused(*options, "--hf", folder)

    parts[2].write_bytes(b"damaged")
    assert f"--hf {folder}: " in refused("--hf", folder, "--skip-bad", "--out", tmp_path / "x")


def test_a_name_on_the_hub_is_pinned_to_its_commit(monkeypatch):
    """Asked of a server of our own. Where there is none, the revision stays what was given."""
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("datasets")

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path.startswith("/api/datasets/us/texts/revision/v1")
            body = json.dumps({"id": "us/texts", "sha": "c0ffee"} if known else {}).encode()
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = http.server.HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    [line] = HubInput("us/texts", None, "train", "v1").identity((0, 0))
    assert "'revision': 'c0ffee'" in line
    assert HubInput("us/nothing", None, "train", None).wanted["revision"] is None
    server.shutdown()
