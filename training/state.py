"""
What a run has learnt, as whole float32 tensors by parameter name, whoever holds them: one process, every process alike
(DDP), a shard each (FSDP2's DTensors), or a shard of the float32 copies (DeepSpeed's ZeRO).
"""

from copy import deepcopy

import torch
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor, distribute_tensor

from training import zero

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def prepare(accelerator, model, step_model, optimizer, *, micro_batch_size, accumulation, grad_clip):
    """
    `accelerator.prepare`, with what DeepSpeed wants beside.

    Args:
        model: the bare model.
        step_model: the same, or compiled.

    Returns:
        (step_model, optimizer) as training calls them.
    """
    accelerator.gradient_accumulation_steps = accumulation
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return accelerator.prepare(step_model, optimizer)
    zero.configure(accelerator, micro_batch_size=micro_batch_size, accumulation=accumulation, grad_clip=grad_clip)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    prepared = accelerator.prepare(step_model, optimizer)
    zero.load_parameters(model, parameters)
    return prepared


def full_state(model, optimizer, accelerator, copy):
    """
    The state in the host's memory. Every process calls it.

    Args:
        model: the bare model.
        optimizer: AdamW, as `accelerator.prepare` gave it.
        copy: whether tensors that are in the host's memory already are copied too, so that training can go on.

    Returns:
        ({"transformer.wte.weight": ..., ...}, {"exp_avg.transformer.wte.weight": ..., "step....": ..., ...}); with
        None for each tensor on other processes than the main one.
    """

    def whole(tensor):
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()  # every process takes part
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
    Gives AdamW the moments that `full_state` returned. Every process calls it with all of them.

    Raises:
        ValueError: a parameter without fitting moments, moments without a parameter.
    """
    if not tensors:  # saved before the first step
        return
    tensors = dict(tensors)
    state = {}
    for name, parameter in model.named_parameters():
        entry = {key: tensors.pop(f"{key}.{name}", None) for key in MOMENTS}
        if any(value is None for value in entry.values()) or entry["exp_avg"].shape != parameter.shape:
            raise ValueError(f"no fitting moments for {name} {tuple(parameter.shape)}")
        if isinstance(parameter, DTensor):
            for key in ("exp_avg", "exp_avg_sq"):
                whole = entry[key].to(parameter.device)
                entry[key] = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        state[name] = entry
    if tensors:
        raise ValueError(f"moments of parameters the model lacks, for example {min(tensors)}")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        zero.load_moments(model, optimizer.optimizer, state)
        return
    number = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state = {number[parameter]: state[name] for name, parameter in model.named_parameters()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


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


def whole_model(model, blank):
    """
    A model that each process can call by itself: `model`, or where its parameters are sharded, `blank` filled with
    whole copies of them. Every process calls it.
    """
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return model
    with torch.no_grad():
        return fill(blank, {name: p.full_tensor() for name, p in model.named_parameters()})
