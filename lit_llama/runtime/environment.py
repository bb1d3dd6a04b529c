"""Settings of the libraries below torch, which read them when they are loaded or first used.

A value that the user has set stays.
"""

import math
import os
import time
from pathlib import Path


def cpu_limit() -> int | None:
    """Return the number of cores that a container may use, rounded up; None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("utf-8").split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no such file, or "max"
        return None


def busy_seconds() -> float | None:
    """Return the time that all cores together have been busy; None if the system does not tell."""
    try:
        words = Path("/proc/stat").read_text("utf-8").split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, *interrupts = map(int, words)
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


START = time.perf_counter(), busy_seconds(), time.process_time()


def is_crowded() -> bool:
    """Tell whether other processes have used cores that this one needs, since it began."""
    started, before, own = START
    now = busy_seconds()
    if before is None or now is None or not hasattr(os, "sched_getaffinity"):
        return False
    others = now - before - (time.process_time() - own)
    ours, cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    return others / (time.perf_counter() - started) > cores - ours + 0.5


def set_wait_policy() -> None:
    """On a crowded machine, let threads that wait sleep. Call before torch is imported."""
    # A thread at the end of a parallel region spins until the others have arrived. If another
    # process has taken the core of one of them, it spins in its place.
    if is_crowded():
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def set_defaults() -> None:
    """Set the other defaults. Call before torch is imported."""
    # Micro-batches differ in size, which leaves gaps in a GPU's memory.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # On the CPU, each number of tokens costs megabytes of cached oneDNN kernels, and packed
    # micro-batches have a new number at each step.
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")
    # torch counts the machine's cores, not those of the container.
    limit = cpu_limit()
    if limit is not None and limit < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(limit))


set_defaults()
