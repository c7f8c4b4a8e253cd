"""Wrap the model for training, and convert parameters and optimizer state from and to full float32 tensors.

A process has every parameter in full, alone and under DDP, or a shard of each under FSDP2 (a DTensor). Checkpoints and
evaluation use full tensors by parameter name, so a run can be resumed with another way of sharding.
"""

import contextlib
from collections.abc import Iterator
from copy import deepcopy
from typing import NamedTuple, cast

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM

# Optimizer state per parameter. The last entry has the parameter's shape.
MOMENTS = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}


class TrainingModels(NamedTuple):
    """One model in the forms that a run needs, and its optimizer."""

    bare: GPT2ReproForCausalLM
    """the module itself, for saving, scoring and sampling at any shape"""
    compiled: torch.nn.Module
    """`bare`, compiled if requested, for the validation loss"""
    wrapped: torch.nn.Module
    """`compiled`, wrapped by DDP or FSDP2 to exchange gradients, for training steps"""
    optimizer: AcceleratedOptimizer


def compile_and_wrap(
    accelerator: Accelerator,
    model: GPT2ReproForCausalLM,
    optimizer: torch.optim.Optimizer,
    accumulation: int,
    *,
    use_compile: bool,
) -> TrainingModels:
    """Compile the model if requested and wrap it with `accelerator.prepare`.

    Args:
        accumulation: micro-batches per optimizer step.
    """
    copy_from_file(model)
    accelerator.gradient_accumulation_steps = accumulation
    step_model = compile_model(model, accelerator) if use_compile else model
    if use_compile and accelerator.distributed_type == DistributedType.MULTI_GPU:
        # Code that is compiled inside of DDP is divided at its buckets, whose exchange then overlaps with the backward
        # pass. The code of the trials (batch.py) is not.
        torch._dynamo.reset()
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.state.fsdp_plugin.mixed_precision_policy = fsdp_precision_policy(accelerator.mixed_precision)
    wrapped, optimizer = accelerator.prepare(step_model, optimizer)
    return TrainingModels(model, step_model, wrapped, optimizer)


def compile_model(model: GPT2ReproForCausalLM, accelerator: Accelerator) -> torch.nn.Module:
    """Return the model compiled for training steps. Calling this again uses the compiled code again."""
    # Each shape is a variant: last validation batches, trials, seq_len_warmup. After 8, torch would stop compiling.
    torch._dynamo.config.recompile_limit = 64
    if accelerator.distributed_type == DistributedType.FSDP:
        for block in model.transformer.h:  # one graph per block: FSDP2 gathers a block's weights just before its call
            block.compile(dynamic=False)
        return model
    # dynamic=None would recompile the training step for any batch size after a smaller last validation batch.
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]  # a module, too


def checkpoint_activations(model: GPT2ReproForCausalLM) -> None:
    """Keep only the inputs of the blocks for the backward pass, which computes each block again, to the same bits."""
    has_dropout = model.config.attn_pdrop > 0 or model.config.resid_pdrop > 0
    # transformers' new name, and the one before it. The random state is only needed to drop the same units again.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": has_dropout})


def fsdp_precision_policy(mixed_precision: str) -> MixedPrecisionPolicy:
    """Return FSDP2's precision: gather weights in bfloat16, sum gradients over micro-batches and processes in float32.

    accelerate's default sums in bfloat16 too, and rounds the loss to bfloat16.
    """
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if mixed_precision == "bf16" else None, reduce_dtype=torch.float32
    )


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a DTensor's shards; return any other tensor unchanged. Every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Shard a replicated tensor like `parameter`; return it unchanged if the parameter is not a DTensor.

    Args:
        tensor: of the parameter's global shape, the same on every process.
    """
    if not isinstance(parameter, DTensor):
        return tensor
    mesh = parameter.device_mesh
    replicated = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=parameter.placements)


def full_state_dict(
    model: torch.nn.Module, optimizer: AcceleratedOptimizer, accelerator: Accelerator, *, copy: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gather parameters and optimizer state in the host's memory. Every process must call this.

    Args:
        copy: copy tensors that are in the host's memory already, so that training may change them.

    Returns:
        ({"transformer.wte.weight": ..., ...}, {"exp_avg.transformer.wte.weight": ..., "step....": ..., ...}).
        Both are empty on every process but the main one.
    """
    parameters: dict[str, torch.Tensor] = {}
    moments: dict[str, torch.Tensor] = {}

    def gather(tensor: torch.Tensor, tensors: dict[str, torch.Tensor], name: str) -> None:
        tensor = full_tensor(tensor.detach())
        if accelerator.is_main_process:
            tensors[name] = tensor.to("cpu", copy=copy).contiguous()

    for name, parameter in model.named_parameters():
        gather(parameter, parameters, name)
        for key, value in optimizer.state.get(parameter, {}).items():
            gather(value, moments, f"{key}.{name}")
    return parameters, moments


