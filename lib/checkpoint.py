"""
Checkpoints: written whole, validated on load, and nothing in them runs code.

  save_checkpoint     write one, then delete the oldest
  load_checkpoint     read one: format number and every byte against its CRC-32
  newest_checkpoint   the newest that is whole
  load_weights        its weights into a model, by name and shape
  changed_keys        what a resumed run has changed, and may
"""
import re
import zipfile
from pathlib import Path

import torch

from lib.config import to_dict
from lib.disk import write_whole
from lib.output import say

FORMAT = 4
NAME = re.compile(r"ckpt_(\d{7}|[1-9]\d{7,})\.pt")
# the keys of the model that a resumed run may change
MAY_CHANGE = {"recompute", "load_balance_coef", "router_z_coef"}


def checkpoints(out_dir):
    """The checkpoints in out_dir, oldest first. Files of other names are not ours."""
    found = [p for p in Path(out_dir).glob("ckpt_*.pt") if NAME.fullmatch(p.name)]
    return sorted(found, key=step_of)


def step_of(path):
    return int(path.stem[5:])


def save_checkpoint(out_dir, step, state, keep):
    """Write `state` as the checkpoint of `step`, then delete the oldest so that `keep` remain, and
    what a killed process left half-written.

    state: {"model": {name: tensor}, "optimizer": {name: {key: tensor}}, "config": {key: value},
    "tokenizer": str, "data": {"sequences": seen so far, "train_tokens": of the dataset},
    "seconds": of training so far}.

    Raises OSError, one line, if it cannot be written. A checkpoint of a later step, a damaged
    one that a resume passed over, is left alone and does not count."""
    path = Path(out_dir) / f"ckpt_{step:07d}.pt"
    write_whole(path, lambda f: torch.save({"format": FORMAT, "step": step, **state}, f),
                "continue with --resume; the older checkpoints are intact")
    old = [p for p in checkpoints(out_dir) if step_of(p) <= step][:-keep]
    for file in (*old, *Path(out_dir).glob("ckpt_*.pt.tmp")):
        file.unlink()
    return path


def check_finite(step, state):
    """Raise FloatingPointError if a tensor of {name: {key: tensor}} is not finite."""
    if not all(t.isfinite().all() for tensors in state.values() for t in tensors.values()):
        raise FloatingPointError(f"the weights after {step} steps were not finite: stopped, and "
                                 f"not saved; resume with a lower --learning_rate")


def load_checkpoint(path):
    """The state that save_checkpoint wrote, with "step", on the CPU.

    Raises ValueError, one line, if the file is damaged or not a checkpoint of ours."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the bytes of {damaged} have changed")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"not a checkpoint of format {FORMAT}")
        return state
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged archive can fail in as many ways as there are bytes
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path} cannot be used: {reason[0]}") from None


def newest_checkpoint(out_dir, stream=None):
    """(path, state) of the newest checkpoint that is whole, or None if out_dir has none at all.

    Prints which damaged ones it passes over. Raises ValueError if all are damaged."""
    found = checkpoints(out_dir)
    for path in reversed(found):
        try:
            return path, load_checkpoint(path)
        except ValueError as error:
            say(f"passing over a checkpoint: {error}", stream)
    if found:
        raise ValueError(f"{out_dir}: none of its {len(found)} checkpoints is whole: "
                         f"choose another --out_dir")
    return None


def load_weights(model, state, path):
    """A checkpoint's weights into the model. Raises ValueError if a name or a shape differs."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be used: {reason} Use the code that wrote it") from None


def changed_keys(config, dataset, path, state):
    """["learning_rate=0.001 (was 0.002)", ...] of a resumed run. Raises ValueError if a key has
    changed that makes it another run."""
    was = {**state["config"], **state["data"], "tokenizer": state["tokenizer"]}
    now = {**to_dict(config), "train_tokens": dataset.train.tokens, "tokenizer": dataset.tokenizer}
    changed = [key for key, value in now.items()
               if was.get(key) != value and key not in ("out_dir", "resume")]
    stays = {*vars(config.model), "optimizer", "seed", "tokenizer"} - MAY_CHANGE
    if other := [f"{k}={was.get(k)!r} (now {now[k]!r})" for k in changed if k in stays]:
        raise ValueError(f"{path} is a checkpoint of another run: {', '.join(other)}: resume with "
                         f"its configuration, or choose another --out_dir")
    return [f"{key}={now[key]!r} (was {was.get(key)!r})" for key in changed]
