"""
Run by test_train.py under torchrun: train.py's main for each command line of a JSON file
{name: arguments}, in the same two processes, which is quicker than to start them anew. Writes
RANK.json, {name: [exit status, what this process printed, its errors], "averaged": see below}.
"""
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from conftest import UNIFIED, tiny_batch, tiny_gpt, train
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import train as program
from lib import data
from lib.config import load_config
from lib.process import Process
from optim import make_optimizer, param_groups

rendezvous = dist.rendezvous


class WithIdle(program.GPT):
    """A fork's model, with a matrix that the forward pass forgets."""

    def __init__(self, config):
        super().__init__(config)
        self.layers[0].idle = torch.nn.Parameter(torch.ones(2, 2))


def own_store(name):
    """A part of the store of its own for what follows, as each start of torchrun has its own."""
    dist.rendezvous = lambda url: ((dist.PrefixStore(name, store), *rest)
                                   for store, *rest in rendezvous(url))


def run(name, arguments):
    """What one run returned and printed."""
    own_store(name)
    program.GPT = WithIdle if name == "idle" else WithIdle.__base__
    # -1: as for a large dataset, whose tokens are only checked when they are read
    data.VERIFY_AT_START = -1 if name == "bad" else 2 ** 30
    outcome = train(*arguments)
    if dist.is_initialized():  # after an error: the processes would have ended
        dist.destroy_process_group()
    return outcome


def averaged():
    """How often the one bucket of gradients is averaged in each of four steps of three
    micro-steps."""
    process, counts = Process(), []
    process.start(load_config(["--device=cpu"]))
    model, batches = tiny_gpt(**UNIFIED), SimpleNamespace(micro_steps=3, fetch=lambda: None)
    batches.x, batches.y = tiny_batch(process.rank)
    parallel = process.parallel(model)
    optimizer = make_optimizer(param_groups(model, 0.1))

    def count(state, bucket):
        counts[-1] += 1
        return allreduce_hook(None, bucket)

    parallel.register_comm_hook(None, count)
    for _ in range(4):
        counts.append(0)
        program.training_step(model, parallel, optimizer, batches, 1e-2, 1.0, process, False)
    return counts


outcomes = {name: run(name, arguments)
            for name, arguments in json.loads(Path(sys.argv[1]).read_text("utf-8")).items()}
own_store("averaged")
outcomes["averaged"] = averaged()
Path(sys.argv[2], f"{os.environ['RANK']}.json").write_text(json.dumps(outcomes), "utf-8")
dist.destroy_process_group()
