"""
Token shards on disk, read and written, and the order in which training reads them.

A dataset is a folder of shards of two splits, train and val. Three formats are recognised, file by file:

  ours      256 x int32 header: 20260526, version 1, tokens, bytes per token; then uint16 or uint32. With meta.json beside.
  llm.c     256 x int32 header: 20240520, version 1, tokens; then uint16 (also modded-nanogpt; FineWeb shards look so)
  nanoGPT   train.bin and val.bin: uint16 and nothing else

Where no meta.json lists them, the word train or val in a shard's name says which split it belongs to.

Training cuts a split into windows of block_size + 1 tokens. Which windows make up step s is a function of (seed, s,
position in the global batch) and nothing else: the same on 1, 2 or 8 processes, with or without a resume. An epoch is a
permutation of all windows, computed entry by entry (permute), so nothing of its size is ever in memory.
"""
import functools
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np

MAGIC, LLMC_MAGIC, HEADER_BYTES = 20260526, 20240520, 256 * 4
GPT2_VOCABULARY = 50257  # <|endoftext|> included
VERIFY_AT_START = 2 ** 30  # datasets up to this many bytes are checked in full when a run starts
READ_TOKENS = 2 ** 20  # tokens read at a time where a whole shard is read
ORDER_BLOCK = 1024  # samples whose order is computed together: many cost little more than a few


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers

class TokenIds:
    """Stands in for a tokenizer that is not known (as in nanoGPT's character data): its text is the ids, such as "17 4 250"."""

    name, eot_token = "ids", None

    def encode(self, text, **_):
        try:
            return [int(word) for word in text.split()]
        except ValueError:
            raise ValueError(f"the data's tokenizer is not known: give token ids as the prompt, such as '17 4', not {text!r}") from None

    def decode_single_token_bytes(self, token):
        return b" %d" % token


@functools.cache
def get_encoding(name):
    """The tiktoken Encoding: "bytes" (256 bytes and <|endoftext|>, needs no download) or any of tiktoken's names.
    "ids" gives a TokenIds. Raises ValueError, one line."""
    import tiktoken
    if name == "ids":
        return TokenIds()
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


class Shard:
    """A shard of any of the three formats: len() is its number of tokens, `dtype` uint16 or uint32, `path`.

    Raises ValueError, one line, if the file is anything else. Every read opens the file anew and asks whether it is still
    the one that was checked: a shard that is cut, replaced or removed during a run is an error in one line, where a memory
    map would end the process (bus error) or give other tokens. And thousands of shards need no thousands of open files."""

    def __init__(self, path):
        self.path = Path(path)
        with open(self.path, "rb") as f:
            self.state = self._state_of(f.fileno())
            header = np.frombuffer(f.read(HEADER_BYTES)[:16].ljust(16, b"\0"), dtype="<i4")
        self.offset, self.tokens, itemsize = self._layout(self.state[0], *map(int, header))
        self.dtype = np.dtype(f"<u{itemsize}")

    @staticmethod
    def _state_of(descriptor):
        stat = os.fstat(descriptor)
        return stat.st_size, int(stat.st_mtime)  # whole seconds: some file systems forget the rest

    def _layout(self, size, magic, version, tokens, itemsize):
        """(bytes before the first token, tokens, bytes of a token), checked against the file's size."""
        if magic in (MAGIC, LLMC_MAGIC):
            itemsize = 2 if magic == LLMC_MAGIC else itemsize
            if version != 1 or itemsize not in (2, 4):
                raise ValueError(f"{self.path}: header says version {version}, {itemsize} bytes a token; version 1 with 2 or 4 bytes "
                                 f"can be read. Make the shard again")
            if tokens < 1 or size != HEADER_BYTES + tokens * itemsize:
                raise ValueError(f"{self.path}: truncated or damaged: its header promises {tokens:,} tokens, "
                                 f"{HEADER_BYTES + tokens * itemsize:,} bytes, and the file has {size:,}. Make the shard again")
            return HEADER_BYTES, tokens, itemsize
        if self.path.name not in ("train.bin", "val.bin"):
            raise ValueError(f"{self.path}: wrong magic {magic}: expected {MAGIC} (ours) or {LLMC_MAGIC} (llm.c); a headerless "
                             f"nanoGPT file must be called train.bin or val.bin")
        if size == 0 or size % 2:
            raise ValueError(f"{self.path}: {size:,} bytes are no sequence of uint16 tokens (nanoGPT's format): truncated?")
        return 0, size // 2, 2

    def __len__(self):
        return self.tokens

    def read(self, start, count):
        """The tokens start, ..., start + count - 1 as an array. Raises ValueError if the file has changed since it was opened."""
        size = count * self.dtype.itemsize
        with open(self.path, "rb", buffering=0) as f:
            content = os.pread(f.fileno(), size, self.offset + start * self.dtype.itemsize)
            if self._state_of(f.fileno()) != self.state or len(content) != size:
                raise ValueError(f"{self.path} has changed since it was opened (cut, or written again): restore it, or make the dataset "
                                 f"again, then start again")
        return np.frombuffer(content, self.dtype)

    def blocks(self):
        """All tokens in order, as arrays of about a million."""
        for start in range(0, self.tokens, READ_TOKENS):
            yield self.read(start, min(READ_TOKENS, self.tokens - start))


