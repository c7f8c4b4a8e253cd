"""Published results of OpenAI's GPT-2 and GPT-3, under protocols that are scored here too."""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from eval.task import LoadedTask
    from modeling_gpt2repro import GPT2ReproConfig


class PublishedModel(NamedTuple):
    """A model with published results."""

    name: str
    size: tuple[int, int]
    """(n_layer, n_embd) of the GPT-2 that it is compared with"""
    parameters: int
    results: dict[str, dict[str, float]]
    """{task: {metric: value}}"""
    losses: dict[str, float]
    """validation loss in nats per token, by corpus"""


# HellaSwag, the lecture's and lm-eval's: build-nanogpt hellaswag.py and play.ipynb, llm.c dev/vislog.ipynb. LAMBADA:
# lm-eval, lambada_openai. Losses: FineWeb-Edu in build-nanogpt's split (its train_gpt2.py's log), FineWeb in llm.c's
# (its discussion 481), OpenWebText (nanoGPT's README). CORE: nanochat's dev/estimate_gpt3_core.ipynb. WikiText: 124M by
# lm-eval in the release notes of workofart/ml-by-hand, whose LAMBADA is the one here, and 774M in transformers' page on
# perplexity. Parameters are counted from the shapes.
_CORE_TASKS = ("core", "hellaswag_zeroshot", "hellaswag", "lambada_openai", "piqa", "arc_easy", "arc_challenge")
_CORE = {
    "124M": dict(zip(_CORE_TASKS, (0.1139, 0.309, 0.308, 0.323, 0.623, 0.412, 0.222), strict=True)),
    "350M": dict(zip(_CORE_TASKS, (0.1849, 0.390, 0.395, 0.426, 0.670, 0.480, 0.262), strict=True)),
    "774M": dict(zip(_CORE_TASKS, (0.2146, 0.440, 0.444, 0.488, 0.698, 0.535, 0.264), strict=True)),
    "1558M": dict(zip(_CORE_TASKS, (0.2565, 0.502, 0.512, 0.523, 0.725, 0.595, 0.299), strict=True)),
}
_GPT2_124M = {
    "core": _CORE["124M"],
    "hellaswag": {"acc": 0.2859, "acc_norm": 0.2955, "lm_eval_acc": 0.2892, "lm_eval_acc_norm": 0.3114},
    "lambada": {"acc": 0.3256, "perplexity": 40.06},
    "wikitext": {"word_perplexity": 37.3698, "byte_perplexity": 1.9682, "bits_per_byte": 0.9769},
}
_GPT2_774M = {
    "core": _CORE["774M"],
    "hellaswag": {"acc_norm": 0.4320},
    "wikitext": {"sliding_perplexity": 16.44, "disjoint_perplexity": 19.44},
}
_GPT2_1558M = {
    "core": _CORE["1558M"],
    "hellaswag": {"acc": 0.3842, "acc_norm": 0.4893, "lm_eval_acc": 0.4004, "lm_eval_acc_norm": 0.5089},
}
# fmt: off
GPT2 = [
    PublishedModel("OpenAI GPT-2 124M", (12, 768), 124_439_808, _GPT2_124M,
                   {"fineweb-edu": 3.2924, "fineweb": 3.425, "openwebtext": 3.12}),
    PublishedModel("OpenAI GPT-2 350M", (24, 1024), 354_823_168,
                   {"hellaswag": {"acc_norm": 0.3752}, "core": _CORE["350M"]},
                   {"fineweb": 3.083, "openwebtext": 2.84}),
    PublishedModel("OpenAI GPT-2 774M", (36, 1280), 774_030_080, _GPT2_774M,
                   {"fineweb": 3.001, "openwebtext": 2.67}),
    PublishedModel("OpenAI GPT-2 1558M", (48, 1600), 1_557_611_200, _GPT2_1558M,
                   {"fineweb": 2.831, "openwebtext": 2.54}),
]
# fmt: on
# The GPT-3 paper (https://arxiv.org/abs/2005.14165), table 2.1 for the sizes and H.1 for HellaSwag, zero-shot: the
# ending is chosen by the log-likelihood per token (section 2.4).
GPT3 = [
    PublishedModel("GPT-3 125M", (12, 768), 125_000_000, {"hellaswag": {"acc_norm": 0.337}}, {}),
    PublishedModel("GPT-3 350M", (24, 1024), 350_000_000, {"hellaswag": {"acc_norm": 0.436}}, {}),
    PublishedModel("GPT-3 760M", (36, 1280), 760_000_000, {"hellaswag": {"acc_norm": 0.510}}, {}),
    PublishedModel("GPT-3 1.3B", (48, 1600), 1_300_000_000, {"hellaswag": {"acc_norm": 0.547}}, {}),
]


