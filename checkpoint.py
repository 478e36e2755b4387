"""
Checkpoints that survive what happens to machines.

A checkpoint is `out_dir/ckpt_0001000.pt`, a torch.save of plain tensors, numbers and strings: format version, step, model,
optimizer, configuration, position in the data, random-number states. It is written to a temporary file, flushed to the
disk, and renamed: under its final name it is always whole. Reading trusts nothing: every byte is checked against the
archive's own CRC-32, then loaded with weights_only=True, so a hostile file cannot run code.
"""
import os
import re
import zipfile
from pathlib import Path

import torch

from disk import sync_folder as fsync_folder

FORMAT = 2


def checkpoints(out_dir):
    """The finished checkpoints in out_dir, oldest first."""
    return sorted(p for p in Path(out_dir).glob("ckpt_*.pt") if re.fullmatch(r"ckpt_\d+\.pt", p.name))


def save_checkpoint(out_dir, step, state, keep):
    """Write `state` (a dict that weights_only can load) as the checkpoint of `step`, then delete the oldest so that `keep`
    remain. Raises OSError, one line, if it cannot be written, on a full disk say: older checkpoints stay, nothing half-written
    does. A checkpoint with a later step (a damaged one that a resume passed over) is left alone and does not count."""
    path = Path(out_dir) / f"ckpt_{step:07d}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save({"format": FORMAT, "step": step, **state}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):  # torch.save buries the first in the second
            cause = error
            while cause.__context__ is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
            raise OSError(f"the checkpoint of step {step} cannot be written to {out_dir} ({reason}): make room and continue with "
                          f"--resume; the older checkpoints stand") from None
        raise
    fsync_folder(out_dir)
    for old in [p for p in checkpoints(out_dir) if p <= path][:-keep]:
        old.unlink()
    return path


def load_checkpoint(path):
    """The checkpoint as a dict, on the CPU. Raises ValueError, one line, if it is not whole or not ours."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the bytes of {damaged} have changed")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"not a checkpoint of format {FORMAT}")
        for key in ("step", "model", "config", "tokenizer"):
            if key not in state:
                raise ValueError(f"it has no {key!r}")
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged archive can fail in as many ways as there are bytes
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path} cannot be used: {reason[0]}") from None
    return state


def newest_checkpoint(out_dir, say=print):
    """(path, state) of the newest checkpoint that is whole, or None if out_dir has no checkpoint at all. Damaged ones are
    passed over, saying so. Raises ValueError if all are damaged."""
    found = checkpoints(out_dir)
    for path in reversed(found):
        try:
            return path, load_checkpoint(path)
        except ValueError as error:
            say(f"passing over a checkpoint: {error}")
    if found:
        raise ValueError(f"{out_dir}: none of its {len(found)} checkpoints is whole: remove them, or start again with --overwrite")
    return None
