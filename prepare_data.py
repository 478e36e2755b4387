"""
Text to token shards.

  python prepare_data.py                                          the built-in dataset: the Python standard library's source
  python prepare_data.py PATH... --encoding gpt2 --out data/x     .txt .md .py .jsonl .json .parquet files, .gz and .zst too,
                                                                  and folders of them
  python prepare_data.py --hf NAME --subset SUBSET --out data/x   a Hugging Face dataset, streamed
  python prepare_data.py --verify data/x                          read a finished dataset and check all of it

A document is a text file, a line of a .jsonl or .json, or a row of a .parquet; <|endoftext|> follows each. A document belongs
to the validation split if a hash of its text says so, so it stays there when data is added, and two copies of it never end
up on both sides. Documents stream through a bounded window of threads (tiktoken releases the interpreter's lock) in their
order, so memory does not grow with the input, and the output does not depend on the number of threads. Everything goes to
OUT.partial, which becomes OUT only when it is complete. After an interruption the same command goes on from the last
finished shard, to the same bytes.
"""
import argparse
import collections
import contextlib
import errno
import gzip
import hashlib
import importlib
import io
import json
import os
import shutil
import sys
import sysconfig
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np

from data import HEADER_BYTES, Dataset, fsync_folder, get_encoding, shard_header

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".json", ".parquet")
COMPRESSED = (".gz", ".zst")
CHUNK_CHARS = 2 ** 18  # what one thread tokenizes at a time


# ---------------------------------------------------------------------------------------------------------------------
# reading

def text_suffix(path):
    """The suffix that says how to read the file, without .gz or .zst: ".jsonl" for a.jsonl.gz."""
    return Path(path.stem if path.suffix in COMPRESSED else path.name).suffix


def optional(package, what):
    """Import an optional package."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise ValueError(f"{what} needs the package {name}: pip install {name}") from None


def find_files(paths, site_packages=True):
    """[(path, named)]: the files given by name, and those with a known suffix in the folders, in sorted order."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                folders[:] = sorted(f for f in folders if not f.startswith(".") and
                                    (site_packages or f not in ("site-packages", "dist-packages")))
                found += [(Path(folder, name), False) for name in sorted(names)
                          if text_suffix(Path(name)) in SUFFIXES and not name.startswith(".")]
        elif not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        elif text_suffix(path) not in SUFFIXES:
            raise ValueError(f"{path}: {text_suffix(path) or 'a file without a suffix'} cannot be read: "
                             f"give {', '.join(SUFFIXES)}, or text with {' or '.join(COMPRESSED)} behind it")
        else:
            found.append((path, True))
    if not found:
        raise ValueError(f"no {', '.join(SUFFIXES)} file in {', '.join(map(str, paths))}")
    return found


@contextlib.contextmanager
def open_text(path):
    """The file as UTF-8 text, and a function that tells how many bytes of the file on disk have been read."""
    with open(path, "rb") as raw:
        if path.suffix == ".gz":
            binary = gzip.open(raw)
        elif path.suffix == ".zst":
            binary = optional("pyarrow", f"{path}: reading .zst").CompressedInputStream(raw, "zstd")
        else:
            binary = contextlib.nullcontext(raw)
        with binary as plain:
            # newline="" keeps line ends as they are: tokens decode to the very bytes of the file
            yield io.TextIOWrapper(plain, encoding="utf-8", newline=""), raw.tell


def read_documents(path, field, max_document):
    """(text, bytes of the file read so far) for each document. Raises ValueError, one line, on what is no text."""
    if text_suffix(path) == ".parquet":
        yield from read_parquet(path, field)
        return
    try:
        with open_text(path) as (text, position):
            if text_suffix(path) in (".jsonl", ".json"):
                for number, line in enumerate(text, 1):
                    if line.strip():
                        yield _jsonl_text(path, number, line, field), position()
                return
            while part := text.read(max_document):
                if len(part) == max_document:
                    part += text.readline(max_document)  # cut at a line end
                if "\0" in part:
                    raise ValueError(f"{path}: has NUL bytes: binary, not text")
                yield part, position()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason}): binary, or another encoding") from None
    except (OSError, EOFError, zlib.error) as error:
        if path.suffix not in COMPRESSED or getattr(error, "errno", None):
            raise
        raise ValueError(f"{path}: not a complete {path.suffix} file ({str(error).partition(chr(10))[0]})") from None


