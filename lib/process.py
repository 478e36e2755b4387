"""
The processes that share a run, and the machine under them.

  Process        which one this is, its device, how it meets the others, who tells of an error
  one_line       what an error means to the user
  leave          how a process ends
  stop_signals   SIGTERM and SIGINT let the step finish
  to_device      numpy arrays to tensors there
  rng_state, set_rng_state   the random-number generators that a process may draw from
"""
import contextlib
import inspect
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# dense bf16 FLOP/s of the GPUs people train on, by their makers' data sheets
PEAK_FLOPS = (("B200", 2250e12), ("H200", 989e12), ("H100 PCIe", 756e12), ("H100", 989e12), ("A100", 312e12), ("L40S", 362e12),
              ("4090", 165e12), ("3090", 71e12))

# Inductor recomputes short pointwise chains instead of storing them. Its defaults (4, 30) split
# DNP's backward and store a float32 (N, F) tensor; these limits avoid that.
INDUCTOR_OPTIONS = {"realize_reads_threshold": 8, "realize_opcount_threshold": 60}


def compile_model(model, **how):
    """torch.compile for each block, the head's product and the loss. One graph serves all layers,
    so the time to compile does not grow with depth. Product and loss are two parts, because as one
    Inductor would store float32 logits. Experts in float32 are a loop whose shapes follow the
    routing: they stay eager. how: arguments of torch.compile in place of ours."""
    how = {"dynamic": False, "options": INDUCTOR_OPTIONS, **how}
    for layer in model.layers:
        looped = getattr(layer, "moe", False) and model.compute_dtype != torch.bfloat16
        (layer.attn if looped else layer).compile(**how)
    for part in ("head_product", "summed_loss"):
        setattr(model, part, torch.compile(getattr(model, part), **how))


class Process:
    """Which process this is: alone, or one of torchrun's. Raises ValueError if the environment tells of others and not where they are."""

    def __init__(self):
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if os.environ.get("WORLD_SIZE", "1") != "1" and missing:
            raise ValueError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set in the environment and {missing[0]} is not: start several "
                             f"processes with torchrun, or one after `unset WORLD_SIZE`")
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ["RANK"]) if self.count > 1 else 0  # alone, RANK is what another program left
        self.first, self.store = self.rank == 0, None
        self.restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) if self.count > 1 else 0
        if self.count > 1:
            store, _, _ = next(dist.rendezvous("env://"))
            if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
                # torchrun may keep its store when it restarts the workers of a machine: do not meet those that are gone
                store = dist.PrefixStore(f"restart_{self.restarts}", store)
            self.store = store

    def start(self, config):
        """Choose the device and meet the others. Raises ValueError if the device cannot be had."""
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        kind = next(k for k in available if available[k]) if config.device == "auto" else config.device
        if not available[kind]:
            raise ValueError(f"device={kind!r} is not available on this machine: use --device=auto")
        if kind == "mps" and self.count > 1:
            raise ValueError("device='mps' cannot run several processes: start without torchrun, or use --device=cpu")
        self.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            if self.device.index >= torch.cuda.device_count():
                raise ValueError(f"process {self.device.index} of this machine has no GPU of its own: there are "
                                 f"{torch.cuda.device_count()}; lower --nproc_per_node")
            torch.cuda.set_device(self.device)
        self.dtype = getattr(torch, config.dtype if config.dtype != "auto" else "bfloat16" if kind == "cuda" else "float32")
        self.compile = kind == "cuda" if config.compile == "auto" else config.compile
        if self.count > 1:  # the timeout ends the others when one process is gone or stuck, instead of waiting for ever
            timeout = timedelta(seconds=config.dist_timeout)
            self.store.set_timeout(timeout)
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=self.store, rank=self.rank, world_size=self.count,
                                    timeout=timeout)

    def parallel(self, model):
        """The model, or DistributedDataParallel around it: gradients meet in buckets of which they are views."""
        if self.count == 1:
            return model
        torch._dynamo.config.optimize_ddp = False  # it would cut compiled graphs at the buckets; here each block is a graph of its own
        # no buffer changes, so none is sent before a forward pass; PyTorch has renamed the key
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None,
                                       gradient_as_bucket_view=True, **{"forward_sync_buffers" if renamed else "broadcast_buffers": False})

    def sum(self, values):
        """A tensor of numbers summed over all processes, as a list. One all-reduce, one wait for the device."""
        if self.count > 1:
            dist.all_reduce(values)
        return values.tolist()

    def gather(self, value):
        """[value of process 0, of process 1, ...], on all."""
        values = [value]
        if self.count > 1:
            values = [None] * self.count
            dist.all_gather_object(values, value)
        return values

    def first_then_all(self, function):
        """function() on the first process, its result or its error on all."""
        if self.count == 1:
            return function()
        outcome = [None]
        if self.first:
            try:
                outcome = [(function(), None)]
            except (ValueError, OSError) as error:
                outcome = [(None, str(error))]
        dist.broadcast_object_list(outcome, src=0)
        result, error = outcome[0]
        if error:
            raise ValueError(error)
        return result

    def report(self, error):
        """Print the error's one line, once however many processes have it; return False, and print nothing, if it is none that the
        program expects."""
        told, text, follows = 0, one_line(error), isinstance(error, RuntimeError) and lost_contact(error)
        if text is None or (follows and self.count == 1):
            return False
        with contextlib.suppress(RuntimeError):  # without the store, the more is said the better
            if self.store is not None:  # a process that lost another says so only if that one has not told why
                told = self.store.add("errors", 0) if follows else self.store.add(f"error {text}", 1) - 1
                self.store.add("errors", 1)
        if not told:
            print(f"error: {f'process {self.rank}: ' if self.count > 1 else ''}{text}", file=sys.stderr, flush=True)
        return True

    def peak_flops(self):
        """Dense bf16 FLOP/s of all devices together; None where we do not know."""
        if self.device.type != "cuda" or self.dtype != torch.bfloat16:
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((flops * self.count for part, flops in PEAK_FLOPS if part in name), None)


