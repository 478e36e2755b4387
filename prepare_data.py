"""
Text to token shards.

  python prepare_data.py                        the source of Python's standard library
  python prepare_data.py PATH... --out data/x   .txt .md .py .jsonl files, .gz of them, folders
  python prepare_data.py --hf NAME --out data/x a Hugging Face dataset, streamed; or a local folder
                                                of parquet, csv, ... files

A document is a text file, a line of a .jsonl or a record of a Hugging Face dataset; <|endoftext|>
follows each. A hash of its text decides whether it is held out for validation. So it stays in its
split when data is added, and two copies of it are in the same split.

Documents stream in order through a bounded window of threads (tiktoken releases the interpreter's
lock). Memory does not grow with the input, and the number of threads changes no byte.

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
import re
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lib.data import ShardWriter
from lib.disk import NO_ROOM, cannot_write, sync_folder, write_whole
from lib.documents import TEXT, FileInput, HubInput, find_files, text_suffix
from lib.lock import hold_lock
from lib.tokenizer import get_encoding

CHUNK_CHARS = 2 ** 18  # what one thread tokenizes at a time
OWN_FILES = re.compile(r"(train|val)_\d{6}\.bin|(meta|progress)\.json(\.tmp)?|lock")
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


def tokenize(documents, encoding, val_fraction, dtype):
    """[(split, tokens, bytes of text, position)] of a list of (text, position)."""
    out = []
    for text, position in documents:
        split = "val" if is_validation(text, val_fraction) else "train"
        ids = encoding.encode_to_numpy(text, disallowed_special=())  # special tokens are only text
        tokens = np.append(ids, encoding.eot_token).astype(dtype)
        out.append((split, tokens, len(text.encode()), position))
    return out


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
    """function over items in `workers` threads; results in order, 2 x workers items in flight."""
    pool, pending = ThreadPoolExecutor(workers), collections.deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


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


def own_files(partial):
    """The files that preparations write to OUT.partial. Raises ValueError if others are there."""
    paths = sorted(path for path in partial.iterdir() if path.name != "lock")
    for path in paths:
        if not OWN_FILES.fullmatch(path.name) or path.is_symlink():
            raise ValueError(f"{path} was not written here: move it away, or choose another --out")
    return paths


@contextlib.contextmanager
def locked(partial, out):
    """Hold OUT.partial, made if need be, for this process only. Leaves no empty folder."""
    partial.mkdir(parents=True, exist_ok=True)
    try:
        with hold_lock(partial / "lock", f"another process is preparing {out}"):
            yield
    finally:
        with contextlib.suppress(OSError):
            partial.rmdir()


class Preparation:
    """A dataset in the making: `documents` up to `position` are in the writers' shards."""

    def __init__(self, partial, documents, options):
        self.partial, self.documents, self.options = partial, documents, options
        self.position, self.encoding = (0, 0), get_encoding(options["encoding"])
        self.dtype = np.uint16 if self.encoding.n_vocab <= 2 ** 16 else np.uint32
        self.writers = {split: ShardWriter(partial, split, self.dtype, options["shard_tokens"])
                        for split in ("train", "val")}

    def tokens(self):
        return sum(writer.tokens for writer in self.writers.values())

    def begin(self):
        """Start, or continue what OUT.partial holds. Raises ValueError if an option or the input
        differs from what it was begun with, or if it is damaged."""
        if not [path for path in own_files(self.partial) if path.suffix != ".tmp"]:
            return self.save()
        try:
            progress = json.loads((self.partial / "progress.json").read_bytes())
            self.check_same(progress)
            for split, writer in self.writers.items():
                writer.restore(progress["writers"][split])
            self.position = tuple(progress["position"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(f"{self.partial} cannot be resumed: {error}. Give the command that it "
                             f"was begun with, or remove it, or choose another --out") from None
        if self.tokens():
            print(f"resuming {self.partial} after {self.tokens():,} tokens", flush=True)

    def check_same(self, progress):
        """Raise ValueError, naming it, if an option or a file is not what it was."""
        for key, value in self.options.items():
            if progress["options"][key] != value:
                raise ValueError(f"it was begun with --{key.replace('_', '-')} "
                                 f"{progress['options'][key]}, not {value}")
        inputs = self.documents.identity(progress["position"])
        for old, new in itertools.zip_longest(progress["input"], inputs, fillvalue="missing"):
            if old != new:
                raise ValueError(f"its input was {old}, and is now {new}")

    def save(self):
        """Write down how to continue from here."""
        progress = {"options": self.options, "position": self.position,
                    "input": self.documents.identity(self.position),
                    "writers": {split: w.state() for split, w in self.writers.items()}}
        write_whole(self.partial / "progress.json", json.dumps(progress, indent=1), AGAIN)

    def write(self, workers):
        """Tokenize and write the documents after `position`; save whenever a shard is finished."""
        def tokenize_chunk(chunk):
            return tokenize(chunk, self.encoding, self.options["val_fraction"], self.dtype)

        started = shown = time.monotonic()
        before, documents = self.tokens(), self.documents
        chunks = in_chunks(documents.documents(self.position))
        for results in map_in_order(tokenize_chunk, chunks, workers):
            for split, tokens, text_bytes, self.position in results:
                if self.writers[split].write(tokens, text_bytes):
                    self.save()
            if time.monotonic() > shown + 1:
                shown = time.monotonic()
                share = f"{documents.done / documents.total:4.0%}  " if documents.total else ""
                print(f"  {share}{self.tokens():,} tokens  "
                      f"{(self.tokens() - before) / (shown - started):,.0f} tokens/s", flush=True)

    def finish(self, source):
        """Close the last shards and write meta.json, which is returned."""
        splits = {}
        for split, writer in self.writers.items():
            if not writer.tokens:
                raise ValueError(f"no document fell into the {split} split: give more documents, "
                                 f"or another --val-fraction")
        for split, writer in self.writers.items():
            writer.close()
            splits[split] = {"tokens": writer.tokens, "bytes": writer.bytes,
                             "documents": writer.documents, "shards": writer.shards}
        meta = {"format": 1, "tokenizer": self.options["encoding"],
                "vocab_size": self.encoding.n_vocab, "source": source,
                "val_fraction": self.options["val_fraction"], "splits": splits}
        write_whole(self.partial / "meta.json", json.dumps(meta, indent=1), AGAIN)
        return meta

    def give_up(self):
        """After an error: before the first finished shard there is nothing to keep."""
        for writer in self.writers.values():
            with contextlib.suppress(OSError):  # closing flushes, and the disk may be full
                writer.abandon()
        if not any(writer.shards for writer in self.writers.values()):
            with contextlib.suppress(ValueError, OSError):
                for path in reversed(own_files(self.partial)):  # progress.json after the shards
                    path.unlink()


def prepare(source, out, encoding, name, val_fraction=0.01, field="text", max_document=None,
            shard_tokens=100_000_000, workers=None, skip_bad=False):
    """Tokenize `source`, files as find_files returns them or a HubInput, into the folder `out`.
    `name` describes the source in meta.json, which is returned. Raises ValueError or OSError."""
    if not (0 < val_fraction < 1 and 0 < shard_tokens < 2 ** 31):
        raise ValueError(f"--val-fraction {val_fraction} or --shard-tokens {shard_tokens} is out "
                         f"of range")
    if get_encoding(encoding).eot_token is None:
        raise ValueError(f"--encoding {encoding} cannot tokenize text: choose bytes or gpt2")
    documents = source
    if isinstance(source, list):
        max_document = max_document or default_max_document(source, val_fraction)
        documents = FileInput(source, field, max_document, skip_bad)
    place = Path(os.path.realpath(os.path.expanduser(out)))  # where a link leads
    partial = place.with_name(f"{place.name}.partial")
    check_out(place, documents.folders)
    options = {"encoding": encoding, "val_fraction": val_fraction, "field": field,
               "max_document": max_document, "shard_tokens": shard_tokens}
    started = time.monotonic()
    with locked(partial, out):
        work = Preparation(partial, documents, options)
        work.begin()
        try:
            work.write(workers or os.cpu_count())
            meta = work.finish(name)
        except BaseException as error:
            work.give_up()
            if getattr(error, "errno", None) in (*NO_ROOM, errno.EFBIG):
                raise cannot_write(partial, error, AGAIN) from None
            raise
        move_into_place(partial, place)

    train, val = meta["splits"]["train"], meta["splits"]["val"]
    print(f"{out}: {train['tokens']:,} training and {val['tokens']:,} validation tokens "
          f"({encoding}) from {train['documents'] + val['documents']:,} documents "
          f"in {time.monotonic() - started:.1f} s")
    if documents.skipped:
        print(f"  skipped {documents.skipped:,} files or records; the first is "
              f"{documents.first_skipped}")
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
    found = find_files([sysconfig.get_paths()["stdlib"]], site_packages=False, quiet=True)
    files = [(path, given) for path, given in found if path.suffix.lower() == ".py"]
    name = f"Python {sys.version.split()[0]} standard library"
    print(f"preparing {out}: {name}, {len(files):,} files", flush=True)
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
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out = args.out or "data/stdlib"
    keys = ("val_fraction", "field", "max_document", "shard_tokens", "workers", "skip_bad")
    options = {key: getattr(args, key) for key in keys}
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be anything
    try:
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
        is_kept = os.path.exists(os.path.realpath(os.path.expanduser(out)) + ".partial")
        print("interrupted: " + ("the same command resumes from the last finished shard" if is_kept
                                 else "nothing unfinished was kept"), file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
