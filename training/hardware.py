"""What a device can do at best, and what an hour of it costs."""

import contextlib
import os
import platform
import re
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import torch


class Device(NamedTuple):
    """A data sheet's line."""

    tflops: float
    """dense bfloat16 matmul, 10^12 FLOP/s, without sparsity"""
    dollars_an_hour: float | None
    """what renting one costs: on-demand list prices of large GPU clouds, late 2026, rounded; None: not looked up"""
    tokens_per_s: float | None = None
    """GPT-2 124M trained on one of eight (T = 1024, 524,288 tokens a step), by llm.c"""
    source: str = ""
    """of tokens_per_s"""


# By words of the name that torch gives; the first that fits counts. Data sheets: nvidia.com, amd.com.
DEVICES = {
    "B200": Device(2250, 5.00),
    "H200": Device(
        989, 3.50, 463_000, "estimated: llm.c's rate on an H100, which has the same peak and less bandwidth"
    ),
    "H100 PCIe": Device(756, 2.50),
    "H100": Device(989, 3.00, 463_000, "estimated from llm.c's published 140 ms a step on eight (vislog)"),
    "A100": Device(312, 1.80, 221_000, "estimated from llm.c's published 94 minutes for 10B tokens on eight"),
    "MI300X": Device(1307, 2.50),
    "L40S": Device(362, 1.00),
    "A10G": Device(70, 0.75),
    "L4": Device(121, 0.70),
    "RTX 5090": Device(209, 0.70),
    "RTX 4090": Device(165, 0.40),
    "RTX 3090": Device(71, 0.25),
}
# What the plan gives time and money for.
PLANNED = ("A100", "H100", "H200")
# FLOPs a token of GPT-2 124M at T = 1024, as training.plan.flops_per_token counts them.
FLOPS_PER_TOKEN_124M = 855_166_464


def look_up(name):
    """The Device of a name that torch gives ("NVIDIA H200"); None if not known, or a part or a slower kind of one."""
    if re.search(r"MIG|Laptop|Max-Q|NVL|GH200| D$", name):
        return None
    return next((device for part, device in DEVICES.items() if re.search(rf"\b{part}\b", name)), None)


class Hardware(NamedTuple):
    """What a run runs on."""

    device: torch.device
    name: str
    num_processes: int
    processes_here: int
    """of this machine"""
    mixed_precision: str
    """ "no" or "bf16" """
    peak_flops: float
    """FLOP/s of one device"""
    peak_source: str
    """ "data sheet" or "measured matmul" """
    dollars_an_hour: float | None
    """of one device; None if not known"""

    def line(self):
        """The console's."""
        threads = f", {torch.get_num_threads()} threads each" if self.device.type == "cpu" else ""
        return (
            f"hardware  {self.num_processes} x {self.name}{threads}, mixed precision {self.mixed_precision}, peak "
            f"{self.peak_flops / 1e12:,.3g} TFLOP/s each ({self.peak_source})"
        )


def describe_hardware(accelerator, dollars_an_hour=None):
    """
    Args:
        accelerator: accelerate.Accelerator.
        dollars_an_hour: of one device, in the place of the table's price.
    """
    device, mixed_precision = accelerator.device, accelerator.mixed_precision
    name = device_name(device)
    peak, source = peak_flops(device, torch.float32 if mixed_precision == "no" else torch.bfloat16)
    return Hardware(
        device=device,
        name=name,
        num_processes=accelerator.num_processes,
        processes_here=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        mixed_precision=mixed_precision,
        peak_flops=peak,
        peak_source=source,
        dollars_an_hour=dollars_an_hour or getattr(look_up(name), "dollars_an_hour", None),
    )


def device_name(device):
    """ "NVIDIA H200", "Apple GPU", or the processor's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    return f"{device.type} ({platform.processor() or platform.machine()})"


def peak_flops(device, dtype):
    """
    FLOP/s that a share of peak refers to.

    Args:
        device: torch.device.
        dtype: of the matmuls, torch.bfloat16 or torch.float32.

    Returns:
        (FLOP/s, "data sheet" or "measured matmul"). Measured where the device is not in the table, and in float32,
        whose peak depends on settings (TF32).
    """
    known = look_up(device_name(device))
    if known is not None and dtype == torch.bfloat16:
        return known.tflops * 1e12, "data sheet"
    return measured_matmul_flops(device, dtype), "measured matmul"


def measured_matmul_flops(device, dtype, seconds=0.3):
    """The best rate of a square matmul, FLOP/s, of those tried within the time: long enough for a core to come free."""
    size = 2048 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(0)  # the run's own random state stays as it is
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)

    def wait():
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()

    torch.mm(a, b, out=out)
    wait()
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds:
        before = time.perf_counter()
        torch.mm(a, b, out=out)
        wait()
        best = min(best, time.perf_counter() - before)
    if device.type != "cpu":
        del a, b, out
        torch.get_device_module(device).empty_cache()  # what is kept for later counts as taken
    return 2 * size**3 / best


def free_memory(device):
    """Bytes that a process may still take: of the device, or on a CPU of the machine and of the container around it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError, TypeError):  # "max" where there is no limit, no file outside Linux
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        # Pages of files that nobody reads just now count as used, and are given up when memory is asked for.
        idle = int(re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.M)[1])
        free = min(free, int((group / "memory.max").read_text()) - (used - idle))
    return free
