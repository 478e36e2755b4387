"""
Text to token shards.

  python prepare_data.py                        the source of Python's standard library
  python prepare_data.py PATH... --out data/x   .txt .md .py .jsonl files, .gz of them, folders
  python prepare_data.py --hf NAME --out data/x a Hugging Face dataset, streamed; or a local folder
                                                of parquet, csv, ... files
  python prepare_data.py --verify data/x        read a finished dataset in full and check it

A document is a text file, a line of a .jsonl or a record of a Hugging Face dataset; <|endoftext|>
follows each. A hash of its text decides whether it is held out for validation. So it stays in its
split when data is added, and two copies of it are in the same split.

The work goes to OUT.partial, which becomes OUT by one rename when it is complete. After an
interruption the same command resumes from the last finished shard, to the same bytes. An OUT that
holds something is never replaced.
"""
import argparse
import collections
import contextlib
import errno
import hashlib
import itertools
import json
import os
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lib.data import HEADER_BYTES, MAGIC, Dataset, Shard
from lib.disk import NO_ROOM, cannot_write, sync_folder, write_whole
from lib.documents import TEXT, FileInput, HubInput, find_files, text_suffix, walk
from lib.lock import hold_lock
from lib.output import say
from lib.tokenizer import get_encoding

CHUNK_CHARS = 2 ** 18  # what one thread tokenizes at a time
AGAIN = "give the same command again"


# --------------------------------------------------------------------------------------------------
# documents to tokens

def is_validation(text, val_fraction):
    """True for about val_fraction of all documents, by a hash of the text alone."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < val_fraction * 2 ** 64


def default_max_document(files, val_fraction):
    """The characters after which text files are cut: 2^20, or a smaller power of two if there are
    too few files, so that about ten documents are held out."""
    sizes = [path.stat().st_size for path, _ in files if text_suffix(path) in TEXT]
    if len(sizes) * val_fraction >= 10:
        return 2 ** 20
    wanted = max(256, int(sum(sizes) * val_fraction / 10))
    return min(2 ** 20, 2 ** (wanted.bit_length() - 1))


def in_chunks(documents):
    """Lists of (text, position) of about CHUNK_CHARS characters together."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document[0])
        if size >= CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def map_in_order(function, items, workers):
    """function over items in `workers` threads (tiktoken releases the interpreter's lock); results
    in order, 2 x workers items in flight: memory does not grow with the input."""
    pending = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


# --------------------------------------------------------------------------------------------------
# tokens to shards

class ShardWriter:
    """Writes one split to train_000000.bin, train_000001.bin, ... of shard_tokens tokens each; the
    header goes in last. `record` is what meta.json says of the split. It is also all that a resume
    needs. Raises ValueError or OSError if the shards are not as it says."""

    def __init__(self, folder, split, dtype, shard_tokens, record):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.itemsize, self.record = np.dtype(dtype).itemsize, record

        # the shards that are finished are whole
        for shard in record["shards"]:
            if len(Shard(folder / shard["name"])) != shard["tokens"]:
                raise ValueError(f"{folder / shard['name']} has another number of tokens")

        # tokens of the next shard, which is unfinished
        self.count = record["tokens"] - sum(shard["tokens"] for shard in record["shards"])
        if self.count and self.path().stat().st_size < self.size():
            raise ValueError(f"{self.path()} has lost tokens")

    def path(self):
        return self.folder / f"{self.split}_{len(self.record['shards']):06d}.bin"

    def size(self):
        return HEADER_BYTES + self.count * self.itemsize

    def write(self, tokens, text_bytes, documents):
        """Add documents. Returns True if a shard became full."""
        finished = len(self.record["shards"])
        self.record["tokens"] += len(tokens)
        self.record["bytes"] += text_bytes
        self.record["documents"] += documents
        # fill the unfinished shard, then the next one
        while len(tokens):
            part, tokens = np.split(tokens, [self.shard_tokens - self.count])
            with open(self.path(), "r+b" if self.count else "wb") as f:
                f.seek(self.size())
                f.write(part)
            self.count += len(part)
            if self.count == self.shard_tokens:
                self.finish()
        return len(self.record["shards"]) > finished

    def flush(self):
        """Bring what was written of the unfinished shard to the disk."""
        if self.count:
            with open(self.path(), "rb") as f:
                os.fsync(f.fileno())

    def finish(self):
        """Finish the unfinished shard, if there is one."""
        if not self.count:
            return

        # the header goes in last, so that a file that has one is whole
        header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
        header[:4] = MAGIC, 1, self.count, self.itemsize
        with open(self.path(), "r+b") as f:
            f.write(header)
            f.truncate(self.size())  # a preparation that was killed may have written more
        self.flush()
        checksum, _ = Shard(self.path()).checksum()
        self.record["shards"].append(
            {"name": self.path().name, "tokens": self.count, "sha256": checksum})
        self.count = 0


