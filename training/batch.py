"""Split an optimizer step's batch into micro-batches; `micro_batch_size: auto` takes the largest that fits."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from common.cli import say
from modeling_gpt2repro import GPT2ReproForCausalLM
from training import TrainingError
from training.checkpoint import LoopState
from training.config import BatchConfig, nearest_multiples
from training.estimate import Hardware, Plan
from training.sharding import compile_model

# Share of the memory that is left for evaluation, fragmentation and compiled code.
RESERVED_SHARE = 0.1


def batch_arithmetic(batch: BatchConfig, num_processes: int) -> tuple[int, int]:
    """Split an optimizer step: micro-batch x seq_len x accumulation x processes = tokens per step, exactly.

    Returns:
        (micro_batch_size, accumulation); the largest possible one for "auto".

    Raises:
        TrainingError: the batch does not divide. The message has the nearest values that do.
    """
    sizes = micro_batch_sizes(batch, num_processes)
    per_process = sizes[-1]
    micro_batch_size = per_process if batch.micro_batch_size == "auto" else min(batch.micro_batch_size, per_process)
    if per_process % micro_batch_size:
        below = max(n for n in sizes if n < micro_batch_size)
        above = min(n for n in sizes if n > micro_batch_size)
        raise TrainingError(
            f"batch.micro_batch_size={micro_batch_size} does not divide the {per_process} sequences per step "
            f"on each of {num_processes} process(es); nearest micro_batch_size: {below} or {above}"
        )
    return micro_batch_size, per_process // micro_batch_size


def micro_batch_sizes(batch: BatchConfig, num_processes: int) -> list[int]:
    """Return the sizes that "auto" chooses from: the divisors of a process's sequences per step, [1, ..., all].

    Raises:
        TrainingError: the sequences cannot be divided among the processes. The message has the nearest values.
    """
    sequences = batch.tokens_per_step // batch.seq_len
    if sequences % num_processes:
        nearest = nearest_multiples(batch.tokens_per_step, batch.seq_len * num_processes)
        raise TrainingError(
            f"batch.tokens_per_step={batch.tokens_per_step} is {sequences} sequences of {batch.seq_len}, which "
            f"{num_processes} processes cannot share evenly; nearest tokens_per_step: {nearest}"
        )
    per_process = sequences // num_processes
    small = [n for n in range(1, math.isqrt(per_process) + 1) if per_process % n == 0]
    return sorted({*small, *(per_process // n for n in small)})


def pieces_per_sequence(step: int, warmup: float, max_steps: int) -> int:
    """Return into how many pieces a step's sequences are cut, a pure function of the step: 4, then 2, then 1.

    Args:
        warmup: `batch.seq_len_warmup`, a fraction of max_steps.
    """
    if step < warmup * max_steps / 2:
        return 4
    return 2 if step < warmup * max_steps else 1


def fitting_sizes(plan: Plan, sizes: Sequence[int], num_bytes: float) -> list[int]:
    """Return the micro-batch sizes that fit into so many bytes by the memory estimate."""
    return [size for size in sizes if plan.estimate_memory(size).total <= num_bytes]


def choose_micro_batch_size(
    plan: Plan,
    accelerator: Accelerator,
    model: GPT2ReproForCausalLM | None = None,
    *,
    saved: LoopState | None = None,
) -> tuple[int, int]:
    """Return (micro_batch_size, accumulation), the same on every process. Every process must call this.

    For "auto" on a GPU, training steps are tried. A CPU does not report that its memory is exhausted, so the memory
    estimate decides there.

    Args:
        model: on its device, before it is wrapped; None to use the estimate alone.
        saved: state of the checkpoint to resume from. "auto" takes its size again if it has this number of processes.

    Raises:
        TrainingError: the batch does not divide, or not even one sequence fits.
    """
    batch, hardware = plan.batch, plan.hardware
    sizes = micro_batch_sizes(batch, hardware.num_processes)
    if batch.micro_batch_size != "auto":
        return batch_arithmetic(batch, hardware.num_processes)
    probe = None
    if model is not None and hardware.device.type != "cpu":
        probe = partial(try_step, plan, accelerator, model)
    if saved is not None and saved.num_processes == hardware.num_processes and saved.micro_batch_size in sizes:
        if largest_fitting_batch([saved.micro_batch_size], plan, probe, 0):
            return saved.micro_batch_size, sizes[-1] // saved.micro_batch_size
        smaller = [n for n in sizes if n < saved.micro_batch_size]
        largest = largest_fitting_batch(smaller, plan, probe, RESERVED_SHARE) or sizes[0]
        say(
            f"resume    {saved.micro_batch_size} sequence(s) at once, as before, no longer fit: this resume, with "
            f"{largest}, is not bit-exact"
        )
    else:
        largest = largest_fitting_batch(sizes, plan, probe, RESERVED_SHARE)
    if not largest and probe is not None:
        raise TrainingError(
            f"not even one sequence of batch.seq_len={batch.seq_len} fits into the memory of {hardware.name}, "
            f"{_gigabytes(device_memory(hardware)[0])}: {_remedies(plan)}"
        )
    return largest or sizes[0], sizes[-1] // (largest or sizes[0])


def largest_fitting_batch(
    sizes: Sequence[int], plan: Plan, probe: Callable[..., None] | None, reserved_share: float
) -> int:
    """Return the largest of `sizes` that every process can train on at once, or 0 if none fits.

    accelerate's find_executable_batch_size would try sizes that do not divide the batch, and has no estimate to start
    from.

    Args:
        probe: `try_step` with its first arguments; None to use the estimate alone.
        reserved_share: share of the available memory to leave free.
    """
    available, _ = device_memory(plan.hardware)
    # A trial may compile for minutes: leave out sizes that would not fit even if the estimate were 15% too high.
    limit = available * (1 - reserved_share) * (1 if probe is None else 1.15)
    largest = 0
    for size in reversed(fitting_sizes(plan, sizes, limit)):
        try:
            if probe is not None:
                probe(size, num_reserved=int(available * reserved_share / 2))
            largest = size
            break
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            say(f"batch     {size} sequence(s) at once do not fit")
    return min(gather_object([largest]))  # values do not go through the device


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if a device's memory, or the machine's, was exhausted."""
    # Apple's error is a RuntimeError, and so are the C++ allocator's for the CPU and a compiler's around any of them.
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in words)