def leave(status):
    """End this process. One of several ends at once, without taking the interpreter apart: a thread of torch.distributed's that still runs
    then may end it with SIGABRT, which torchrun takes for a failure (seen twice, in some hundred runs; the cause is not proven)."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(status)
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed before the start
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def one_line(error):
    """What to tell the user; None for an error that can only be a mistake of the program's."""
    reason = (str(error).splitlines() or [""])[0]
    if isinstance(error, KeyboardInterrupt):
        return "interrupted before the first step: nothing was changed"
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return ("out of memory: lower batch_size and raise gradient_accumulation_steps as much, which leaves the global batch as it is, "
                f"or set recompute=True ({reason})")
    if isinstance(error, RuntimeError) and lost_contact(error):
        return f"another process has ended, or has been silent for dist_timeout seconds ({reason}): continue with --resume"
    return None


def lost_contact(error):
    """True if this is how torch.distributed (an NCCL error, or gloo's plain RuntimeError) tells that a process is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


@contextlib.contextmanager
def stop_signals(tell):
    """SIGTERM and SIGINT do not interrupt what runs in here: they are put into a list, and the first one is told to the user if `tell`."""
    received = []

    def receive(number, frame):
        if tell and not received:
            with contextlib.suppress(OSError):  # print may not run in the midst of another print
                name = signal.Signals(number).name
                os.write(1, f"{name}: stopping after this step, or after one more if this is an evaluation\n".encode())
        received.append(number)
    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def rng_state(device):
    """{device type: state} of the random-number generators that a process may draw from."""
    return {"cpu": torch.get_rng_state(), **({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})}


def set_rng_state(state, device):
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def to_device(arrays, device):
    """numpy (x, y) -> tensors on the device; on CUDA the copy runs beside the computation."""
    tensors = (torch.from_numpy(a.copy()) for a in arrays)
    if device.type == "cuda":
        return tuple(t.pin_memory().to(device, non_blocking=True) for t in tensors)
    return tuple(t.to(device) for t in tensors)
