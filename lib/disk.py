"""
What the disk may and may not do to us: a file is written whole or not at all.

  write_whole    text or bytes to a temporary file, flushed, renamed into place, the folder flushed
  sync_folder    make a rename survive a power cut
"""
import os
from pathlib import Path


def sync_folder(folder):
    """Flush a folder's list of files to the disk: a file renamed in it stays renamed after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path, content, advice="make room and try again"):
    """Write `content`, text, bytes, or a function that writes to an open binary file, so that `path` holds all of it or what it
    held before. Raises OSError, one line that ends with `advice`; no temporary file stays."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            if callable(content):
                content(f)
            else:
                f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error  # torch.save wraps the operating system's error in one of its own
        while cause.__context__ is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if isinstance(cause, OSError):
            raise OSError(f"{path} cannot be written ({cause.strerror or cause}): {advice}") from None
        raise
    sync_folder(path.parent)
