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

from lib.output import say

TEXT, LINES = (".txt", ".md", ".py"), ".jsonl"
KINDS = f"{', '.join(TEXT)}, {LINES}, or one of these with .gz after it"


def text_suffix(path):
    """The suffix that decides how to read a file, in lower case: ".jsonl" for a.JSONL.gz."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def is_readable(path):
    """True for a regular file of a known kind that this user may read. Nothing is opened."""
    known = text_suffix(path) in (*TEXT, LINES)
    return known and path.is_file() and os.access(path, os.R_OK)


def find_files(paths):
    """[(path, given)]: the files to read, each with the path of `paths` that led to it, sorted.

    A printed line counts what else the folders hold. Linked folders and hidden files are not read.
    Raises FileNotFoundError, or ValueError on a path that cannot be read."""
    found, unread = [], []
    for given in (Path(os.path.expanduser(path)) for path in paths):
        if given.is_dir():
            found += walk(given, unread)
        elif not os.path.lexists(given):
            raise FileNotFoundError(f"{given} does not exist")
        elif not is_readable(given):
            raise ValueError(f"{given} cannot be read: give a file that is {KINDS}. For parquet "
                             f"and other formats: python prepare_data.py --hf {given.parent}")
        else:
            found.append((given, given))
    if unread:
        say(f"  not read: {len(unread):,} files and linked folders; the first is {unread[0]}")
    if not found:
        raise ValueError(f"no file in {', '.join(map(str, paths))} is {KINDS}. For other formats: "
                         f"--hf FOLDER")
    return found


def walk(given, unread, left_out=()):
    """Yield (path, given) for each readable file below a folder; add the others to `unread`.
    Folders with a name of `left_out` are left out."""
    tree = os.walk(given, onerror=lambda error: unread.append(error.filename))
    for folder, folders, names in tree:
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in left_out)
        unread += [path for path in (Path(folder, f) for f in folders) if path.is_symlink()]
        for path in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
            if is_readable(path):
                yield path, given
            else:
                unread.append(path)


def read_documents(path, raw, field, max_document, on_bad_record):
    """Yield the text of each document of the file at `path`, open in binary as `raw`.

    on_bad_record(line) is called for each record without text. Raises ValueError if the file is
    not text, or cannot be read to its end."""
    is_lines = text_suffix(path) == LINES
    encoding = "utf-8-sig" if is_lines else "utf-8"  # JSON may begin with a byte-order mark
    binary = gzip.open(raw) if path.suffix.lower() == ".gz" else raw
    # newline="" keeps line ends as they are: tokens decode to the very bytes of the file
    text = io.TextIOWrapper(binary, encoding=encoding, newline="")
    try:
        if is_lines:
            yield from texts_of(text, f"{path}, line", field, on_bad_record)
        else:
            yield from read_pieces(path, text, max_document)
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


def texts_of(records, name, field, on_bad_record):
    """The text of each record: a dictionary, or a line of JSON. An empty line has an empty text."""
    for number, record in enumerate(records, 1):
        try:
            if isinstance(record, str):
                record = json.loads(record) if record.strip() else {field: ""}
        except (ValueError, RecursionError):
            on_bad_record(f"{name} {number}: not JSON")
            continue

        text = record.get(field) if isinstance(record, dict) else None
        if isinstance(text, str):
            yield text.encode("utf-8", "replace").decode("utf-8")  # JSON can hold lone surrogates
            continue
        has = ", ".join(record) if isinstance(record, dict) else f"a {type(record).__name__}"
        problem = f"no text in field {field!r} (it has: {has})"
        if text is not None:
            problem = f"the field {field!r} has the type {type(text).__name__}, and is no text"
        on_bad_record(f"{name} {number}: {problem}: name another with --field, or skip and count "
                      f"such records with --skip-bad")


def describe_file(path):
    """A line that changes with the file; whole seconds, because some file systems forget parts."""
    stat = path.stat()
    return f"{os.path.realpath(path)} ({stat.st_size} bytes, time {int(stat.st_mtime)})"


class FileInput:
    """Every document of `files`, as find_files returns them.

    A position is (number of a file, documents read from it). `done` of `total` bytes on disk have
    been read. `skipped` counts files and records, and `first_skipped` is a line about the first.
    `folders` are those that were given."""

    def __init__(self, files, field="text", max_document=2 ** 20, skip_bad=False):
        self.files, self.field, self.max_document = files, field, max_document
        self.skip_bad, self.skipped = skip_bad, 0
        self.folders = {given for _, given in files if given.is_dir()}
        self.done, self.total = 0, sum(path.stat().st_size for path, _ in files if path.is_file())

    def skip(self, reason, allowed=False):
        """Count what holds no text. Raises ValueError with the reason unless that is allowed."""
        if not (self.skip_bad or allowed):
            raise ValueError(reason) from None
        self.first_skipped = self.first_skipped if self.skipped else reason
        self.skipped += 1

    def describe_skipped(self):
        return f"skipped {self.skipped:,} files or records: {self.first_skipped}, ..."

    def read(self, path):
        before = self.done
        with open(path, "rb") as raw:
            for text in read_documents(path, raw, self.field, self.max_document, self.skip):
                self.done = before + raw.tell()
                yield text

    def documents(self, position=(0, 0)):
        """Yield (text, position after it) for each document after `position` that has text."""
        first, already_read = position
        self.done, self.skipped = sum(path.stat().st_size for path, _ in self.files[:first]), 0
        for number, (path, given) in enumerate(self.files[first:], first):
            try:
                for count, text in enumerate(self.read(path), 1):
                    if text and (number > first or count > already_read):
                        yield text, (number, count)
            except ValueError as error:
                self.skip(str(error), allowed=path != given and text_suffix(path) in TEXT)

    def identity(self, position):
        """What must not change for `position` to mean the same: a line for each file up to it."""
        return [describe_file(path) for path, _ in self.files[:position[0] + 1]]


class HubInput(FileInput):
    """Every document of a Hugging Face dataset, by its name there or a local folder, streamed by
    the package datasets. It counts as one file. Of a name on the hub the commit is asked for, and
    no other is read."""

    def __init__(self, name, subset, split, revision, field="text", skip_bad=False):
        path, self.local_files = Path(os.path.realpath(os.path.expanduser(name))), []
        self.name = name
        if path.is_dir():
            self.name = str(path)
            files = [file for file in sorted(path.rglob("*")) if file.is_file()
                     and not any(part.startswith(".") for part in file.relative_to(path).parts)]
            self.local_files = [describe_file(file) for file in files]
        else:
            revision = commit_of(name, revision)
        super().__init__([(Path(self.name), Path(self.name))], field, skip_bad=skip_bad)
        self.wanted = {"name": subset, "split": split, "revision": revision}

    def records(self):
        """Raises an OSError of one line for whatever the package datasets raises."""
        try:
            import datasets
            yield from datasets.load_dataset(self.name, **self.wanted, streaming=True)
        except ImportError as error:
            raise OSError(f"--hf {self.name}: {error}: pip install {error.name}") from None
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise OSError(f"--hf {self.name}: {reason}") from None

    def read(self, _):
        return texts_of(self.records(), f"--hf {self.name}, record", self.field, self.skip)

    def identity(self, _):
        """What must not change for a position to mean the same."""
        return [f"--hf {self.name} {self.wanted}", *self.local_files]


def commit_of(name, revision):
    """The commit that the hub gives for a dataset's revision; `revision` where it does not."""
    try:
        import huggingface_hub
        return huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=20).sha
    except Exception:  # the package datasets will say what is wrong
        return revision
