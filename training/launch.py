"""The processes of a run: how this one finds the others, acts as one with them, and leaves them."""

import contextlib
import gc
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
)

from training import TrainingError
from training.cpu import keep_freed_memory, use_all_cores
from training.precision import resolve_mixed_precision


class MainProcessFailed(SystemExit):
    """Ends a process because the main process failed, which reports why."""


def start_accelerator(mixed_precision, *, is_muon=False):
    """
    Args:
        mixed_precision: "auto", "no" or "bf16".
        is_muon: whether the optimizer needs whole matrices.

    Returns:
        accelerate.Accelerator, for what the launcher said and the hardware is.

    Raises:
        TrainingError: the launcher started processes that do not see each other, or shares the model out in a way
            that this loop does not know.
    """
    # cpu=True where there is no accelerator: without it, processes started on a CPU never find each other.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=resolve_mixed_precision(mixed_precision),
        kwargs_handlers=[
            # The others wait while one prepares data, checks a checkpoint or saves; NCCL's patience is ten minutes.
            InitProcessGroupKwargs(timeout=timedelta(minutes=30)),
            # Gradients lie where DDP exchanges them; of several micro-batches the sum only, when it is complete.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise TrainingError(
            f"the launcher started {launched} processes, but this one sees {accelerator.num_processes}: they would "
            "train separate models side by side. Launch with one of accelerate_configs/*.yaml that fits this machine"
        )
    kind = accelerator.distributed_type
    is_fsdp1 = kind == DistributedType.FSDP and not accelerator.is_fsdp2
    is_zero3 = kind == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 3
    if is_fsdp1 or is_zero3 or kind == DistributedType.MEGATRON_LM:
        what = "fsdp_version: 1" if is_fsdp1 else "zero_stage: 3" if is_zero3 else kind.value
        raise TrainingError(
            f"the launcher was told {what}; this loop shares a model out by FSDP2 or ZeRO-2: see "
            "accelerate_configs/fsdp2.yaml and deepspeed_zero2.yaml"
        )
    if is_muon and kind == DistributedType.DEEPSPEED:
        raise TrainingError(
            "optim.muon_lr: Muon needs each matrix whole, and DeepSpeed's ZeRO cuts them up as it comes; launch with "
            "accelerate_configs/fsdp2.yaml or ddp_8gpu.yaml, or leave muon_lr out"
        )
    if accelerator.device.type == "cpu":
        use_all_cores(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    return accelerator


def on_main_process(accelerator, function):
    """
    Calls a function on the main process alone, and gives every process what it returns.

    If it raises something there, all processes end: one that ended alone would leave the others waiting for it until
    the launcher loses patience.

    Args:
        function: takes nothing, returns something that can be pickled.
    """
    outcome, error = None, None
    if accelerator.is_main_process:
        try:
            outcome = function()
        except Exception as raised:
            error = raised
    outcome, has_failed = broadcast_object_list([outcome, error is not None])
    if error is not None:
        raise error
    if has_failed:
        raise MainProcessFailed(1)
    return outcome


@contextlib.contextmanager
def own_accelerator_state() -> Iterator[None]:
    """
    Keep accelerate's global state of this run apart from that of Accelerators before and after it in this process.

    Otherwise the next Accelerator keeps this one's mixed precision, or refuses to start with another.
    """
    states = [AcceleratorState._shared_state, GradientState._shared_state]
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # else the processes still have to part
        states.append(PartialState._shared_state)
    before = [dict(state) for state in states]
    try:
        for state in states:
            state.clear()
        yield
    finally:
        for state, values in zip(states, before, strict=True):
            state.clear()
            state.update(values)


def leave_process_group():
    """
    Ends the communication between processes. To be called when nothing holds the prepared model any more.

    DDP's reducer refers to the process group. If it is the last to do so, it waits for gloo's threads while it holds
    Python's lock, and hangs for ever where one of them wants the lock to drop a tensor (torch 2.13). Taken down from
    Python, the lock is released for the wait.
    """
    gc.collect()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