def not_comparable_reason(data: dict[str, Any], n: int | None, full_size: int | None) -> str | None:
    """Return why published results cannot be compared with a score on `n` items, or None if they can.

    `data` and `full_size` (None if unknown) are a task's in the result of `eval.evaluate`.
    """
    if data["is_sample"]:
        return "published results are for the task's own items, and these are this project's sample"
    if full_size is not None and n != full_size:
        return f"published results are for all {full_size:,} items, and these are for {n:,}"
    return None


def describe_published(task: str, about: dict[str, Any], n: int | None) -> str:
    """Return, in words, the published results that a task's scores on `n` items can be compared with, or why not.

    `about` is the task's entry in "tasks" of `eval.evaluate`'s result.
    """
    published = [
        f"{metric} {model.results[task][metric]:.4g} ({model.name})"
        for metric in about["figures"]
        for model in GPT2 + GPT3
        if metric in model.results.get(task, {})
    ]
    if not published:
        return "no results of OpenAI's models are published for it"
    reason = not_comparable_reason(about["data"], n, about["full_size"])
    return f"not comparable: {reason}" if reason else f"comparable with the published {', '.join(published)}"


def find_corpus(source: Any) -> str | None:
    """Return the corpus that a JSON-serializable data source names: "fineweb-edu", "fineweb", "openwebtext" or None."""
    name = re.sub("[-_]", "", json.dumps(source).lower())
    patterns = {
        "fineweb-edu": "finewebedu|edufineweb",
        "fineweb": "(?<!edu)fineweb(?!edu|2)",
        "openwebtext": "openwebtext(?!2)",
    }
    matches = [corpus for corpus, pattern in patterns.items() if re.search(pattern, name)]
    return matches[0] if len(matches) == 1 else None  # two matches are ambiguous


def reference_lines(
    shape: "GPT2ReproConfig", data_source: Any, tasks: "Sequence[LoadedTask]", *, is_gpt2_tokenizer: bool
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return ({name: loss}, {task: {name: main metric}}) of chance and of models of a training run's size.

    Args:
        shape: has n_layer and n_embd.
        data_source: where the training data came from, see `find_corpus`.
        tasks: those that the run scores.
        is_gpt2_tokenizer: if not, published results are not comparable.
    """
    corpus = find_corpus(data_source)
    models = [m for m in GPT2 + GPT3 if m.size == (shape.n_layer, shape.n_embd) and is_gpt2_tokenizer]
    losses = {model.name: model.losses[corpus] for model in models if corpus in model.losses}
    scores: dict[str, dict[str, float]] = {}
    for task, items, data in tasks:
        metric = task.main_metric or next(iter(task.metrics))
        lines = scores[task.name] = {} if task.chance is None else {"chance": task.chance}
        if not_comparable_reason({"is_sample": data.is_sample}, len(items), task.full_size) is None:
            results = {model.name: model.results.get(task.name, {}) for model in models}
            lines |= {name: metrics[metric] for name, metrics in results.items() if metric in metrics}
    return losses, scores
