"""
Where text comes from: files, folders and Hugging Face datasets, one document after the other.

  find_files       the files of some paths, and what in their folders is not read
  read_documents   the documents of one file: a whole text, the lines of a .jsonl, the rows of a .parquet
  Input            all documents of many files, from any position on, and what was skipped
  HubInput         the same for a Hugging Face dataset
  is_validation    which split a document belongs to

What is no text at all (binary, empty, another encoding) is an error in a file given by name; in a folder it is skipped, counted
and said. A record without text and a data file that is damaged or has another field are errors in both; with --skip-bad they
are skipped, counted and said, too.
"""
import collections
import contextlib
import functools
import gzip
import hashlib
import importlib
import io
import json
import os
import zlib
from pathlib import Path

TEXT, LINES = (".txt", ".md", ".py"), (".jsonl", ".json")
SUFFIXES = (*TEXT, *LINES, ".parquet")
COMPRESSED = (".gz", ".zst")
SHORTEST_CUT = 256  # characters: text files are not cut shorter to give both splits a document


class NoText(ValueError):
    """A file that is no text at all: an error if it was named, skipped and counted if it was found in a folder."""

    def __init__(self, path, what):
        super().__init__(f"{path}: {what}")
        self.what = what


def text_suffix(path):
    """The suffix that says how to read the file, without .gz or .zst, in lower case: ".jsonl" for a.JSONL.gz."""
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).suffix.lower()


def optional(package, what):
    """Import an optional package."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise ValueError(f"{what} needs the package {name}: pip install {name}") from None


def find_files(paths, site_packages=True, say=print):
    """[(path, given)]: the files given by name, and those with a known suffix in the given folders, in sorted order. `given`
    is the path of `paths` by which each was found. What a folder holds besides, hidden files excepted, is said."""
    found, unread = [], collections.defaultdict(list)
    for given in (Path(os.path.expanduser(path)) for path in paths):
        if given.is_dir():
            found += walk(given, site_packages, unread)
        elif not os.path.lexists(given):
            raise FileNotFoundError(f"{given} does not exist")
        elif text_suffix(given) not in SUFFIXES:
            raise ValueError(f"{given}: {text_suffix(given) or 'a file without a suffix'} cannot be read: "
                             f"give {', '.join(SUFFIXES)}, or text with {' or '.join(COMPRESSED)} after it")
        elif not given.is_file():
            raise ValueError(f"{given} is not a regular file but {'a dangling link' if given.is_symlink() else 'a pipe or a device'}")
        else:
            found.append((given, given))
    for what, names in unread.items():
        say(f"  not read: {len(names):,} {what}: {names[0]}{', ...' if len(names) > 1 else ''}")
    if not found:
        raise ValueError(f"no {', '.join(SUFFIXES)} file in {', '.join(map(str, paths))}")
    return found


def walk(given, site_packages, unread):
    """(path, given) of every file below the folder `given` that can be read; `unread` takes the others: what they are -> paths."""
    closed = unread["folder(s) that cannot be opened"]
    for folder, folders, names in os.walk(given, onerror=lambda error: closed.append(error.filename)):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and
                            (site_packages or f not in ("site-packages", "dist-packages")))
        unread["linked folder(s); name a folder to read it"] += [p for p in (Path(folder, f) for f in folders) if p.is_symlink()]
        for path in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
            if text_suffix(path) not in SUFFIXES:
                unread["file(s) with other suffixes"].append(path)
            elif not path.is_file():
                unread["dangling link(s)" if path.is_symlink() else "pipe(s) or device(s)"].append(path)
            elif not os.access(path, os.R_OK):
                unread["file(s) without permission"].append(path)
            else:
                yield path, given
    for what in [what for what, names in unread.items() if not names]:
        del unread[what]


@contextlib.contextmanager
def open_text(path):
    """The file as UTF-8 text, and a function that tells how many bytes of the file on disk have been read."""
    with open(path, "rb") as raw:
        if path.suffix.lower() == ".gz":
            binary = gzip.open(raw)
        elif path.suffix.lower() == ".zst":
            binary = optional("pyarrow", f"{path}: reading .zst").CompressedInputStream(raw, "zstd")
        else:
            binary = contextlib.nullcontext(raw)
        with binary as plain:
            # newline="" keeps line ends as they are: tokens decode to the very bytes of the file. JSON may begin with a BOM
            encoding = "utf-8-sig" if text_suffix(path) in LINES else "utf-8"
            yield io.TextIOWrapper(plain, encoding=encoding, newline=""), raw.tell


def refuse(message):
    """What readers do with a record that holds no text, unless they are told to skip and count it."""
    raise ValueError(f"{message}; --skip-bad skips such and counts them")


def read_documents(path, field, max_document, bad=refuse):
    """(text, bytes of the file read so far) for each document. `bad` is called with one line on each record that has no text.
    Raises ValueError, one line, on a file that cannot be read to its end; NoText, if it is no text."""
    suffix = text_suffix(path)
    if suffix == ".parquet":
        yield from read_parquet(path, field, bad)
        return
    try:
        with open_text(path) as (text, position):
            for document in read_lines(path, text, field, bad) if suffix in LINES else read_pieces(path, text, max_document):
                yield document, position()
    except UnicodeDecodeError as error:
        utf16 = error.start == 0 and error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
        what = "not UTF-8 text but, by its byte-order mark, UTF-16" if utf16 else "not UTF-8 text: binary, or another encoding"
        raise NoText(path, what) if suffix in TEXT else ValueError(f"{path}: {what}") from None
    except (OSError, EOFError, zlib.error) as error:
        if path.suffix.lower() not in COMPRESSED or getattr(error, "errno", None):
            raise
        raise ValueError(f"{path}: not a complete {path.suffix} file ({str(error).partition(chr(10))[0]})") from None


def read_pieces(path, text, max_document):
    """A text file, cut at the first line end after max_document characters."""
    while part := text.read(max_document):
        if len(part) == max_document:
            part += text.readline(max_document)
        if "\0" in part:
            raise NoText(path, "has NUL bytes: binary, not text")
        yield part


def read_lines(path, text, field, bad):
    """The text in each line of a file that holds one JSON object a line."""
    first = True
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            record = error
        if first and (isinstance(record, list) or line.lstrip().startswith("[")):
            raise NoText(path, "a JSON array, not one JSON object a line (`jq -c '.[]' FILE` makes it so)")
        if first and isinstance(record, Exception) and text_suffix(path) == ".json":
            raise NoText(path, "not one JSON object a line")
        first = False
        if isinstance(record, Exception):
            bad(f"{path}, line {number}: not JSON ({record})")
        elif isinstance(record, dict) and isinstance(record.get(field), str):
            yield record[field].encode("utf-8", "replace").decode("utf-8")  # JSON can hold lone surrogates, UTF-8 cannot
        else:
            keys = [f"{key} (null)" if value is None else key for key, value in record.items()] if isinstance(record, dict) else []
            has = ", ".join(keys) or type(record).__name__
            bad(f"{path}, line {number}: no text in field {field!r} (it has: {has}): name another with --field")


def is_text(types, kind):
    """True if a column's type is string, large_string, string_view or a dictionary of them. types: pyarrow.types."""
    kind = kind.value_type if types.is_dictionary(kind) else kind
    checks = ("is_string", "is_large_string", "is_string_view")  # the last came with pyarrow 16
    return any(getattr(types, check)(kind) for check in checks if hasattr(types, check))


