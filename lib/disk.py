"""
Files that are written whole or not at all, and a lock on a folder.

  write_whole    text or bytes to a temporary file, flushed, renamed into place, the folder flushed
  sync_folder    make a rename survive a power cut
  hold           a lock that ends with the process, however the process ends
"""
import errno
import fcntl
import os
import platform
from pathlib import Path

NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # of a folder: CIFS and others
NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # Lustre, some NFS
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
    advice = f"make room and {advice}" if error.errno in NO_ROOM else advice
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


def hold(path):
    """Lock the file `path`, made if need be. Returns what `release` takes.

    Where the file system has no flock, the file names the process that holds it, and the lock
    of a process of this machine that has ended is taken over. Raises BlockingIOError if another
    process holds it; without an errno, its text says which file to remove."""
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_FLOCK:
            file.close()
            raise
        file.seek(0)
        holder = file.read().split()  # process id and machine
        if holder and (holder[-1] != platform.node() or is_alive(holder[0])):
            file.close()
            raise BlockingIOError(f"remove {path} if process {' of '.join(holder)} "
                                  f"has ended") from None
        file.truncate(0)
        print(os.getpid(), platform.node(), file=file, flush=True)
    return file


def release(file):
    """Give up what `hold` returned."""
    file.seek(0)
    if file.read().split()[:1] == [str(os.getpid())]:
        file.truncate(0)
    file.close()


def is_alive(process_id):
    """True if a process of this machine has this id, or if this is no id."""
    try:
        os.kill(int(process_id), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, OSError):
        pass
    return True
