"""
Run under torchrun by test_train.py: several runs of train.py's main in the same two processes, which is quicker than to start
them anew. Arguments: a JSON file {name: command line}, and a folder for what each process says, RANK.json {name: [status, out, err]}.
In the run called "watched" it counts how often gradients meet, and watches where they are kept.
"""
import json
import os
import sys
import warnings
from pathlib import Path

import torch.distributed as dist
from conftest import train
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import train as program
from lib import data

training_step = program.training_step
seen = {"meetings": [], "moved": [], "left": 0.0, "warnings": 0}


def watched_step(model, parallel, *rest):
    """training_step, watched: one call of the hook for each bucket that meets."""
    def hook(state, bucket):
        seen["meetings"][-1] += 1
        return allreduce_hook(state, bucket)
    if not seen["meetings"]:
        parallel.register_comm_hook(None, hook)
    before = [None if p.grad is None else p.grad.data_ptr() for p in model.parameters()]
    seen["meetings"].append(0)
    outcome = training_step(model, parallel, *rest)
    seen["moved"].append(sum(old != p.grad.data_ptr() for old, p in zip(before, model.parameters())))
    seen["left"] += sum(p.grad.abs().sum().item() for p in model.parameters())
    return outcome


rendezvous, said = dist.rendezvous, {}
for name, argv in json.loads(Path(sys.argv[1]).read_text()).items():
    # each run in a part of the store of its own, as each start of torchrun has a store of its own
    dist.rendezvous = lambda url, name=name: ((dist.PrefixStore(name, store), *rest) for store, *rest in rendezvous(url))
    program.training_step = watched_step if name == "watched" else training_step
    data.VERIFY_AT_START = -1 if name == "bad" else 2 ** 30  # as a large dataset, whose tokens are only checked when they are read
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        said[name] = train(*argv)
    seen["warnings"] += sum("buffers" in str(warning.message) for warning in caught)
    assert not dist.is_initialized()
Path(sys.argv[2], f"{os.environ['RANK']}.json").write_text(json.dumps({**said, "seen": seen}))