class Preparation:
    """A dataset in the making: `documents` up to `position` are in the shards of `splits`."""

    def __init__(self, partial, documents, options):
        """Start, or continue what OUT.partial holds. Raises ValueError if an option or the input
        differs from what it was begun with, or if it is damaged or was not begun here."""
        self.partial, self.documents, self.options = partial, documents, options
        self.encoding = get_encoding(options["encoding"])
        self.dtype = np.uint16 if self.encoding.n_vocab <= 2 ** 16 else np.uint32
        progress = {"position": (0, 0), "splits": {
            split: {"tokens": 0, "bytes": 0, "documents": 0, "shards": []}
            for split in ("train", "val")}}
        is_new = not {path.name for path in partial.iterdir()} - {"lock", "progress.json.tmp"}

        # what is there must be of the same options and the same input, or documents would come
        # twice or be missing
        try:
            if not is_new:
                progress = json.loads((partial / "progress.json").read_bytes())
                now = self.identity(progress["position"])
                for old, new in itertools.zip_longest(progress["begun_with"], now):
                    if old != new:
                        raise ValueError(f"it was begun with {old}, not {new}")
            self.position, self.splits = tuple(progress["position"]), progress["splits"]
            self.writers = {split: ShardWriter(partial, split, self.dtype,
                                               options["shard_tokens"], record)
                            for split, record in self.splits.items()}
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(f"{partial} cannot be resumed: {error}. Give the command that it was "
                             f"begun with, or move it away, or choose another --out") from None
        if is_new:
            self.save()
        elif self.tokens():
            say(f"resuming {partial} after {self.tokens():,} tokens")

    def identity(self, position):
        """What must not change for a resume from `position`: options and inputs, a line each."""
        options = [f"--{key.replace('_', '-')} {value}" for key, value in self.options.items()]
        return options + self.documents.identity(position)

    def tokens(self):
        return sum(record["tokens"] for record in self.splits.values())

    def save(self):
        """Write down how to continue from here."""
        for writer in self.writers.values():
            writer.flush()
        progress = {"position": self.position, "splits": self.splits,
                    "begun_with": self.identity(self.position)}
        write_whole(self.partial / "progress.json", json.dumps(progress, indent=1), AGAIN)

    def tokenize(self, chunk):
        """{split: (tokens, bytes of text, documents)} of a list of (text, position), and the last
        position."""
        def encode(text):  # special tokens are only text
            ids = self.encoding.encode_to_numpy(text, disallowed_special=())
            return np.append(ids, self.encoding.eot_token).astype(self.dtype)

        # each document goes to its split, by its text alone
        texts = {"train": [], "val": []}
        for text, _ in chunk:
            held_out = is_validation(text, self.options["val_fraction"])
            texts["val" if held_out else "train"].append(text)
        parts = {split: (np.concatenate([np.empty(0, self.dtype), *map(encode, kept)]),
                         sum(len(text.encode()) for text in kept), len(kept))
                 for split, kept in texts.items()}
        return parts, chunk[-1][1]

    def write(self, workers):
        """Tokenize and write the documents after `position`; save whenever a shard is finished."""
        chunks = in_chunks(self.documents.documents(self.position))
        before, started = self.tokens(), time.monotonic()
        shown = started
        for parts, position in map_in_order(self.tokenize, chunks, workers):
            # after a finished shard a resume can start from here
            self.position = position
            finished = [self.writers[split].write(*part) for split, part in parts.items()]
            if any(finished):
                self.save()
            if time.monotonic() > shown + 1:
                shown = time.monotonic()
                self.show_progress((self.tokens() - before) / (shown - started))

    def show_progress(self, rate):
        """Tokens, and their rate a second; of files also the share that is read, and time left."""
        line = f"  {self.tokens():,} tokens  {rate:,.0f} tokens/s"
        # a file may grow while it is read
        if share := min(1.0, self.documents.done / max(1, self.documents.total)):
            line += f"  {share:.0%} read, {self.tokens() * (1 / share - 1) / rate:,.0f} s left"
        say(line)

    def finish(self, source):
        """Finish the last shards and write meta.json, which is returned."""
        for split, record in self.splits.items():
            if not record["tokens"]:
                reason = "give more documents, or another --val-fraction"
                if self.documents.skipped:
                    reason += f" ({self.documents.describe_skipped()})"
                raise ValueError(f"no document fell into the {split} split: {reason}")
        for writer in self.writers.values():
            writer.finish()
        meta = {"format": 1, "tokenizer": self.options["encoding"],
                "vocab_size": self.encoding.n_vocab, "source": source,
                "val_fraction": self.options["val_fraction"], "splits": self.splits}
        write_whole(self.partial / "meta.json", json.dumps(meta, indent=1), AGAIN)
        return meta

    def give_up(self):
        """After an error: before the first finished shard there is nothing to keep."""
        if not any(record["shards"] for record in self.splits.values()):
            for writer in self.writers.values():
                writer.path().unlink(missing_ok=True)
            (self.partial / "progress.json").unlink()  # the last: it says that the rest is ours


