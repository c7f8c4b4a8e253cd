"""Find out what this machine can do, before data and weights are touched: its GPU, 16-bit formats, a compiler."""

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

from common.cli import say
from training import TrainingError

_INSTALL_COMPILER = {
    "nt": "Visual Studio's Build Tools",
    "posix": "apt install build-essential (or your system's package of gcc and g++)",
}


def find_device(*, use_cpu: bool = False) -> str:
    """Return the type of the device to train on: "cuda", "mps", "xpu" or "cpu".

    Raises:
        TrainingError: see `check_gpu`.
    """
    if use_cpu or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1"):  # the launcher's --cpu
        return "cpu"
    check_gpu()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def check_gpu() -> None:
    """Refuse to train on the CPU, or to fail later, because of a GPU that torch cannot use.

    Raises:
        TrainingError: there is an NVIDIA GPU, and torch is built without CUDA, cannot start it, or has no code for it.
    """
    if torch.cuda.is_available():
        if torch.version.hip is None:
            _check_architecture(torch.cuda.get_device_capability(), torch.cuda.get_arch_list())
        return
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")  # the usual way to turn GPUs off
    if torch.accelerator.is_available() or is_hidden or not _has_nvidia_gpu():
        return
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA: install a build with it (see pytorch.org)"
    else:
        reason = (
            f"torch {torch.__version__} cannot start CUDA {torch.version.cuda}: the driver is too old or does not run. "
            "`nvidia-smi` shows its version; update it, or install a torch that is built for an older CUDA"
        )
    raise TrainingError(f"there is an NVIDIA GPU, but {reason}. To train on the CPU, add --cpu")


def _has_nvidia_gpu() -> bool:
    if any(Path("/dev").glob("nvidia[0-9]*")):  # Linux; in containers, only the GPUs that were passed on
        return True
    nvidia_smi = shutil.which("nvidia-smi")  # Windows, also under WSL
    if nvidia_smi is None:
        return False
    try:
        listed = subprocess.run([nvidia_smi, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU 0" in listed.stdout


def _check_architecture(capability: tuple[int, int], built_for: list[str]) -> None:
    """Raise TrainingError if torch has no code for a GPU.

    Args:
        capability: the GPU's, such as (8, 6).
        built_for: such as ["sm_75", "sm_80", "compute_120"]. Code for sm_80 runs on 8.0 to 8.9; compute_80 is compiled
            for any later GPU when it is needed.
    """
    kinds = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name) for name in built_for]
    for kind, major, minor in (match.groups() for match in kinds if match):
        version = (int(major), int(minor))
        if version <= capability and (kind == "compute" or version[0] == capability[0]):
            return
    if built_for:
        raise TrainingError(
            f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, and torch "
            f"{torch.__version__} has no code for it, only {', '.join(built_for)}: install a torch that is built for "
            "another CUDA (Pascal and Volta need CUDA 12), or add --cpu to train on the CPU"
        )


def half_precision(device_type: str) -> str:
    """Return the 16-bit format in which the hardware multiplies: "bf16", "fp16", or "no" for neither."""
    if device_type == "cuda":  # emulated bfloat16 is slower than float32; cards before Ampere have fp16
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device_type == "xpu":
        return "bf16" if torch.xpu.is_bf16_supported() else "no"
    if device_type == "mps":
        return "bf16"  # every Apple GPU that torch 2.10 runs on (macOS 14 and newer)
    # torch.cpu's probes are private and change between versions; float32 is the safe choice without them.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if any(getattr(torch.cpu, probe, lambda: False)() for probe in probes) else "no"


def can_compile(device_type: str, *, is_dry_run: bool = False) -> bool:
    """Return True if torch.compile is to be used, False on Apple's GPUs, where it is not tried.

    Raises:
        TrainingError: something that torch.compile needs is missing; not in a dry run, perhaps for another machine.
    """
    if device_type == "mps":
        say("compile   off on Apple's GPUs, where torch.compile is experimental")
        return False
    missing = None
    if device_type != "cpu" and importlib.util.find_spec("triton") is None:
        missing = f"Triton: pip install {'triton-windows' if os.name == 'nt' else 'triton'}"
    elif device_type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() < (7, 0):
        missing = "a GPU with compute capability 7.0 (Volta) or more for Triton"
    elif _find_compiler(device_type) is None:
        missing = f"a C compiler: {_INSTALL_COMPILER[os.name]}"
    elif not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing = "Python.h: apt install python3-dev (or your system's package of Python's headers)"
    if missing is not None and not is_dry_run:
        raise TrainingError(
            f"torch.compile needs {missing}. Or train without it, slower and with the same result: --compile false"
        )
    return True


def _find_compiler(device_type: str) -> str | None:
    """Return the compiler that torch would call: for C++ on a CPU, for C in Triton on a GPU."""
    variable, names = "CC", ("gcc", "clang", "cc", "cl")
    if device_type == "cpu":
        variable, names = "CXX", ("g++", "clang++", "c++", "cl")
    if command := os.environ.get(variable, "").split():
        return shutil.which(command[0])
    return next(filter(None, map(shutil.which, names)), None)
