"""provenance.json: what made this run, so that someone else can make it again."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from common.checkpoints import is_local
from common.files import write_json

_PACKAGES = ("transformers", "accelerate", "datasets", "tiktoken", "evaluate", "numpy", "safetensors")
_MOST_DIFF_CHARACTERS = 1_000_000


def provenance(*, config, data, plan, accelerator, step):
    """
    Args:
        config: dict, the resolved settings.
        data: dict that identifies the training data, the hash of its manifest among others.
        plan: training.estimate.Plan.
        step: the step this launch goes on from; 0 for a fresh run.

    Returns:
        JSON-able dict: command, settings, seed, code with its uncommitted changes, versions, hardware, data, start time
        (UTC).
    """
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "from_step": step,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seed": config["seed"],
        "config": config,
        # A folder here, or a model on the Hub? The name alone does not tell.
        "init_from_is_folder": config["init_from"] is not None and is_local(config["init_from"]),
        "model": {"parameters": plan.num_parameters, "flops_per_token": plan.flops_per_token},
        "data": data,
        "code": _git_state(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # with its build (+cu130), which PyPI's package version leaves out
            **{name: _version(name) for name in _PACKAGES},
        },
        "hardware": {
            "platform": platform.platform(),
            "device": plan.hardware.name,
            "processes": accelerator.num_processes,
            "dollars_an_hour": plan.hardware.dollars_per_hour,  # of one device
            "distributed": accelerator.distributed_type.value,
            "mixed_precision": accelerator.mixed_precision,
            "cpu_threads": torch.get_num_threads(),
            "cpu_count": os.cpu_count(),
            "cuda": torch.version.cuda,
        },
    }


def write_provenance(path, record, *, before):
    """
    Writes provenance.json: the record of this launch, and under "earlier_launches" those of the launches before it.

    Args:
        before: the provenance.json of the run that this one goes on from, which may be another's; None for a fresh run.
    """
    earlier = []
    if before is not None and before.is_file():
        with contextlib.suppress(ValueError):  # somebody has damaged it; the run goes on
            last = json.loads(before.read_text(encoding="utf-8"))
            earlier = [*last.pop("earlier_launches", []), last]
            # Not of what came after the step that a branch goes on from.
            earlier = [launch for launch in earlier if launch.get("from_step", 0) <= record["from_step"]]
    write_json(path, {**record, "earlier_launches": earlier})


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state():
    """The commit, and what the code has beyond it; null outside a git checkout."""
    root = Path(__file__).parent.parent

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, errors="replace", check=True
        ).stdout

    try:
        status, diff = git("status", "--porcelain"), git("diff", "HEAD")
        return {
            "commit": git("rev-parse", "HEAD").strip(),
            "dirty": bool(status),
            "untracked": [line[3:] for line in status.splitlines() if line.startswith("??")],
            "diff": diff
            if len(diff) <= _MOST_DIFF_CHARACTERS
            else f"{diff[:_MOST_DIFF_CHARACTERS]}\n... cut: {len(diff):,} characters",
        }
    except (OSError, subprocess.CalledProcessError):
        return None
