"""
Proves that damage is refused before a run and during one, that shards of other programs are
recognised, and that the order of training is a permutation that depends on nothing but the seed and
the sample number, and stays what it is. test_fuzz proves that the three formats give their tokens.
"""
import hashlib
import json
import os
import pathlib
import re
import shlex
import shutil

import numpy as np
import pytest
from conftest import ROOT, run

from lib import data
from lib.data import Dataset, Split, find_shards, permute, window_numbers


def llmc_shard(path, tokens):
    header = np.array([20240520, 1, len(tokens), *[0] * 253], dtype="<i4")
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return path


def nanogpt_folder(folder, tokens):
    for name in ("train.bin", "val.bin"):
        np.asarray(tokens, dtype="<u2").tofile(folder / name)


def test_windows_overlap_by_one_and_stay_within_a_shard(tmp_path):
    """Of four bytes a token, for a vocabulary beyond 65,536, or of two."""
    wide = tmp_path / "a_train_0.bin"
    header = np.array([20260526, 1, 25, 4, *[0] * 252], "<i4")
    wide.write_bytes(header.tobytes() + np.arange(70_000, 70_025).astype("<u4").tobytes())
    paths = [wide, llmc_shard(tmp_path / "a_train_1.bin", range(100, 109)),
             llmc_shard(tmp_path / "a_train_2.bin", range(200, 204))]
    split = Split(paths, block_size=8)
    assert len(split) == 3 + 1 + 0 and split.tokens == 38
    x, y = split[[3, 0, 2]]
    assert x.dtype == y.dtype == np.int64
    assert x.tolist() == [list(range(start, start + 8)) for start in (100, 70_000, 70_016)]
    assert y.tolist() == [list(range(start, start + 8)) for start in (101, 70_001, 70_017)]


def test_a_whole_shard_is_read_in_blocks(tmp_path, monkeypatch):
    """Of 7 tokens here: all of them once, and the checksum is of all."""
    monkeypatch.setattr(data, "READ_TOKENS", 7)
    shard = data.Shard(llmc_shard(tmp_path / "x.bin", range(100, 153)))
    assert np.concatenate(list(shard.blocks())).tolist() == list(range(100, 153))
    digest = hashlib.sha256(np.arange(100, 153, dtype="<u2").tobytes()).hexdigest()
    assert shard.checksum() == (digest, 152)


@pytest.mark.parametrize("change, message", [
    (lambda path: os.truncate(path, 5000), "x.bin has changed since it was opened"),
    (lambda path: open(path, "r+b").write(bytes(9)), "x.bin has changed since it was opened"),
    (os.remove, "No such file or directory: '.*x.bin"),
])
def test_a_shard_that_changes_during_a_run_is_one_line(tmp_path, change, message):
    path = llmc_shard(tmp_path / "x.bin", np.arange(200_000) % 50_000)
    os.utime(path, (1e9, 1e9))
    split = Split([path], 64)
    os.utime(path, (1e9, 1e9 + 0.5))  # some file systems forget parts of a second
    split[[2000, 3]]
    change(path)
    with pytest.raises((ValueError, OSError), match=message):
        split[[2000, 3]]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000, 4097, 65537])
def test_an_epoch_has_every_window_once_and_the_next_another_order(n):
    epochs = window_numbers(0, 3 * n, n, seed=7).reshape(3, n)
    assert np.array_equal(window_numbers(n + 1, n, n, seed=7), epochs.ravel()[n + 1:2 * n + 1])
    for number, epoch in enumerate(epochs):
        assert np.array_equal(np.sort(epoch), np.arange(n))
        assert np.array_equal(permute(np.arange(n), n, [7, number]), epoch)
    if n > 100:
        for other in (epochs[1], epochs[2], np.arange(n), window_numbers(0, n, n, seed=8)):
            assert (epochs[0] == other).mean() < 0.05


@pytest.mark.parametrize("first, n, seed, expected", [
    (0, 1000, 1337, [358, 421, 866, 449, 666, 460, 618, 354]),
    (1022, 1023, 3, [544, 480, 382, 326]),  # from one epoch and block into the next
    (10_000_000, 97_001, 1, [90210, 54001, 44202, 38257]),
    (5, 1024, 7, [131, 499, 830, 351]),  # a power of 4 needs no wider network
])
def test_the_order_stays_that_of_the_committed_results(first, n, seed, expected):
    assert window_numbers(first, len(expected), n, seed).tolist() == expected


def test_a_whole_word_decides_the_split(tmp_path):
    names = {"train": ["TRAIN0001.bin", "interval_train.bin", "retrieval_train_000.bin"],
             "val": ["fineweb_val_000000.bin", "x-validation-1.bin"],
             None: ["constrained.bin", "model.bin", "valuable.bin", "train.npy"]}
    for name in sum(names.values(), []):
        (tmp_path / name).touch()
    found = find_shards(tmp_path)
    assert {split: [path.name for path in found[split]] for split in found} == {
        split: names[split] for split in ("train", "val")}
    (tmp_path / "val_of_train.bin").touch()
    with pytest.raises(ValueError, match="val_of_train.bin would be in both splits"):
        Dataset(tmp_path, 16)


@pytest.mark.parametrize("highest, tokenizer", [
    (50256, "gpt2"), (256, "gpt2"), (255, "ids"), (50257, "ids")])
