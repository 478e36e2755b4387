"""
Proves that the three shard formats give their tokens, that damage is refused before a run and
during one, that shards of other programs are recognised, and that the order of training is a
permutation that depends on nothing but the seed and the sample number.
"""
import hashlib
import json
import os
import pickle
import shutil

import numpy as np
import pytest
from conftest import run

from lib.data import (
    MAGIC,
    Dataset,
    Shard,
    ShardWriter,
    Split,
    foreign_shards,
    permute,
    shard_header,
    window_numbers,
)
from lib.tokenizer import get_encoding


def llmc_shard(path, tokens):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype=np.uint16).tobytes())
    return path


def nanogpt_folder(folder, tokens):
    for name in ("train.bin", "val.bin"):
        (folder / name).write_bytes(np.asarray(tokens, dtype=np.uint16).tobytes())


def llmc_folder(folder, tokens):
    for name in ("x_train_0.bin", "x_val_0.bin"):
        llmc_shard(folder / name, tokens)


# --------------------------------------------------------------------------------------------------
# shards

def test_three_formats(tmp_path):
    tokens = np.arange(1000) * 50
    short, long = tokens.astype(np.uint16).tobytes(), (tokens * 4).astype(np.uint32).tobytes()
    (tmp_path / "train.bin").write_bytes(short)
    (tmp_path / "a.bin").write_bytes(shard_header(1000, 2) + short)
    (tmp_path / "b.bin").write_bytes(shard_header(1000, 4) + long)
    llmc_shard(tmp_path / "c.bin", tokens)
    for name in ("train.bin", "a.bin", "b.bin", "c.bin"):
        shard, expected = Shard(tmp_path / name), tokens * (4 if name == "b.bin" else 1)
        assert np.array_equal(np.concatenate(list(shard.blocks())), expected)
        assert np.array_equal(shard.read(700, 200), expected[700:900])


