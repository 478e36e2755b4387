"""
Token shards on disk, and the order in which training reads them.

A dataset is a folder of `*train*.bin` and `*val*.bin` shards. Three formats are recognised, file by file:

  ours      256 x int32 header: 20260526, version 1, tokens, bytes per token; then uint16 or uint32. With meta.json beside.
  llm.c     256 x int32 header: 20240520, version 1, tokens; then uint16 (also modded-nanogpt; FineWeb shards look so)
  nanoGPT   train.bin and val.bin: uint16 and nothing else

Training cuts a split into windows of block_size + 1 tokens. Which windows make up step s is a function of (seed, s,
position in the global batch) and nothing else: the same on 1, 2 or 8 processes, with or without a resume. An epoch is a
permutation of all windows, computed entry by entry (permute), so nothing of its size is ever in memory.
"""
import functools
import hashlib
import json
import os
from pathlib import Path

import numpy as np

MAGIC, LLMC_MAGIC, HEADER_BYTES = 20260526, 20240520, 256 * 4
VERIFY_AT_START = 2 ** 30  # datasets up to this many bytes are checked in full when a run starts
ORDER_BLOCK = 1024  # samples whose order is computed together: many cost little more than a few


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers

@functools.cache
def get_encoding(name):
    """The tiktoken Encoding: "bytes" (256 bytes and <|endoftext|>, needs no download) or any of tiktoken's names."""
    import tiktoken
    if name == "bytes":
        # the pattern only cuts text into short pieces; with no merges every byte is a token
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|endoftext|>": 256})
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f"unknown encoding {name!r}: choose bytes or one of {', '.join(tiktoken.list_encoding_names())}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # tiktoken lets whatever its HTTP library raises through
        raise ValueError(f"tiktoken could not get the vocabulary of {name!r} ({type(error).__name__}): connect once, or set "
                         f"TIKTOKEN_CACHE_DIR to a folder that holds it, or use --encoding bytes") from None


# ---------------------------------------------------------------------------------------------------------------------
# shards

def shard_header(tokens, itemsize):
    """The 1024 bytes that open one of our shards."""
    header = np.zeros(256, dtype="<i4")
    header[:4] = MAGIC, 1, tokens, itemsize
    return header.tobytes()


def open_shard(path):
    """A read-only memory map of the shard's tokens, uint16 or uint32. Raises ValueError, one line, on anything else."""
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as f:
        header = np.frombuffer(f.read(HEADER_BYTES)[:16].ljust(16, b"\0"), dtype="<i4")
    magic, version, tokens, itemsize = (int(x) for x in header)
    if magic in (MAGIC, LLMC_MAGIC):
        itemsize = 2 if magic == LLMC_MAGIC else itemsize
        if version != 1 or itemsize not in (2, 4):
            raise ValueError(f"{path}: header says version {version}, {itemsize} bytes a token; version 1 with 2 or 4 bytes "
                             f"can be read. Make the shard again")
        if tokens < 1 or size != HEADER_BYTES + tokens * itemsize:
            raise ValueError(f"{path}: truncated or damaged: its header promises {tokens:,} tokens, "
                             f"{HEADER_BYTES + tokens * itemsize:,} bytes, and the file has {size:,}. Make the shard again")
        offset = HEADER_BYTES
    elif path.name in ("train.bin", "val.bin"):
        if size == 0 or size % 2:
            raise ValueError(f"{path}: {size:,} bytes are no sequence of uint16 tokens (nanoGPT's format): truncated?")
        offset, itemsize = 0, 2
    else:
        raise ValueError(f"{path}: wrong magic {magic}: expected {MAGIC} (ours) or {LLMC_MAGIC} (llm.c); a headerless "
                         f"nanoGPT file must be called train.bin or val.bin")
    return np.memmap(path, dtype="<u2" if itemsize == 2 else "<u4", mode="r", offset=offset)


