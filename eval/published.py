"""What OpenAI's GPT-2 and GPT-3 score, where it was published under a protocol that is scored here too."""

import json
import re
from typing import NamedTuple


class PublishedModel(NamedTuple):
    """A model that others scored."""

    name: str
    family: str
    size: tuple[int, int]
    """layers, width: of the GPT-2 that it is compared with"""
    parameters: int
    results: dict
    """{task: {figure: value}}"""
    losses: dict
    """validation loss, nats a token, by the text that it was measured on"""


# HellaSwag, lecture's and lm-eval's: build-nanogpt hellaswag.py and play.ipynb, llm.c dev/vislog.ipynb. LAMBADA:
# lm-eval, lambada_openai. Losses: FineWeb-Edu as build-nanogpt splits it (its train_gpt2.py's log), FineWeb as llm.c
# does (its discussion 481), OpenWebText (nanoGPT's README). Parameters are counted from the shapes.
GPT2 = [
    PublishedModel(
        "OpenAI GPT-2 124M",
        "OpenAI GPT-2",
        (12, 768),
        124_439_808,
        {
            "hellaswag": {"acc": 0.2859, "acc_norm": 0.2955, "lm_eval_acc": 0.2892, "lm_eval_acc_norm": 0.3114},
            "lambada": {"acc": 0.3256, "perplexity": 40.06},
        },
        {"fineweb-edu": 3.2924, "fineweb": 3.425, "openwebtext": 3.12},
    ),
    PublishedModel(
        "OpenAI GPT-2 350M",
        "OpenAI GPT-2",
        (24, 1024),
        354_823_168,
        {"hellaswag": {"acc_norm": 0.3752}},
        {"fineweb": 3.083, "openwebtext": 2.84},
    ),
    PublishedModel(
        "OpenAI GPT-2 774M",
        "OpenAI GPT-2",
        (36, 1280),
        774_030_080,
        {"hellaswag": {"acc_norm": 0.4320}},
        {"fineweb": 3.001, "openwebtext": 2.67},
    ),
    PublishedModel(
        "OpenAI GPT-2 1558M",
        "OpenAI GPT-2",
        (48, 1600),
        1_557_611_200,
        {"hellaswag": {"acc": 0.3842, "acc_norm": 0.4893, "lm_eval_acc": 0.4004, "lm_eval_acc_norm": 0.5089}},
        {"fineweb": 2.831, "openwebtext": 2.54},
    ),
]
# The GPT-3 paper (https://arxiv.org/abs/2005.14165), table 2.1 for the sizes and H.1 for HellaSwag, zero-shot: the
# ending is chosen by the log-likelihood a token (section 2.4).
GPT3 = [
    PublishedModel("GPT-3 125M", "GPT-3", (12, 768), 125_000_000, {"hellaswag": {"acc_norm": 0.337}}, {}),
    PublishedModel("GPT-3 350M", "GPT-3", (24, 1024), 350_000_000, {"hellaswag": {"acc_norm": 0.436}}, {}),
    PublishedModel("GPT-3 760M", "GPT-3", (36, 1280), 760_000_000, {"hellaswag": {"acc_norm": 0.510}}, {}),
    PublishedModel("GPT-3 1.3B", "GPT-3", (48, 1600), 1_300_000_000, {"hellaswag": {"acc_norm": 0.547}}, {}),
]


def why_not_comparable(data, n, full_size):
    """
    Args:
        data: {"is_sample", ...}, as `eval.evaluate` says it.
        n, full_size: items that were scored, and of the set that published figures are of, None for no such set.

    Returns:
        None, or why published figures cannot stand beside the score.
    """
    if data["is_sample"]:
        return "published figures are of others' items; these are this project's own sample"
    if full_size is not None and n != full_size:
        return f"published figures are of all {full_size:,} items; these are of {n:,}"
    return None


def of_size(size):
    """Those of the GPT-2 of (n_layer, n_embd), none for another shape."""
    return [model for model in GPT2 + GPT3 if model.size == tuple(size)]


def text_of(source):
    """
    Which of the texts that losses were published for this is, as far as its name says.

    Args:
        source: JSON-able, where the data came from; None if not known.

    Returns:
        "fineweb-edu", "fineweb", "openwebtext" or None.
    """
    name = re.sub("[-_]", "", json.dumps(source).lower())
    texts = {
        "fineweb-edu": "finewebedu|edufineweb",
        "fineweb": "(?<!edu)fineweb(?!edu|2)",
        "openwebtext": "openwebtext(?!2)",
    }
    found = [text for text, pattern in texts.items() if re.search(pattern, name)]
    return found[0] if len(found) == 1 else None  # of two, nobody can tell


def published_lines(shape, data_source, item_source):
    """
    What models of this size have, as far as it can be compared with a training run's.

    Args:
        shape: has n_layer and n_embd; a GPT2ReproConfig.
        data_source: JSON-able, where the training data came from; None if not known.
        item_source: where HellaSwag's items came from, an eval.items.Source; None if nothing is scored.

    Returns:
        ({name: loss}, {name: HellaSwag's acc_norm}), both possibly empty.
    """
    text, size = text_of(data_source), (shape.n_layer, shape.n_embd)
    losses = {model.name: model.losses[text] for model in of_size(size) if text in model.losses}
    # This project's own items nobody else was scored on.
    is_comparable = item_source is not None and not item_source.is_sample
    scores = {model.name: model.results["hellaswag"]["acc_norm"] for model in of_size(size)} if is_comparable else {}
    return losses, scores