@pytest.mark.parametrize("name, content, message", [
    ("x.bin", b"\x01\x00\x00\x00" * 300, r"wrong magic 1, not 20260526 \(ours\) or 20240520"),
    ("x.bin", b"", "wrong magic 0"),
    ("x.bin", b"\x07", "wrong magic"),
    ("val.bin", b"", "0 bytes are no sequence"),
    ("train.bin", b"abc", "3 bytes are no sequence of uint16"),
    ("x.bin", shard_header(100, 2) + bytes(150), "promises 100 tokens of 2 bytes .* has 1,174"),
    ("x.bin", shard_header(100, 2)[:500], "truncated or damaged"),
    ("x.bin", shard_header(100, 2) + bytes(250), "truncated or damaged"),
    ("x.bin", shard_header(0, 2), "truncated or damaged"),
    ("x.bin", shard_header(-5, 2), "truncated or damaged"),
    ("x.bin", shard_header(100, 3) + bytes(300), "100 tokens of 3 bytes"),
    ("x.bin", np.array([MAGIC, 2, 10, 2] + [0] * 257, dtype=np.int32).tobytes(), "version 2"),
])
def test_damaged_shards(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Shard(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_windows_overlap_by_one_and_stay_within_a_shard(tmp_path):
    paths = [llmc_shard(tmp_path / "a_train_0.bin", range(0, 25)),
             llmc_shard(tmp_path / "a_train_1.bin", range(100, 109)),
             llmc_shard(tmp_path / "a_train_2.bin", range(200, 204))]
    split = Split(paths, block_size=8)
    assert len(split) == 3 + 1 + 0 and split.tokens == 38
    x, y = split[[3, 0, 2]]
    assert x.dtype == y.dtype == np.int64
    assert x.tolist() == [list(range(start, start + 8)) for start in (100, 0, 16)]
    assert y.tolist() == [list(range(start, start + 8)) for start in (101, 1, 17)]


@pytest.mark.parametrize("change", ["cut", "replaced", "removed"])
def test_a_shard_that_changes_during_a_run_is_one_line(tmp_path, change):
    """In a process of its own: a memory map would end it with a bus error, or read other tokens."""
    llmc_folder(tmp_path, np.arange(200_000) % 50_000)
    os.utime(tmp_path / "x_train_0.bin", (1e9, 1e9))
    changes = {"cut": "os.truncate(path, 5000)",
               "replaced": "open(path, 'r+b').write(bytes(9))",
               "removed": "os.remove(path)"}
    program = tmp_path / "program.py"
    program.write_text(f"""
import os, sys
sys.path.insert(0, os.getcwd())
from lib.data import Dataset
dataset, path = Dataset({str(tmp_path)!r}, 64), {str(tmp_path / "x_train_0.bin")!r}
dataset.train[[2000, 3]]
{changes[change]}
try:
    dataset.train[[2000, 3]]
except (ValueError, OSError) as error:
    print(error)
""", encoding="utf-8")
    said = run(program).stdout
    assert said.count("\n") == 1 and "x_train_0.bin" in said
    assert ("No such file" if change == "removed" else "has changed since it was opened") in said


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_shards_are_written_as_the_format_says(tmp_path, dtype, restored):
    """Shards of ten tokens: header, tokens and checksum by hand; also if resumed in the middle."""
    documents = [np.arange(n, dtype=dtype) + n for n in (3, 1, 25, 7, 9)]
    writer = ShardWriter(tmp_path, "train", dtype, 10)
    for number, tokens in enumerate(documents):
        if restored and number == 3:
            state = json.loads(json.dumps(writer.state()))
            writer.write(np.zeros(4, dtype), 1)  # lost again
            writer.abandon()
            writer = ShardWriter(tmp_path, "train", dtype, 10)
            writer.restore(state)
        writer.write(tokens, 2 * len(tokens))
    writer.close()

    assert (writer.tokens, writer.bytes, writer.documents) == (45, 90, 5)
    whole, itemsize = np.concatenate(documents), dtype().itemsize
    assert len(writer.shards) == 5
    for number, shard in enumerate(writer.shards):
        tokens = whole[10 * number:10 * number + 10]
        header = np.array([20260526, 1, len(tokens), itemsize] + [0] * 252, dtype="<i4")
        content = header.tobytes() + tokens.tobytes()
        assert (tmp_path / shard["name"]).read_bytes() == content
        assert shard == {"name": f"train_{number:06d}.bin", "tokens": len(tokens),
                         "sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}


# --------------------------------------------------------------------------------------------------
# the order

@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000, 4097, 65537])
def test_permute_is_a_permutation(n):
    image = permute(np.arange(n), n, [7, 0])
    assert np.array_equal(np.sort(image), np.arange(n))
    assert np.array_equal(permute([n - 1, 0], n, [7, 0]), image[[n - 1, 0]])  # entry by entry
    if n > 100:
        other = permute(np.arange(n), n, [7, 1])
        assert (image == other).mean() < 0.05 and (image == np.arange(n)).mean() < 0.05


def test_permute_looks_random():
    """Neighbours are scattered: correlations are of order 1/sqrt(n), and every tenth of the range
    is hit evenly from any tenth."""
    n = 100_000
    image = permute(np.arange(n), n, [3, 0]).astype(float)
    for lag in (1, 2, 16, 256):
        assert abs(np.corrcoef(image[:-lag], image[lag:])[0, 1]) < 5 / np.sqrt(n)
    counts = np.histogram2d(np.arange(n), image, bins=10)[0]
    # chi-square with 81 degrees of freedom: mean 81, standard deviation 13
    assert ((counts - 1000) ** 2 / 1000).sum() < 200


def test_an_epoch_has_every_window_once_and_the_next_another_order():
    n = 103
    epochs = window_numbers(0, 3 * n, n, seed=5).reshape(3, n)
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(n))
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()
    assert (window_numbers(0, n, n, seed=6) != epochs[0]).any()


@pytest.mark.parametrize("size", [1, 7, 16])
def test_the_order_is_the_same_however_it_is_cut(size):
    whole = window_numbers(0, 2240, 57, seed=1)
    parts = [window_numbers(first, min(size, 2240 - first), 57, seed=1)
             for first in range(0, 2240, size)]
    assert np.array_equal(np.concatenate(parts), whole)


# --------------------------------------------------------------------------------------------------
# shards of other programs

