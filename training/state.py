"""
What a run has learnt, as whole float32 tensors by parameter name, whoever holds them: one process, every process alike
(DDP), a shard each (FSDP2's DTensors), or a shard of the float32 copies (DeepSpeed's ZeRO).
"""

import contextlib
from copy import deepcopy

import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate

from training import zero

# What each optimizer keeps of a parameter; the last is of the parameter's shape.
MOMENTS = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}


def prepare(accelerator, model, optimizer, *, compiled, micro_batch_size, accumulation, grad_clip):
    """
    `accelerator.prepare`, with compilation before it and with what FSDP2 and DeepSpeed want beside.

    Args:
        model: the bare model on its device.
        optimizer: `build_optimizer`'s, over its parameters.
        compiled: whether to use torch.compile.

    Returns:
        (the model as training calls it: wrapped by DDP or the like; the same before it was wrapped, compiled or not;
        the optimizer)
    """
    accelerator.gradient_accumulation_steps = accumulation
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    is_zero = accelerator.distributed_type == DistributedType.DEEPSPEED
    step_model = model
    if compiled and is_fsdp:
        for block in model.transformer.h:  # each by itself: its weights are gathered just before it is called
            block.compile(dynamic=False)
    elif compiled:
        # Not dynamic: a last validation batch with fewer rows would have the training step compiled for any number.
        step_model = torch.compile(model, dynamic=False)
    if is_fsdp:
        accelerator.state.fsdp_plugin.mixed_precision_policy = fsdp_precision(accelerator.mixed_precision)
    if is_zero:
        zero.configure(accelerator, micro_batch_size=micro_batch_size, accumulation=accumulation, grad_clip=grad_clip)
        parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_model, optimizer = accelerator.prepare(step_model, optimizer)
    if is_zero:
        zero.load_parameters(model, parameters)
    return train_model, step_model, optimizer


def clip_gradients(accelerator, model, most):
    """
    Scales the gradient down where its norm is above `most`. Every process calls it.

    Returns:
        scalar float32 tensor, the norm before.
    """
    norm = gathered(accelerator.clip_grad_norm_(model.parameters(), most))
    return torch.as_tensor(norm, dtype=torch.float32, device=accelerator.device)  # ZeRO's is a float


def gathered(tensor):
    """The whole of it, where each process has a shard. Every process calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def held_like(parameter, whole):
    """A tensor of the parameter's shape that every process has whole, as the parameter is held: its shard, if it is."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=parameter.placements)


def fsdp_precision(mixed_precision):
    """
    FSDP2's: weights are gathered in bfloat16, gradients summed over micro-batches and processes in float32.
    accelerate's own would do both in bfloat16, and round the loss to it.
    """
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if mixed_precision == "bf16" else None, reduce_dtype=torch.float32
    )


def full_state(model, optimizer, accelerator, copy):
    """
    The state in the host's memory. Every process calls it.

    Args:
        model: the bare model.
        optimizer: as `accelerator.prepare` gave it.
        copy: whether tensors that are in the host's memory already are copied too, so that training can go on.

    Returns:
        ({"transformer.wte.weight": ..., ...}, {"exp_avg.transformer.wte.weight": ..., "step....": ..., ...}); with
        None for each tensor on other processes than the main one.
    """

    def whole(tensor):
        tensor = gathered(tensor.detach())
        return tensor.to("cpu", copy=copy).contiguous() if accelerator.is_main_process else None

    parameters, moments = {}, {}
    is_zero = accelerator.distributed_type == DistributedType.DEEPSPEED
    for name, parameter in model.named_parameters():
        parameters[name] = whole(zero.parameter(parameter) if is_zero else parameter)
        of_parameter = zero.moments(parameter, optimizer.optimizer) if is_zero else optimizer.state.get(parameter, {})
        for key, value in of_parameter.items():
            moments[f"{key}.{name}"] = whole(value)
    return parameters, moments


def load_moments(tensors, model, optimizer, accelerator):
    """
    Gives the optimizer the moments that `full_state` returned. Every process calls it with all of them.

    Raises:
        ValueError: a parameter without fitting moments, moments without a parameter.
    """
    if not tensors:  # saved before the first step
        return
    tensors = dict(tensors)
    state = {}
    of_muon = {p for group in optimizer.param_groups if "momentum" in group for p in group["params"]}
    for name, parameter in model.named_parameters():
        kind = "Muon" if parameter in of_muon else "AdamW"
        entry = {key: tensors.pop(f"{key}.{name}", None) for key in MOMENTS[kind]}
        if any(value is None for value in entry.values()) or entry[MOMENTS[kind][-1]].shape != parameter.shape:
            raise ValueError(f"no fitting moments of {kind} for {name} {tuple(parameter.shape)}")
        if isinstance(parameter, DTensor):
            for key in [key for key in entry if key != "step"]:
                entry[key] = held_like(parameter, entry[key].to(parameter.device))
        state[name] = entry
    if tensors:
        raise ValueError(f"moments of parameters the model lacks, for example {min(tensors)}")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        zero.load_moments(model, optimizer.optimizer, state)
        return
    number = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state = {number[parameter]: state[name] for name, parameter in model.named_parameters()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def copy_from_file(model: torch.nn.Module) -> None:
    """
    Copy a model's parameters out of the file that from_pretrained maps them from on a CPU.

    Windows neither renames nor removes a file that is mapped, and a run removes the checkpoint it was resumed from.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def blank_copy(model):
    """A model of the same class and configuration without weights (on the meta device)."""
    with torch.device("meta"):
        blank = type(model)(deepcopy(model.config))
    blank.generation_config = deepcopy(model.generation_config)
    return blank


def fill(blank, parameters):
    """Gives a blank copy these parameters, not copies of them: {"transformer.wte.weight": ..., ...}. Returns it."""
    missing, unexpected = blank.load_state_dict(parameters, strict=False, assign=True)
    blank.tie_weights()
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"parameters do not fit: missing {missing}, unexpected {unexpected}")
    return blank


@contextlib.contextmanager
def whole_model(model, blank):
    """
    While it lasts, a model in eval mode that each process can call by itself: `model`, or where its parameters are
    sharded, `blank` filled with whole copies of them. Every process uses it.
    """
    whole = model
    if any(isinstance(p, DTensor) for p in model.parameters()):
        with torch.no_grad():
            whole = fill(blank, {name: p.full_tensor() for name, p in model.named_parameters()})
    whole.eval()
    try:
        yield whole
    finally:
        model.train()
        if whole is not model:
            whole.to("meta")  # gives the copies' memory back
