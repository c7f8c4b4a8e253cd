"""HellaSwag's accuracies as a metric: `evaluate.load("eval/hellaswag")`."""

# One import per line, and a relative one for the local file: `evaluate` finds with a regular expression which packages
# this file needs and which files to copy along with it.
import inspect

import datasets
import evaluate

from .accuracy import accuracy

_CITATION = """\
@inproceedings{zellers2019hellaswag,
    title = {HellaSwag: Can a Machine Really Finish Your Sentence?},
    author = {Zellers, Rowan and Holtzman, Ari and Bisk, Yonatan and Farhadi, Ali and Choi, Yejin},
    booktitle = {Proceedings of the 57th Annual Meeting of the Association for Computational Linguistics},
    year = {2019},
}
"""

_DESCRIPTION = """\
The fraction of HellaSwag items in which a language model gives the correct ending the highest log-likelihood
(acc), and the highest log-likelihood divided by its length (acc_norm).
"""

_INPUTS = inspect.cleandoc(accuracy.__doc__ or "")


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class HellaSwag(evaluate.Metric):
    """`compute(predictions=, references=)`. A ValueError names the malformed item, see `accuracy`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": {
                        "log_likelihoods": datasets.Sequence(datasets.Value("float64")),
                        "lengths": datasets.Sequence(datasets.Value("int64")),
                    },
                    "references": datasets.Value("int64"),
                }
            ),
            homepage="https://rowanzellers.com/hellaswag",
            reference_urls=["https://arxiv.org/abs/1905.07830"],
        )

    def _compute(self, predictions: list[dict], references: list[int]) -> dict[str, float]:
        return accuracy(predictions, references)