class ShardWriter:
    """Writes one split's tokens to train_000000.bin, train_000001.bin, ... of shard_tokens each; the header goes in last."""

    def __init__(self, folder, split, dtype, shard_tokens):
        self.folder, self.split, self.itemsize, self.shard_tokens = folder, split, np.dtype(dtype).itemsize, shard_tokens
        self.shards, self.file, self.tokens, self.bytes, self.documents = [], None, 0, 0, 0

    def write(self, tokens, text_bytes):
        """Add a document. True if a shard became full."""
        self.tokens += len(tokens)
        self.bytes += text_bytes
        self.documents += 1
        before = len(self.shards)
        while len(tokens):
            if self.file is None:
                self._open(0)
            part, tokens = np.split(tokens, [self.shard_tokens - self.count])
            self.file.write(part)
            self.hash.update(part)
            self.count += len(part)
            if self.count == self.shard_tokens:
                self.close()
        return len(self.shards) > before

    def _open(self, count):
        """Start the next shard, or continue it after its first `count` tokens."""
        self.name, self.count, self.hash = f"{self.split}_{len(self.shards):06d}.bin", count, hashlib.sha256()
        self.file = open(self.folder / self.name, "r+b" if count else "w+b")
        self.file.write(bytes(HEADER_BYTES))
        for start in range(0, count, READ_TOKENS):
            size = min(READ_TOKENS, count - start) * self.itemsize
            part = self.file.read(size)
            if len(part) < size:
                raise ValueError(f"{self.folder / self.name} has lost tokens")
            self.hash.update(part)
        self.file.truncate()

    def close(self):
        """Finish the shard that is being written, if one is."""
        if self.file is not None:
            self.file.seek(0)
            self.file.write(shard_header(self.count, self.itemsize))
            self._sync()
            self.file.close()
            self.file = None
            self.shards.append({"name": self.name, "tokens": self.count, "sha256": self.hash.hexdigest()})

    def _sync(self):
        self.file.flush()
        os.fsync(self.file.fileno())

    def state(self):
        """What restore needs; the tokens it counts are on the disk."""
        if self.file:
            self._sync()
        return {"shards": list(self.shards), "count": self.count if self.file else 0, "tokens": self.tokens, "bytes": self.bytes,
                "documents": self.documents}

    def restore(self, state):
        """Continue from `state`. Raises ValueError, OSError or KeyError if the folder no longer holds what it counts."""
        for shard in state["shards"]:
            if len(Shard(self.folder / shard["name"])) != shard["tokens"]:
                raise ValueError(f"{self.folder / shard['name']} has another number of tokens")
        self.shards, self.tokens, self.bytes, self.documents = (state[k] for k in ("shards", "tokens", "bytes", "documents"))
        if state["count"]:
            self._open(state["count"])


# ---------------------------------------------------------------------------------------------------------------------
# datasets

