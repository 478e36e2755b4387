"""
Text to token shards.

  python prepare_data.py                                          the built-in dataset: the Python standard library's source
  python prepare_data.py PATH... --encoding gpt2 --out data/x     .txt .md .py .jsonl .json .parquet files, .gz and .zst too,
                                                                  and folders of them
  python prepare_data.py --hf NAME --subset SUBSET --out data/x   a Hugging Face dataset, streamed
  python -m lib.verify data/x                                   read a finished dataset and check all of it

A document is a text file, a line of a .jsonl or .json, or a row of a .parquet; <|endoftext|> follows each. A document belongs
to the validation split if a hash of its text says so, so it stays there when data is added, and two copies of it never end
up on both sides. Documents stream through a bounded window of threads (tiktoken releases the interpreter's lock) in their
order, so memory does not grow with the input, and the output does not depend on the number of threads.

Everything goes to OUT.partial, which becomes OUT only when it is complete. After an interruption the same command resumes
from the last finished shard, to the same bytes. Nothing is ever removed that prepare_data.py did not write.
"""
import argparse
import collections
import contextlib
import errno
import json
import os
import re
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np

from lib.data import ShardWriter, get_encoding, read_meta
from lib.disk import sync_folder, write_whole
from lib.documents import HubInput, Input, cut_for_both_splits, find_files, is_validation, text_suffix

CHUNK_CHARS = 2 ** 18  # what one thread tokenizes at a time
AGAIN = "give the same command again"


# ---------------------------------------------------------------------------------------------------------------------
# tokenizing

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


# ---------------------------------------------------------------------------------------------------------------------
# the folder: nothing is removed that was not written here

def read_progress(folder):
    """The content of folder/progress.json, a dict; None if there is none of ours. It is written whole, so never half there."""
    try:
        progress = json.loads((folder / "progress.json").read_bytes())
        return progress if progress["options"] and progress["writers"] else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def foreign(folder):
    """The name of something in the folder that is not part of a dataset made here, finished or not; None if there is none.

    A finished one has a meta.json of ours, which lists its shards. An unfinished one, OUT.partial, has a progress.json of ours,
    and shards of our names; `replaced` in it is the old OUT, while the new one takes its place."""
    ours = {"lock", "meta.json.tmp", "progress.json.tmp", "replaced"}
    names = sorted(path.name for path in folder.iterdir())
    if read_progress(folder):
        ours |= {"progress.json", "meta.json", *(name for name in names if re.fullmatch(r"(train|val)_\d{6}\.bin", name))}
    with contextlib.suppress(ValueError):
        if meta := read_meta(folder):
            ours |= {"meta.json", *(shard["name"] for split in meta["splits"].values() for shard in split["shards"])}
    for path in (folder / name for name in names):
        if path.name not in ours or path.is_symlink() or (path.name == "lock" and path.stat().st_size):
            return path.name
        if path.is_dir() and (path.name != "replaced" or foreign(path)):
            return path.name
    return None


def discard(folder):
    """Remove a dataset made here, finished or not, file by file."""
    if stranger := foreign(folder):
        raise ValueError(f"{folder / stranger} was not written here, so {folder} is not removed: move it away")
    marks = ("meta.json", "progress.json")  # they tell that it is ours, and go last: a kill leaves something we know again
    for path in sorted(folder.iterdir(), key=lambda p: marks.index(p.name) if p.name in marks else -1):
        discard(path) if path.is_dir() else path.unlink()
    folder.rmdir()


