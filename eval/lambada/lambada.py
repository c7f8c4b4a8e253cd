"""LAMBADA's accuracy and perplexity as a metric: `evaluate.load("eval/lambada")`."""

# Each import on a line of its own, the local one relative: see hellaswag.py.
import datasets
import evaluate

from .word_prediction import word_prediction

_CITATION = """\
@inproceedings{paperno2016lambada,
    title = {The LAMBADA dataset: Word prediction requiring a broad discourse context},
    author = {Paperno, Denis and Kruszewski, Germ{\\'a}n and Lazaridou, Angeliki and Pham, Ngoc Quan and
        Bernardi, Raffaella and Pezzelle, Sandro and Baroni, Marco and Boleda, Gemma and Fern{\\'a}ndez, Raquel},
    booktitle = {Proceedings of the 54th Annual Meeting of the Association for Computational Linguistics},
    year = {2016},
}
"""

_DESCRIPTION = """\
How well a language model foresees the last word of a passage: the fraction of words that it would write itself (acc),
and the perplexity of a word.
"""

_INPUTS = """\
Args:
    predictions: one dict a passage: "log_likelihood", of its last word in nats, summed over the word's tokens;
        "is_greedy", whether each of those tokens is the model's most probable one. There are no references: the
        word is what was scored.

Returns:
    acc, perplexity: the fraction of greedy words; exp of minus the mean log-likelihood.
    acc_stderr, perplexity_stderr: their standard errors.
    n: the number of passages.

Example:
    >>> lambada = evaluate.load("eval/lambada")
    >>> results = lambada.compute(
    ...     predictions=[
    ...         {"log_likelihood": -1.0, "is_greedy": True},
    ...         {"log_likelihood": -3.0, "is_greedy": False},
    ...     ],
    ... )
    >>> results["acc"], round(results["perplexity"], 4)
    (0.5, 7.3891)
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class Lambada(evaluate.Metric):
    """`compute(predictions=)`; ValueError names the passage that is wrong, see `word_prediction`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": {
                        "log_likelihood": datasets.Value("float64"),
                        "is_greedy": datasets.Value("bool"),
                    },
                }
            ),
            homepage="https://zenodo.org/record/2630551",
            reference_urls=["https://arxiv.org/abs/1606.06031"],
        )

    def _compute(self, predictions):
        return word_prediction(predictions)
