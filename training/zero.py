"""
DeepSpeed's ZeRO, stage 2: every process has all weights (in bfloat16, if that is the precision) and a share of the
float32 copies and of AdamW's moments.

DeepSpeed (tried: 0.19.8) is told here what a file in YAML cannot know, and asked for what checkpoints hold. It divides
by the accumulation and averages over processes as DDP under accelerate does; it clips, skips steps whose gradient is
not finite, and steps by itself within the last micro-batch's backward pass.
"""

import torch


def configure(accelerator, *, micro_batch_size, accumulation, grad_clip):
    """Completes DeepSpeed's configuration before `accelerator.prepare`."""
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    settings.update(
        train_micro_batch_size_per_gpu=micro_batch_size,
        gradient_accumulation_steps=accumulation,
        gradient_clipping=grad_clip,
    )
    if accelerator.mixed_precision == "bf16":
        # Gradients are summed over micro-batches and processes in float32, as without DeepSpeed; steps whose gradient
        # is not finite are skipped.
        settings.update(
            bf16={"enabled": True, "check_grad_overflow": True},
            data_types={"grad_accum_dtype": "fp32"},
            communication_data_type="fp32",
        )


def parameter(tensor):
    """The whole float32 copy of a parameter. Every process calls it."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(tensor)


def moments(tensor, zero_optimizer):
    """{"step", "exp_avg", "exp_avg_sq"} of a parameter, whole; {} before the first step. Every process calls it."""
    from deepspeed.utils import safe_get_full_optimizer_state

    states = list(zero_optimizer.optimizer.state.values())
    if not states:
        return {}
    _link(zero_optimizer)
    found = {key: safe_get_full_optimizer_state(tensor, key) for key in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.tensor(float(states[0]["step"])), **found}


def load_parameters(model, parameters):
    """
    Sets the float32 copies: DeepSpeed's own came from rounded weights. Every process calls it.

    Args:
        parameters: {name: float32 tensor}
    """
    from deepspeed.utils import safe_set_full_fp32_param

    for name, tensor in model.named_parameters():
        safe_set_full_fp32_param(tensor, parameters[name])


def load_moments(model, zero_optimizer, moments_by_name):
    """
    Sets the moments. Every process calls it with all of them.

    Args:
        moments_by_name: {name: {"step", "exp_avg", "exp_avg_sq"}}
    """
    from deepspeed.utils import safe_set_full_optimizer_state

    # The moments of a share come with its first step: made now, so that there is something to set.
    step = next(iter(moments_by_name.values()))["step"]
    inner = zero_optimizer.optimizer
    for group in inner.param_groups:
        for share in group["params"]:
            zeros = {key: torch.zeros_like(share) for key in ("exp_avg", "exp_avg_sq")}
            inner.state[share] = {"step": step.clone().to(share.device), **zeros}
    _link(zero_optimizer)
    for name, tensor in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            safe_set_full_optimizer_state(tensor, moments_by_name[name][key], key)


def _link(zero_optimizer):
    """Lets DeepSpeed find each parameter's moments; it does so itself after one of several groups only."""
    zero_optimizer._hp_optimizer_states_linked = False
    zero_optimizer._lazy_init_hp_params_optimizer_state()