# --------------------------------------------------------------------------------------------------
# OUT and OUT.partial

def check_out(out, inputs):
    """Raise ValueError if OUT lies in an input folder, or anything is in its place."""
    for folder in inputs:
        if out.is_relative_to(os.path.realpath(folder)):
            raise ValueError(f"{out} lies in the input {folder}: choose another --out")
    if os.path.lexists(out) and not (out.is_dir() and not os.listdir(out)):
        what = "holds a dataset" if (out / "meta.json").exists() else "is not an empty folder"
        raise ValueError(f"{out} {what}: choose another --out, or remove it")


def prepare(source, out, encoding, name, val_fraction=0.01, field="text", max_document=None,
            shard_tokens=100_000_000, workers=None, skip_bad=False):
    """Tokenize `source`, files as find_files returns them or a HubInput, into the folder `out`.
    `name` describes the source in meta.json, which is returned. Raises ValueError or OSError."""
    for option, value, limit in (("val-fraction", val_fraction, 1), ("workers", workers, 2 ** 10),
                                 ("shard-tokens", shard_tokens, 2 ** 31),
                                 ("max-document", max_document, 2 ** 20 + 1)):
        if value is not None and not 0 < value < limit:
            raise ValueError(f"--{option} {value} must be above 0 and below {limit}")
    if get_encoding(encoding).eot_token is None:
        raise ValueError(f"--encoding {encoding} cannot tokenize text: choose bytes or gpt2")

    # files become documents as they are read; a Hugging Face dataset has them already
    documents = source
    if isinstance(source, list):
        max_document = max_document or default_max_document(source, val_fraction)
        documents = FileInput(source, field, max_document, skip_bad)

    # the work goes beside its place, under a lock
    place = Path(os.path.realpath(os.path.expanduser(out)))  # where a link leads
    partial = place.with_name(f"{place.name}.partial")
    check_out(place, documents.folders)
    options = {"encoding": encoding, "val_fraction": val_fraction, "field": field,
               "max_document": max_document, "shard_tokens": shard_tokens}
    started = time.monotonic()
    partial.mkdir(parents=True, exist_ok=True)
    try:
        with hold_lock(partial / "lock", f"another process is preparing {out}"):
            work = Preparation(partial, documents, options)
            try:
                work.write(workers or os.cpu_count())
                meta = work.finish(name)
            except BaseException as error:
                work.give_up()
                if getattr(error, "errno", None) in (*NO_ROOM, errno.EFBIG):
                    raise cannot_write(partial, error, AGAIN) from None
                raise
            move_into_place(partial, place)
    finally:
        with contextlib.suppress(OSError):
            partial.rmdir()  # if nothing is left in it

    train, val = meta["splits"]["train"], meta["splits"]["val"]
    say(f"{out}: {train['tokens']:,} training and {val['tokens']:,} validation tokens "
        f"({encoding}) from {train['documents'] + val['documents']:,} documents "
        f"in {time.monotonic() - started:.1f} s")
    if documents.skipped:
        say(f"  {documents.describe_skipped()}")
    return meta


