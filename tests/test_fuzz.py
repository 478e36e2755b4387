"""
Proves that arbitrary bytes in place of a shard, a meta.json, a config file, a command line, a log
or a checkpoint end in one clear line, or in exactly what an independent reader finds. They never
end in a crash or in other tokens. Needs hypothesis.
"""
import json
import struct

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.checkpoint import load_checkpoint
from lib.config import FIELDS, load_config, read_config_file, to_dict
from lib.data import Dataset, Shard
from lib.log import lines_before

SETTINGS = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[
    HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def one_line(error):
    return str(error) and "\n" not in str(error)


# --------------------------------------------------------------------------------------------------
# data

headers = st.builds(
    lambda magic, version, count, size, rest:
        struct.pack("<4i", magic, version, count, size) + rest,
    st.sampled_from([20260526, 20240520, 20240521, 0]),
    st.sampled_from([1, 1, 1, 0, 2, -1]),
    st.one_of(st.integers(-2, 40), st.integers(-2 ** 31, 2 ** 31 - 1)),
    st.sampled_from([2, 2, 4, 4, 0, 1, 3, -2]),
    st.sampled_from([bytes(1008), bytes(1008), bytes(100), b""]))
bodies = st.binary(max_size=160)
shards = st.one_of(st.binary(max_size=200), st.builds(lambda h, body: h + body, headers, bodies))
SHARD_NAMES = ["train.bin", "val.bin", "train_000000.bin", "fineweb_val_000001.bin"]


def reference(name, content):
    """The tokens by the formats' definitions, from struct only; None if there are none."""
    magic, version, count, size = struct.unpack("<4i", content[:16].ljust(16, b"\0"))
    if magic in (20260526, 20240520):
        size = 2 if magic == 20240520 else size
        is_whole = count >= 1 and len(content) == 1024 + count * size
        if version == 1 and size in (2, 4) and is_whole:
            kind = "H" if size == 2 else "I"
            return list(struct.unpack(f"<{count}{kind}", content[1024:]))
    elif name in ("train.bin", "val.bin") and content and len(content) % 2 == 0:
        return list(struct.unpack(f"<{len(content) // 2}H", content))
    return None


@SETTINGS
@given(content=shards, name=st.sampled_from(SHARD_NAMES))
def test_shards(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    try:
        shard = Shard(tmp_path / name)
        tokens = shard.read(0, len(shard)).tolist()
    except ValueError as error:
        assert one_line(error) and name in str(error)
        tokens = None
    assert tokens == reference(name, content)


JSON_KEYS = ["splits", "train", "val", "shards", "tokens", "bytes", "tokenizer", "vocab_size",
             "name", "sha256"]
json_leaves = st.one_of(st.none(), st.booleans(), st.integers(-5, 300), st.floats(),
                        st.sampled_from(["", "x", "bytes", "gpt2", "../a"]))
json_keys = st.sampled_from(JSON_KEYS)
json_values = st.recursive(json_leaves, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(json_keys, inner)), max_leaves=8)

FIRST_SHARD = ("splits", "train", "shards", 0)
PLACES_IN_META = [
    ("tokenizer",), ("vocab_size",), ("splits",), ("splits", "train"), ("splits", "val", "shards"),
    FIRST_SHARD, (*FIRST_SHARD, "name"), (*FIRST_SHARD, "tokens"), (*FIRST_SHARD, "sha256"),
    ("splits", "val", "bytes"), ("splits", "val", "tokens")]
texts = st.one_of(st.binary(max_size=50), json_values.map(lambda value: json.dumps(value).encode()))


@SETTINGS
@given(place=st.sampled_from(PLACES_IN_META), value=json_values, text=st.none() | texts)
def test_datasets(dataset, tmp_path, place, value, text):
    """A good meta.json with one value replaced, or any text: an error, or the same tokens."""
    folder = tmp_path / "copy"
    folder.mkdir(exist_ok=True)
    for path in dataset.glob("*.bin"):
        if not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())
    if text is None:
        meta = inner = json.loads((dataset / "meta.json").read_bytes())
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        text = json.dumps(meta).encode()
    (folder / "meta.json").write_bytes(text)

    try:
        opened = Dataset(folder, 16, 257)
        bytes_per_token = opened.val_bytes_per_token
    except (ValueError, FileNotFoundError) as error:
        assert one_line(error)
    else:
        found, expected = (next(d.train.shards[0].blocks()) for d in (opened, Dataset(dataset, 16)))
        assert np.array_equal(found, expected)
        assert bytes_per_token is None or bytes_per_token > 0


# --------------------------------------------------------------------------------------------------
# configurations, checkpoints and logs

expressions = st.one_of(st.text(max_size=12), json_values.map(repr), st.sampled_from(
    ["exit()", "1e400", "-" * 5000 + "1", "(" * 300, "{[]: 1}", "10**9", "__import__"]))
assignments = st.builds(lambda key, value: f"{key} = {value}".encode(),
                        st.sampled_from([*FIELDS, "n_layr"]), expressions)


SHORT = ["--max_iters=2000", "--warmup_iters=0"]  # so that no model is built to count parameters


@SETTINGS
@given(content=st.one_of(st.binary(max_size=80), st.text(max_size=60).map(str.encode), assignments))
def test_config_files(tmp_path, content):
    path = tmp_path / "config.py"
    path.write_bytes(content)
    try:
        values = read_config_file(path)
        config = load_config([str(path), *SHORT])
    except ValueError as error:
        assert one_line(error)
    else:
        assert values and set(values) <= set(FIELDS)
        worked_out = ("init_std", "max_iters", "warmup_iters", "d_ff", "d_expert", "n_kv_head",
                      "min_lr", "out_dir", "dataset")  # where 0, -1 or ~ has a meaning
        assert all(to_dict(config)[key] == value or key in worked_out
                   for key, value in values.items())


@SETTINGS
@given(key=st.one_of(st.sampled_from(sorted(FIELDS)), st.text(max_size=5)),
       value=st.one_of(st.text(max_size=20), json_values.map(repr), st.sampled_from(
           ["{[]: 1}", "(" * 300, "9" * 5000, "-" * 3000 + "1"])))
def test_command_lines(key, value):
    try:
        again = SHORT if key in ("max_iters", "warmup_iters") else []
        load_config([*SHORT, f"--{key}={value}", *again])
    except ValueError as error:
        assert one_line(error)


@SETTINGS
@given(content=st.binary(max_size=300))
def test_checkpoints(tmp_path, content):
    (tmp_path / "ckpt_0000001.pt").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be used") as error:
        load_checkpoint(tmp_path / "ckpt_0000001.pt")
    assert one_line(error.value)


log_lines = st.one_of(st.binary(max_size=30), json_values.map(lambda v: json.dumps(v).encode()),
                      st.just(b'{"event": "train", "step": 3}'))


@SETTINGS
@given(lines=st.lists(log_lines))
def test_logs(tmp_path, lines):
    path, good = tmp_path / "log.jsonl", b'{"event": "train", "step": 2, "loss": 1.5}'
    path.write_bytes(b"\n".join([good, *lines]))
    kept = lines_before(path, 4)
    assert kept.encode().startswith(good + b"\n")
    assert all(isinstance(json.loads(line), dict) for line in kept.splitlines())
