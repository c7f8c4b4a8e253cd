"""The log-likelihoods of HellaSwag's endings."""

from eval.hellaswag.accuracy import accuracy
from eval.scoring import loglikelihoods


def score_hellaswag(model, tokenizer, items, *, batch_size=32, on_batch=None):
    """
    Scores the endings as build-nanogpt's hellaswag.py does: the context as it stands in the data, then a
    space and the ending, encoded apart and joined.

    Args:
        model: as for `loglikelihoods`.
        tokenizer: a Hugging Face tokenizer; GPT-2's gives the published numbers. Nothing in an item is taken
            for a special token.
        items: list of HellaSwagItem, for instance a process's share `items[rank::world_size]`; may be empty.
        batch_size: sequences in one forward pass; an item is four.
        on_batch: called after each batch with the ContinuationScores of its endings.

    Returns:
        list of one dict an item, in order, as `accuracy` and the metric take them: "log_likelihoods" (4
        floats, nats, summed over the ending's tokens) and "num_tokens" (4 ints).

    Raises:
        EvalError: as `loglikelihoods`.
    """
    requests = []
    for item in items:
        context, *endings = tokenizer(
            [item.context, *(f" {ending}" for ending in item.endings)],
            add_special_tokens=False,
            split_special_tokens=True,
        )["input_ids"]
        requests += [(context, ending) for ending in endings]
    scores = iter(loglikelihoods(model, requests, batch_size=batch_size, on_batch=on_batch))
    predictions = []
    for item in items:
        of_item = [next(scores) for _ in item.endings]
        predictions.append(
            {
                "log_likelihoods": [score.log_likelihood for score in of_item],
                "num_tokens": [score.num_tokens for score in of_item],
            }
        )
    return predictions


def joint_accuracy(shares, items, source):
    """
    Args:
        shares: what `score_hellaswag` gave process r of W for `items[r::W]`, by r; None where it gave nothing.
        items: list of HellaSwagItem, all of them.
        source: their ItemSource.

    Returns:
        dict as of `accuracy`, and is_sample; None without items, or where a share is missing.
    """
    if not items or None in shares:
        return None
    predictions = [shares[i % len(shares)][i // len(shares)] for i in range(len(items))]
    return accuracy(predictions, [item.label for item in items]) | {"is_sample": source.is_sample}