def try_step(
    plan: Plan, accelerator: Accelerator, model: GPT2ReproForCausalLM, size: int, *, num_reserved: int
) -> None:
    """Run a training step's forward and backward passes, with memory reserved for what the run will have besides.

    Leaves no gradients behind. Compiled code is kept: `compile_and_wrap` uses it again.

    Args:
        num_reserved: bytes to leave free, for evaluation and fragmentation.

    Raises:
        RuntimeError: the device's memory is exhausted.
    """
    device, seq_len = accelerator.device, plan.batch.seq_len
    step_model = compile_model(model, accelerator) if plan.compiled else model
    tokens, targets = torch.zeros(2, size, seq_len, dtype=torch.int64, device=device)
    position_ids = None
    if plan.has_positions:  # two documents in a row: with one, attention would need no mask
        position_ids = (torch.arange(seq_len, device=device) % max(1, seq_len // 2)).repeat(size, 1)
    accumulation = micro_batch_sizes(plan.batch, accelerator.num_processes)[-1] // size
    num_bytes = num_reserved
    # AdamW's moments and DDP's buckets. FSDP2 shards them, and the parameters that are full here.
    if accelerator.distributed_type != DistributedType.FSDP:
        num_bytes += (12 if accelerator.num_processes > 1 else 8) * plan.num_parameters
    reserved = None
    try:
        reserved = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        for _ in range(min(2, accumulation)):  # the second pass has the gradients of the first in memory
            with accelerator.autocast():
                # Arguments as the training loop's, two tensors: else its first step would compile again.
                loss = step_model(input_ids=tokens, position_ids=position_ids, shift_labels=targets).loss
            loss.backward()
    finally:
        model.zero_grad()
        del reserved, tokens, targets
        torch.get_device_module(device).empty_cache()


@contextlib.contextmanager
def out_of_memory_as_one_line(plan: Plan, micro_batch_size: int) -> Iterator[None]:
    """Turn an exhausted memory, in training or evaluation, into a TrainingError with the size that fits."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        hardware = plan.hardware
        sizes = micro_batch_sizes(plan.batch, hardware.num_processes)
        usable = device_memory(hardware)[0] * (1 - RESERVED_SHARE)
        fitting = fitting_sizes(plan, [n for n in sizes if n < micro_batch_size], usable)
        remedy = _remedies(plan)
        if fitting:
            memory = _gigabytes(plan.estimate_memory(fitting[-1]).total)
            remedy = f"--batch.micro_batch_size {fitting[-1]} fits, with about {memory} (an estimate)"
        raise TrainingError(
            f"out of memory on {hardware.name} with {micro_batch_size} sequence(s) at once: {remedy}. Add --resume "
            "auto to continue from the newest checkpoint"
        ) from None


def _remedies(plan: Plan) -> str:
    checkpointing = "" if plan.activation_checkpointing else "--activation_checkpointing block, "
    sharding = "" if plan.sharded else ", or on several GPUs accelerate_configs/fsdp2.yaml"
    return f"{checkpointing}a smaller model or batch.seq_len{sharding}"


def check_memory(plan: Plan, *, is_dry_run: bool) -> None:
    """Compare the memory that the run needs with the machine's, before anything is loaded, and print a warning.

    Raises:
        TrainingError: parameters and optimizer alone are larger than all of the memory. A dry run, which may be for
            another machine, does not raise it.
    """
    hardware = plan.hardware
    sizes = micro_batch_sizes(plan.batch, hardware.num_processes)
    size = sizes[0] if plan.batch.micro_batch_size == "auto" else min(plan.batch.micro_batch_size, sizes[-1])
    memory, (available, total) = plan.estimate_memory(size), device_memory(hardware)
    if memory.state > total and not is_dry_run:
        raise TrainingError(
            f"the parameters and the optimizer's moments take {_gigabytes(memory.state)} per process, and the memory "
            f"of {hardware.name} is {_gigabytes(total)} for each: choose a smaller model (model.n_layer, "
            "model.n_embd, model.n_positions)"
        )
    if memory.total <= available:
        return
    fitting = fitting_sizes(plan, sizes, available)
    remedy = f"--batch.micro_batch_size {fitting[-1]} or auto" if fitting else _remedies(plan)
    sequences = f"{size} sequence{'s' if size > 1 else ''}"
    say(
        f"warning: with {sequences} at once, a process takes about {_gigabytes(memory.total)} (an estimate), and "
        f"{_gigabytes(available)} are free: it may run out of memory. Remedy: {remedy}"
    )


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f} GB"


def device_memory(hardware: Hardware) -> tuple[float, float]:
    """Return the bytes that a process of the run can have, and all bytes of its device.

    Those that torch has reserved for the process count as free. On a CPU, both are the process's share of the machine's
    memory; what is free is limited by the container, and the total has the swap space.
    """
    device = hardware.device
    if hardware.card is not None:
        return hardware.card.gigabytes * 1e9, hardware.card.gigabytes * 1e9
    if device.type == "mps":
        return torch.mps.recommended_max_memory(), torch.mps.recommended_max_memory()
    if device.type != "cpu":
        module = torch.get_device_module(device)
        free, total = module.mem_get_info(device)
        return free + module.memory_reserved(device), total
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError, KeyError):  # no limit ("max"), or not Linux
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        # Inactive page cache counts as used but is reclaimable.
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        inactive = int(statistics["inactive_file"])
        free = min(free, int((group / "memory.max").read_text()) - (used - inactive))
    total = psutil.virtual_memory().total + psutil.swap_memory().total
    return free / hardware.local_world_size, total / hardware.local_world_size
