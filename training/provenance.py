"""provenance.json: what made this run, so that someone else can make it again."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tiktoken", "evaluate", "numpy", "safetensors")


def provenance(*, config, data, model, accelerator):
    """
    Args:
        config: dict, the resolved settings.
        data: dict that identifies the training data.
        model: dict that describes the model (parameter count).

    Returns:
        JSON-able dict: command, settings, code, versions, hardware, data, start time (UTC).
    """
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "config": config,
        "model": model,
        "data": data,
        "code": _git_state(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "hardware": {
            "platform": platform.platform(),
            "device": device_name(accelerator.device),
            "processes": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision,
            "cpu_threads": torch.get_num_threads(),
            "cpu_count": os.cpu_count(),
        },
    }


def device_name(device):
    """ "NVIDIA H200", "Apple GPU", or the processor's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    return f"{device.type} ({platform.processor() or platform.machine()})"


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state():
    """The commit and whether the code differs from it; null outside a git checkout."""
    root = Path(__file__).parent.parent

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
