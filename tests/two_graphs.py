"""
Run under torchrun by test_graphs.py: compiled models take two steps of two micro-steps each and are evaluated in two processes, and
take a step again. Argument: a folder for RANK.json, {model: {after_training, after_evaluation: [graphs, breaks], weights: a sum}}.
"""
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import MIXTURE, UNIFIED, tiny_batch, tiny_gpt
from test_graphs import PARTS, compiled, counted

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
for name, keys, dtype in (("dense", {}, torch.float32), ("mixture", MIXTURE, torch.bfloat16)):
    model = tiny_gpt(**UNIFIED, **keys)
    model.compute_dtype = dtype
    parallel, batches = process.parallel(compiled(model, **PARTS)), Batches(process.rank)
    optimizer = make_optimizer(param_groups(model, 0.1), lr=1e-2)

    def step(model=model, parallel=parallel, optimizer=optimizer, batches=batches):
        training_step(model, parallel, optimizer, batches, 1e-2, 1.0, process, False)

    step()
    step()
    said[name] = {"after_training": counted()}
    with torch.no_grad():
        model.eval()(batches.x, batches.y)
    model.train()
    step()
    said[name] |= {"after_evaluation": counted(), "weights": sum(p.double().sum().item() for p in model.parameters())}
Path(sys.argv[1], f"{process.rank}.json").write_text(json.dumps(said))
dist.destroy_process_group()
