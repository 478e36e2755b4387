"""A printed line that cannot end a program."""
import contextlib
import os
import sys


def say(text, stream=None):
    """Print a line to standard output or `stream`, with an escape for what it cannot encode. A
    closed pipe or a full disk behind it ends no work: from then on its output is dropped."""
    stream = sys.stdout if stream is None else stream
    try:
        print(encodable(text, stream, "backslashreplace"), file=stream, flush=True)
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def encodable(text, stream, errors):
    """The text as the stream can show it; `errors` tells what stands for the rest, as in encode."""
    encoding = getattr(stream, "encoding", None) or "utf-8"  # None: closed; print does nothing
    return text.encode(encoding, errors).decode(encoding)