def read_parquet(path, field):
    """(text, bytes of the file read so far, by its rows) for each row of a parquet file, a few rows in memory at a time."""
    pyarrow, parquet = optional("pyarrow", f"{path}: reading .parquet"), optional("pyarrow.parquet", f"{path}: reading .parquet")
    size, number = path.stat().st_size, 0
    try:
        with parquet.ParquetFile(path) as file:
            names, rows = file.schema_arrow.names, file.metadata.num_rows
            if field not in names:
                raise ValueError(f"{path}: no column {field!r} (it has: {', '.join(names)}): name another with --field")
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if not isinstance(text, str):
                        raise ValueError(f"{path}, row {number}: no text in column {field!r} but {type(text).__name__}: "
                                         f"name another with --field")
                    yield text, size * number // rows
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file ({str(error).partition(chr(10))[0]})") from None


def _jsonl_text(path, number, line, field):
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        has = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{path}, line {number}: no text in field {field!r} (it has: {has}): name another with --field")
    return record[field].encode("utf-8", "replace").decode("utf-8")  # JSON can hold lone surrogates, UTF-8 cannot


class Input:
    """Every document of all files, in order, with progress (`done` of `total` bytes on disk) and what was skipped."""

    def __init__(self, files, field, max_document):
        self.files, self.field, self.max_document = files, field, max_document
        self.total, self.done = sum(path.stat().st_size for path, _ in files), 0
        self.empty, self.unreadable = [], []

    def identity(self, position):
        """What must be the same for a position in the input to mean the same: the files up to it, their sizes and times."""
        return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path, _ in self.files[:position[0] + 1]]

    def documents(self, position=(0, 0)):
        """(text, position behind it) for each document behind `position`, which is (file, documents of that file)."""
        first, skip = position
        before = sum(path.stat().st_size for path, _ in self.files[:first])
        for number, (path, named) in enumerate(self.files[first:], first):
            documents = 0
            try:
                for text, read in read_documents(path, self.field, self.max_document):
                    if text:
                        documents += 1
                        self.done = before + read
                        if number > first or documents > skip:
                            yield text, (number, documents)
            except ValueError:
                if named or documents:  # a folder may hold a binary file or two; a file asked for by name must be text
                    raise
                if str(path) not in self.unreadable:  # a resumed preparation reads again what had been read ahead
                    self.unreadable.append(str(path))
            else:
                if not documents:
                    if named:
                        raise ValueError(f"{path} is empty: no document in it")
                    if str(path) not in self.empty:
                        self.empty.append(str(path))
            before += path.stat().st_size
            self.done = before


