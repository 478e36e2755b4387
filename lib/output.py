"""A printed line that cannot end a program."""
import contextlib
import os
import sys


def say(text, stream=None):
    """Print a line to standard output or `stream`. A closed pipe or a full disk behind it ends
    no work: from then on its output is dropped."""
    stream = sys.stdout if stream is None else stream
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