def load_moments(tensors: dict[str, torch.Tensor], model: torch.nn.Module, optimizer: AcceleratedOptimizer) -> None:
    """Load the optimizer state that `full_state_dict` returned. Every process must call this with all tensors.

    Raises:
        ValueError: the tensors do not fit the parameters.
    """
    if not tensors:  # saved before the first step
        return
    tensors = dict(tensors)
    state = {}
    muon_params = {p for group in optimizer.param_groups if "momentum" in group for p in group["params"]}
    # The optimizer's own state dict numbers the parameters in the order of its groups.
    index = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    for name, parameter in model.named_parameters():
        kind = "Muon" if parameter in muon_params else "AdamW"
        entry = {key: tensors.pop(f"{key}.{name}") for key in MOMENTS[kind] if f"{key}.{name}" in tensors}
        if len(entry) < len(MOMENTS[kind]) or entry[MOMENTS[kind][-1]].shape != parameter.shape:
            raise ValueError(f"no fitting moments of {kind} for {name} {tuple(parameter.shape)}")
        if isinstance(parameter, DTensor):
            for key in [key for key in entry if key != "step"]:
                entry[key] = shard_like(parameter, entry[key].to(parameter.device))
        state[index[parameter]] = entry
    if tensors:
        raise ValueError(f"moments of parameters the model lacks, for example {min(tensors)}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def copy_from_file(model: torch.nn.Module) -> None:
    """Copy a model's parameters into memory; on a CPU, from_pretrained maps them from the file.

    Windows can neither rename nor remove a mapped file, and a run removes the checkpoint it was resumed from.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def meta_copy(model: GPT2ReproForCausalLM) -> GPT2ReproForCausalLM:
    """Return a model of the same configuration on the meta device, without weights."""
    with torch.device("meta"):
        meta_model = GPT2ReproForCausalLM(
            deepcopy(cast(GPT2ReproConfig, model.config))
        )  # FSDP2 has changed the class of `model`
    meta_model.generation_config = deepcopy(model.generation_config)
    return meta_model


def load_params(meta_model: GPT2ReproForCausalLM, parameters: dict[str, torch.Tensor]) -> GPT2ReproForCausalLM:
    """Assign parameters, without copying them, to a model from `meta_copy`. Return the model."""
    missing, unexpected = meta_model.load_state_dict(parameters, strict=False, assign=True)
    meta_model.tie_weights()
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"parameters do not fit: missing {missing}, unexpected {unexpected}")
    return meta_model


@contextlib.contextmanager
def unsharded_model(models: TrainingModels) -> Iterator[tuple[GPT2ReproForCausalLM, torch.nn.Module]]:
    """Give (the model, the same compiled if that was requested), in eval mode, that each process can call alone.

    If the parameters are sharded, both are a copy with the gathered parameters. Every process must enter this.
    """
    eval_model, loss_model = models.bare, models.compiled
    if any(isinstance(p, DTensor) for p in models.bare.parameters()):
        with torch.no_grad():
            parameters = {name: full_tensor(p) for name, p in models.bare.named_parameters()}
        eval_model = loss_model = load_params(meta_copy(models.bare), parameters)
    eval_model.eval()
    try:
        yield eval_model, loss_model
    finally:
        models.bare.train()
        if eval_model is not models.bare:
            eval_model.to("meta")  # type: ignore[arg-type]  # frees the gathered parameters
