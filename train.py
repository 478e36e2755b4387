"""
Pre-training, on one CPU, one GPU, or many under torchrun.

  python train.py configs/quickstart.py
  python train.py configs/quickstart.py --learning_rate=3e-3 --out_dir=out/x
  torchrun --nproc_per_node=8 train.py configs/unified_350m.py
  torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py configs/unified_350m.py

A config is a plain Python file of assignments to the keys of lib/config.py and model.py's GPTConfig; --key=value overrides it, and a bare
--key means True.
The global batch is batch_size x gradient_accumulation_steps sequences however many processes share it, and step s sees the
same sequences on 1, 2 or 8. A step's number is the count of updates made before it.

  training_step    one update: everything that happens in it
  evaluate         the loss on the validation split, always of the same windows
  train            set up, then the loop
"""
import contextlib
import math
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from lib.checkpoint import Log, RunFolder, changed_keys, duration, load_checkpoint, load_weights, start_wandb
from lib.config import BUILTIN, describe_keys, flat, load_config, share_batch, tokens_per_step
from lib.data import Dataset, get_encoding, window_numbers
from lib.process import Process, compile_model, leave, rng_state, set_rng_state, stop_signals, to_device
from model import GPT
from norms import named_scale_vectors
from optim import learning_rate, load_optimizer_state, make_optimizer, optimizer_state, param_groups, set_learning_rate
from prepare_data import prepare_builtin
from sample import stream_text

EXIT_STOPPED = 75  # exit status after SIGTERM or SIGINT, once the checkpoint is saved ("try again" in sysexits.h)
EVAL_WINDOWS = 8  # validation windows for each of eval_iters


class Batches:
    """This process's share of the global batches, one micro-batch `x, y` (micro_batch, block_size) at a time, from sample number
    `sequences` on. Which samples those are: data.window_numbers."""

    def __init__(self, split, config, process, sequences):
        self.split, self.seed, self.process, self.sequences = split, config.seed, process, sequences
        self.micro_batch, self.micro_steps = share_batch(config, process.count)
        self.fetch()

    def fetch(self):
        """Put the next micro-batch into x and y."""
        first = self.sequences + self.process.rank * self.micro_batch
        windows = window_numbers(first, self.micro_batch, len(self.split), self.seed)
        self.x, self.y = to_device(self.split[windows], self.process.device)
        self.sequences += self.process.count * self.micro_batch


# ---------------------------------------------------------------------------------------------------------------------
# the step

def training_step(model, parallel, optimizer, batches, lr, grad_clip, process, stop):
    """One update from one global batch. parallel: the model, or DistributedDataParallel around it; stop: this process was asked to.
    Returns means over the global batch: cross-entropy in nats per token; the gradient's norm before clipping; whether any process
    was asked to stop; router_stats as a flat list. No update is made if the first or the second is not finite."""
    set_learning_rate(optimizer, lr)
    loss, routers = 0.0, 0.0
    for micro_step in range(batches.micro_steps):
        if process.count > 1:  # gradients meet once, in the last backward pass
            parallel.require_backward_grad_sync = micro_step == batches.micro_steps - 1
        _, cross_entropy = parallel(batches.x, batches.y)
        auxiliary = model.auxiliary_loss()
        batches.fetch()  # the next one, while the device is busy
        ((cross_entropy + auxiliary) / batches.micro_steps).backward()
        loss += cross_entropy.detach() / batches.micro_steps
        routers += 0.0 if model.router_stats is None else model.router_stats / batches.micro_steps
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    numbers = torch.stack((loss, grad_norm, torch.full_like(loss, stop)))
    if torch.is_tensor(routers):
        numbers = torch.cat((numbers, routers.flatten()))
    loss, grad_norm, stop, *routers = (total / process.count for total in process.sum(numbers))  # a step's one wait for the device
    if math.isfinite(loss) and math.isfinite(grad_norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=process.count == 1)  # under DDP gradients stay views of its buckets
    return loss, grad_norm, stop > 0, routers


# ---------------------------------------------------------------------------------------------------------------------
# watching

