"""
The processes that share a run, and the machine under them.

  Process        rank, world size and device; collectives; rank-aware error reporting
  compile_model  torch.compile, block by block
  report         an error in one line
  stop_signals   SIGTERM, SIGINT and SIGHUP let the step finish
"""
import contextlib
import inspect
import os
import signal
import socket
import sys
import threading
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lib.count import PEAK_FLOPS
from lib.output import say

# Inductor recomputes short pointwise chains instead of storing them. Its defaults (4, 30) split
# DNP's backward and store a float32 (N, F) tensor; these limits avoid that.
INDUCTOR_OPTIONS = {"realize_reads_threshold": 12, "realize_acc_reads_threshold": 12,
                    "realize_opcount_threshold": 60}


def compile_model(model, **how):
    """torch.compile for each block, and for the head's product with the loss, which as one part
    can put the gradient of the logits in their place. One graph serves all layers, so the time to
    compile does not grow with depth. Experts in float32 are a loop whose shapes follow the
    routing: they stay eager. how: arguments of torch.compile in place of ours."""
    how = {"dynamic": False, "options": INDUCTOR_OPTIONS, **how}
    for layer in model.layers:
        looped = getattr(layer, "moe", False) and model.compute_dtype != torch.bfloat16
        (layer.attn if looped else layer).compile(**how)
    model.cross_entropy.compile(**how)
    model.compiled = True


