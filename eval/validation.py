"""The loss on text that the model has not seen."""

import torch


@torch.no_grad()
def validation_loss(model, batches, *, on_batch=None):
    """
    Args:
        model: a GPT2ReproForCausalLM in eval mode, wrapped or not. An autocast around the call is respected.
        batches: iterable of (inputs [rows, T], targets [rows, T], position_ids [rows, T] or None), on its device.
        on_batch: called after each batch.

    Returns:
        (sum of -ln p(target) in nats, number of targets): sums of several processes add up.
    """
    loss_sum, num_tokens = 0.0, 0
    for inputs, targets, position_ids in batches:
        loss = model(
            input_ids=inputs,
            position_ids=position_ids,
            shift_labels=targets,
            num_items_in_batch=1,  # the sum, not the mean
            return_logits=False,
        ).loss
        loss_sum += loss.item()
        num_tokens += targets.numel()
        if on_batch is not None:
            on_batch()
    return loss_sum, num_tokens