def test_folders_of_other_programs(tmp_path):
    tokens = np.arange(500) % 90
    nanogpt_folder(tmp_path, tokens)
    assert len(Dataset(tmp_path, 16, 50304).train) == 31

    fineweb = tmp_path / "fineweb"
    fineweb.mkdir()
    for name in ("fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin"):
        llmc_shard(fineweb / name, tokens)
    dataset = Dataset(fineweb, 16, 50304)
    assert (len(dataset.train), len(dataset.val), dataset.tokenizer) == (62, 31, "gpt2")
    with pytest.raises(ValueError, match="token id 89 is beyond vocab_size=80"):
        Dataset(fineweb, 16, 80)
    unread = Dataset(fineweb, 16, 80, verify=False)  # as a dataset too big to be read at the start
    with pytest.raises(ValueError, match="token id 8[0-9] is beyond vocab_size=80"):
        unread.train[list(range(10))]


@pytest.mark.parametrize("name, split", [
    ("retrieval_train_000.bin", "train"),
    ("train.bin", "train"),
    ("TRAIN0001.bin", "train"),
    ("interval_train.bin", "train"),
    ("fineweb_val_000000.bin", "val"),
    ("x-validation-1.bin", "val"),
    ("constrained.bin", None),
    ("valuable.bin", None),
    ("model.bin", None),
])
def test_a_whole_word_decides_the_split(tmp_path, name, split):
    (tmp_path / name).touch()
    found = foreign_shards(tmp_path)
    assert [s for s in ("train", "val") if found[s]] == ([split] if split else [])


def test_no_shard_is_in_both_splits(tmp_path):
    llmc_shard(tmp_path / "x_train_0.bin", range(100))
    os.symlink(tmp_path / "x_train_0.bin", tmp_path / "x_val_0.bin")
    with pytest.raises(ValueError, match="x_val_0.bin would be in both splits, .* x_train_0.bin"):
        Dataset(tmp_path, 16)
    (tmp_path / "x_val_0.bin").unlink()
    llmc_shard(tmp_path / "val_of_train.bin", range(100))
    with pytest.raises(ValueError, match="val_of_train.bin would be in both splits"):
        Dataset(tmp_path, 16)


