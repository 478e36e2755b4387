"""
Proves that lib.verify finds what is wrong with a dataset: damage, ids beyond the vocabulary, and
documents in both splits.
"""
import hashlib
import json
import shutil

import numpy as np
import pytest

import lib.verify
from lib.data import LLMC_MAGIC, Dataset
from lib.verify import document_digests, main, verify


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


def read_json(folder):
    return json.loads((folder / "meta.json").read_bytes())


def write_json(folder, meta):
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)


def test_verify(dataset, tmp_path, capsys):
    verify(dataset)
    assert "good: 4" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: no dataset at"):
        main([str(tmp_path / "none")])


def test_ctrl_c_is_one_line(dataset, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(lib.verify, "document_digests", stop)
    with pytest.raises(SystemExit) as end:
        main([str(dataset)])
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_documents_are_found_across_shards(tmp_path):
    """The validation document 3, 4, 5 is also in the training split, where it spans two shards."""
    for name, tokens in (("x_train_0.bin", [1, 2, 256, 3, 4]),
                         ("x_train_1.bin", [5, 256, 6, 6, 6]),
                         ("x_val_0.bin", [9, 9, 256, 3, 4, 5, 256])):
        header = np.zeros(256, dtype=np.int32)
        header[:3] = LLMC_MAGIC, 1, len(tokens)
        (tmp_path / name).write_bytes(header.tobytes() + np.uint16(tokens).tobytes())
    dataset = Dataset(tmp_path, 1)
    train, val = (list(document_digests(s, 256)) for s in (dataset.train, dataset.val))
    assert len(train) == 3 and len(val) == 2
    assert train[1] == val[1] and set(train) & set(val) == {val[1]}


def test_verify_without_the_tokenizer_checks_all_that_needs_none(copy):
    """An unknown encoding fails where an unreachable vocabulary does."""
    write_json(copy, {**read_json(copy), "tokenizer": "gpt9"})
    message = "checksums and token ids are good, but .* not looked for: unknown encoding 'gpt9'"
    with pytest.raises(ValueError, match=message):
        verify(copy)
    flip_a_bit(copy / "train_000000.bin")
    with pytest.raises(ValueError, match="checksum mismatch"):
        verify(copy)


def test_verify_refuses_a_vocabulary_larger_than_the_tokenizers(copy):
    write_json(copy, {**read_json(copy), "vocab_size": 300})
    with pytest.raises(ValueError, match=r"token ids up to 299 \(bytes\), beyond"):
        verify(copy)


def test_verify_finds_validation_documents_in_the_training_split(copy):
    meta = read_json(copy)
    val, train = meta["splits"]["val"], meta["splits"]["train"]
    shutil.copy(copy / "val_000000.bin", copy / "extra.bin")
    train["shards"].append({**val["shards"][0], "name": "extra.bin"})
    write_json(copy, meta)
    count = val["documents"]
    message = f"{count} of {count} validation documents are also in the training split"
    with pytest.raises(ValueError, match=message):
        verify(copy)


def test_verify_finds_ids_beyond_the_vocabulary(copy):
    path, meta = copy / "train_000000.bin", read_json(copy)
    tokens = np.frombuffer(path.read_bytes()[1024:], dtype=np.uint16).copy()
    tokens[77] = 300
    path.write_bytes(path.read_bytes()[:1024] + tokens.tobytes())
    meta["splits"]["train"]["shards"][0]["sha256"] = hashlib.sha256(tokens).hexdigest()
    write_json(copy, meta)
    with pytest.raises(ValueError, match="token id 300 is beyond vocab_size=257"):
        verify(copy)
