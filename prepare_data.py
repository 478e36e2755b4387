"""
Text to token shards.

  python prepare_data.py                                          the built-in dataset: the Python standard library's source
  python prepare_data.py PATH... --encoding gpt2 --out data/x     .txt .md .py .jsonl files, also .gz, and folders of them
  python prepare_data.py --verify data/x                          read a finished dataset and check all of it

A document is a file, or a line of a .jsonl; <|endoftext|> follows each. A document belongs to the validation split if a
hash of its text says so, so it stays there when data is added, and two copies of it never end up on both sides.
Documents stream through a bounded window of threads (tiktoken releases the interpreter's lock) in their order, so
memory does not grow with the input, and the output does not depend on the number of threads. Everything goes to
OUT.partial, which becomes OUT only when it is complete.
"""
import argparse
import collections
import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data import HEADER_BYTES, Dataset, fsync_folder, get_encoding, shard_header

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
CHUNK_CHARS = 2 ** 20  # what one thread tokenizes at a time


# ---------------------------------------------------------------------------------------------------------------------
# reading

def text_suffix(path):
    """The suffix that says how to read the file, without .gz: ".jsonl" for a.jsonl.gz."""
    return Path(path.stem if path.suffix == ".gz" else path.name).suffix


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
                             f"give {', '.join(SUFFIXES)}, or one of these with .gz")
        else:
            found.append((path, True))
    if not found:
        raise ValueError(f"no {', '.join(SUFFIXES)} file in {', '.join(map(str, paths))}")
    return found


@contextlib.contextmanager
def open_text(path):
    """The file as UTF-8 text, and a function that tells how many bytes of the file on disk have been read."""
    with open(path, "rb") as raw:
        with gzip.open(raw) if path.suffix == ".gz" else contextlib.nullcontext(raw) as binary:
            # newline="" keeps line ends as they are: tokens decode to the very bytes of the file
            yield io.TextIOWrapper(binary, encoding="utf-8", newline=""), raw.tell


def read_documents(path, field, max_document):
    """(text, bytes of the file read so far) for each document. Raises ValueError, one line, on what is no text."""
    try:
        with open_text(path) as (text, position):
            if text_suffix(path) == ".jsonl":
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
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from None


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

    def __iter__(self):
        before = 0
        for path, named in self.files:
            documents = 0
            try:
                for text, position in read_documents(path, self.field, self.max_document):
                    if text:
                        documents += 1
                        self.done = before + position
                        yield text
            except ValueError:
                if named or documents:  # a folder may hold a binary file or two; a file asked for by name must be text
                    raise
                self.unreadable.append(path)
            else:
                if not documents:
                    if named:
                        raise ValueError(f"{path} is empty: no document in it")
                    self.empty.append(path)
            before += path.stat().st_size
            self.done = before


# ---------------------------------------------------------------------------------------------------------------------
# tokenizing

