"""
Token shards on disk, read and written, and the order in which training reads them.

A dataset is a folder of shards of two splits, train and val. Each file has one of three formats:

  ours      256 x int32 header: 20260526, version 1, tokens, bytes per token; then uint16 or uint32
  llm.c     256 x int32 header: 20240520, version 1, tokens; then uint16 (modded-nanogpt's, too)
  nanoGPT   train.bin and val.bin: uint16 and nothing else

Our shards are listed in meta.json. Without it, the word train or val in a shard's name decides.

Training cuts a split into windows of block_size + 1 tokens. The windows of step s are a function of
(seed, s, position in the global batch) and of nothing else: they are the same on 1, 2 or 8
processes, with or without a resume. An epoch is a permutation of all windows, computed entry by
entry (permute), so nothing of its size is ever in memory.
"""
import functools
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np

from lib.tokenizer import get_encoding

MAGIC, LLMC_MAGIC, HEADER_BYTES = 20260526, 20240520, 256 * 4
GPT2_VOCABULARY = 50257  # <|endoftext|> included
VERIFY_AT_START = 2 ** 30  # bytes: a dataset up to this size is checked in full when a run starts
READ_TOKENS = 2 ** 20  # tokens read at a time where a whole shard is read
ORDER_BLOCK = 1024  # samples whose order is computed together: many cost little more than a few


# --------------------------------------------------------------------------------------------------
# shards

def shard_header(tokens, itemsize):
    """The 1024 bytes at the start of one of our shards."""
    header = np.zeros(256, dtype="<i4")
    header[:4] = MAGIC, 1, tokens, itemsize
    return header.tobytes()


class Shard:
    """A shard of any of the three formats. len() is its number of tokens, `dtype` uint16 or uint32.

    Raises ValueError if the file has none of the formats. So does a read if its size or time has
    changed, where a memory map would give other tokens, or end the process with a bus error."""

    def __init__(self, path):
        self.path = Path(path)
        with open(self.path, "rb") as f:
            self.state = self._state_of(f.fileno())
            header = np.frombuffer(f.read(16).ljust(16, b"\0"), dtype="<i4")
        self.offset, self.tokens, itemsize = self._layout(self.state[0], *map(int, header))
        self.dtype = np.dtype(f"<u{itemsize}")

    @staticmethod
    def _state_of(descriptor):
        stat = os.fstat(descriptor)
        return stat.st_size, int(stat.st_mtime)  # whole seconds: some file systems forget the rest

    def _layout(self, size, magic, version, tokens, itemsize):
        """(bytes before the first token, tokens, bytes per token), checked against the size."""
        if magic in (MAGIC, LLMC_MAGIC):
            itemsize = 2 if magic == LLMC_MAGIC else itemsize
            is_whole = tokens > 0 and size == HEADER_BYTES + tokens * itemsize
            if version != 1 or itemsize not in (2, 4) or not is_whole:
                raise ValueError(f"{self.path}: truncated or damaged: its header promises "
                                 f"{tokens:,} tokens of {itemsize} bytes (version {version}), and "
                                 f"the file has {size:,} bytes: make the shard again")
            return HEADER_BYTES, tokens, itemsize

        if self.path.name not in ("train.bin", "val.bin"):
            raise ValueError(f"{self.path}: wrong magic {magic}, not {MAGIC} (ours) or {LLMC_MAGIC}"
                             f" (llm.c); a file without a header must be train.bin or val.bin")
        if size == 0 or size % 2:
            raise ValueError(f"{self.path}: {size:,} bytes are no sequence of uint16 tokens "
                             f"(nanoGPT's format): truncated?")
        return 0, size // 2, 2

    def __len__(self):
        return self.tokens

    def read(self, start, count):
        """The tokens start, ..., start + count - 1 as an array."""
        size = count * self.dtype.itemsize
        with open(self.path, "rb", buffering=0) as f:
            content = os.pread(f.fileno(), size, self.offset + start * self.dtype.itemsize)
            if self._state_of(f.fileno()) != self.state or len(content) != size:
                raise ValueError(f"{self.path} has changed since it was opened (cut, or written "
                                 f"again): restore it, or make the dataset again, then start again")
        return np.frombuffer(content, self.dtype)

    def blocks(self):
        """All tokens in order, as arrays of about a million."""
        for start in range(0, self.tokens, READ_TOKENS):
            yield self.read(start, min(READ_TOKENS, self.tokens - start))

    def checksum(self):
        """(SHA-256 of the tokens' bytes, the highest token id)."""
        hasher, highest = hashlib.sha256(), 0
        for block in self.blocks():
            hasher.update(block)
            highest = max(highest, int(block.max()))
        return hasher.hexdigest(), highest


