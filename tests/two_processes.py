"""
Run by conftest's `two` under torchrun: train.py's main for each command line of a JSON file
{name: arguments}, in the same two processes, which is quicker than to start them anew. Writes
RANK.json, {name: [exit status, what this process printed, its errors], "averaged": how often the
one bucket of gradients was averaged in the run "small", "seeds": of its steps, "timeouts": {name:
seconds that its processes wait for each other}}.
"""
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import gpt_with_idle, train
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import train as program
from lib import data
from lib.process import Process
from model import GPT

rendezvous, parallel, start = dist.rendezvous, Process.parallel, Process.start
averaged, timeouts, seeds, step = [], {}, [], program.training_step


def counted(process, model, idle):
    """Process.parallel, whose result counts how often it averages."""
    result = parallel(process, model, idle)
    result.register_comm_hook(None, lambda state, bucket: averaged.append(1) or allreduce_hook(
        None, bucket))
    return result


def run(name, arguments):
    """What one run returned and printed."""
    def started(process, config):
        start(process, config)
        backend = dist.group.WORLD._get_backend(process.device)
        assert backend.options._timeout == process.store.timeout
        timeouts[name] = process.store.timeout.total_seconds()

    Process.start = started
    # a part of the store of its own, as each start of torchrun has its own
    dist.rendezvous = lambda url: ((dist.PrefixStore(name, store), *rest)
                                   for store, *rest in rendezvous(url))
    program.training_step = step
    if name == "small":
        program.training_step = lambda *args: seeds.append(torch.initial_seed()) or step(*args)
    program.GPT = gpt_with_idle if name == "idle" else GPT
    Process.parallel = counted if name == "small" else parallel
    # -1: as for a large dataset, whose tokens are only checked when they are read
    data.VERIFY_AT_START = -1 if name == "bad" else 2 ** 30
    outcome = train(*arguments)
    if dist.is_initialized():  # after an error: the processes would have ended
        dist.destroy_process_group()
    return outcome


requests = json.loads(Path(sys.argv[1]).read_text("utf-8"))
outcomes = {name: run(name, arguments) for name, arguments in requests.items()}
outcomes |= {"averaged": len(averaged), "timeouts": timeouts, "seeds": seeds}
Path(sys.argv[2], f"{os.environ['RANK']}.json").write_text(json.dumps(outcomes), "utf-8")