def move_into_place(partial, out):
    """Make the finished OUT.partial OUT. The rename fails if something has come there meanwhile."""
    try:
        partial.rename(out)
    except OSError as error:
        raise ValueError(f"{out} cannot be made ({error.strerror}); the finished dataset waits in "
                         f"{partial}: move it where you want it") from None
    sync_folder(out.parent)
    for name in ("lock", "progress.json"):
        (out / name).unlink()


def prepare_builtin(out="data/stdlib", encoding="bytes", max_document=None, **options):
    """The built-in dataset: the source of this Python's standard library."""
    stdlib, name = sysconfig.get_paths()["stdlib"], f"Python {sys.version.split()[0]}"
    found = walk(Path(stdlib), unread=[], left_out=("site-packages", "dist-packages"))
    files = [(path, given) for path, given in found if path.suffix.lower() == ".py"]
    name += " standard library"
    say(f"preparing {out}: {name}, {len(files):,} files")
    return prepare(files, out, encoding, name, max_document=max_document or 2 ** 20, **options)


# --------------------------------------------------------------------------------------------------
# the program

def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="files and folders; none: the built-in dataset")
    add("--hf", metavar="NAME", help="a Hugging Face dataset, or a local folder in its formats")
    add("--subset", help="--hf: the configuration's name")
    add("--split", default="train", help="--hf: the split to read (default: train)")
    add("--revision", help="--hf: a commit, tag or branch, to pin what is read")
    add("--out", help="the dataset's folder (default for the built-in dataset: data/stdlib)")
    add("--encoding", help="bytes, or a tiktoken name (default: gpt2; built-in dataset: bytes)")
    add("--val-fraction", type=float, default=0.01, help="share of documents held out (0.01)")
    add("--field", default="text", help="the field of a record that holds the text (text)")
    add("--max-document", type=int,
        help="cut text files at a line end after so many characters (at most 1048576)")
    add("--shard-tokens", type=int, default=100_000_000, help="tokens per shard (100000000)")
    add("--workers", type=int, help="threads (default: all cores)")
    add("--skip-bad", action="store_true", help="skip and count bad files and records")
    add("--verify", metavar="FOLDER", help="check a finished dataset in full; nothing is written")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out = args.out or "data/stdlib"
    keys = ("val_fraction", "field", "max_document", "shard_tokens", "workers", "skip_bad")
    options = {key: getattr(args, key) for key in keys}
    try:
        if args.verify is not None:
            data = Dataset(args.verify, block_size=1, verify=True)
            say(f"{args.verify}: good: {data.train.tokens:,} training and {data.val.tokens:,} "
                f"validation tokens ({data.tokenizer})")
            return
        if args.hf and args.paths:
            raise ValueError(f"--hf {args.hf} and {args.paths[0]}: give one source at a time")
        if not args.out and (args.hf or args.paths or args.encoding not in (None, "bytes")):
            raise ValueError("--out is missing: give the dataset's folder, such as data/NAME")
        if not (args.hf or args.paths):
            prepare_builtin(out, args.encoding or "bytes", **options)
            return
        if args.hf:
            wanted = (args.hf, args.subset, args.split, args.revision)
            source, names = HubInput(*wanted, args.field, args.skip_bad), filter(None, wanted)
        else:
            source, names = find_files(args.paths), args.paths
        prepare(source, out, args.encoding or "gpt2", " ".join(names), **options)
    except (ValueError, OSError) as error:
        sys.exit("error: " + str(error).replace("\n", "\\n"))  # names may hold line ends
    except KeyboardInterrupt:
        say(f"interrupted: {AGAIN}", sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