class ShardWriter:
    """Writes one split to train_000000.bin, train_000001.bin, ... of shard_tokens tokens each; the
    header goes in last. `tokens`, `bytes` (of text) and `documents` count what was written."""

    STATE = ("shards", "count", "tokens", "bytes", "documents")

    def __init__(self, folder, split, dtype, shard_tokens):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.itemsize = np.dtype(dtype).itemsize
        self.shards, self.file, self.count = [], None, 0  # finished ones; the next, its tokens
        self.tokens = self.bytes = self.documents = 0

    def write(self, tokens, text_bytes):
        """Add a document. Returns True if a shard became full."""
        finished = len(self.shards)
        self.tokens += len(tokens)
        self.bytes += text_bytes
        self.documents += 1
        while len(tokens):
            if self.file is None:
                self._open(0)
            part, tokens = np.split(tokens, [self.shard_tokens - self.count])
            self.file.write(part)
            self.count += len(part)
            if self.count == self.shard_tokens:
                self.close()
        return len(self.shards) > finished

    def _open(self, count):
        """Start the next shard, or continue it after its first `count` tokens."""
        self.path = self.folder / f"{self.split}_{len(self.shards):06d}.bin"
        self.count, size = count, HEADER_BYTES + count * self.itemsize
        self.file = open(self.path, "r+b" if count else "w+b")
        if count and os.fstat(self.file.fileno()).st_size < size:
            raise ValueError(f"{self.path} has lost tokens")
        self.file.truncate(size)
        self.file.seek(size)

    def close(self):
        """Finish the shard that is being written, if there is one."""
        if self.file is None:
            return
        self.file.seek(0)
        self.file.write(shard_header(self.count, self.itemsize))
        self._sync()
        self.abandon()
        checksum, _ = Shard(self.path).checksum()
        self.shards.append({"name": self.path.name, "tokens": self.count, "sha256": checksum})
        self.count = 0

    def abandon(self):
        """Close the file of an unfinished shard."""
        file, self.file = self.file, None
        if file:
            file.close()

    def _sync(self):
        self.file.flush()
        os.fsync(self.file.fileno())

    def state(self):
        """The state that `restore` needs. The tokens that it counts are on the disk."""
        if self.file:
            self._sync()
        return {key: getattr(self, key) for key in self.STATE}

    def restore(self, state):
        """Continue from `state`. Raises ValueError, OSError or KeyError if a shard has changed."""
        for shard in state["shards"]:
            if len(Shard(self.folder / shard["name"])) != shard["tokens"]:
                raise ValueError(f"{self.folder / shard['name']} has another number of tokens")
        for key in self.STATE:
            setattr(self, key, state[key])
        if self.count:
            self._open(self.count)


# --------------------------------------------------------------------------------------------------
# datasets

