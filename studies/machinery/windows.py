"""
The loss of a finished run on every window of its validation split, and on each document in it. The
curves of a run use some of the windows; a comparison that decides uses them all.
"""
import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from lib.data import Dataset
from lib.disk import write_whole
from sample import load_model
from studies.machinery.plan import ROOT
from studies.machinery.runs import read_json

BATCH = 32  # windows at a time


@torch.no_grad()
def every_window(folder):
    """{"loss": nats a token over all windows, "tokens": [of each document], "losses": [nats a token
    of each document]} of the newest checkpoint in a run's folder."""
    model, encoding, step = load_model(folder)
    steps = read_json(Path(folder) / "summary.json")["steps"]
    if step != steps:
        raise ValueError(f"its last whole checkpoint is of step {step}, not {steps}")
    config = read_json(Path(folder) / "config.json")
    where = ROOT / Path(config["dataset"]).expanduser()
    split = Dataset(where, config["block_size"], config["vocab_size"]).val

    losses, inputs = [], []
    for first in range(0, len(split), BATCH):
        x, y = split[list(range(first, min(first + BATCH, len(split))))]
        logits, targets = model(torch.from_numpy(x.copy()))[0], torch.from_numpy(y.copy())
        losses.append(F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                                      reduction="none").double().numpy())
        inputs.append(x.ravel())
    losses, inputs = np.concatenate(losses), np.concatenate(inputs)

    # windows follow one another, so a target's document has as many <|endoftext|> before it
    document = np.cumsum(inputs == encoding.eot_token)
    tokens = np.bincount(document)
    sums = np.bincount(document, losses)
    held = tokens > 0
    return {"loss": float(losses.mean()), "tokens": tokens[held].tolist(),
            "losses": (sums[held] / tokens[held]).tolist()}


def main(folders):
    """Write windows.json into the folder of each finished run that has none. A checkpoint that this
    code cannot read, such as one from before a change of the model, is passed over."""
    for folder in folders:
        path = Path(folder) / "windows.json"
        if (Path(folder) / "summary.json").is_file() and not path.is_file():
            try:
                write_whole(path, json.dumps(every_window(folder)) + "\n")
            except (ValueError, FileNotFoundError) as error:
                print(f"passed over: {folder}, not evaluated on all windows: {error}")
