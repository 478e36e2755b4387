"""
Proves that a lock is held by one process at a time, and is free when that process has ended, also
where the file system has no flock.
"""
import errno
import fcntl
import os
import socket
import subprocess

import pytest

from lib.lock import hold_lock


@pytest.fixture(params=[None, errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def flock(request, monkeypatch):
    """flock as it is, and as a file system without it answers."""
    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    if request.param:
        monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_lock_is_held_once_and_leaves_nothing(tmp_path, flock, monkeypatch):
    path = tmp_path / "lock"
    with hold_lock(path, "busy"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", os.getppid)  # the question is another process's
            with pytest.raises(ValueError, match="^busy"):
                with hold_lock(path, "busy"):
                    pass
        assert path.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["{}\n{}\n", "{}\n{}\n123456\n"])
def test_the_lock_of_a_process_that_has_ended_here_is_taken_over(tmp_path, flock, content):
    """The file as the package filelock writes it; its newer versions add a third line."""
    path, ended = tmp_path / "lock", subprocess.Popen(["true"])
    ended.wait()
    for pid in (ended.pid, os.getpid()):  # a container may give the new process the old pid
        path.write_text(content.format(pid, socket.gethostname()), encoding="utf-8")
        with hold_lock(path, "busy"):
            pass
        assert not path.exists()


@pytest.mark.parametrize("content, message", [
    (f"1\n{socket.gethostname()}\n", f"busy; if process 1 on {socket.gethostname()} has ended"),
    ("7\nanother-machine\n", "busy; if process 7 on another-machine has ended, remove "),
    ("my own notes", "lock is not a lock file of this program: move it away"),
])
def test_another_lock_is_left_alone(tmp_path, flock, content, message):
    path = tmp_path / "lock"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        with hold_lock(path, "busy"):
            pass
    assert path.read_text(encoding="utf-8") == content