class Split:
    """The shards of a split as windows of block_size + 1 tokens. Windows overlap by one token, and
    none spans two shards.

    split[indices] -> (x, y): int64 arrays (len(indices), block_size); y is x one token later.
    Raises ValueError on a token id of vocab_size or more."""

    def __init__(self, paths, block_size, vocab_size=None):
        self.block_size, self.vocab_size = block_size, vocab_size
        self.shards = [Shard(path) for path in paths]
        self.tokens = sum(len(shard) for shard in self.shards)
        windows = [max(0, (len(shard) - 1) // block_size) for shard in self.shards]
        self.first_window = np.cumsum([0] + windows)

    def __len__(self):
        return int(self.first_window[-1])

    def __getitem__(self, indices):
        T = self.block_size
        windows = np.empty((len(indices), T + 1), dtype=np.int64)
        shard_of = np.searchsorted(self.first_window, indices, side="right") - 1
        for row, (index, s) in enumerate(zip(indices, shard_of)):
            windows[row] = self.shards[s].read(int(index - self.first_window[s]) * T, T + 1)
            self.check_ids(self.shards[s], windows[row].max())
        return windows[:, :-1], windows[:, 1:]

    def check_ids(self, shard, highest):
        if self.vocab_size is not None and highest >= self.vocab_size:
            raise ValueError(f"{shard.path}: token id {highest} is beyond vocab_size="
                             f"{self.vocab_size}: another tokenizer's, or a damaged shard")


def require(record, **types):
    """Raise KeyError or TypeError unless a JSON object has these keys; numbers must be positive."""
    for key, kind in types.items():
        if type(record[key]) is not kind or (kind is int and record[key] < 1):
            raise TypeError(f"{key} is {record[key]!r}")


def read_meta(folder):
    """The checked content of folder/meta.json, or None without one. Raises ValueError."""
    path = Path(folder) / "meta.json"
    if not path.exists():
        return None
    try:
        meta = json.loads(path.read_bytes())
        require(meta, tokenizer=str, vocab_size=int, splits=dict)
        for split in (meta["splits"]["train"], meta["splits"]["val"]):
            require(split, tokens=int, bytes=int, shards=list)
            for shard in split["shards"]:
                require(shard, name=str, sha256=str, tokens=int)
                if not re.fullmatch(r"[^/\\\0]+\.bin", shard["name"]):
                    raise ValueError(f"{shard['name']!r} is no shard in this folder")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{path} is damaged ({reason}): make the dataset again") from None
    return meta


def foreign_shards(folder):
    """{"train": paths, "val": paths}: the .bin files of a folder without meta.json, by name.

    A whole word decides: a_val_000000.bin is a validation shard, retrieval_train_0.bin is not.
    Raises ValueError if a file would be in both splits."""
    found = {}
    for split, words in {"train": "train|training", "val": "val|valid|validation"}.items():
        word = re.compile(rf"(?<![a-z])({words})(?![a-z])", re.IGNORECASE)
        found[split] = sorted(p for p in Path(folder).glob("*.bin") if word.search(p.stem))
    training = {os.path.realpath(path): path.name for path in found["train"]}
    for path in found["val"]:
        if other := training.get(os.path.realpath(path)):
            raise ValueError(f"{path} would be in both splits, by its name or by {other}: "
                             f"rename it, so that it has one of the words train and val")
    return found


class Dataset:
    """A folder of shards: `train` and `val` (Split), the `tokenizer`'s name ("ids" if unknown), and
    `val_bytes_per_token` (None if unknown).

    Opening it checks files, headers, sizes and vocabulary; a dataset up to 1 GiB, or any with
    verify=True, is also read in full (verify). Raises FileNotFoundError or ValueError."""

    def __init__(self, folder, block_size, vocab_size=None, verify=None):
        self.folder = Path(os.path.expanduser(folder))
        if not self.folder.exists():
            raise FileNotFoundError(f"no dataset at {folder}: make it with `python prepare_data.py "
                                    f"PATH... --out {folder}`, or set --dataset to one that exists")
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is a file: give its folder {self.folder.parent}")
        self.meta = read_meta(self.folder)
        if self.meta and vocab_size is not None and self.meta["vocab_size"] > vocab_size:
            needed = self.meta["vocab_size"]
            raise ValueError(f"{folder} has token ids up to {needed - 1} "
                             f"({self.meta['tokenizer']}), beyond the model's vocab_size="
                             f"{vocab_size}: set --vocab_size={needed} or more")

        self.train = self._open_split("train", block_size, vocab_size)
        self.val = self._open_split("val", block_size, vocab_size)
        self.tokenizer = self.meta["tokenizer"] if self.meta else self._foreign_tokenizer()

        shards = self.train.shards + self.val.shards
        size = sum(len(shard) * shard.dtype.itemsize for shard in shards)
        if verify or (verify is None and size <= VERIFY_AT_START):
            self.verify()

    def _listed(self, split):
        """The records of a split's shards in meta.json; [] without one."""
        return self.meta["splits"][split]["shards"] if self.meta else []

    def _open_split(self, name, block_size, vocab_size):
        paths = [self.folder / shard["name"] for shard in self._listed(name)]
        paths = paths if self.meta else foreign_shards(self.folder)[name]
        if missing := [path for path in paths if not path.is_file()]:
            raise FileNotFoundError(f"{missing[0]} is missing: make the dataset again")
        if not paths:
            advice = "make the dataset again with `python prepare_data.py PATH... --out FOLDER`"
            if next(self.folder.glob("*.npy"), None):
                advice = "its .npy shards cannot be read; docs/data.md shows how to convert them"
            raise FileNotFoundError(f"{self.folder} holds no {name} shard (a .bin file with the "
                                    f"word {name} in its name): {advice}")

        split = Split(paths, block_size, vocab_size)
        if len(split) == 0:
            raise ValueError(f"{self.folder}: the {name} split has {split.tokens:,} tokens, less "
                             f"than one window of {block_size} + 1: lower --block_size")
        return split

    def _foreign_tokenizer(self):
        """"gpt2" if shards without a meta.json can hold GPT-2's tokens, as nearly all do; or "ids".

        They cannot if meta.pkl lies beside them: nanoGPT writes it for other vocabularies (and a
        pickle can run code, so it is never loaded). Nor can they if, in the first million tokens of
        each split, an id is beyond 50256, or, without an llm.c header, none is beyond 255: those
        are characters or bytes."""
        firsts = [self.train.shards[0], self.val.shards[0]]
        highest = max(int(s.read(0, min(READ_TOKENS, len(s))).max()) for s in firsts)
        has_headers = all(shard.offset for shard in firsts)
        fits = highest < GPT2_VOCABULARY and (has_headers or highest > 255)
        return "gpt2" if fits and not (self.folder / "meta.pkl").exists() else "ids"

    def verify(self):
        """Read every token: compare checksums with meta.json, and ids with the vocabulary."""
        for name, split in (("train", self.train), ("val", self.val)):
            records = self._listed(name) or [{}] * len(split.shards)
            for shard, record in zip(split.shards, records):
                found, highest = shard.checksum()
                expected = record.get("sha256", found)
                if found != expected:
                    raise ValueError(f"{shard.path}: checksum mismatch: meta.json has "
                                     f"{expected[:16]}, the tokens give {found[:16]}. "
                                     f"The file has changed: make the dataset again")
                split.check_ids(shard, highest)

    @functools.cached_property
    def val_bytes_per_token(self):
        """UTF-8 bytes of text per validation token: from meta.json, or estimated from the first
        million of GPT-2's tokens. None if the tokenizer or its vocabulary cannot be had."""
        if self.meta:
            val = self.meta["splits"]["val"]
            return val["bytes"] / val["tokens"]
        if self.tokenizer == "ids":
            return None
        try:
            encoding, shard = get_encoding(self.tokenizer), self.val.shards[0]
            tokens = shard.read(0, min(1_000_000, len(shard)))
            ids, counts = np.unique(tokens[tokens != encoding.eot_token], return_counts=True)
            sizes = [len(encoding.decode_single_token_bytes(int(i))) for i in ids]
        except (ValueError, KeyError):
            return None
        return float(np.dot(sizes, counts) / len(tokens))


# --------------------------------------------------------------------------------------------------
# order

def permute(index, n, seed):
    """The images of `index` (array of integers in [0, n)) under a pseudo-random permutation of
    [0, n), in O(1) memory.

    A six-round Feistel network is a permutation of [0, 4^h) whatever its round function is.
    Applying it again until the result is below n ("cycle walking") makes it one of [0, n)."""
    index = np.array(index, dtype=np.uint64)
    h = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << h) - np.uint64(1)
    keys = np.random.SeedSequence(seed).generate_state(6, dtype=np.uint64)

    def feistel(x):
        left, right = x >> h, x & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)  # as splitmix64 mixes
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & mask)
        return (left << h) | right

    index = feistel(index)
    while (outside := index >= n).any():
        index[outside] = feistel(index[outside])
    return index.astype(np.int64)


@functools.lru_cache(maxsize=4)
def window_block(block, n, seed):
    """The window numbers of ORDER_BLOCK consecutive samples, from block x ORDER_BLOCK on."""
    first = block * ORDER_BLOCK
    epoch, index = np.divmod(np.arange(first, first + ORDER_BLOCK, dtype=np.int64), n)
    out = np.empty(ORDER_BLOCK, dtype=np.int64)
    for e in np.unique(epoch):
        out[epoch == e] = permute(index[epoch == e], n, [seed, int(e)])
    return out


def window_numbers(first, count, n, seed):
    """The numbers, in [0, n), of the windows that are the training samples first, ..., first +
    count - 1. Every window comes once in an epoch; each epoch is a new permutation.
    Sample number = step x global batch + position in the global batch."""
    blocks = range(first // ORDER_BLOCK, (first + count - 1) // ORDER_BLOCK + 1)
    start = first - blocks.start * ORDER_BLOCK
    numbers = np.concatenate([window_block(block, n, seed) for block in blocks])
    return numbers[start:start + count]
