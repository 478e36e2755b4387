"""
Proves that arbitrary bytes in place of a shard, a meta.json, a config file or a command line end in
one clear line, or in exactly what an independent reader finds: never in a crash or in other tokens.
"""
import json
import shutil
import struct

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.config import FIELDS, load_config
from lib.data import Dataset, Shard

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[
    HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.floats()
    | st.sampled_from(["", "x", "bytes", "../a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["splits", "train", "shards", "tokens", "name"]), inner), max_leaves=8)


def one_line(error):
    return str(error) and "\n" not in str(error)


def shard(magic, size, body, changes):
    """A shard of whole tokens, but for the change. None has three bytes."""
    count = len(body) // size
    good = {"version": 1, "count": count, "size": size, "rest": 1008}
    *fields, rest = (good | changes).values()
    return struct.pack("<4i", magic, *fields) + bytes(rest) + body[:count * size]


CHANGES = {"version": st.integers(0, 2), "count": st.integers(-2, 40) | st.just(2 ** 31 - 1),
           "size": st.sampled_from([2, 4, 0, 3, -2]), "rest": st.sampled_from([1007, 1009, 100])}
changes = st.one_of(st.just({}), *(st.fixed_dictionaries({k: v}) for k, v in CHANGES.items()))
shards = st.binary(max_size=200) | st.builds(
    shard, st.sampled_from([20260526, 20240520, 20240521]), st.sampled_from([2, 4, 3]),
    st.binary(max_size=160), changes)


def tokens_of(name, content):
    """The tokens by the formats' definitions, from struct only; None if there are none."""
    magic, version, count, size = struct.unpack("<4i", content[:16].ljust(16, b"\0"))
    if magic in (20260526, 20240520):
        size = 2 if magic == 20240520 else size
        is_whole = count >= 1 and len(content) == 1024 + count * size
        if version == 1 and size in (2, 4) and is_whole:
            return list(struct.unpack(f"<{count}{'H' if size == 2 else 'I'}", content[1024:]))
    elif name == "train.bin" and content and len(content) % 2 == 0:  # nanoGPT's
        return list(struct.unpack(f"<{len(content) // 2}H", content))
    return None


@SETTINGS
@given(content=shards, name=st.sampled_from(["train.bin", "train_000000.bin"]))
def test_shards(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    if expected := tokens_of(name, content):
        shard = Shard(tmp_path / name)
        assert [*shard.read(0, 1), *shard.read(1, len(shard) - 1)] == expected
    else:
        with pytest.raises(ValueError, match=name) as error:
            Shard(tmp_path / name)
        assert one_line(error.value)


SHARD = ("splits", "train", "shards", 0)
PLACES_IN_META = [
    ("tokenizer",), ("vocab_size",), ("splits",), ("splits", "train"), ("splits", "val", "shards"),
    SHARD, (*SHARD, "name"), (*SHARD, "tokens"), (*SHARD, "sha256"), ("splits", "val", "bytes"),
    ("splits", "val", "tokens")]


@SETTINGS
@given(place=st.sampled_from(PLACES_IN_META), value=json_values, text=st.none() | st.binary())
def test_meta(dataset, tmp_path, place, value, text):
    """A good meta.json with one value replaced, or any text: an error, or the same tokens."""
    if text is None:
        meta = inner = json.loads((dataset / "meta.json").read_bytes())
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        text = json.dumps(meta).encode()
    shutil.copytree(dataset, tmp_path, dirs_exist_ok=True)
    (tmp_path / "meta.json").write_bytes(text)
    try:
        opened = Dataset(tmp_path, 16, 257)
        bytes_per_token = opened.val_bytes_per_token
    except (ValueError, FileNotFoundError) as error:
        assert one_line(error)
    else:
        found, expected = (next(d.train.shards[0].blocks()) for d in (opened, Dataset(dataset, 16)))
        assert np.array_equal(found, expected)
        assert bytes_per_token is None or bytes_per_token > 0


SHORT = ["--max_iters=2000", "--warmup_iters=0"]  # so that no model is built to count parameters
keys = st.sampled_from([*FIELDS, "n_layr"])
values = st.text(max_size=20) | json_values.map(repr) | st.sampled_from(
    ["exit()", "1e400", "-" * 5000 + "1", "(" * 300, "{[]: 1}", "10**9", "__import__"])
config_files = st.binary(max_size=80) | st.builds("{} = {}".format, keys, values).map(str.encode)
flags = st.builds("--{}={}".format, keys | st.text(max_size=5), values)


@SETTINGS
@given(content=config_files, flag=flags)
def test_configurations(tmp_path, content, flag):
    """A config file, and an argument of the command line."""
    path = tmp_path / "config.py"
    path.write_bytes(content)
    for argument in (str(path), flag):
        try:
            load_config([argument, *SHORT])
        except ValueError as error:
            assert one_line(error)