def is_validation(text, val_fraction):
    """True for about val_fraction of all documents, by a hash of the text alone."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < val_fraction * 2 ** 64


def tokenize(texts, encoding, val_fraction, dtype):
    """[(split, tokens, bytes of text)] of some documents; each ends with <|endoftext|>."""
    out = []
    for text in texts:
        ids = encoding.encode_to_numpy(text, disallowed_special=())  # special tokens in the text are only text
        tokens = np.append(ids, encoding.eot_token).astype(dtype)
        out.append(("val" if is_validation(text, val_fraction) else "train", tokens, len(text.encode())))
    return out


def in_chunks(documents):
    """Lists of documents of about CHUNK_CHARS characters together."""
    chunk, size = [], 0
    for text in documents:
        chunk.append(text)
        size += len(text)
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
                self.name, self.count, self.hash = f"{self.split}_{len(self.shards):06d}.bin", 0, hashlib.sha256()
                self.file = open(self.folder / self.name, "wb")
                self.file.write(bytes(HEADER_BYTES))
            part, tokens = np.split(tokens, [self.shard_tokens - self.count])
            self.file.write(part)
            self.hash.update(part)
            self.count += len(part)
            if self.count == self.shard_tokens:
                self.close()

    def close(self):
        if self.file is not None:
            self.file.seek(0)
            self.file.write(shard_header(self.count, self.itemsize))
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None
            self.shards.append({"name": self.name, "tokens": self.count, "sha256": self.hash.hexdigest()})


def prepare(files, out, encoding_name, source, val_fraction=0.01, field="text", max_document=2 ** 20,
            shard_tokens=100_000_000, workers=None, overwrite=False):
    """Tokenize files ([(path, named)] of find_files) into the dataset folder `out`. Returns its meta.json as a dict."""
    out, partial = Path(out), Path(f"{out}.partial")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: choose another --out, or replace it with --overwrite")
    encoding = get_encoding(encoding_name)
    dtype = np.uint16 if encoding.n_vocab <= 2 ** 16 else np.uint32
    documents = Input(files, field, max_document)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    writers = {split: ShardWriter(partial, split, dtype, shard_tokens) for split in ("train", "val")}
    try:
        start = shown = time.time()
        chunks = map_in_order(lambda texts: tokenize(texts, encoding, val_fraction, dtype), in_chunks(documents),
                              workers or os.cpu_count())
        for chunk in chunks:
            for split, tokens, text_bytes in chunk:
                writers[split].write(tokens, text_bytes)
            if time.time() - shown > 1:
                shown = time.time()
                show_progress(documents, sum(w.tokens for w in writers.values()), shown - start)
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
        with open(partial / "meta.json", "w") as f:
            json.dump(meta, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
        fsync_folder(out.parent)
    except BaseException:
        for writer in writers.values():
            if writer.file:
                writer.file.close()
        shutil.rmtree(partial, ignore_errors=True)
        raise
    seconds, tokens = time.time() - start, sum(w.tokens for w in writers.values())
    print(f"{out}: {writers['train'].tokens:,} training and {writers['val'].tokens:,} validation tokens ({encoding_name}) "
          f"from {sum(w.documents for w in writers.values()):,} documents in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")
    for what, skipped in (("empty", documents.empty), ("not UTF-8 text", documents.unreadable)):
        if skipped:
            print(f"  skipped {len(skipped)} files, {what}: {skipped[0]}{', ...' if len(skipped) > 1 else ''}")
    return meta


def show_progress(documents, tokens, seconds):
    left = seconds * (documents.total / max(1, documents.done) - 1)
    print(f"  {documents.done / max(1, documents.total):4.0%}  {tokens:,} tokens  {tokens / seconds:,.0f} tokens/s  "
          f"about {left:.0f} s left", flush=True)


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


def verify(folder):
    """Check a finished dataset in full. Raises ValueError or FileNotFoundError at the first thing that is wrong."""
    dataset = Dataset(folder, block_size=1, verify=True)
    print(f"{folder}: good: {dataset.train.tokens:,} training tokens in {len(dataset.train.shards)} shards, "
          f"{dataset.val.tokens:,} validation tokens in {len(dataset.val.shards)}, tokenizer {dataset.tokenizer}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="files and folders; none: the built-in dataset")
    parser.add_argument("--encoding", help="bytes, or a tiktoken name (default: gpt2; bytes for the built-in dataset)")
    parser.add_argument("--out", help="the dataset's folder (default: data/NAME)")
    parser.add_argument("--val-fraction", type=float, default=0.01, help="share of documents held out (default: 0.01)")
    parser.add_argument("--field", default="text", help="the field of a .jsonl line that holds the text (default: text)")
    parser.add_argument("--max-document", type=int, default=2 ** 20,
                        help="cut longer text files at a line end after so many characters (default: 1048576)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens a shard (default: 100000000)")
    parser.add_argument("--workers", type=int, help="threads (default: all cores)")
    parser.add_argument("--include-site-packages", action="store_true", help="built-in dataset: installed packages too")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--verify", metavar="FOLDER", help="check a finished dataset instead of making one")
    args = parser.parse_args(argv)
    try:
        if args.verify:
            return verify(args.verify)
        for key, good in (("val_fraction", 0 < args.val_fraction < 1), ("max_document", args.max_document > 0),
                          ("shard_tokens", 0 < args.shard_tokens < 2 ** 31), ("workers", (args.workers or 1) > 0)):
            if not good:
                raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)} is out of range")
        options = {key: getattr(args, key) for key in ("val_fraction", "field", "max_document", "shard_tokens", "workers",
                                                       "overwrite")}
        if args.paths:
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
        print("interrupted: nothing was kept", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