class Split:
    """The shards of "train" or "val" as windows of block_size + 1 tokens that overlap by one, none across two shards.

    split[indices] -> (x, y), int64 arrays (len(indices), block_size); y is x one token later.
    """

    def __init__(self, paths, block_size, vocab_size=None):
        self.paths, self.block_size, self.vocab_size = [Path(p) for p in paths], block_size, vocab_size
        self.shards = [open_shard(p) for p in self.paths]
        self.tokens = sum(len(s) for s in self.shards)
        self.first_window = np.cumsum([0] + [max(0, (len(s) - 1) // block_size) for s in self.shards])

    def __len__(self):
        return int(self.first_window[-1])

    def __getitem__(self, indices):
        T = self.block_size
        windows = np.empty((len(indices), T + 1), dtype=np.int64)
        shard_of = np.searchsorted(self.first_window, indices, side="right") - 1
        for row, (index, s) in enumerate(zip(indices, shard_of)):
            start = int(index - self.first_window[s]) * T
            windows[row] = self.shards[s][start:start + T + 1]
        if self.vocab_size is not None and windows.max() >= self.vocab_size:
            bad = np.argwhere(windows >= self.vocab_size)[0]
            raise ValueError(f"{self.paths[shard_of[bad[0]]]}: token id {windows[tuple(bad)]} is beyond "
                             f"vocab_size={self.vocab_size}: wrong tokenizer for this model, or a damaged shard")
        return windows[:, :-1], windows[:, 1:]


def check_types(record, types):
    """Raise TypeError or KeyError if a JSON object lacks a key, or has a value of another type or a number below 1."""
    for key, type_ in types.items():
        if type(record[key]) is not type_ or (type_ is int and record[key] < 1):
            raise TypeError(f"{key} is {record[key]!r}")


class Dataset:
    """A folder of shards: `train` and `val` (Split), `tokenizer`, `val_bytes_per_token` (None if unknown).

    Opening it checks what can be checked at once: files, headers, sizes, vocabulary; and for datasets up to 1 GiB, or with
    verify=True, every checksum (or, without a meta.json, every token id). Raises FileNotFoundError or ValueError.
    """

    def __init__(self, folder, block_size, vocab_size=None, verify=None):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no dataset at {folder}: make it with "
                                    f"`python prepare_data.py PATH... --out {folder}`, or set --dataset to one that exists")
        self.meta = self._read_meta()
        self.tokenizer = self.meta["tokenizer"] if self.meta else "gpt2"  # what foreign shards are, nearly always
        if self.meta and vocab_size is not None and self.meta["vocab_size"] > vocab_size:
            raise ValueError(f"{folder} has token ids up to {self.meta['vocab_size'] - 1} ({self.tokenizer}), beyond the "
                             f"model's vocab_size={vocab_size}: set --vocab_size={self.meta['vocab_size']} or more")
        self.train, self.val = (self._open_split(name, block_size, vocab_size) for name in ("train", "val"))
        size = sum(p.stat().st_size for split in (self.train, self.val) for p in split.paths)
        if verify or (verify is None and size <= VERIFY_AT_START):
            self.verify()

    def _read_meta(self):
        path = self.folder / "meta.json"
        if not path.exists():
            return None
        try:
            meta = json.loads(path.read_text())
            check_types(meta, {"tokenizer": str, "vocab_size": int, "splits": dict})
            for split in ("train", "val"):
                check_types(meta["splits"][split], {"tokens": int, "bytes": int, "shards": list})
                for shard in meta["splits"][split]["shards"]:
                    check_types(shard, {"name": str, "sha256": str, "tokens": int})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{path} is damaged ({reason}): make the dataset again") from None
        return meta

    def _open_split(self, name, block_size, vocab_size):
        if self.meta:
            paths = [self.folder / shard["name"] for shard in self.meta["splits"][name]["shards"]]
            missing = [p for p in paths if not p.is_file()]
            if missing:
                raise FileNotFoundError(f"{missing[0]} is listed in meta.json and missing: make the dataset again")
        else:
            paths = sorted(self.folder.glob(f"*{name}*.bin"))
        if not paths:
            raise FileNotFoundError(f"{self.folder} holds no {name} shard (*{name}*.bin): make the dataset again with "
                                    f"`python prepare_data.py PATH... --out {self.folder}`")
        split = Split(paths, block_size, vocab_size)
        if self.meta:
            for p, shard, said in zip(paths, split.shards, self.meta["splits"][name]["shards"]):
                if len(shard) != said["tokens"]:
                    raise ValueError(f"{p} has {len(shard):,} tokens and meta.json says {said['tokens']:,}: "
                                     f"make the dataset again")
        if len(split) == 0:
            raise ValueError(f"{self.folder}: the {name} split has {split.tokens:,} tokens, less than one window of "
                             f"block_size={block_size} + 1: use more data or a smaller --block_size")
        return split

    def verify(self):
        """Read every token: checksums where meta.json has them, token ids against the vocabulary elsewhere."""
        for name, split in (("train", self.train), ("val", self.val)):
            for i, (path, shard) in enumerate(zip(split.paths, split.shards)):
                if self.meta:
                    said = self.meta["splits"][name]["shards"][i]["sha256"]
                    found = hashlib.sha256(shard).hexdigest()
                    if found != said:
                        raise ValueError(f"{path}: checksum mismatch: meta.json says {said[:16]}, the tokens give "
                                         f"{found[:16]}. The file has changed: make the dataset again")
                if split.vocab_size is not None and (highest := int(shard.max())) >= split.vocab_size:
                    raise ValueError(f"{path}: token id {highest} is beyond vocab_size={split.vocab_size}: "
                                     f"wrong tokenizer for this model, or a damaged shard")

    @functools.cached_property
    def val_bytes_per_token(self):
        """UTF-8 bytes of text for each validation token. From meta.json; for foreign shards, assumed to be GPT-2's, from
        the first million tokens; None if that vocabulary is not at hand."""
        if self.meta:
            return self.meta["splits"]["val"]["bytes"] / self.meta["splits"]["val"]["tokens"]
        try:
            encoding = get_encoding(self.tokenizer)
            ids, counts = np.unique(self.val.shards[0][:1_000_000], return_counts=True)
            text_bytes = [0 if i == encoding.eot_token else len(encoding.decode_single_token_bytes(int(i))) for i in ids]
        except (ValueError, KeyError):
            return None
        return float(np.dot(text_bytes, counts) / counts.sum())


# ---------------------------------------------------------------------------------------------------------------------
# order

def permute(index, n, seed):
    """The images of `index` (array of integers in [0, n)) under a pseudo-random permutation of [0, n), in O(1) memory.

    A six-round Feistel network is a permutation of [0, 4^h) whatever its round function; applying it again until the
    result is below n ("cycle walking") makes it one of [0, n)."""
    index = np.array(index, dtype=np.uint64)
    h = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << h) - np.uint64(1)
    keys = np.random.SeedSequence(seed).generate_state(6, dtype=np.uint64)

    def feistel(x):
        left, right = x >> h, x & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)  # multiply and shift, as splitmix64 mixes
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & mask)
        return (left << h) | right

    index = feistel(index)
    while (outside := index >= n).any():
        index[outside] = feistel(index[outside])
    return index.astype(np.int64)


@functools.lru_cache(maxsize=4)
def window_block(block, n, seed):
    """The windows of the samples block x ORDER_BLOCK and following: see window_numbers, which calls for a few at a time."""
    first = block * ORDER_BLOCK
    epoch, index = np.divmod(np.arange(first, first + ORDER_BLOCK, dtype=np.int64), n)
    out = np.empty(ORDER_BLOCK, dtype=np.int64)
    for e in np.unique(epoch):
        out[epoch == e] = permute(index[epoch == e], n, [seed, int(e)])
    return out


def window_numbers(first, count, n, seed):
    """Which of a split's n windows the samples first, first+1, ... of training are: without replacement within an epoch,
    a new permutation each epoch. Sample number = step x global batch + position in the global batch."""
    blocks = range(first // ORDER_BLOCK, (first + count - 1) // ORDER_BLOCK + 1)
    start = first - blocks.start * ORDER_BLOCK
    return np.concatenate([window_block(block, n, seed) for block in blocks])[start:start + count]


def fsync_folder(folder):
    """Make a rename in this folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
