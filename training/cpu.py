"""What a run on a CPU has to arrange by itself: threads, and memory that it has freed."""

import ctypes
import os
import platform

import torch

# mallopt's parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def use_all_cores(processes):
    """
    Gives this process its share of the cores where `accelerate launch` has given it one core.

    That is what it does when told nothing; it is told with --num_cpu_threads_per_process. A share of one core is what
    several processes get anyway. Without the launcher, OMP_NUM_THREADS=1 means what it says.

    Args:
        processes: of this machine.
    """
    if os.environ.get("OMP_NUM_THREADS") == "1" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // processes))


def keep_freed_memory():
    """
    Tells glibc not to return freed memory to the kernel.

    By default it unmaps every freed block of more than 32 MB and trims the heap, so that each step faults the same
    pages in again: a fifth of a step's time on a CPU (benchmarks/LOG.md), for a few percent more memory. Does nothing
    where the C library is another one.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
