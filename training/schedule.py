"""The learning rate, a pure function of the step: nothing to save, nothing to step twice."""

import math


def learning_rate(step, optim, max_steps):
    """
    Linear warm-up, then a cosine down to `final_lr_fraction` of the peak (GPT-3 paper, appendix B; the lecture's).

    With `cooldown_fraction` it stays at the peak instead, and goes down on a straight line over that last part of the
    steps (Hägele et al. 2024, https://arxiv.org/abs/2405.18392).

    Args:
        step: optimizer steps already taken; 0 for the first. The first step has lr / warmup_steps, not 0.
        optim: has lr (the peak), warmup_steps, final_lr_fraction and cooldown_fraction; a
            training.config.OptimConfig.
        max_steps: where the schedule ends.

    Returns:
        float, the learning rate of the coming step; the lowest from `max_steps` on.
    """
    peak, warmup_steps, final_fraction = optim.lr, optim.warmup_steps, optim.final_lr_fraction
    if step >= max_steps:
        return peak * final_fraction
    rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if optim.cooldown_fraction is not None:
        height = min(1.0, (max_steps - step) / (optim.cooldown_fraction * max_steps))
    elif step < warmup_steps:
        height = 1.0
    else:
        progress = (step - warmup_steps) / (max_steps - warmup_steps)
        height = 0.5 * (1.0 + math.cos(math.pi * progress))  # 1 -> 0
    # The lower one: a short run's warm-up may reach into its cooldown.
    return peak * min(rise, final_fraction + (1.0 - final_fraction) * height)