def check_free(out, overwrite):
    """Raise ValueError, one line, if `out` exists and may not be replaced by a new dataset. An empty folder may."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise ValueError(f"{out} is not a folder: choose another --out")
    if os.path.ismount(out):
        raise ValueError(f"{out} is a mount point, which cannot be replaced: give a folder inside it as --out")
    stranger = foreign(out)
    if not (out / "meta.json").exists():  # without it, not even a lock is taken for ours
        stranger = next((path.name for path in sorted(out.iterdir())), None)
    if stranger:
        raise ValueError(f"{out} exists and holds {stranger}, which is not part of a dataset made here: choose another --out")
    if any(out.iterdir()) and not overwrite:
        raise ValueError(f"{out} exists: choose another --out, or replace it with --overwrite")


def check_place(out, inputs, overwrite):
    """Raise ValueError, one line, unless a dataset can be made at `out`, by way of OUT.partial, and nothing be lost."""
    partial = Path(f"{out}.partial")
    for place in (out, partial):
        for path in inputs:
            if place.is_relative_to(path) or Path(path).is_relative_to(place):
                raise ValueError(f"{place} would be, hold or lie inside the input {path}: choose another --out, such as "
                                 f"{Path(path).parent / (out.name + '-tokens')}")
    if Path.cwd().is_relative_to(out):
        raise ValueError(f"{out} is or holds the working directory: choose another --out")
    check_free(out, overwrite)
    if os.path.lexists(partial) and (stranger := foreign(partial) if partial.is_dir() else partial.name):
        raise ValueError(f"{partial} is where the work would be kept, but {stranger} was not written here: move it away, or choose "
                         f"another --out")


def move_into_place(partial, out, overwrite):
    """Make the finished OUT.partial OUT. The old one, if any, is first moved aside, into OUT.partial, and removed when the new
    one is in place; progress goes last. A kill between any two of these loses nothing."""
    try:
        check_free(out, overwrite)  # it may have come while we worked
        if out.exists():
            if (partial / "replaced").exists():
                discard(partial / "replaced")
            out.rename(partial / "replaced")
        partial.rename(out)
    except BaseException as error:
        if (partial / "replaced").exists() and not out.exists():
            (partial / "replaced").rename(out)
        if isinstance(error, (ValueError, OSError)):
            raise ValueError(f"{error} (the new dataset is finished and waits in {partial})") from None
        raise
    sync_folder(out.parent)
    if (out / "replaced").exists():
        discard(out / "replaced")
    for name in ("lock", "progress.json"):
        (out / name).unlink()


@contextlib.contextmanager
def locked(partial, out):
    """Hold OUT.partial, made if need be, for this process alone."""
    partial.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(partial / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(f"another process is preparing {out}: wait for it, or choose another --out") from None
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            if os.listdir(partial) == ["lock"]:  # refused before anything was written
                (partial / "lock").unlink()
                partial.rmdir()


# ---------------------------------------------------------------------------------------------------------------------
# preparing

class Preparation:
    """A dataset in the making in OUT.partial: `documents` (Input or HubInput) read up to `position`, and the two writers."""

    def __init__(self, partial, documents, options, dtype):
        self.partial, self.documents, self.options = partial, documents, options
        self.writers = {split: ShardWriter(partial, split, dtype, options["shard_tokens"]) for split in ("train", "val")}
        self.position, self.started, self.seconds_before, self.tokens_before, self.done_before = (0, 0), time.time(), 0.0, 0, 0

    @property
    def tokens(self):
        return sum(w.tokens for w in self.writers.values())

    @property
    def seconds(self):
        return self.seconds_before + time.time() - self.started

    def resume(self):
        """Continue from OUT.partial/progress.json, if it counts a finished shard. Raises ValueError if it is one of other input or
        options, or damaged."""
        progress = read_progress(self.partial)
        try:
            if progress is None or not any(state["shards"] for state in progress["writers"].values()):
                return
            identity = self.documents.identity(progress["position"])
            if progress["options"] != self.options or progress["input"] != json.loads(json.dumps(identity)):
                raise ValueError("other input or options")
            for split, writer in self.writers.items():
                writer.restore(progress["writers"][split])
            self.documents.resume(progress["skipped"])
            self.position, self.seconds_before, self.done_before = tuple(progress["position"]), progress["seconds"], progress["done"]
        except (ValueError, KeyError, TypeError, IndexError, OSError):
            self.close()
            raise ValueError(f"{self.partial} holds an unfinished preparation of other input or with other options, or a damaged one: "
                             f"give the same command again to finish it, or discard it with --overwrite") from None
        self.tokens_before = self.tokens
        print(f"resuming {self.partial} after {sum(len(w.shards) for w in self.writers.values())} shards, {self.tokens:,} tokens",
              flush=True)

    def begin(self):
        """Empty OUT.partial of all but what was resumed, and mark it as ours."""
        known = {shard["name"] for w in self.writers.values() for shard in w.shards} | {w.name for w in self.writers.values() if w.file}
        if not known:
            self.save()
        for path in self.partial.iterdir():
            if path.name not in known | {"lock", "progress.json", "replaced"}:
                path.unlink()

    def save(self):
        """Write down how to continue from here."""
        write_whole(self.partial / "progress.json", json.dumps({
            "options": self.options, "input": self.documents.identity(self.position), "position": self.position,
            "done": self.documents.done, "seconds": self.seconds, "skipped": self.documents.skipped_before(self.position),
            "writers": {split: w.state() for split, w in self.writers.items()}}, indent=1), AGAIN)

    def write(self, chunks):
        """Write tokenized documents; save whenever a shard is finished."""
        shown = time.time()
        for chunk in chunks:
            for split, tokens, text_bytes, self.position in chunk:
                if self.writers[split].write(tokens, text_bytes):
                    self.save()
            if time.time() - shown > 1:
                shown = time.time()
                self.show_progress(shown - self.started)

    def show_progress(self, seconds):
        """A line with what is done, and, where the size of the input is known, how long the rest will take."""
        tokens, done, total = self.tokens - self.tokens_before, self.documents.done, self.documents.total
        rate = f"{tokens:,} tokens  {tokens / seconds:,.0f} tokens/s"
        if total:
            left = seconds * (total - done) / max(1, done - self.done_before)
            print(f"  {done / total:4.0%}  {rate}  about {left:.0f} s left", flush=True)
        else:
            print(f"  {done:,} documents  {rate}", flush=True)

    def finish(self, vocab_size):
        """Close the last shards and write meta.json, which is returned."""
        for split, writer in self.writers.items():
            writer.close()
            if not writer.shards:
                raise ValueError(f"none of the {sum(w.documents for w in self.writers.values()):,} documents fell into the {split} split "
                                 f"at --val-fraction {self.options['val_fraction']}: give more documents, or another fraction")
        self.position = self.documents.end()
        self.save()
        meta = {"format": 1, "tokenizer": self.options["tokenizer"], "vocab_size": vocab_size, "source": self.options["source"],
                "val_fraction": self.options["val_fraction"],
                "splits": {split: {"tokens": w.tokens, "bytes": w.bytes, "documents": w.documents, "shards": w.shards}
                           for split, w in self.writers.items()}}
        write_whole(self.partial / "meta.json", json.dumps(meta, indent=1), AGAIN)
        return meta

    def close(self):
        for writer in self.writers.values():
            if writer.file:
                with contextlib.suppress(OSError):  # closing flushes, and the disk may be full
                    writer.file.close()

    def give_up(self):
        """After an error: keep what can be resumed; before the first finished shard there is nothing."""
        self.close()
        if not any(w.shards for w in self.writers.values()):
            with contextlib.suppress(ValueError, OSError):
                discard(self.partial)


def take_up(partial, documents, options, dtype, overwrite):
    """The Preparation that OUT.partial holds, or a new one: if there is none, or with `overwrite` if it cannot be resumed."""
    work = Preparation(partial, documents, options, dtype)
    try:
        work.resume()
    except ValueError:
        if not overwrite:
            raise
        work = Preparation(partial, documents, options, dtype)
    return work


def prepare(files, out, encoding_name, source, val_fraction=0.01, field="text", max_document=2 ** 20,
            shard_tokens=100_000_000, workers=None, overwrite=False, skip_bad=False):
    """Tokenize files ([(path, given)] of find_files, or a HubInput) into the dataset folder `out`. Returns its meta.json as a
    dict. Whenever a shard is finished, OUT.partial/progress.json tells how to resume from there. Raises ValueError or OSError."""
    encoding, listed = get_encoding(encoding_name), isinstance(files, list)
    if encoding.eot_token is None:
        raise ValueError(f"--encoding {encoding_name}: text cannot be tokenized with it: choose bytes, gpt2 or another name")
    dtype = np.uint16 if encoding.n_vocab <= 2 ** 16 else np.uint32
    documents = Input(files, field, max_document, skip_bad) if listed else files
    place = Path(os.path.realpath(os.path.expanduser(out)))  # where a link leads
    partial = Path(f"{place}.partial")
    check_place(place, documents.places(), overwrite)
    if listed:
        documents.check()
        documents.max_document = max_document = cut_for_both_splits(files, field, max_document, skip_bad, val_fraction)
    options = {"tokenizer": encoding_name, "source": source, "val_fraction": val_fraction, "field": field,
               "max_document": max_document, "shard_tokens": shard_tokens}
    with locked(partial, out):
        if (partial / "replaced").exists() and not place.exists():  # killed between the two renames of the final move
            (partial / "replaced").rename(place)
        check_free(place, overwrite)
        work = take_up(partial, documents, options, dtype, overwrite)
        try:
            work.begin()
            work.write(map_in_order(lambda chunk: tokenize(chunk, encoding, val_fraction, dtype),
                                    in_chunks(documents.documents(work.position)), workers or os.cpu_count()))
            meta = work.finish(encoding.n_vocab)
            move_into_place(partial, place, overwrite)
        except BaseException as error:
            work.give_up()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise OSError(f"{partial} cannot be written ({error.strerror}): make room and {AGAIN}") from None
            raise
    print(f"{out}: {meta['splits']['train']['tokens']:,} training and {meta['splits']['val']['tokens']:,} validation tokens "
          f"({encoding_name}) from {sum(s['documents'] for s in meta['splits'].values()):,} documents in {work.seconds:.1f} s, "
          f"{work.tokens / work.seconds:,.0f} tokens/s")
    for line in documents.report():
        print(f"  skipped {line}")
    return meta


def prepare_builtin(out="data/stdlib", encoding="bytes", include_site_packages=False, **options):
    """The built-in dataset: the source of this Python's standard library, which every machine has."""
    roots = [sysconfig.get_paths()["stdlib"]]
    if include_site_packages:
        roots += [path for path in dict.fromkeys(sysconfig.get_paths()[key] for key in ("purelib", "platlib"))
                  if os.path.isdir(path) and not Path(path).is_relative_to(roots[0])]
    source = f"Python {sys.version.split()[0]} standard library{', site-packages' if include_site_packages else ''}"
    found = find_files(roots, site_packages=include_site_packages, say=lambda line: None)
    files = [(path, given) for path, given in found if text_suffix(path) == ".py"]
    print(f"preparing {out}: {source}, {len(files):,} files", flush=True)
    return prepare(files, out, encoding, source, **options)


