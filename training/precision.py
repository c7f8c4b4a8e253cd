"""Which mixed precision a run uses."""

import os

import torch

from training import TrainingError


def resolve_mixed_precision(setting):
    """
    Args:
        setting: "auto", "no" or "bf16".

    Returns:
        "no" or "bf16". With "auto", bf16 if the launcher was told so. The launcher's "no" is also what it
        says when it was told nothing, so then the hardware decides; `--mixed_precision no` given to train.py
        itself is how to ask for float32.

    Raises:
        TrainingError: the launcher was told a precision that this loop does not train in.
    """
    if setting != "auto":
        return setting
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if told not in ("no", "bf16"):
        raise TrainingError(
            f"the launcher was told mixed_precision={told!r}, and this loop trains in 'bf16' or 'no' (float32); "
            "change the launcher's setting, or override it with --mixed_precision after train.py"
        )
    return "bf16" if told == "bf16" or hardware_has_bf16() else "no"


def hardware_has_bf16():
    """Whether bfloat16 matmuls are done by the chip rather than emulated (slower than float32)."""
    is_on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1")  # the launcher was told so
    if torch.cuda.is_available() and not is_on_cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available() and not is_on_cpu:
        return True  # every Apple GPU that torch 2.10 runs on (macOS 14 and newer)
    # torch.cpu's probes are private and have come and gone; without them, float32 is the safe answer.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
