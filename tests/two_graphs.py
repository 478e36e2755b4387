"""
Run under torchrun by test_graphs.py: in two processes, compiled models take two steps of two
micro-steps each, are evaluated, and take a step again. Argument: a folder for RANK.json, {model:
{after_training, after_evaluation: [graphs, breaks], weights: a sum}}.
"""
import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import UNIFIED, tiny_batch, tiny_gpt
from test_graphs import MIXTURE, PARTS, compiled, counted

from lib.config import load_config
from lib.process import Process
from optim import make_optimizer, param_groups
from train import training_step


class Batches:
    micro_steps = 2

    def __init__(self, seed):
        self.seed = seed
        self.fetch()

    def fetch(self):
        self.x, self.y = tiny_batch(self.seed)
        self.seed += 2


process = Process()
process.start(load_config(["--device=cpu"]))
said = {}
kinds = (("dense", {}, torch.float32), ("mixture", MIXTURE, torch.bfloat16))
for name, keys, dtype in kinds:
    model = tiny_gpt(**UNIFIED, **keys)
    model.compute_dtype = dtype
    parallel, batches = process.parallel(model), Batches(process.rank)
    compiled(model, **PARTS)
    optimizer = make_optimizer(param_groups(model, 0.1), lr=1e-2)

    step = partial(training_step, model, parallel, optimizer, batches, 1e-2, 1.0, process, False)

    step()
    step()
    said[name] = {"after_training": counted()}
    with torch.no_grad():
        model.eval()(batches.x, batches.y)
    model.train()
    step()
    weights = sum(p.double().sum().item() for p in model.parameters())
    said[name] |= {"after_evaluation": counted(), "weights": weights}
Path(sys.argv[1], f"{process.rank}.json").write_text(json.dumps(said), "utf-8")
dist.destroy_process_group()