@contextlib.contextmanager
def open_parquet(path, field):
    """The ParquetFile at `path`. Raises ValueError, one line, if it has no column of text called `field`, or is damaged."""
    pyarrow, parquet = optional("pyarrow", f"{path}: reading .parquet"), optional("pyarrow.parquet", f"{path}: reading .parquet")
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if (count := schema.names.count(field)) > 1:
                raise ValueError(f"{path}: {count} columns are called {field!r}: rename one, or name another with --field")
            if not count:
                raise ValueError(f"{path}: no column {field!r} (it has: {', '.join(schema.names)}): name another with --field")
            if not is_text(pyarrow.types, kind := schema.field(field).type):
                raise ValueError(f"{path}: no text in column {field!r} but {kind}: name another with --field")
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file ({str(error).partition(chr(10))[0]})") from None


def read_parquet(path, field, bad):
    """(text, bytes of the file read so far, by its rows) for each row of a parquet file, a few rows in memory at a time."""
    size, number = path.stat().st_size, 0
    with open_parquet(path, field) as file:
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            for value in batch.column(0):
                number += 1
                try:
                    text, what = value.as_py(), f"null in column {field!r}"
                except UnicodeDecodeError:
                    text, what = None, "not UTF-8"
                if text is None:
                    bad(f"{path}, row {number}: {what}")
                else:
                    yield text, size * number // file.metadata.num_rows