class HubInput:
    """Every document of a Hugging Face dataset, by its name there or a local folder, streamed by the package `datasets`."""

    def __init__(self, name, subset, split, revision, field):
        datasets = optional("datasets", "--hf")
        self.name, self.field, self.wanted = name, field, [name, subset, split, revision]
        self.empty, self.unreadable, self.done = [], [], 0
        try:
            self.dataset = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True)
            splits = self.dataset.info.splits or {}
            self.total = splits[split].num_examples if split in splits else 0  # documents; 0: unknown
        except Exception as error:  # it lets whatever its file systems and HTTP libraries raise through
            raise ValueError(f"--hf {name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from None

    def identity(self, position):
        return self.wanted

    def documents(self, position=(0, 0)):
        self.done = position[1]
        for record in self.dataset.skip(position[1]):
            self.done += 1
            text = record.get(self.field)
            if not isinstance(text, str):
                raise ValueError(f"--hf {self.name}, document {self.done}: no text in field {self.field!r} (it has: "
                                 f"{', '.join(record)}): name another with --field")
            if text:
                yield text.encode("utf-8", "replace").decode("utf-8"), (0, self.done)


# ---------------------------------------------------------------------------------------------------------------------
# tokenizing

def is_validation(text, val_fraction):
    """True for about val_fraction of all documents, by a hash of the text alone."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < val_fraction * 2 ** 64


def tokenize(documents, encoding, val_fraction, dtype):
    """[(split, tokens, bytes of text, position)] of some (text, position); <|endoftext|> ends each document."""
    out = []
    for text, position in documents:
        ids = encoding.encode_to_numpy(text, disallowed_special=())  # special tokens in the text are only text
        tokens = np.append(ids, encoding.eot_token).astype(dtype)
        out.append(("val" if is_validation(text, val_fraction) else "train", tokens, len(text.encode()), position))
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
    """function over items with `workers` threads, results in order, at most 2 x workers items in flight."""
    with ThreadPoolExecutor(workers) as pool:
        pending = collections.deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class ShardWriter:
    """Writes one split's tokens to train_000000.bin, train_000001.bin, ... of shard_tokens each; the header goes in last."""

    def __init__(self, folder, split, dtype, shard_tokens):
        self.folder, self.split, self.itemsize, self.shard_tokens = folder, split, np.dtype(dtype).itemsize, shard_tokens
        self.shards, self.file, self.tokens, self.bytes, self.documents = [], None, 0, 0, 0

    def write(self, tokens, text_bytes):
        self.tokens += len(tokens)
        self.bytes += text_bytes
        self.documents += 1
        while len(tokens):
            if self.file is None:
                self.open(0)
            part, tokens = np.split(tokens, [self.shard_tokens - self.count])
            self.file.write(part)
            self.hash.update(part)
            self.count += len(part)
            if self.count == self.shard_tokens:
                self.close()

    def open(self, count):
        """Start the next shard, or go on with it behind its first `count` tokens."""
        self.name, self.count, self.hash = f"{self.split}_{len(self.shards):06d}.bin", count, hashlib.sha256()
        self.file = open(self.folder / self.name, "r+b" if count else "w+b")
        self.file.write(bytes(HEADER_BYTES))
        before = self.file.read(count * self.itemsize)
        if len(before) < count * self.itemsize:
            raise ValueError(f"{self.folder / self.name} has lost tokens: discard the unfinished preparation with --overwrite")
        self.hash.update(before)
        self.file.truncate()

    def close(self):
        if self.file is not None:
            self.file.seek(0)
            self.file.write(shard_header(self.count, self.itemsize))
            self.sync()
            self.file.close()
            self.file = None
            self.shards.append({"name": self.name, "tokens": self.count, "sha256": self.hash.hexdigest()})

    def sync(self):
        self.file.flush()
        os.fsync(self.file.fileno())

    def state(self):
        """What restore needs; the tokens it counts are on the disk."""
        if self.file:
            self.sync()
        return {"shards": list(self.shards), "count": self.count if self.file else 0, "tokens": self.tokens, "bytes": self.bytes,
                "documents": self.documents}

    def restore(self, state):
        self.shards, self.tokens, self.bytes, self.documents = (state[k] for k in ("shards", "tokens", "bytes", "documents"))
        if state["count"]:
            self.open(state["count"])


def write_json(path, value):
    """Write a small file so that it is there in full or not at all."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w") as f:
        json.dump(value, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def read_progress(partial, options, documents):
    """The progress.json of an unfinished preparation, or None. Raises ValueError if it was one of other input or options."""
    try:
        progress = json.loads((partial / "progress.json").read_text())
        same = progress["options"] == options and progress["input"] == json.loads(json.dumps(documents.identity(progress["position"])))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, IndexError):
        same = False
    if not same:
        raise ValueError(f"{partial} holds an unfinished preparation of other input or with other options: give the same command "
                         f"again to finish it, or discard it with --overwrite")
    return progress


def prepare(files, out, encoding_name, source, val_fraction=0.01, field="text", max_document=2 ** 20,
            shard_tokens=100_000_000, workers=None, overwrite=False):
    """Tokenize files ([(path, named)] of find_files, or a HubInput) into the dataset folder `out`. Returns its meta.json as a
    dict. Whenever a shard is finished, OUT.partial/progress.json tells how to go on from there."""
    out, partial = Path(out), Path(f"{out}.partial")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: choose another --out, or replace it with --overwrite")
    encoding = get_encoding(encoding_name)
    dtype = np.uint16 if encoding.n_vocab <= 2 ** 16 else np.uint32
    documents = Input(files, field, max_document) if isinstance(files, list) else files
    options = {"tokenizer": encoding_name, "source": source, "val_fraction": val_fraction, "field": field,
               "max_document": max_document, "shard_tokens": shard_tokens}
    partial.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(partial / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(f"another process is preparing {out}: wait for it, or choose another --out") from None
    progress = None if overwrite else read_progress(partial, options, documents)
    writers = {split: ShardWriter(partial, split, dtype, shard_tokens) for split in ("train", "val")}
    try:
        position, seconds_before, tokens_before, done_before = (0, 0), 0.0, 0, 0
        if progress:
            position, seconds_before, done_before = progress["position"], progress["seconds"], progress["done"]
            documents.empty, documents.unreadable = progress["empty"], progress["unreadable"]
            for split, writer in writers.items():
                writer.restore(progress["writers"][split])
            tokens_before = sum(w.tokens for w in writers.values())
            print(f"going on with {partial} after {sum(len(w.shards) for w in writers.values())} shards, {tokens_before:,} tokens",
                  flush=True)
        known = {shard["name"] for w in writers.values() for shard in w.shards} | {w.name for w in writers.values() if w.file}
        for path in partial.iterdir():
            if path.name not in known | {"lock"} and not (progress and path.name == "progress.json"):
                path.unlink()
        start = shown = time.time()
        chunks = map_in_order(lambda chunk: tokenize(chunk, encoding, val_fraction, dtype), in_chunks(documents.documents(position)),
                              workers or os.cpu_count())
        for chunk in chunks:
            for split, tokens, text_bytes, position in chunk:
                shards = len(writers[split].shards)
                writers[split].write(tokens, text_bytes)
                if len(writers[split].shards) > shards:
                    write_json(partial / "progress.json", {
                        "options": options, "input": documents.identity(position), "position": position, "done": documents.done,
                        "seconds": seconds_before + time.time() - start, "empty": documents.empty, "unreadable": documents.unreadable,
                        "writers": {s: w.state() for s, w in writers.items()}})
            if time.time() - shown > 1:
                shown = time.time()
                show_progress(documents, done_before, sum(w.tokens for w in writers.values()) - tokens_before, shown - start)
        for writer in writers.values():
            writer.close()
        for split, writer in writers.items():
            if not writer.shards:
                raise ValueError(f"none of the {sum(w.documents for w in writers.values())} documents fell into the {split} "
                                 f"split at --val-fraction {val_fraction}: give more documents, another fraction, or cut "
                                 f"long ones with --max-document (characters)")
        meta = {"format": 1, "tokenizer": encoding_name, "vocab_size": encoding.n_vocab, "source": source,
                "val_fraction": val_fraction,
                "splits": {split: {"tokens": w.tokens, "bytes": w.bytes, "documents": w.documents, "shards": w.shards}
                           for split, w in writers.items()}}
        write_json(partial / "meta.json", meta)
        for name in ("progress.json", "lock"):
            (partial / name).unlink(missing_ok=True)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
        fsync_folder(out.parent)
    except BaseException as error:
        for writer in writers.values():
            if writer.file:
                with contextlib.suppress(OSError):  # closing flushes, and the disk may be full
                    writer.file.close()
        if not (partial / "progress.json").exists():
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise OSError(f"{partial} cannot be written ({error.strerror}): make room and give the same command again") from None
        raise
    finally:
        lock.release()
    seconds, tokens = seconds_before + time.time() - start, sum(w.tokens for w in writers.values())
    print(f"{out}: {writers['train'].tokens:,} training and {writers['val'].tokens:,} validation tokens ({encoding_name}) "
          f"from {sum(w.documents for w in writers.values()):,} documents in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")
    for what, skipped in (("empty", documents.empty), ("not UTF-8 text", documents.unreadable)):
        if skipped:
            print(f"  skipped {len(skipped)} files, {what}: {skipped[0]}{', ...' if len(skipped) > 1 else ''}")
    return meta


def show_progress(documents, done_before, tokens, seconds):
    """A line with what is done, and, where the size of the input is known, how long the rest will take."""
    rate = f"{tokens:,} tokens  {tokens / seconds:,.0f} tokens/s"
    if documents.total:
        left = seconds * (documents.total - documents.done) / max(1, documents.done - done_before)
        print(f"  {documents.done / documents.total:4.0%}  {rate}  about {left:.0f} s left", flush=True)
    else:
        print(f"  {documents.done:,} documents  {rate}", flush=True)


def prepare_builtin(out="data/stdlib", encoding="bytes", include_site_packages=False, **options):
    """The built-in dataset: the source of this Python's standard library, which every machine has."""
    roots = [sysconfig.get_paths()["stdlib"]]
    if include_site_packages:
        roots += [path for path in dict.fromkeys(sysconfig.get_paths()[key] for key in ("purelib", "platlib"))
                  if os.path.isdir(path) and not Path(path).is_relative_to(roots[0])]
    source = f"Python {sys.version.split()[0]} standard library{', site-packages' if include_site_packages else ''}"
    files = [(path, False) for path, _ in find_files(roots, site_packages=include_site_packages)
             if text_suffix(path) == ".py"]
    print(f"preparing {out}: {source}, {len(files):,} files", flush=True)
    return prepare(files, out, encoding, source, **options)


def document_digests(split, end):
    """The digest of every document of a Split, in order; token `end` stands between documents, which may span shards."""
    rest = []
    for shard in split.shards:
        start = 0
        for stop in np.flatnonzero(shard == end):
            document = b"".join((*rest, shard[start:stop].astype("<u4").tobytes()))
            rest, start = [], stop + 1
            if document:
                yield hashlib.blake2b(document, digest_size=16).digest()
        rest.append(shard[start:].astype("<u4").tobytes())
    if any(rest):
        yield hashlib.blake2b(b"".join(rest), digest_size=16).digest()


def verify(folder):
    """Check a finished dataset in full: sizes, checksums, token range, and that no validation document is in the training
    split (the same tokens from end to end; near-duplicates are not looked for). Raises ValueError or FileNotFoundError."""
    dataset = Dataset(folder, block_size=1, verify=True)
    encoding = get_encoding(dataset.tokenizer)
    for split in (dataset.train, dataset.val):
        for path, shard in zip(split.paths, split.shards):
            if (highest := int(shard.max())) >= encoding.n_vocab:
                raise ValueError(f"{path}: token id {highest} is beyond {dataset.tokenizer}'s {encoding.n_vocab:,}: a damaged shard, or "
                                 f"another tokenizer's")
    held_out = set(document_digests(dataset.val, encoding.eot_token))
    leaked = held_out.intersection(document_digests(dataset.train, encoding.eot_token))
    if leaked:
        raise ValueError(f"{folder}: {len(leaked):,} of {len(held_out):,} validation documents are in the training split, too: "
                         f"validation losses would flatter; make the dataset again")
    print(f"{folder}: good: {dataset.train.tokens:,} training tokens in {len(dataset.train.shards)} shards, "
          f"{dataset.val.tokens:,} validation tokens in {len(dataset.val.shards)}, tokenizer {dataset.tokenizer}, "
          f"{len(held_out):,} different validation documents, none of them in the training split")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="files and folders; none: the built-in dataset")
    parser.add_argument("--encoding", help="bytes, or a tiktoken name (default: gpt2; bytes for the built-in dataset)")
    parser.add_argument("--out", help="the dataset's folder (default: data/NAME)")
    parser.add_argument("--val-fraction", type=float, default=0.01, help="share of documents held out (default: 0.01)")
    parser.add_argument("--field", default="text", help="the field of a line or row that holds the text (default: text)")
    parser.add_argument("--hf", metavar="NAME", help="a Hugging Face dataset by name, or a local folder in one of its formats")
    parser.add_argument("--subset", help="--hf: the configuration's name")
    parser.add_argument("--split", default="train", help="--hf: which split to read; ours is made by --val-fraction (default: train)")
    parser.add_argument("--revision", help="--hf: a commit, tag or branch, to pin what is read")
    parser.add_argument("--max-document", type=int, default=2 ** 20,
                        help="cut longer text files at a line end after so many characters (default: 1048576)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens a shard (default: 100000000)")
    parser.add_argument("--workers", type=int, help="threads (default: all cores)")
    parser.add_argument("--include-site-packages", action="store_true", help="built-in dataset: installed packages too")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--verify", metavar="FOLDER", help="check a finished dataset instead of making one")
    args, out = parser.parse_args(argv), None
    try:
        if args.verify:
            return verify(args.verify)
        for key, good in (("val_fraction", 0 < args.val_fraction < 1), ("max_document", args.max_document > 0),
                          ("shard_tokens", 0 < args.shard_tokens < 2 ** 31), ("workers", (args.workers or 1) > 0)):
            if not good:
                raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)} is out of range")
        options = {key: getattr(args, key) for key in ("val_fraction", "field", "max_document", "shard_tokens", "workers",
                                                       "overwrite")}
        if args.hf and args.paths:
            raise ValueError(f"--hf {args.hf} and {args.paths[0]}: one source at a time")
        if args.hf:
            out = args.out or f"data/{Path(args.hf).name}{'-' + args.subset if args.subset else ''}"
            source = " ".join(filter(None, (args.hf, args.subset, args.split, args.revision)))
            prepare(HubInput(args.hf, args.subset, args.split, args.revision, args.field), out, args.encoding or "gpt2", source, **options)
        elif args.paths:
            files = find_files(args.paths)
            out = args.out or f"data/{Path(args.paths[0]).resolve().name.split('.')[0]}"
            prepare(files, out, args.encoding or "gpt2", " ".join(args.paths), **options)
        else:
            encoding = args.encoding or "bytes"
            out = args.out or ("data/stdlib" + ("-site" if args.include_site_packages else "") +
                               ("" if encoding == "bytes" else f"-{encoding}"))
            prepare_builtin(out, encoding, args.include_site_packages, **options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        kept = Path(f"{out}.partial", "progress.json").exists()
        print(f"interrupted: {'the same command goes on from the last finished shard' if kept else 'nothing was kept'}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
