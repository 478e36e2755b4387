"""
Token shards on disk, and the order in which training reads them.

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

class Shard:
    """A shard of any of the three formats. len() is its number of tokens, `dtype` uint16 or uint32.

    Raises ValueError if the file has none of the formats. So does a read if its size or time has
    changed, where a memory map would give other tokens, or end the process with a bus error."""

    def __init__(self, path):
        self.path = Path(path)
        with open(self.path, "rb") as f:
            self.state = self._state_of(f)
            header = np.frombuffer(f.read(16).ljust(16, b"\0"), dtype="<i4")
        magic, version, self.tokens, itemsize = header.tolist()
        size, self.offset = self.state[0], HEADER_BYTES

        # ours says how wide a token is; llm.c's are of two bytes; nanoGPT's files have no header
        if magic == LLMC_MAGIC:
            itemsize = 2
        elif magic != MAGIC and self.path.name in ("train.bin", "val.bin"):
            version, self.tokens, itemsize, self.offset = 1, size // 2, 2, 0
        elif magic != MAGIC:
            raise ValueError(f"{self.path}: wrong magic {magic}, not {MAGIC} (ours) or {LLMC_MAGIC}"
                             f" (llm.c); a file without a header must be train.bin or val.bin")

        # the size must be what the header says
        is_whole = self.tokens > 0 and size == self.offset + self.tokens * itemsize
        if version != 1 or itemsize not in (2, 4) or not is_whole:
            raise ValueError(f"{self.path}: truncated or damaged: {size:,} bytes cannot be "
                             f"{self.offset:,} bytes of header (version {version}) and "
                             f"{self.tokens:,} tokens of {itemsize} bytes: make the shard again")
        self.dtype = np.dtype(f"<u{itemsize}")
        if self.offset == 0:
            self.check_width()

    def check_width(self):
        """Raise ValueError if a file without a header seems to have tokens of four bytes: then the
        second of each two is nearly 0."""
        if self.tokens % 2:
            return
        first, second = self.read(0, min(self.tokens, 4096)).reshape(-1, 2).T
        if second.max() < 16 and len(np.unique(first)) > 16:
            raise ValueError(f"{self.path}: every second of its tokens is below 16, as if they were"
                             f" uint32: without a header they must be uint16; give them ours "
                             f"(docs/data.md)")

    @staticmethod
    def _state_of(file):
        stat = os.fstat(file.fileno())
        return stat.st_size, int(stat.st_mtime)  # whole seconds: some file systems forget the rest

    def __len__(self):
        return self.tokens

    def read(self, start, count):
        """The tokens start, ..., start + count - 1 as an array."""
        size = count * self.dtype.itemsize
        with open(self.path, "rb", buffering=0) as f:
            content = os.pread(f.fileno(), size, self.offset + start * self.dtype.itemsize)
            if self._state_of(f) != self.state or len(content) != size:
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
        # each window is read from its shard, and x and y are views of it
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


def read_meta(folder):
    """What folder/meta.json says: (the tokenizer's name, its vocab_size, bytes of text per
    validation token, {split: {path of a shard: SHA-256}}). Raises ValueError if it is damaged."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_bytes())
        val_bytes_per_token = meta["splits"]["val"]["bytes"] / meta["splits"]["val"]["tokens"]
        if not val_bytes_per_token > 0:
            raise ValueError(f"{val_bytes_per_token} bytes per token")
        shards = {split: {folder / shard["name"]: str(shard["sha256"])
                          for shard in meta["splits"][split]["shards"]}
                  for split in ("train", "val")}
        return str(meta["tokenizer"]), int(meta["vocab_size"]), val_bytes_per_token, shards
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{path} is damaged ({reason}): make the dataset again") from None


def find_shards(folder):
    """{split: {path of a shard: None}}: the .bin files of a folder without meta.json, by name.

    A whole word decides: a_val_000000.bin is a validation shard, retrieval_train_0.bin is not.
    Raises ValueError if a file would be in both splits."""
    found = {}
    for split, words in {"train": "train|training", "val": "val|valid|validation"}.items():
        word = re.compile(rf"(?<![a-z])({words})(?![a-z])", re.IGNORECASE)
        found[split] = {p: None for p in sorted(folder.glob("*.bin")) if word.search(p.stem)}
    if both := found["train"].keys() & found["val"]:
        raise ValueError(f"{min(both)} would be in both splits by its name: rename it, so that it "
                         f"has one of the words train and val")
    return found


