"""Text that a model writes, to be read by a person."""

import torch

from eval import EvalError


def check_prompts(tokenizer, prompts, *, num_tokens, n_positions):
    """Raises EvalError for a prompt without tokens, or one that leaves no room for so many more."""
    for prompt in prompts:
        length = len(tokenizer(prompt).input_ids)
        if length == 0:
            raise EvalError(f"eval.prompts: {prompt!r} has no tokens; leave it out, or give a word to begin with")
        if length + num_tokens > n_positions:
            raise EvalError(
                f"eval.prompts: {prompt!r} and eval.sample_tokens={num_tokens} more tokens do not fit "
                f"model.n_positions={n_positions}; ask for fewer"
            )


@torch.no_grad()
def sample_texts(model, tokenizer, prompts, *, num_tokens, seed):
    """
    Each prompt with its continuation, drawn from the 50 most probable tokens at each place (the lecture's).

    Args:
        model: a causal language model with `generate`, in eval mode.
        num_tokens: in a continuation.
        seed: the same seed and weights give the same texts. The random state around the call stays as it is.

    Yields:
        str
    """
    device = model.device
    own_rng = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").to(device)
        with torch.random.fork_rng(**own_rng):
            torch.manual_seed(seed)
            output = model.generate(
                **ids, max_new_tokens=num_tokens, do_sample=True, top_k=50, pad_token_id=tokenizer.eos_token_id
            )
        yield tokenizer.decode(output[0])