class Trap:
    """A pickle that makes a folder if it is ever loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("has_pickle", [False, True])
def test_nanogpt_character_data(tmp_path, has_pickle):
    """65 characters, and a meta.pkl that must not be loaded: no tokenizer is known."""
    nanogpt_folder(tmp_path, np.arange(2000) % 65)
    if has_pickle:
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Trap(tmp_path / "loaded")))
    opened = Dataset(tmp_path, 16, 65)
    assert opened.tokenizer == "ids" and opened.val_bytes_per_token is None
    assert not (tmp_path / "loaded").exists()


@pytest.mark.parametrize("highest, has_header, has_pickle, tokenizer", [
    (50256, False, False, "gpt2"),
    (256, False, False, "gpt2"),
    (255, False, False, "ids"),
    (50257, False, False, "ids"),
    (5000, False, True, "ids"),
    (64, True, False, "gpt2"),
    (50256, True, False, "gpt2"),
    (50257, True, False, "ids"),
    (64, True, True, "ids"),
])
def test_when_shards_are_taken_for_gpt2s(tmp_path, highest, has_header, has_pickle, tokenizer):
    tokens = [0] * 50 + [highest] + [1] * 50
    (llmc_folder if has_header else nanogpt_folder)(tmp_path, tokens)
    if has_pickle:
        (tmp_path / "meta.pkl").touch()
    assert Dataset(tmp_path, 16).tokenizer == tokenizer


def test_bytes_per_token_of_gpt2s_shards(tmp_path, needs_gpt2):
    text = "The scale of a vector is a vector's scale. " * 50
    tokens = needs_gpt2.encode(text) + [needs_gpt2.eot_token]
    llmc_folder(tmp_path, tokens)
    expected = pytest.approx(len(text) / len(tokens), rel=1e-12)
    assert Dataset(tmp_path, 16, 50304).val_bytes_per_token == expected


# --------------------------------------------------------------------------------------------------
# our folders

@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


def read_json(folder):
    return json.loads((folder / "meta.json").read_bytes())


def write_json(folder, meta):
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def test_our_folder(dataset):
    opened, meta = Dataset(dataset, 16, 257), read_json(dataset)["splits"]
    assert opened.train.tokens == meta["train"]["tokens"]
    assert opened.val.tokens == meta["val"]["tokens"]
    text = bytes((opened.val.shards[0].read(0, 2000) % 256).astype(np.uint8)).decode()
    assert "sums, part" in text and " + " in text
    text_bytes = opened.val.tokens - meta["val"]["documents"]
    assert opened.val_bytes_per_token == text_bytes / opened.val.tokens


def test_a_folder_without_a_dataset(tmp_path):
    advice = "nothing: make it with `python prepare_data.py PATH... --out "
    with pytest.raises(FileNotFoundError, match=advice):
        Dataset(tmp_path / "nothing", 16)
    with pytest.raises(FileNotFoundError, match="holds no train shard"):
        Dataset(tmp_path, 16)
    shard = llmc_shard(tmp_path / "x_train_0.bin", range(100))
    with pytest.raises(ValueError, match=f"x_train_0.bin is a file: give its folder {tmp_path}"):
        Dataset(shard, 16)
    (tmp_path / "x_val_0.npy").touch()
    with pytest.raises(FileNotFoundError, match="its .npy shards cannot be read"):
        Dataset(tmp_path, 16)


def test_a_home_folder_is_a_home_folder(dataset, monkeypatch):
    monkeypatch.setenv("HOME", str(dataset.parent))
    assert Dataset(f"~/{dataset.name}", 16).folder == dataset


@pytest.mark.parametrize("name", ["../elsewhere.bin", "/etc/passwd", "sub/x.bin", "..", ""])
def test_shards_named_in_meta_stay_in_the_folder(copy, name):
    meta = read_json(copy)
    llmc_shard(copy.parent / "elsewhere.bin", range(100))
    meta["splits"]["val"]["shards"][0]["name"] = name
    write_json(copy, meta)
    with pytest.raises(ValueError, match="meta.json is damaged .* is no shard in this folder"):
        Dataset(copy, 16)


def test_checksum_mismatch(copy):
    path = copy / "train_000000.bin"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="train_000000.bin: checksum mismatch"):
        Dataset(copy, 16, 257)


def test_a_dataset_must_fit_the_model(dataset):
    message = r"token ids up to 256 \(bytes\), beyond the model's vocab_size=200: set --vocab_size"
    with pytest.raises(ValueError, match=message):
        Dataset(dataset, 16, 200)
    with pytest.raises(ValueError, match="val split has .* less than one window of 5000 "):
        Dataset(dataset, 5000, 257)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"splits": {"train": 1}}', "null", "[" * 9999])
def test_damaged_meta(copy, text):
    (copy / "meta.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="meta.json is damaged"):
        Dataset(copy, 16, 257)


def test_a_shard_that_meta_lists_is_missing(copy):
    (copy / "val_000000.bin").unlink()
    with pytest.raises(FileNotFoundError, match="val_000000.bin is missing"):
        Dataset(copy, 16, 257)


# --------------------------------------------------------------------------------------------------
# tokenizers

def test_bytes_encoding_is_utf8():
    encoding, text = get_encoding("bytes"), "γ = β·α <|endoftext|>\r\n" + "x" * 1000
    assert encoding.encode(text, disallowed_special=()) == list(text.encode())
    assert encoding.decode(list(text.encode())) == text
    assert encoding.eot_token == 256 and encoding.n_vocab == 257


def test_ids_are_their_own_text():
    encoding = get_encoding("ids")
    assert encoding.encode(" 17 4\n250") == [17, 4, 250]
    assert encoding.decode_single_token_bytes(17) == b" 17"
    with pytest.raises(ValueError, match="give token ids as the prompt, such as '17 4', not 'To"):
        encoding.encode("To be")


def test_unknown_and_unreachable_encodings(tmp_path):
    with pytest.raises(ValueError, match="unknown encoding 'gpt3': choose bytes or one of .*gpt2"):
        get_encoding("gpt3")
    (tmp_path / "a.txt").write_text("some text", encoding="utf-8")
    closed = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"),
              "HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = run("prepare_data.py", tmp_path / "a.txt", "--out", tmp_path / "out", check=False,
               env=closed)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "TIKTOKEN_CACHE_DIR" in done.stderr and "--encoding bytes" in done.stderr
    assert not list(tmp_path.glob("out*"))