class Split:
    """The shards of "train" or "val" as windows of block_size + 1 tokens that overlap by one, none across two shards.

    split[indices] -> (x, y), int64 arrays (len(indices), block_size); y is x one token later.
    """

    def __init__(self, paths, block_size, vocab_size=None):
        self.block_size, self.vocab_size = block_size, vocab_size
        self.shards = [Shard(p) for p in paths]
        self.tokens = sum(len(s) for s in self.shards)
        self.first_window = np.cumsum([0] + [max(0, (len(s) - 1) // block_size) for s in self.shards])

    def __len__(self):
        return int(self.first_window[-1])

    def __getitem__(self, indices):
        T = self.block_size
        windows = np.empty((len(indices), T + 1), dtype=np.int64)
        shard_of = np.searchsorted(self.first_window, indices, side="right") - 1
        for row, (index, s) in enumerate(zip(indices, shard_of)):
            windows[row] = self.shards[s].read(int(index - self.first_window[s]) * T, T + 1)
        if self.vocab_size is not None and windows.max() >= self.vocab_size:
            bad = np.argwhere(windows >= self.vocab_size)[0]
            raise ValueError(f"{self.shards[shard_of[bad[0]]].path}: token id {windows[tuple(bad)]} is beyond "
                             f"vocab_size={self.vocab_size}: wrong tokenizer for this model, or a damaged shard")
        return windows[:, :-1], windows[:, 1:]


def check_types(record, types):
    """Raise TypeError or KeyError if a JSON object lacks a key, or has a value of another type or a number below 1."""
    for key, type_ in types.items():
        if type(record[key]) is not type_ or (type_ is int and record[key] < 1):
            raise TypeError(f"{key} is {record[key]!r}")


def read_meta(folder):
    """The checked content of folder/meta.json; None if there is none. Raises ValueError, one line, if it is not one of ours."""
    path = Path(folder) / "meta.json"
    if not path.exists():
        return None
    try:
        meta = json.loads(path.read_bytes())
        check_types(meta, {"tokenizer": str, "vocab_size": int, "splits": dict})
        names = []
        for split in ("train", "val"):
            check_types(meta["splits"][split], {"tokens": int, "bytes": int, "shards": list})
            for shard in meta["splits"][split]["shards"]:
                check_types(shard, {"name": str, "sha256": str, "tokens": int})
                names.append(shard["name"])
        if outside := [name for name in names if not re.fullmatch(r"[^/\\\0]+", name) or name in (".", "..")]:
            raise ValueError(f"{outside[0]!r} is no name of a shard in this folder")
        if twice := [name for name, other in zip(sorted(names), sorted(names)[1:]) if name == other]:
            raise ValueError(f"it lists {twice[0]} twice")
        for split in ("train", "val"):
            said = meta["splits"][split]
            if said["tokens"] != (held := sum(shard["tokens"] for shard in said["shards"])):
                raise ValueError(f"{split} has {said['tokens']:,} tokens, and its shards {held:,}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} is damaged ({reason}): make the dataset again") from None
    return meta


def foreign_shards(folder, split):
    """The .bin files with the whole word train (training), or val (valid, validation), in their names, in order of name: both
    fineweb_val_000000.bin and val.bin are validation shards, retrieval_train_0.bin is not. Raises ValueError on one with both."""
    words = {"train": "train|training", "val": "val|valid|validation"}
    has = {s: re.compile(rf"(?<![a-z])({w})(?![a-z])", re.IGNORECASE) for s, w in words.items()}
    paths = sorted(p for p in Path(folder).glob("*.bin") if has[split].search(p.stem))
    other = [p for p in Path(folder).glob("*.bin") if has["val" if split == "train" else "train"].search(p.stem)]
    taken = {os.path.realpath(p): p for p in other}
    for path in paths:
        if os.path.realpath(path) in taken:
            raise ValueError(f"{path} would be in both splits, by its name or by {taken[os.path.realpath(path)].name}: "
                             f"rename it, so that it has one of the words train and val")
    return paths


class Dataset:
    """A folder of shards: `train` and `val` (Split), `tokenizer` ("ids" if unknown), `val_bytes_per_token` (None if unknown).

    Opening it checks what can be checked at once: files, headers, sizes, vocabulary; and for datasets up to 1 GiB, or with
    verify=True, every checksum (or, without a meta.json, every token id). Raises FileNotFoundError or ValueError.
    """

    def __init__(self, folder, block_size, vocab_size=None, verify=None):
        self.folder = Path(os.path.expanduser(folder))
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no dataset at {folder}: make it with "
                                    f"`python prepare_data.py PATH... --out {folder}`, or set --dataset to one that exists")
        self.meta = read_meta(self.folder)
        if self.meta and vocab_size is not None and self.meta["vocab_size"] > vocab_size:
            raise ValueError(f"{folder} has token ids up to {self.meta['vocab_size'] - 1} ({self.meta['tokenizer']}), beyond the "
                             f"model's vocab_size={vocab_size}: set --vocab_size={self.meta['vocab_size']} or more")
        self.train, self.val = (self._open_split(name, block_size, vocab_size) for name in ("train", "val"))
        self.tokenizer = self.meta["tokenizer"] if self.meta else self._foreign_tokenizer()
        size = sum(len(shard) * shard.dtype.itemsize for split in (self.train, self.val) for shard in split.shards)
        if verify or (verify is None and size <= VERIFY_AT_START):
            self.verify()

    def _open_split(self, name, block_size, vocab_size):
        said = self.meta["splits"][name]["shards"] if self.meta else []
        paths = [self.folder / shard["name"] for shard in said] if self.meta else foreign_shards(self.folder, name)
        if missing := [p for p in paths if not p.is_file()]:
            raise FileNotFoundError(f"{missing[0]} is {'listed in meta.json and missing' if self.meta else 'no file'}: make the "
                                    f"dataset again")
        if not paths:
            raise FileNotFoundError(f"{self.folder} holds no {name} shard (a .bin file with the word {name} in its name): make the "
                                    f"dataset again with `python prepare_data.py PATH... --out {self.folder}`")
        split = Split(paths, block_size, vocab_size)
        for shard, expected in zip(split.shards, said):
            if len(shard) != expected["tokens"]:
                raise ValueError(f"{shard.path} has {len(shard):,} tokens and meta.json says {expected['tokens']:,}: "
                                 f"make the dataset again")
        if len(split) == 0:
            raise ValueError(f"{self.folder}: the {name} split has {split.tokens:,} tokens, less than one window of "
                             f"block_size={block_size} + 1: use more data or a smaller --block_size")
        return split

    def _foreign_tokenizer(self):
        """"gpt2" if shards without a meta.json can be GPT-2's, as they nearly always are; else "ids", no known tokenizer.

        They cannot be if meta.pkl lies beside them (nanoGPT's mark of a vocabulary of its own; a pickle can run code when it is
        loaded, so we never load it), or if, in the first million tokens of each split, an id is beyond 50256, or, in nanoGPT's
        headerless files, none is beyond 255: such are characters or bytes. llm.c's header itself stands for GPT-2's tokens."""
        firsts = [split.shards[0] for split in (self.train, self.val)]
        highest = max(int(shard.read(0, min(READ_TOKENS, len(shard))).max()) for shard in firsts)
        named = all(shard.offset for shard in firsts)  # the files have a header
        fits = highest < GPT2_VOCABULARY and (named or highest > 255)
        return "gpt2" if fits and not (self.folder / "meta.pkl").exists() else "ids"

    def verify(self):
        """Read every token: checksums where meta.json has them, token ids against the vocabulary elsewhere."""
        for name, split in (("train", self.train), ("val", self.val)):
            for i, shard in enumerate(split.shards):
                digest, highest = hashlib.sha256(), 0
                for block in shard.blocks():
                    digest.update(block)
                    highest = max(highest, int(block.max()))
                said = self.meta["splits"][name]["shards"][i]["sha256"] if self.meta else digest.hexdigest()
                if digest.hexdigest() != said:
                    raise ValueError(f"{shard.path}: checksum mismatch: meta.json says {said[:16]}, the tokens give "
                                     f"{digest.hexdigest()[:16]}. The file has changed: make the dataset again")
                if split.vocab_size is not None and highest >= split.vocab_size:
                    raise ValueError(f"{shard.path}: token id {highest} is beyond vocab_size={split.vocab_size}: "
                                     f"wrong tokenizer for this model, or a damaged shard")

    @functools.cached_property
    def val_bytes_per_token(self):
        """UTF-8 bytes of text for each validation token. From meta.json; for foreign shards of GPT-2's tokens from the first
        million; None if the tokenizer is not known or its vocabulary is not at hand."""
        if self.meta:
            return self.meta["splits"]["val"]["bytes"] / self.meta["splits"]["val"]["tokens"]
        try:
            encoding = get_encoding(self.tokenizer)
            if encoding.eot_token is None:
                return None
            shard = self.val.shards[0]
            ids, counts = np.unique(shard.read(0, min(1_000_000, len(shard))), return_counts=True)
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
    """Window numbers for one block of consecutive samples, block x ORDER_BLOCK and following: see window_numbers."""
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
