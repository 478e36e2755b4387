"""
Where text comes from: files, folders and Hugging Face datasets, one document after the other.

  find_files       the files to read, of some paths
  read_documents   the documents of one file: pieces of a text, or the lines of a .jsonl
  FileInput        every document of many files, from any position on
  HubInput         the same for a Hugging Face dataset

A text file that cannot be read as UTF-8 is an error if it was given by name; it is skipped and
counted if it was found in a folder. A record without text or a damaged .jsonl is an error in both
cases. With --skip-bad all of these are skipped and counted.
"""
import gzip
import io
import json
import os
import zlib
from pathlib import Path

TEXT, LINES = (".txt", ".md", ".py"), ".jsonl"
KINDS = f"{', '.join(TEXT)}, {LINES}, or one of these with .gz after it"


def text_suffix(path):
    """The suffix that decides how to read a file, in lower case: ".jsonl" for a.JSONL.gz."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def is_readable(path):
    """True for a regular file of a known kind that this user may read. Nothing is opened."""
    known = text_suffix(path) in (*TEXT, LINES)
    return known and path.is_file() and os.access(path, os.R_OK)


def find_files(paths, site_packages=True, quiet=False):
    """[(path, given)]: the files to read, each with the path of `paths` that led to it, sorted.

    A printed line counts what else the folders hold. Linked folders and hidden files are not read.
    Raises FileNotFoundError, or ValueError on a path that cannot be read."""
    found, unread = [], []
    for given in (Path(os.path.expanduser(path)) for path in paths):
        if given.is_dir():
            found += walk(given, site_packages, unread)
        elif not os.path.lexists(given):
            raise FileNotFoundError(f"{given} does not exist")
        elif not is_readable(given):
            raise ValueError(f"{given} cannot be read: give a file that is {KINDS}. For parquet "
                             f"and other formats: python prepare_data.py --hf {given.parent}")
        else:
            found.append((given, given))
    if unread and not quiet:
        print(f"  not read: {len(unread):,} files and linked folders; the first is {unread[0]}")
    if not found:
        raise ValueError(f"no file in {', '.join(map(str, paths))} is {KINDS}. For other formats: "
                         f"--hf FOLDER")
    return found


def walk(given, site_packages, unread):
    """Yield (path, given) for each readable file below a folder; add the others to `unread`."""
    left_out = () if site_packages else ("site-packages", "dist-packages")

    def on_error(error):
        unread.append(error.filename)

    for folder, folders, names in os.walk(given, onerror=on_error):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in left_out)
        unread += [path for path in (Path(folder, f) for f in folders) if path.is_symlink()]
        for path in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
            if is_readable(path):
                yield path, given
            else:
                unread.append(path)


def read_documents(path, field, max_document, on_bad_record):
    """Yield (text, bytes of the file read so far) for each document that is not empty.

    on_bad_record(line) is called for each record without text. Raises ValueError if the file is
    not text, or cannot be read to its end."""
    is_lines = text_suffix(path) == LINES
    encoding = "utf-8-sig" if is_lines else "utf-8"  # JSON may begin with a byte-order mark
    try:
        with open(path, "rb") as raw:
            binary = gzip.open(raw) if path.suffix.lower() == ".gz" else raw
            # newline="" keeps line ends as they are: tokens decode to the very bytes of the file
            text = io.TextIOWrapper(binary, encoding=encoding, newline="")
            if is_lines:
                documents = read_lines(path, text, field, on_bad_record)
            else:
                documents = read_pieces(path, text, max_document)
            for document in documents:
                if document:
                    yield document, raw.tell()
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not UTF-8 text, or damaged ({error})") from None


def read_pieces(path, text, max_document):
    """A text file, cut at the first line end after max_document characters."""
    while piece := text.read(max_document):
        if len(piece) == max_document:
            piece += text.readline(max_document)
        if "\0" in piece:
            raise ValueError(f"{path}: not text but binary: it has NUL bytes")
        yield piece


def read_lines(path, text, field, on_bad_record):
    """The text of each line of a file with one JSON object a line."""
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            document = text_of(json.loads(line), field)
        except (ValueError, RecursionError) as error:
            reason = error if type(error) is ValueError else "not JSON"
            on_bad_record(f"{path}, line {number}: {reason}")
        else:
            yield document


def text_of(record, field):
    """The text of a record. Raises ValueError if its field has none."""
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        has = ", ".join(record) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise ValueError(f"no text in field {field!r} (it has: {has}): name another with --field, "
                         f"or skip and count such records with --skip-bad")
    return text.encode("utf-8", "replace").decode("utf-8")  # JSON can hold lone surrogates


class FileInput:
    """Every document of `files`, as find_files returns them.

    A position is (number of a file, documents read from it). `done` of `total` bytes on disk have
    been read. `skipped` counts files and records, `first_skipped` is a line about the first."""

    def __init__(self, files, field="text", max_document=2 ** 20, skip_bad=False):
        self.files, self.field, self.skip_bad = files, field, skip_bad
        self.max_document = max_document
        self.folders = {given for _, given in files if given.is_dir()}
        self.sizes = [path.stat().st_size for path, _ in files]
        self.done, self.total, self.skipped = 0, sum(self.sizes), 0

    def skip(self, reason, allowed=False):
        """Count what holds no text. Raises ValueError with the reason unless that is allowed."""
        if not (self.skip_bad or allowed):
            raise ValueError(reason) from None
        self.first_skipped = self.first_skipped if self.skipped else reason
        self.skipped += 1

    def documents(self, position=(0, 0)):
        """Yield (text, position after it) for each document after `position`."""
        first, already_read = position
        self.skipped, before = 0, sum(self.sizes[:first])
        for number, (path, given) in enumerate(self.files[first:], first):
            texts = read_documents(path, self.field, self.max_document, self.skip)
            try:
                for count, (text, read) in enumerate(texts, 1):
                    self.done = before + read
                    if number > first or count > already_read:
                        yield text, (number, count)
            except ValueError as error:
                self.skip(str(error), allowed=path != given and text_suffix(path) in TEXT)
            before += self.sizes[number]

    def identity(self, position):
        """What must not change for `position` to mean the same: a line for each file up to it."""
        stats = [(path, path.stat()) for path, _ in self.files[:position[0] + 1]]
        # whole seconds: some file systems forget the rest
        return [f"{os.path.realpath(path)} ({stat.st_size} bytes, time {int(stat.st_mtime)})"
                for path, stat in stats]


class HubInput:
    """Every document of a Hugging Face dataset, by its name there or a local folder, streamed by
    the package datasets. A position is (records, 0). The rest is as in FileInput."""

    skip = FileInput.skip

    def __init__(self, name, subset, split, revision, field="text", skip_bad=False):
        try:
            import datasets
        except ImportError:
            raise ValueError("--hf needs the package datasets: pip install datasets") from None
        path = os.path.realpath(os.path.expanduser(name))
        self.folders = {Path(path)} if os.path.isdir(path) else set()
        self.name = path if self.folders else name
        self.wanted = {"subset": subset, "split": split, "revision": revision}
        self.field, self.skip_bad, self.done, self.skipped = field, skip_bad, 0, 0
        self.dataset = self.attempt(lambda: datasets.load_dataset(
            self.name, subset, split=split, revision=revision, streaming=True))
        splits = self.attempt(lambda: self.dataset.info.splits) or {}
        self.total = splits[split].num_examples if split in splits else 0  # 0: unknown

    def attempt(self, function):
        """function(). Raises a ValueError of one line for whatever datasets raises."""
        try:
            return function()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ValueError(f"--hf {self.name}: {reason}") from None

    def documents(self, position=(0, 0)):
        """Yield (text, position after it) for each document after `position`."""
        self.done, self.skipped = position[0], 0
        records = iter(self.dataset.skip(self.done))
        while (record := self.attempt(lambda: next(records, None))) is not None:
            self.done += 1
            try:
                text = text_of(record, self.field)
            except ValueError as error:
                self.skip(f"--hf {self.name}, record {self.done}: {error}")
            else:
                if text:
                    yield text, (self.done, 0)

    def identity(self, position):
        """What must not change for `position` to mean the same."""
        return [f"--hf {self.name} {self.wanted}"]
