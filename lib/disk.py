"""
Files that are written whole or not at all.

  write_whole    text or bytes to a temporary file, flushed, renamed into place, the folder flushed
  sync_folder    make a rename survive a power cut
"""
import errno
import os
from pathlib import Path

NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # of a folder: CIFS and others
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def sync_folder(folder):
    """Flush a folder's list of files, where the file system can. Raises OSError with its path."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise OSError(error.errno, error.strerror, str(folder)) from None
    finally:
        os.close(descriptor)


def cannot_write(path, error, advice):
    """The OSError that says so in one line; it asks for room only where room is missing."""
    if not path.parent.is_dir():
        advice = f"there is no folder {path.parent}"
    elif error.errno in NO_ROOM:
        advice = f"make room and {advice}"
    return OSError(f"{path} cannot be written ({error.strerror or error}): {advice}")


def write_whole(path, content, advice="try again"):
    """Write text, bytes, or what the function `content` writes to an open binary file.

    `path` then holds all of it or what it held before, and no temporary file stays. Raises
    OSError, whose one line ends with `advice`."""
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
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error  # torch.save wraps the operating system's error in one of its own
        while cause.__context__ is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if isinstance(cause, OSError):
            raise cannot_write(path, cause, advice) from None
        raise