def under_torchrun():
    """Another program may have left some of its variables, or empty ones."""
    return all(map(os.environ.get, ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")))


def torchrun():
    """(rank, number of processes, rank on this machine), as torchrun sets them; without it this
    process is the only one."""
    env = os.environ
    if not under_torchrun():
        return 0, 1, 0
    return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK") or 0)


def restarts_of_torchrun():
    """(how often torchrun has started its processes again, a name for this very torchrun: machine,
    process, and where it is known when that began). (0, "") without it."""
    if not under_torchrun():
        return 0, ""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0
    agent, began = os.getppid(), ""
    with contextlib.suppress(OSError):  # only Linux has it
        stat = Path(f"/proc/{agent}/stat").read_text(encoding="utf-8", errors="replace")
        began = stat.rpartition(")")[2].split()[19]
    return int(count), f"{socket.gethostname()} {agent} {began}"


class Process:
    """This process: the only one, or one of several that torchrun has started."""

    def __init__(self):
        self.rank, self.world_size, self.local_rank = torchrun()
        self.is_main = self.rank == 0
        self.restarts, self.torchrun = restarts_of_torchrun()
        self.store = None
        if self.world_size > 1:
            self.store, _, _ = next(dist.rendezvous("env://"))
            if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
                # torchrun may keep its store over a restart, with addresses of dead processes
                self.store = dist.PrefixStore(f"restart_{self.restarts}", self.store)

    def start(self, config):
        """Choose device, dtype and whether to compile; join the others. Raises ValueError if
        this machine lacks the device."""
        mps = self.world_size == 1 and torch.backends.mps.is_available()
        there = ["cuda"] * torch.cuda.is_available() + ["mps"] * mps + ["cpu"]
        kind = there[0] if config.device == "auto" else config.device
        if kind not in there:
            raise ValueError(f"device={kind!r} is not available on this machine "
                             f"(mps: for one process only): use --device=auto")
        self.device, bf16 = torch.device(kind), False
        if kind == "cuda":
            index, count = self.local_rank, torch.cuda.device_count()
            if index >= count:
                raise ValueError(f"process {index} of this machine has no GPU of its own: there "
                                 f"are {count}; lower --nproc_per_node")
            self.device = torch.device(kind, index)
            torch.cuda.set_device(self.device)
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        auto = "bfloat16" if bf16 else "float32"
        self.dtype = getattr(torch, auto if config.dtype == "auto" else config.dtype)
        if self.dtype == torch.bfloat16 and config.model.n_expert and config.model.n_embd % 8:
            raise ValueError(f"n_embd={config.model.n_embd} is no multiple of 8, as the experts' "
                             f"products in bfloat16 need it: choose another, or --dtype=float32")
        self.compile = kind == "cuda" if config.compile == "auto" else config.compile
        if self.world_size > 1:
            timeout = timedelta(seconds=config.dist_timeout)  # if a process is gone or stuck
            self.store.set_timeout(timeout)
            dist.init_process_group(
                "nccl" if kind == "cuda" else "gloo", store=self.store, rank=self.rank,
                world_size=self.world_size, timeout=timeout,
                device_id=self.device if kind == "cuda" else None)

    def parallel(self, model, idle=False):
        """The model, or DistributedDataParallel around it: gradients are averaged in buckets,
        of which they are views. idle: whether some parameters get no gradient. Call it before
        compile_model."""
        if self.world_size == 1:
            return model
        # it would cut compiled graphs at the buckets; here each block is a graph of its own
        torch._dynamo.config.optimize_ddp = False
        # no buffer changes, so none is sent before a forward pass; PyTorch has renamed the key
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        return DistributedDataParallel(
            model, device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True, find_unused_parameters=idle,
            **{"forward_sync_buffers" if renamed else "broadcast_buffers": False})

    def sum(self, values):
        """A tensor summed over all processes, as a list. One all-reduce, one wait."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values.tolist()

    def on_main_then_all(self, function):
        """function() on the main process; its result or its error on all."""
        if self.world_size == 1:
            return function()
        outcome = [None]
        if self.is_main:
            try:
                outcome = [(function(), None)]
            except (ValueError, OSError) as error:
                outcome = [(None, str(error))]
        dist.broadcast_object_list(outcome, src=0)
        result, error = outcome[0]
        if error:
            raise ValueError(error)
        return result

    def leave(self):
        """End with the others, after a run without an error. After one NCCL would wait for the
        process that failed, and a process that is gone looks like a failure to the others."""
        if self.world_size > 1:
            dist.barrier()
            dist.destroy_process_group()

    def peak_flops(self):
        """Dense bf16 FLOP/s of all devices together; None where we do not know."""
        if self.device.type != "cuda" or self.dtype != torch.bfloat16:
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((flops * self.world_size for part, flops in PEAK_FLOPS.items()
                     if part in name), None)


def hard_exit(status):
    """End this process. With several, end at once: a thread of torch.distributed that still
    runs may otherwise end it with SIGABRT, which torchrun reports as a failure."""
    if torchrun()[1] > 1:
        os._exit(status)  # nothing waits in a stream: say flushes
    sys.exit(status)


def report(error, process):
    """Print the error's one line, once if several processes have it. Returns False, and prints
    nothing, for an error that can only be a mistake in the program."""
    text, lost = one_line(error), lost_contact(error)
    if text is None or lost and process.world_size == 1:
        return False
    with contextlib.suppress(RuntimeError):  # the store is gone: report all the same
        if process.store and process.store.add("lost" if lost else text, 1) > 1:
            return True
    where = f"process {process.rank}: " if process.world_size > 1 else ""
    say(f"error: {where}{text}", sys.stderr)
    return True


def one_line(error):
    """The text for the user; None for an error that can only be a mistake in the program."""
    reason = (str(error).splitlines() or [""])[0]
    if isinstance(error, KeyboardInterrupt):
        return "interrupted before the first step: nothing was changed"
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return ("out of memory: lower batch_size and raise gradient_accumulation_steps as much, "
                f"which leaves the global batch as it is, or set recompute=True ({reason})")
    if lost_contact(error):
        return (f"another process has ended, or has been silent for dist_timeout seconds "
                f"({reason}): continue with --resume")
    if any(part in str(error) for part in ("C++ compiler", "C compiler", "Python.h")):
        return ("torch.compile needs a C++ compiler and Python's headers (on Debian g++ and "
                "python3-dev): install them, or set --compile=False")
    return None


def lost_contact(error):
    """True for an error of torch.distributed (of NCCL, or gloo's plain RuntimeError)."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError)
                                                 and "gloo" in str(error))


@contextlib.contextmanager
def stop_signals(tell):
    """SIGTERM, SIGINT and SIGHUP, unless they are ignored, do not interrupt what runs in here:
    they are put into the list that this gives. tell: print the first one."""
    received = []

    def receive(number, frame):
        if tell and not received:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                # print may not run in the midst of another print
                os.write(sys.stdout.fileno(), f"{signal.Signals(number).name}: stopping after this "
                         f"step, or after one more if this is an evaluation\n".encode())
        received.append(number)
    numbers = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
               if signal.getsignal(n) != signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # Python gives signals to the main thread only
    before = {n: signal.signal(n, receive) for n in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def to_device(arrays, device):
    """numpy (x, y) -> tensors there; on CUDA the copy runs beside the computation."""
    tensors = (torch.from_numpy(a.copy()) for a in arrays)
    if device.type == "cuda":
        return tuple(t.pin_memory().to(device, non_blocking=True) for t in tensors)
    return tuple(t.to(device) for t in tensors)
