"""
What a run has learnt, as whole float32 tensors by parameter name, whoever holds them: one process, every process alike
(DDP), a shard each (FSDP2's DTensors).
"""

from copy import deepcopy

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


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
    for name, parameter in model.named_parameters():
        parameters[name] = whole(parameter)
        for key, value in optimizer.state[parameter].items():
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
    index_of = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state = {}
    for name, parameter in model.named_parameters():
        entry = {key: tensors.pop(f"{key}.{name}", None) for key in MOMENTS}
        if any(value is None for value in entry.values()) or entry["exp_avg"].shape != parameter.shape:
            raise ValueError(f"no fitting moments for {name} {tuple(parameter.shape)}")
        if isinstance(parameter, DTensor):
            for key in ("exp_avg", "exp_avg_sq"):
                whole = entry[key].to(parameter.device)
                entry[key] = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        state[index_of[parameter]] = entry
    if tensors:
        raise ValueError(f"moments of parameters the model lacks, for example {min(tensors)}")
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
    A model that each process can call by itself: `model`, or where its parameters are sharded, `blank` filled with whole
    copies of them. Every process calls it.
    """
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return model
    with torch.no_grad():
        return fill(blank, {name: p.full_tensor() for name, p in model.named_parameters()})
