import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_memory_is_not_faulted_in_again():
    """Page faults of ten 64 MB tensors, one after the other, in a process of its own."""
    program = """
import resource, sys, torch
from training.cpu import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(12):  # until the heap has found its size: aligned blocks leave gaps at first
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", program, how], capture_output=True, check=True, cwd=ROOT).stdout)
        for how in ("leave", "keep")
    }
    assert faults["leave"] > 10 * 2**26 // 2**21  # at least one a huge page, were they in use
    assert faults["keep"] < faults["leave"] / 5, faults
