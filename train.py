"""
Pre-training, on one CPU, one GPU, or many under torchrun.

  python train.py configs/quickstart.py
  python train.py configs/quickstart.py --learning_rate=3e-3 --out_dir=out/x
  torchrun --nproc_per_node=8 train.py configs/unified_350m.py

A config is a Python file that assigns values to the keys of lib/config.py and of GPTConfig in
model.py; --key=value overrides it, and a bare --key means True. The global batch is batch_size x
gradient_accumulation_steps sequences however many processes share it, and step s, after s updates,
sees the same sequences on 1, 2 or 8.

  training_step    one update: everything that happens in it
  evaluate         the loss on the validation split, always of the same windows
  train            set-up, then the loop
  resume, save     what a checkpoint restores, and what it holds
"""
import contextlib
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import optim
from lib.checkpoint import changed_keys, check_finite, load_checkpoint, load_weights
from lib.config import BUILTIN, describe_keys, load_config, share_batch, to_dict, tokens_per_step
from lib.data import Dataset, get_encoding, window_numbers
from lib.log import RunLog, describe, look_at, summarize
from lib.output import say
from lib.process import Process, compile_model, hard_exit, report, stop_signals, to_device
from model import GPT
from prepare_data import prepare_builtin
from sample import print_sample

EXIT_STOPPED = 75  # after a signal, with the checkpoint saved ("try again" in sysexits.h)


class Batches:
    """This process's micro-batches x, y (micro_batch, block_size), from global sample number
    `sequences` on. data.window_numbers defines the order."""

    def __init__(self, split, config, process, sequences):
        self.split, self.seed, self.process, self.sequences = split, config.seed, process, sequences
        self.micro_batch, self.micro_steps = share_batch(config, process.world_size)
        self.fetch()

    def fetch(self):
        """Put the next micro-batch into x and y."""
        first = self.sequences + self.process.rank * self.micro_batch
        windows = window_numbers(first, self.micro_batch, len(self.split), self.seed)
        self.x, self.y = to_device(self.split[windows], self.process.device)
        self.sequences += self.process.world_size * self.micro_batch


def training_step(model, parallel, optimizer, batches, lr, grad_clip, process, stop):
    """One update from one global batch. parallel: the model, or DistributedDataParallel around it;
    stop: whether this process got a signal. Returns means over the global batch: cross-entropy in
    nats per token; the gradient's norm before clipping; whether any process got a signal; what the
    routers did, as a flat list. No update is made if the first or the second is not finite."""
    optim.set_learning_rate(optimizer, lr)

    # Gradients add up over the micro-steps. Processes share them in the last one only, and the next
    # micro-batch is fetched while the device is busy
    loss, routers = 0.0, 0.0
    for micro_step in range(batches.micro_steps):
        if process.world_size > 1:
            parallel.require_backward_grad_sync = micro_step == batches.micro_steps - 1
        _, cross_entropy = parallel(batches.x, batches.y)
        auxiliary = model.auxiliary_loss()
        batches.fetch()
        ((cross_entropy + auxiliary) / batches.micro_steps).backward()
        loss += cross_entropy.detach() / batches.micro_steps
        if model.routers is not None:
            routers += model.routers.detach() / batches.micro_steps

    # the gradient is cut to grad_clip; 0 never cuts, and measures its norm all the same
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)

    # What is logged is summed over the processes in one reduction, with the signal, so that all of
    # them stop after the same step. This is the step's one wait for the device
    numbers = torch.stack((loss, grad_norm, torch.full_like(loss, stop)))
    if torch.is_tensor(routers):
        numbers = torch.cat((numbers, routers.flatten()))
    means = [number / process.world_size for number in process.sum(numbers)]
    loss, grad_norm, stop, *routers = means

    # the update, unless a number is not finite
    if math.isfinite(loss) and math.isfinite(grad_norm):
        optimizer.is_updating = True  # should it fail now, the weights are those of no step
        optimizer.step()
        optimizer.is_updating = False
    optimizer.zero_grad(set_to_none=process.world_size == 1)  # under DDP they stay bucket views
    return loss, grad_norm, stop > 0, routers