class Dataset:
    """A folder of shards: `train` and `val` (Split), the `tokenizer`'s name ("ids" if unknown), and
    `val_bytes_per_token` (None if unknown).

    Opening it checks files, headers, sizes and vocabulary; a dataset up to 1 GiB, or any with
    verify=True, is also read in full (verify). Raises FileNotFoundError or ValueError."""

    def __init__(self, folder, block_size, vocab_size=None, verify=None):
        self.folder, self.vocab_size = Path(os.path.expanduser(folder)), vocab_size
        if not self.folder.exists():
            raise FileNotFoundError(f"no dataset at {folder}: make it with `python prepare_data.py "
                                    f"PATH... --out {folder}`, or set --dataset to one that exists")
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is a file: give its folder {self.folder.parent}")

        # our meta.json knows the tokenizer and the shards; other folders are known by file names
        if (self.folder / "meta.json").exists():
            self.tokenizer, needed, self.val_bytes_per_token, shards = read_meta(self.folder)
            vocab_size = needed if vocab_size is None else vocab_size
            if needed > vocab_size:
                raise ValueError(f"{folder} has token ids up to {needed - 1} ({self.tokenizer}), "
                                 f"beyond the model's vocab_size={vocab_size}: set "
                                 f"--vocab_size={needed} or more")
        else:
            shards = find_shards(self.folder)
        self.checksums = {**shards["train"], **shards["val"]}
        self.train, self.val = (self._open_split(split, shards[split], block_size, vocab_size)
                                for split in ("train", "val"))

        # a small dataset is read in full, a large one only on demand
        opened = self.train.shards + self.val.shards
        size = sum(len(shard) * shard.dtype.itemsize for shard in opened)
        if verify or (verify is None and size <= VERIFY_AT_START):
            self.verify()

    def _open_split(self, name, paths, block_size, vocab_size):
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

    def verify(self):
        """Read every token: compare checksums with meta.json, and ids with the vocabulary."""
        for split in (self.train, self.val):
            for shard in split.shards:
                found, highest = shard.checksum()
                expected = self.checksums[shard.path] or found
                if found != expected:
                    raise ValueError(f"{shard.path}: checksum mismatch: meta.json has "
                                     f"{expected[:16]}, the tokens give {found[:16]}. "
                                     f"The file has changed: make the dataset again")
                split.check_ids(shard, highest)

    # what meta.json says of the tokenizer; without one, what the first million validation tokens do

    @functools.cached_property
    def tokenizer(self):
        """"gpt2", whose tokens shards without a meta.json nearly always hold, or "ids" (unknown).

        It is unknown if the model's vocabulary is smaller than GPT-2's, if an id is beyond it, if
        none is beyond 255 (characters or bytes), or with a meta.pkl, which nanoGPT writes for other
        vocabularies. A pickle can run code, so it is never loaded."""
        if self.vocab_size is not None and self.vocab_size < GPT2_VOCABULARY:
            return "ids"
        highest = next(self.val.shards[0].blocks()).max()
        is_gpt2s = 255 < highest < GPT2_VOCABULARY and not (self.folder / "meta.pkl").exists()
        return "gpt2" if is_gpt2s else "ids"

    @functools.cached_property
    def val_bytes_per_token(self):
        """UTF-8 bytes of text per validation token. None if the tokenizer or its vocabulary cannot
        be had."""
        if self.tokenizer == "ids":
            return None
        try:
            encoding = get_encoding(self.tokenizer)
        except ValueError:
            return None
        tokens = next(self.val.shards[0].blocks())
        text = encoding.decode_bytes(tokens[tokens != encoding.eot_token].tolist())
        return len(text) / len(tokens)


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

    # walk on from each image that is outside
    index = feistel(index)
    while (outside := index >= n).any():
        index[outside] = feistel(index[outside])
    return index.astype(np.int64)


@functools.lru_cache(maxsize=4)
def window_block(block, n, seed):
    """The window numbers of ORDER_BLOCK consecutive samples, from block x ORDER_BLOCK on."""
    samples = np.arange(block * ORDER_BLOCK, (block + 1) * ORDER_BLOCK, dtype=np.int64)
    epochs, indices = np.divmod(samples, n)
    return np.concatenate([permute(indices[epochs == e], n, [seed, int(e)])
                           for e in np.unique(epochs)])


def window_numbers(first, count, n, seed):
    """The numbers, in [0, n), of the windows that are the training samples first, ..., first +
    count - 1. Every window comes once in an epoch; each epoch is a new permutation.
    Sample number = step x global batch + position in the global batch."""
    samples = range(first, first + count)
    return np.array([window_block(s // ORDER_BLOCK, n, seed)[s % ORDER_BLOCK] for s in samples])