class Input:
    """Every document of all files, in order, with progress (`done` of `total` bytes on disk) and what was skipped:
    (number of the file, what) -> how many. A position is (number of a file, documents of it)."""

    def __init__(self, files, field, max_document=2 ** 20, skip_bad=False):
        self.files, self.field, self.max_document, self.skip_bad = files, field, max_document, skip_bad
        self.sizes = [path.stat().st_size for path, _ in files]
        self.total, self.done, self.skipped = sum(self.sizes), 0, collections.Counter()

    def places(self):
        """The real paths of everything that is read, a folder standing for what it holds."""
        paths = {given for _, given in self.files} | {path for path, _ in self.files if path.is_symlink()}
        return {os.path.realpath(path) for path in paths}

    def check(self):
        """Raise what can be known before the work: a missing package, and what is wrong with a data file's first record."""
        for path, given in self.files:
            if text_suffix(path) == ".parquet" or path.suffix.lower() == ".zst":
                optional("pyarrow", f"{path}: reading {path.suffix}")
            try:
                if text_suffix(path) == ".parquet":
                    with open_parquet(path, self.field):
                        pass
                elif text_suffix(path) in LINES:
                    next(read_documents(path, self.field, self.max_document), None)
            except ValueError as error:
                if not self._skips(error, path, given):
                    raise

    def _skips(self, error, path, given):
        """A folder may hold a binary file or two; a file asked for by name must be text."""
        return self.skip_bad or (isinstance(error, NoText) and path != given)

    def identity(self, position):
        """What must be the same for a position in the input to mean the same: the files up to it, their sizes and times."""
        return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path, _ in self.files[:position[0] + 1]]

    def end(self):
        return len(self.files), 0

    def skipped_before(self, position):
        """What was skipped in the files before the position's, which a resumed preparation reads from its start."""
        return [[number, what, count] for (number, what), count in self.skipped.items() if number < position[0]]

    def resume(self, skipped):
        self.skipped = collections.Counter({(number, what): count for number, what, count in skipped})

    def bad_record(self, number, message):
        if not self.skip_bad:
            refuse(message)
        self.skipped[number, "bad record(s)"] += 1

    def documents(self, position=(0, 0)):
        """(text, position after it) for each document after `position`."""
        first, skip = position
        before = sum(self.sizes[:first])
        for number, (path, given) in enumerate(self.files[first:], first):
            documents = 0
            try:
                for text, read in read_documents(path, self.field, self.max_document, functools.partial(self.bad_record, number)):
                    if text:
                        documents += 1
                        self.done = before + read
                        if number > first or documents > skip:
                            yield text, (number, documents)
                if not documents and not self.skipped[number, "bad record(s)"]:
                    raise NoText(path, "empty: no document in it")
            except ValueError as error:
                if not self._skips(error, path, given):
                    raise
                what = error.what if isinstance(error, NoText) else "cannot be read"
                self.skipped[number, f"{'end(s) of file(s)' if documents else 'file(s)'}, {what}"] = 1
            before += self.sizes[number]
            self.done = before

    def report(self):
        """A line for each kind of thing that was skipped: how many, and where the first is."""
        for what in sorted({what for _, what in +self.skipped}):
            counts = {number: count for (number, w), count in self.skipped.items() if w == what and count}
            yield f"{sum(counts.values()):,} {what}: {self.files[min(counts)][0]}{', ...' if len(counts) > 1 else ''}"


class HubInput:
    """Every document of a Hugging Face dataset, by its name there or a local folder, streamed by the package `datasets`.
    A position is (records, bad records among them)."""

    def __init__(self, name, subset, split, revision, field, skip_bad=False):
        datasets = optional("datasets", "--hf")
        self.name, self.field, self.wanted, self.skip_bad = os.path.expanduser(name), field, [name, subset, split, revision], skip_bad
        self.done, self.bad = 0, 0
        try:
            self.dataset = datasets.load_dataset(self.name, subset, split=split, revision=revision, streaming=True)
            splits = self.dataset.info.splits or {}
            self.total = splits[split].num_examples if split in splits else 0  # documents; 0: unknown
        except Exception as error:  # it lets whatever its file systems and HTTP libraries raise through
            raise self._one_line(error) from None

    def _one_line(self, error):
        return ValueError(f"--hf {self.name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")

    def places(self):
        return {os.path.realpath(self.name)} if os.path.exists(self.name) else set()

    def identity(self, position):
        return self.wanted

    def end(self):
        return self.done, self.bad

    def skipped_before(self, position):
        return position[1]

    def resume(self, skipped):
        self.bad = skipped

    def documents(self, position=(0, 0)):
        self.done, self.bad = position
        records = iter(self.dataset.skip(position[0]))
        while True:
            try:
                record = next(records, None)
            except Exception as error:
                raise self._one_line(error) from None
            if record is None:
                return
            self.done += 1
            text = record.get(self.field)
            if not isinstance(text, str):
                self.bad += 1
                if not self.skip_bad:
                    refuse(f"--hf {self.name}, document {self.done}: no text in field {self.field!r} (it has: {', '.join(record)}): "
                           f"name another with --field")
            elif text:
                yield text.encode("utf-8", "replace").decode("utf-8"), (self.done, self.bad)

    def report(self):
        return [f"{self.bad:,} bad record(s)"] if self.bad else []


def is_validation(text, val_fraction):
    """True for about val_fraction of all documents, by a hash of the text alone."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < val_fraction * 2 ** 64


def cut_for_both_splits(files, field, max_document, skip_bad, val_fraction):
    """The length at which text files are cut into documents: max_document, or so much less that both splits get a document.
    Reads until both have one. Raises ValueError if that cannot be."""
    wanted = max_document
    while True:
        found, count = set(), 0
        for text, _ in Input(files, field, max_document, skip_bad).documents():
            found.add(is_validation(text, val_fraction))
            count += 1
            if len(found) == 2:
                if max_document < wanted:
                    print(f"  text files are cut into documents of about {max_document:,} characters, not {wanted:,}, or one split "
                          f"would have none (--max-document, --val-fraction)", flush=True)
                return max_document
        if max_document // 4 < SHORTEST_CUT or not any(text_suffix(path) in TEXT for path, _ in files):
            raise ValueError(f"none of the {count:,} documents fell into the {'train' if True in found else 'val'} split at "
                             f"--val-fraction {val_fraction}: give more documents, or another fraction")
        max_document //= 4
