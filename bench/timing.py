"""
Times and the machine that they hold for.

  timed             seconds of one call
  spread            median and range of several numbers
  machine           the processor or the GPU, because ratios differ between them
  versions          what a file of results says about where it was measured
"""
import os
import platform
import statistics
import time
from pathlib import Path

import torch

# of x86: those that decide how fast a matrix product is
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def timed(function, clock=time.perf_counter):
    """Seconds that function() takes, the device's work included."""
    started = clock()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def processor(cpuinfo=Path("/proc/cpuinfo")):
    """The CPU's name and instruction sets; on other systems than Linux what Python knows of it."""
    found = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text("utf-8").splitlines():
            key, _, value = line.partition(":")
            found[key.strip()] = value.strip()
    name = found.get("model name") or platform.processor() or platform.machine()
    flags = [flag for flag in INSTRUCTION_SETS if flag in found.get("flags", "").split()]
    return f"{name} ({', '.join(flags)})" if flags else name


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()}, {os.cpu_count()} cores"


def versions():
    found = {"python": platform.python_version(), "torch": torch.__version__,
             "machine": machine(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found
