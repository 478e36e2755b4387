"""
One process at a time: a lock file that is free again when its process ends, however it ends.

The lock is the operating system's (flock). Where a file system has none (Lustre, some NFS), the
file itself is the lock: it holds the process number and the machine's name, a line each, as the
package filelock writes them, too.
"""
import contextlib
import errno
import fcntl
import os
import re
import socket

NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def hold_lock(path, busy):
    """
    Hold the lock file `path`, a Path, while the context lasts; then remove it.

    Raises ValueError with the line `busy` if another process holds it, and names the file to remove
    if it cannot know whether that process has ended. Raises OSError if the file cannot be written.
    """
    remove_if_stale(path, busy)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(busy) from None
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            os.write(descriptor, f"{os.getpid()}\n{socket.gethostname()}\n".encode())
        if not (path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))):
            raise ValueError(busy)  # its last holder has just removed it
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # missing: prepare_data.py has renamed the folder
    finally:
        os.close(descriptor)


def remove_if_stale(path, busy):
    """Remove the lock file of a process that has ended on this machine. Raises as hold_lock."""
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    if not content:
        return  # flock's file, which only the operating system knows to be free

    record = re.fullmatch(r"([1-9]\d{0,8})\n(.+)\n(\d+\n)?", content)
    if not record:
        raise ValueError(f"{path} is not a lock file of this program: move it away")
    pid, host = int(record[1]), record[2]
    if host != socket.gethostname() or (pid != os.getpid() and is_running(pid)):
        raise ValueError(f"{busy}; if process {pid} on {host} has ended, remove {path}")
    path.unlink()


def is_running(pid):
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM  # another user's process
    return True