def test_when_shards_are_taken_for_gpt2s(tmp_path, highest, tokenizer):
    """Not for a model of fewer tokens. Not with a meta.pkl, which says that they are another's, and
    is an error if it is loaded."""
    nanogpt_folder(tmp_path, [0] * 50 + [highest] + [1] * 50)
    assert Dataset(tmp_path, 16).tokenizer == tokenizer
    assert Dataset(tmp_path, 16, 60000).tokenizer == tokenizer
    if highest < 50256:
        assert Dataset(tmp_path, 16, 50256).tokenizer == "ids"
    with pytest.raises(ValueError, match=f"token id {highest} is beyond vocab_size={highest}"):
        Dataset(tmp_path, 16, highest)
    (tmp_path / "meta.pkl").touch()
    opened = Dataset(tmp_path, 16)
    assert opened.tokenizer == "ids" and opened.val_bytes_per_token is None


def test_four_bytes_a_token_without_a_header_are_refused(tmp_path):
    """Of Llama 3's 128,256 ids, as uint16 every second one is 0 or 1."""
    tokens = np.random.default_rng(0).integers(128_256, size=300)
    nanogpt_folder(tmp_path, tokens % 50_000)
    Dataset(tmp_path, 16)
    tokens.astype("<u4").tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match="train.bin: every second of its tokens is below 16, as"):
        Dataset(tmp_path, 16)


def test_bytes_per_token_of_gpt2s_shards(tmp_path, needs_gpt2):
    text = "The scale of a vector is a vector's scale. " * 50
    tokens = needs_gpt2.encode(text) + [needs_gpt2.eot_token]
    nanogpt_folder(tmp_path, tokens)
    assert Dataset(tmp_path, 16, 50304).val_bytes_per_token == len(text) / len(tokens)


@pytest.mark.slow
def test_the_pages_own_tokenizer(texts, tmp_path, monkeypatch):
    """docs/data.md from file to sample: as many bytes a token as its merges give, and a sample."""
    page = (ROOT / "docs/data.md").read_text("utf-8").split("## Your own tokenizer")[1]
    train_it, module, commands = re.findall(r"```\w+\n(.*?)```", page, re.DOTALL)[:3]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(texts, "texts")
    exec(train_it, {})
    pathlib.Path("tiktoken_ext/mine.py").write_text(module, "utf-8")
    program = [f"sys.path.insert(0, {str(ROOT)!r})"]
    for line in commands.splitlines():
        _, name, *args = shlex.split(line)
        if name == "train.py":
            args = [str(ROOT / args[0]), *args[1:], "--max_iters=2", "--eval_windows=2",
                    "--sample_tokens=0"]
        module = name.removesuffix(".py")
        program.append(f"from {module} import main; main({args!r})")
    code = "import sys\n" + "\n".join(program)
    printed = run("-c", code, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}).stdout
    opened = Dataset("data/mine", 16, 301)
    assert opened.tokenizer == "mine" and 1.2 < opened.val_bytes_per_token < 3
    assert "(mine)" in printed and "bits/byte" in printed and "\n12 + " in printed


def test_our_folder_must_fit_the_model(dataset):
    opened = Dataset(dataset, 16, 257)
    meta = json.loads((dataset / "meta.json").read_bytes())["splits"]
    assert opened.tokenizer == "bytes"
    assert opened.train.tokens == meta["train"]["tokens"]
    assert opened.val.tokens == meta["val"]["tokens"]
    text_bytes = opened.val.tokens - meta["val"]["documents"]
    assert opened.val_bytes_per_token == text_bytes / opened.val.tokens

    message = r"token ids up to 256 \(bytes\), beyond the model's vocab_size=200: set --vocab_size"
    with pytest.raises(ValueError, match=message):
        Dataset(dataset, 16, 200)
    with pytest.raises(ValueError, match="val split has .* less than one window of 5000 "):
        Dataset(dataset, 5000, 257)


def test_a_folder_without_a_dataset(tmp_path):
    shard = llmc_shard(tmp_path / "x_train_0.bin", range(100))
    with pytest.raises(ValueError, match=f"x_train_0.bin is a file: give its folder {tmp_path}"):
        Dataset(shard, 16)
    (tmp_path / "x_val_0.npy").touch()
    with pytest.raises(FileNotFoundError, match="its .npy shards cannot be read"):
        Dataset(tmp_path, 16)


@pytest.mark.parametrize("name, old, new, message", [
    ("train_000000.bin", b"s\0u\0m", b"S\0u\0m", "train_000000.bin: checksum mismatch"),
    ("train_000000.bin", b"s\0u\0m", b"s\0u", "train_000000.bin: truncated or damaged"),
    ("meta.json", b'"vocab_size": 257', b'"vocab_size": 256', "token id 256 is beyond vocab_size"),
    ("meta.json", b"val_000000.bin", b"nothing.bin", "nothing.bin is missing"),
    ("meta.json", b'"name"', b'"nam"', r"meta.json is damaged \(KeyError: 'name'\): make"),
    ("meta.json", b'"bytes": ', b'"bytes": -', "meta.json is damaged"),
    ("meta.json", b"{", b"[" * 9999, "meta.json is damaged"),
])
def test_a_damaged_dataset_is_one_line(dataset, tmp_path, name, old, new, message):
    folder = shutil.copytree(dataset, tmp_path / "copy")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content.replace(old, new))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        Dataset(folder, 16)
    assert "\n" not in str(error.value)
