"""
Proves that lib.verify sees what is wrong with a dataset: damage, ids beyond the vocabulary, documents in both splits.
"""
import hashlib
import json
import shutil

import numpy as np
import pytest

import lib.verify
from lib.data import Dataset
from lib.verify import document_digests, main, verify


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


def test_verify_without_the_tokenizer_checks_all_that_needs_none(dataset, tmp_path):
    """As offline, where its vocabulary cannot be had: an encoding that nobody knows fails at the same place."""
    copy = shutil.copytree(dataset, tmp_path / "copy")
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps({**meta, "tokenizer": "gpt9"}))
    with pytest.raises(ValueError, match="checksums and token ids are good, but .* not looked for: unknown encoding 'gpt9'"):
        verify(copy)
    path = copy / meta["splits"]["train"]["shards"][0]["name"]
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checksum mismatch"):
        verify(copy)


def test_verify_refuses_a_vocabulary_larger_than_the_tokenizers(dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps({**meta, "vocab_size": 300}))
    with pytest.raises(ValueError, match=r"token ids up to 299 \(bytes\), beyond"):
        verify(copy)


def test_verify_sees_leaks_and_damage(dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    meta = json.loads((copy / "meta.json").read_text())
    val, train = meta["splits"]["val"]["shards"][0], meta["splits"]["train"]["shards"][0]
    (copy / "extra.bin").write_bytes((copy / val["name"]).read_bytes())
    meta["splits"]["train"]["shards"].append({**val, "name": "extra.bin"})
    meta["splits"]["train"]["tokens"] += val["tokens"]
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
    with pytest.raises(ValueError, match="token id 300 is beyond vocab_size=257"):
        verify(copy)
