"""Memory that a CPU run has freed stays with the process."""

import ctypes
import platform

# mallopt's parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


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