def default_out(args):
    """data/NAME, after the source. Raises ValueError if its name has nothing before or after its dots."""
    if args.hf or args.paths:
        source = args.hf or os.path.realpath(os.path.expanduser(args.paths[0]))
        name = Path(source).name.lstrip(".")
        if not name:
            raise ValueError(f"{source} gives the dataset no name: choose one with --out")
        return f"data/{name}{'-' + args.subset if args.subset else ''}" if args.hf else f"data/{name.split('.')[0]}"
    encoding = "" if args.encoding in (None, "bytes") else f"-{args.encoding}"
    return f"data/stdlib{'-site' if args.include_site_packages else ''}{encoding}"


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
                        help="cut longer text files at a line end after so many characters (default: 1048576; less if a split were empty)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens a shard (default: 100000000)")
    parser.add_argument("--workers", type=int, help="threads (default: all cores)")
    parser.add_argument("--include-site-packages", action="store_true", help="built-in dataset: installed packages too")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--skip-bad", action="store_true", help="skip and count files and records without text, and damaged files")
    args, out = parser.parse_args(argv), None
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be anything
    try:
        for key, good in (("val_fraction", 0 < args.val_fraction < 1), ("max_document", args.max_document > 0),
                          ("shard_tokens", 0 < args.shard_tokens < 2 ** 31), ("workers", args.workers is None or args.workers > 0)):
            if not good:
                raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)} is out of range")
        if args.hf and args.paths:
            raise ValueError(f"--hf {args.hf} and {args.paths[0]}: one source at a time")
        out = args.out or default_out(args)
        options = {key: getattr(args, key) for key in ("val_fraction", "field", "max_document", "shard_tokens", "workers",
                                                       "overwrite", "skip_bad")}
        if args.hf:
            source = " ".join(filter(None, (args.hf, args.subset, args.split, args.revision)))
            hub = HubInput(args.hf, args.subset, args.split, args.revision, args.field, args.skip_bad)
            prepare(hub, out, args.encoding or "gpt2", source, **options)
        elif args.paths:
            prepare(find_files(args.paths), out, args.encoding or "gpt2", " ".join(args.paths), **options)
        else:
            prepare_builtin(out, args.encoding or "bytes", args.include_site_packages, **options)
    except (ValueError, OSError) as error:
        sys.exit("error: " + str(error).replace("\n", "\\n"))  # names of files and fields may hold line ends
    except KeyboardInterrupt:
        partial = f"{os.path.realpath(os.path.expanduser(out))}.partial" if out else ""
        kept = ": the same command resumes from the last finished shard" if os.path.exists(partial) else ", nothing unfinished was kept"
        print(f"interrupted{kept}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