@torch.no_grad()
def evaluate(model, split, config, process):
    """Mean loss, nats per token, over eval_iters x EVAL_WINDOWS windows spread evenly over the split (over all of a smaller one).
    Processes share them by micro-batches of training's size; the last is filled up with windows whose targets do not count."""
    count, (size, _) = min(len(split), config.eval_iters * EVAL_WINDOWS), share_batch(config, process.count)
    windows = [i * len(split) // count for i in range(count)]
    total = torch.zeros(1, device=process.device)
    model.eval()
    for first in range(process.rank * size, count, process.count * size):
        batch = windows[first:first + size]
        x, y = to_device(split[batch + [0] * (size - len(batch))], process.device)
        y[len(batch):] = -1
        total += model(x, y)[1] * len(batch)
    model.train()
    return process.sum(total)[0] / count


# ---------------------------------------------------------------------------------------------------------------------
# the run

class Training:
    """What a checkpoint saves and a resumed run takes from it: model, optimizer, step, position in the data, seconds."""

    def __init__(self, config, process, dataset):
        self.config, self.process, self.dataset = config, process, dataset
        torch.manual_seed(config.seed)
        self.model = GPT(config.model).to(process.device)  # initialized on the CPU: the same weights on every device
        self.model.compute_dtype = process.dtype
        groups = param_groups(self.model, config.weight_decay, config.scale_weight_decay, config.decay_embeddings, config.scale_lr)
        self.optimizer = make_optimizer(groups, config.optimizer, config.learning_rate, (config.beta1, config.beta2),
                                        config.muon_momentum, fused=process.device.type == "cuda")
        torch.manual_seed(config.seed + process.rank)  # nothing below draws random numbers; with dropout, say, a fork would
        self.step, self.seconds_before, self.started = 0, 0.0, time.time()
        self.first_step, self.first_sequence = 0, 0  # where this process took up the run

    def load(self, path):
        """Take up the run of a checkpoint. Returns which keys have changed since. Raises ValueError, one line, if it does not fit the
        model, or has made more steps than are asked for."""
        state = load_checkpoint(path)
        load_weights(self.model, state, path)
        try:
            load_optimizer_state(self.optimizer, state["optimizer"])
        except ValueError as error:
            raise ValueError(f"{path} cannot be used: {error}: remove it, and an older checkpoint is taken") from None
        self.step = self.first_step = state["step"]
        self.seconds_before, self.first_sequence = state["seconds"], state["data"]["sequences"]
        if len(state["rng"]) == self.process.count:
            set_rng_state(state["rng"][self.process.rank], self.process.device)
        if self.config.token_budget:  # with another batch it takes another number of steps
            left = self.config.token_budget - self.first_sequence * self.config.model.block_size
            self.config.max_iters = self.step + max(0, math.ceil(left / tokens_per_step(self.config)))
        if self.step > self.config.max_iters:
            raise ValueError(f"{path} has made {self.step} steps, and max_iters={self.config.max_iters}: set --max_iters={self.step} or "
                             f"more, or choose another --out_dir")
        return changed_keys(self.config, self.dataset.train.tokens, state)

    def start(self):
        """Make what runs: compiled parts, gradients that meet, the first batch."""
        if self.process.compile:
            compile_model(self.model)
        self.parallel = self.process.parallel(self.model)
        self.batches = Batches(self.dataset.train, self.config, self.process, self.first_sequence)

    def sequences(self):
        """Sequences seen so far: the position in the data."""
        return self.first_sequence + (self.step - self.first_step) * tokens_per_step(self.config) // self.config.model.block_size

    def seconds(self):
        return self.seconds_before + time.time() - self.started

    def save(self, folder):
        """Write a checkpoint. Raises FloatingPointError, and writes none, if there is a weight or a moment that is not finite."""
        moments = optimizer_state(self.optimizer)
        tensors = [*self.model.parameters(), *(t for state in moments.values() for t in state.values())]
        if not all(t.isfinite().all() for t in tensors):
            raise FloatingPointError(f"the weights after {self.step} steps were not finite: stopped, and not saved; "
                                     f"resume with a lower --learning_rate")
        rng = self.process.gather(rng_state(self.process.device))
        if self.process.first:
            folder.save(self.step, {
                "model": self.model.state_dict(), "optimizer": moments, "config": flat(self.config),
                "tokenizer": self.dataset.tokenizer, "seconds": self.seconds(), "rng": rng,
                "data": {"sequences": self.sequences(), "train_tokens": self.dataset.train.tokens}})


def loop(t, folder, log, stops):
    """Step after step from t.step on. Returns (val_loss, val_bpb) of the end, or None if a signal stopped it."""
    config, saved_step = t.config, t.step
    moe_layers = [i for i, layer in enumerate(t.model.layers) if layer.moe]
    while True:
        last = t.step >= config.max_iters
        if last:
            log.check_bad_steps(t.step - 1, most=1)
        with log.paused():
            if t.step > saved_step and not log.bad_steps and (last or is_due(t.step, config.checkpoint_interval)):
                t.save(folder)  # before evaluating, which may fail too
                saved_step = t.step
            if last or is_due(t.step, config.eval_interval):
                val_loss = evaluate(t.model, t.dataset.val, config, t.process)
                val_bpb = log.evaluation(t.step, t.sequences() * config.model.block_size, val_loss, t.dataset.val_bytes_per_token)
                log.weights(t.step, t.model)
        if last:
            return val_loss, val_bpb

        lr = learning_rate(t.step, config)
        loss, grad_norm, stop, routers = training_step(t.model, t.parallel, t.optimizer, t.batches, lr, config.grad_clip, t.process,
                                                       bool(stops))
        log.step(t.step, loss, lr, grad_norm)
        if routers and log.shows(t.step):
            log.routers(t.step, moe_layers, routers)
        t.step += 1
        if stop and t.step < config.max_iters:
            if not log.bad_steps:
                t.save(folder)
            log.say(f"stopped by a signal after {t.step} steps, and {'not ' if log.bad_steps else ''}saved: continue with --resume")
            return None


def is_due(step, interval):
    return interval > 0 and step % interval == 0


def open_dataset(config, process):
    """The dataset, made first if it is the built-in one and missing. The first process checks all of it, the others
    only its headers."""
    def prepare_and_check():
        if config.dataset == BUILTIN and not Path(BUILTIN).exists():
            prepare_builtin(BUILTIN)
        Dataset(config.dataset, config.model.block_size, config.model.vocab_size)
    process.first_then_all(prepare_and_check)
    return Dataset(config.dataset, config.model.block_size, config.model.vocab_size, verify=False)


def describe(t, say):
    config, process, tokens, model = t.config, t.process, t.dataset.train.tokens, t.model
    params, scales = model.num_params(), model.num_params("scale_vectors")
    active = f" ({model.num_params('active'):,} active)" if config.model.n_expert else ""
    say(f"{params:,} parameters{active}, {scales:,} of them in {len(named_scale_vectors(model))} scale vectors ({scales / params:.4%})")
    say(f"{tokens:,} training tokens ({t.dataset.tokenizer}); {config.max_iters:,} steps of {tokens_per_step(config):,} tokens, "
        f"{config.max_iters * tokens_per_step(config) / tokens:.2f} epochs")
    say(f"{process.count} x {process.device.type}, {str(process.dtype)[6:]}, {'compiled' if process.compile else 'not compiled'}, "
        f"{t.batches.micro_steps} x {t.batches.micro_batch} sequences of {config.model.block_size} in each process")


def train(config, process):
    """Run the configuration to its end. Returns the exit status: 0, or EXIT_STOPPED after a signal."""
    if process.restarts:  # torchrun's restart of a run continues it, also one that began by discarding another
        config.resume, config.overwrite = True, False
    # everything that can be wrong with the request comes first; the folder changes once a step is made
    dataset = open_dataset(config, process)
    encoding = get_encoding(dataset.tokenizer) if config.sample_tokens else None
    with contextlib.closing(RunFolder(config)) as folder:
        resume_from = process.first_then_all(lambda: folder.take(dataset.tokenizer))
        say = print if process.first else lambda text: None
        t = Training(config, process, dataset)
        if resume_from:
            changed = t.load(resume_from)
            say(f"resuming from {resume_from} at step {t.step}")
            if changed:
                say(f"changed since the checkpoint: {', '.join(changed)}")
        t.start()
        describe(t, say)
        process.first_then_all(lambda: start_wandb(config))
        log = Log(folder if process.first else None, config, t.step, t.model.flops_per_token(), process.peak_flops())
        with stop_signals(tell=process.first) as stops:
            result = loop(t, folder, log, stops)
        if result is None:
            return EXIT_STOPPED
        if process.first:
            finish(t, folder, log, result, encoding)
        if process.count > 1:
            dist.barrier()  # leave together: a process that is gone looks like a failure to the others
    return 0


def finish(t, folder, log, result, encoding):
    """Write the summary, say where things are, and show a sample."""
    (val_loss, val_bpb), seconds, tokens = result, t.seconds(), t.sequences() * t.config.model.block_size
    folder.finish({"val_loss": val_loss, "val_bpb": val_bpb, "steps": t.step, "tokens": tokens, "params": t.model.num_params(),
                   "scale_params": t.model.num_params("scale_vectors"), "seconds": seconds,
                   "tokens_per_s": tokens / max(seconds, 1e-9), "spikes": log.spikes})
    out, prompt = t.config.out_dir, t.config.sample_prompt
    log.say(f"done in {duration(seconds)}: {out}/ holds the last checkpoint, log.jsonl, config.json and summary.json; "
            f"draw it with `python -m study.report {out}`")
    if encoding:
        log.say(f"\na sample, with the prompt {prompt!r}:\n" + "-" * 80)
        try:
            stream_text(t.model.eval(), encoding, prompt, t.config.sample_tokens)
        except (KeyboardInterrupt, ValueError) as error:  # the run is done all the same
            log.say(f"no sample: {str(error) or 'interrupted'}")


def main(argv):
    if any(arg in ("-h", "--help") for arg in argv):
        print(__doc__.partition("\n\n  training_step")[0] + "\n\nkeys and defaults:\n" + describe_keys())
        return 0
    try:
        process = Process()
    except (ValueError, dist.DistError) as error:  # the second: the others cannot be met at MASTER_ADDR and MASTER_PORT
        print(f"error: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return 1
    try:
        if not argv:
            raise ValueError("which model? Start with `python train.py configs/quickstart.py`, some two minutes on two cores; configs/ "
                             "holds others, and `python train.py --help` lists every key")
        config = load_config(argv)
        share_batch(config, process.count)  # raises what all processes raise, before they meet
        process.start(config)
        return train(config, process)
    except (Exception, KeyboardInterrupt) as error:
        if not process.report(error):
            raise
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
