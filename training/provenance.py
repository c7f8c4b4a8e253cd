"""Describe for provenance.json the settings, code, versions, hardware and data that made a run."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from common.checkpoints import is_local
from common.files import read_json
from training.checkpoint import LoopState
from training.estimate import Plan

_PACKAGES = ("transformers", "accelerate", "datasets", "tiktoken", "evaluate", "numpy", "safetensors")
_MAX_DIFF_CHARACTERS = 1_000_000


def describe_launch(
    settings: dict[str, Any], argv: Sequence[str], data: dict[str, Any], plan: Plan, state: LoopState
) -> dict[str, Any]:
    """Return command, settings, seed, code with its uncommitted changes, versions, hardware, data and start time.

    Args:
        argv: arguments of train.py that gave them.
        state: the loop's, where this launch starts.
    """
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "from_step": state.step,
        "micro_batch_size": state.micro_batch_size,  # the setting may be "auto"
        "command": shlex.join(["train.py", *map(str, argv)]),
        "seed": settings["seed"],
        "config": settings,
        # The name alone does not tell a local folder from a model on the Hub.
        "init_from_is_folder": settings["init_from"] is not None and is_local(settings["init_from"]),
        "model": {"parameters": plan.num_parameters, "flops_per_token": plan.flops_per_token},
        "data": data,
        "code": _git_state(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # with its build (+cu130), which the package's version leaves out
            **{name: _version(name) for name in _PACKAGES},
        },
        "hardware": {
            "platform": platform.platform(),
            "device": plan.hardware.name,
            "processes": plan.hardware.num_processes,
            "machines": int(os.environ.get("GROUP_WORLD_SIZE", "1")),
            "dollars_per_hour": plan.hardware.dollars_per_hour,  # of one device
            "distributed": PartialState().distributed_type.value,
            "mixed_precision": plan.hardware.mixed_precision,
            "cpu_threads": torch.get_num_threads(),
            "cpu_count": os.cpu_count(),
            "cuda": torch.version.cuda,
        },
    }


def earlier_launches(path: Path, step: int) -> list[dict[str, Any]]:
    """Return the launches in a run's provenance.json up to a step, oldest first.

    Args:
        path: a missing file and a damaged file give an empty list.
        step: the step that a branch resumes from; launches from later steps are not part of its past.
    """
    last = read_json(path)
    launches = [*last.pop("earlier_launches", []), last] if last else []
    return [launch for launch in launches if launch.get("from_step", 0) <= step]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Return the commit and the uncommitted changes; None outside a git checkout."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=True).stdout

    try:
        untracked = git("ls-files", "--others", "--exclude-standard", "*.py").splitlines()  # texts change no results
        diff = git("diff", "HEAD")
        commit = git("rev-parse", "HEAD").strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    dirty = bool(diff or untracked)
    if len(diff) > _MAX_DIFF_CHARACTERS:
        diff = f"{diff[:_MAX_DIFF_CHARACTERS]}\n... cut: {len(diff):,} characters"
    return {"commit": commit, "dirty": dirty, "untracked": untracked, "diff": diff}
