"""Start this process's Accelerator, run functions on the main process alone, and leave the process group."""

import contextlib
import ctypes
import gc
import os
import platform
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
)

from common.cli import available_cores, check_world_size, is_main_process, say
from common.errors import one_line
from common.terminal import is_launched
from training import TrainingError
from training.machine import half_precision

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

Result = TypeVar("Result")


class MainProcessFailed(SystemExit):
    """Ends a process because the main process failed and has reported the error."""


def start_accelerator(mixed_precision: str, device_type: str) -> Accelerator:
    """Return an Accelerator for the launcher's settings and this hardware.

    Raises:
        UserError: the launcher's processes do not reach each other, or its precision or way of sharding is not
            supported.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        _refuse_sharding("DeepSpeed")  # accelerate would import the package first
    if os.name == "nt" and device_type == "cuda" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainingError(
            "several GPUs exchange gradients by NCCL, which torch does not have on Windows: use one, with accelerate "
            "launch --config_file accelerate_configs/single_gpu.yaml, or WSL"
        )
    precision = resolve_mixed_precision(mixed_precision, device_type)
    with _connecting():
        accelerator = Accelerator(
            cpu=device_type == "cpu",  # else processes that were started on a CPU do not find each other
            mixed_precision=precision,
            kwargs_handlers=[
                # The others wait while the main process prepares data or saves. NCCL's default is 10.
                InitProcessGroupKwargs(timeout=timedelta(minutes=30)),
                # Saves a copy of the gradients: they live in the buckets that DDP exchanges.
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    check_world_size(accelerator.num_processes)
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        _refuse_sharding("fsdp_version: 1")
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        _refuse_sharding("Megatron-LM")
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.mixed_precision == "fp16":
        raise TrainingError("mixed_precision=fp16 does not go with FSDP2: use bf16, or DDP (ddp_8gpu.yaml)")
    if accelerator.device.type == "cpu" and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise TrainingError(  # accelerate would train with DDP and say nothing
            "the launcher's configuration selects FSDP, which needs GPUs, and there is none here: use "
            "accelerate_configs/cpu.yaml, or cpu_2proc.yaml for two processes"
        )
    if accelerator.device.type == "cpu":
        # One thread is the default of `accelerate launch`. Without the launcher, it is the user's choice and stays.
        if os.environ.get("OMP_NUM_THREADS") == "1" and is_launched():
            torch.set_num_threads(max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        keep_freed_memory()
    # More is an error, as on CUDA; else Apple's allocator continues into swap space.
    if accelerator.device.type == "mps" and "PYTORCH_MPS_HIGH_WATERMARK_RATIO" not in os.environ:
        torch.mps.set_per_process_memory_fraction(1.0)
    torch.set_float32_matmul_precision("high")  # TF32 for matmuls that stay in float32
    transformers.utils.logging.disable_progress_bar()
    return accelerator


@contextlib.contextmanager
def _connecting() -> Iterator[None]:
    """Say on each machine which address its processes connect to, and raise TrainingError if they cannot."""
    rank, num_processes = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if os.environ.get("LOCAL_WORLD_SIZE", num_processes) != num_processes and os.environ.get("LOCAL_RANK") == "0":
        print(f"machines  process {rank} of {num_processes}: waits at {address} for the others", flush=True)
    try:
        yield
    except RuntimeError as error:  # torch's DistError, or, if gloo reports it, without a class of its own
        if not isinstance(error, torch.distributed.DistError) and not str(error).startswith("Gloo"):
            raise
        raise TrainingError(
            f"process {rank} of {num_processes} cannot connect to the others at {address} ({one_line(error)}): check "
            "the address, the firewall, and that each machine's own name has an address that the others reach "
            "(not 127.x); or name the network interface, as in GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0"
        ) from None


def _refuse_sharding(name: str) -> None:
    raise TrainingError(
        f"the launcher's configuration selects {name}, which train.py does not support: shard with FSDP2, "
        "accelerate launch --config_file accelerate_configs/fsdp2.yaml"
    )


def resolve_mixed_precision(setting: str, device_type: str) -> str:
    """Return "no", "bf16" or "fp16" for one of them or "auto".

    "auto" is the launcher's setting, or else the 16-bit format of the hardware. The launcher's "no" is also its
    default, so the hardware decides then; `--mixed_precision no` as a setting of train.py selects float32. A GPU
    without bfloat16 gets fp16, and a line says so if bf16 was asked for.

    Raises:
        TrainingError: the launcher is set to a precision that train.py does not support, or fp16 was asked for without
            a GPU that has it.
    """
    hardware = half_precision(device_type)
    if setting == "auto":
        setting = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if setting not in ("no", "bf16", "fp16"):
            raise TrainingError(
                f"the launcher's mixed_precision is {setting!r}, and train.py supports 'bf16', 'fp16' and 'no' "
                "(float32): change it, or override it with --mixed_precision after train.py"
            )
        if setting == "no":
            setting = hardware
    if setting == "fp16" and device_type != "cuda":  # accelerate would train in float32 on a CPU, and say nothing
        raise TrainingError("mixed_precision=fp16 needs an NVIDIA or AMD GPU; use bf16, or no for float32")
    if setting == "bf16" and hardware == "fp16":
        say(f"precision {torch.cuda.get_device_name()} has no bfloat16: training in fp16, with loss scaling")
        return "fp16"
    return setting


def keep_freed_memory() -> None:
    """Set glibc's malloc to keep freed memory instead of returning it to the kernel. Other C libraries do not change.

    By default, glibc unmaps every freed block of more than 32 MB and trims the heap, so that each step faults the same
    pages in again: a fifth of a step's time on a CPU (benchmarks/LOG.md). Keeping it takes a few percent more memory.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def run_on_main(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Call `function(*args, **kwargs)` on the main process and return its result, which is pickled, on every process.

    If the function raises an error, every process exits: if only one process exited, the others would hang until the
    process-group timeout.
    """
    result, error = None, None
    if is_main_process():
        try:
            result = function(*args, **kwargs)
        except Exception as raised:
            error = raised
    result, has_failed = broadcast_object_list([result, error is not None])
    if error is not None:
        raise error
    if has_failed:
        raise MainProcessFailed(1)
    return result


@contextlib.contextmanager
def isolated_accelerator_state() -> Iterator[None]:
    """Keep accelerate's global state of this run apart from Accelerators before and after it in the same process.

    Otherwise the next Accelerator inherits this one's mixed precision, or refuses a different one.
    """
    states = [AcceleratorState._shared_state, GradientState._shared_state]
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # several processes still need it to leave their group
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


def leave_process_group() -> None:
    """Destroy the process group. Call this when nothing refers to the wrapped model anymore.

    DDP's reducer refers to the process group. If the reducer's reference is the last one, the reducer waits for gloo's
    threads while it holds Python's lock, and hangs if a thread needs the lock to drop a tensor (torch 2.13). Destroying
    the group from Python releases the lock during the wait.
    """
    gc.collect()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