@torch.no_grad()
def evaluate(model, split, config, process):
    """Mean loss, nats per token, over eval_windows windows spread evenly over the split, at most
    all. Processes share them by micro-batches; what fills up the last one does not count."""
    size, _ = share_batch(config, process.world_size)
    count = min(len(split), config.eval_windows)
    windows = [i * len(split) // count for i in range(count)]

    # each process takes every world_size-th batch; the last one is filled up with targets of -1
    total = torch.zeros(1, device=process.device)
    model.eval()
    for first in range(process.rank * size, count, process.world_size * size):
        batch = windows[first:first + size]
        x, y = to_device(split[batch + [0] * (size - len(batch))], process.device)
        y[len(batch):] = -1
        total += model(x, y)[1] * len(batch)
    model.train()
    return process.sum(total)[0] / count


def set_up(config, process, dataset, log):
    """A new run: all that the loop works on."""
    torch.manual_seed(config.seed)
    model = GPT(config.model).to(process.device)  # the same weights on every device
    model.compute_dtype = process.dtype
    groups = optim.param_groups(model, config.weight_decay, config.scale_weight_decay,
                                config.decay_embeddings, config.scale_lr)
    optimizer = optim.make_optimizer(groups, config.optimizer, config.learning_rate,
                                     (config.beta1, config.beta2), config.muon_momentum)
    return SimpleNamespace(
        config=config, process=process, dataset=dataset, log=log, model=model, optimizer=optimizer,
        step=0, saved=0,  # steps made; the step of the last checkpoint
        sequences=0,  # seen so far: the position in the data
        started=time.monotonic())  # of a resumed run: as if it had never been interrupted


def resume(run, path):
    """Continue a checkpoint's run: weights, moments, step, position in the data, seconds. Raises
    ValueError if it has made more steps than the configuration asks for."""
    config, state = run.config, load_checkpoint(path)
    load_weights(run.model, state, path)
    optim.load_optimizer_state(run.optimizer, state["optimizer"])
    run.step = run.saved = state["step"]
    run.sequences = state["data"]["sequences"]
    run.started -= state["seconds"]
    optim.set_learning_rate(run.optimizer, optim.learning_rate(run.step - 1, config))  # logged
    if run.step > config.max_iters:
        raise ValueError(f"{path} has made {run.step} steps, and max_iters={config.max_iters}: "
                         f"set --max_iters={run.step} or more, or choose another --out_dir")
    run.log.say(f"resuming from {path} at step {run.step}")
    if changed := changed_keys(config, run.dataset, path, state):
        run.log.say(f"changed since the checkpoint: {', '.join(changed)}")


def save(run):
    """Write a checkpoint, unless this step has one, or is the first, or the last steps were not
    finite, or an update failed halfway. Returns False in the last two cases. Raises
    FloatingPointError if a weight or a moment is not finite."""
    if run.step == run.saved:
        return True
    if run.log.bad_steps or getattr(run.optimizer, "is_updating", False):
        return False
    run.saved = run.step  # also if it fails: it is not tried again
    moments = optim.optimizer_state(run.optimizer)
    check_finite(run.step, {"weights": run.model.state_dict(), **moments})
    if run.process.is_main:
        run.log.save(run.step, {
            "model": run.model.state_dict(), "optimizer": moments, "config": to_dict(run.config),
            "tokenizer": run.dataset.tokenizer, "seconds": time.monotonic() - run.started,
            "data": {"sequences": run.sequences, "train_tokens": run.dataset.train.tokens}})
    return True


def train(config, process):
    """Set-up, then the loop. Returns the exit status: 0, or EXIT_STOPPED after a signal."""
    # all that can be wrong with the data, the tokenizer or the folder is said before any work
    dataset = open_dataset(config, process)
    encoding = None
    if config.sample_tokens:
        encoding = get_encoding(dataset.tokenizer)
    with contextlib.closing(RunLog(config, process)) as log:
        checkpoint = process.on_main_then_all(lambda: log.lock_and_check(dataset))

        # model and optimizer as they start, or as the checkpoint has them
        run = set_up(config, process, dataset, log)
        if checkpoint:
            resume(run, checkpoint)
        run.batches = Batches(dataset.train, config, process, run.sequences)

        # DistributedDataParallel must know of idle parameters, and come before compiling
        run.problems, idle = look_at(run.model)
        run.parallel = process.parallel(run.model, idle=bool(idle))
        if process.compile:
            compile_model(run.model)
        describe(run)

        # a signal does not interrupt a step: the loop ends after it
        with stop_signals(tell=process.is_main) as stops:
            result = loop(run, stops)
        if result is None:
            return EXIT_STOPPED
        if process.is_main:
            summarize(run, *result)
        if process.is_main and encoding:
            print_sample(run.model, encoding, config.sample_prompt, config.sample_tokens)
    return 0


def loop(run, stops):
    """Step after step. Returns the last validation loss, in nats per token and bits per byte, or
    None after a signal. Whatever else ends it saves first, if the weights are finite."""
    config, process, log = run.config, run.process, run.log
    try:
        while True:
            # a checkpoint, and then an evaluation, are of the weights before this step
            last = run.step >= config.max_iters
            if last:
                log.check_bad_steps(run.step - 1, most=1)
            if last or is_due(run.step, config.checkpoint_interval):
                save(run)
            if last or is_due(run.step, config.eval_interval):
                val_loss = evaluate(run.model, run.dataset.val, config, process)
                val_bpb = log.evaluation(run, val_loss)
            if last:
                return val_loss, val_bpb

            # one update; each step is seeded anew, so that a fork with dropout resumes exactly
            began = time.monotonic()
            lr = optim.learning_rate(run.step, config)
            torch.manual_seed(config.seed + run.step * process.world_size + process.rank)
            loss, grad_norm, stop, routers = training_step(
                run.model, run.parallel, run.optimizer, run.batches, lr, config.grad_clip, process,
                bool(stops))
            run.step += 1
            run.sequences += tokens_per_step(config) // config.model.block_size
            log.step(run, loss, lr, grad_norm, routers, time.monotonic() - began)

            # a signal: all processes know of it since this step
            if stop and run.step < config.max_iters:
                done = f"{run.step} steps, and {'saved' if save(run) else 'not saved'}"
                log.say(f"stopped by a signal after {done}: continue with --resume")
                return None
    except BaseException:
        with contextlib.suppress(Exception):  # the error that ended the run is the one to report
            save(run)
        raise


def is_due(step, interval):
    return interval > 0 and step % interval == 0


def open_dataset(config, process):
    """The dataset, made first if it is the built-in one. The main process checks all of it."""
    where = config.dataset, config.model.block_size, config.model.vocab_size
    if config.dataset == BUILTIN and not Path(BUILTIN).exists():
        process.on_main_then_all(lambda: prepare_builtin(BUILTIN))
    process.on_main_then_all(lambda: Dataset(*where) and None)
    return Dataset(*where, verify=False)


def main(argv):
    if {"-h", "--help"} & set(argv):
        usage = (__doc__ or "").partition("\n\n  training_step")[0]  # None under python -OO
        say(f"{usage}\n\nkeys and defaults:\n{describe_keys()}")
        return 0
    process = Process()
    try:
        config = load_config(argv)
        share_batch(config, process.world_size)  # raises what all processes would raise
        process.start(config)
        status = train(config, process)
        process.leave()
        return status
    except (Exception, KeyboardInterrupt) as error:
        if not report(error, process):
            raise
        return 1


if __name__ == "__main__":
    hard_exit(main(sys.argv[1:]))
