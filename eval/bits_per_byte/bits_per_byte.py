"""Bits per byte as a metric: `evaluate.load("eval/bits_per_byte")`."""

# Each import on a line of its own, the local one relative: see hellaswag.py.
import datasets
import evaluate

from .compression import bits_per_byte

_CITATION = """\
@article{gao2020pile,
    title = {The {P}ile: An 800GB Dataset of Diverse Text for Language Modeling},
    author = {Gao, Leo and Biderman, Stella and Black, Sid and Golding, Laurence and Hoppe, Travis and
        Foster, Charles and Phang, Jason and He, Horace and Thite, Anish and Nabeshima, Noa and Presser, Shawn and
        Leahy, Connor},
    journal = {arXiv preprint arXiv:2101.00027},
    year = {2020},
}
"""

_DESCRIPTION = """\
How many bits a language model needs for a byte of text: minus its log-likelihood in bits over the bytes of UTF-8.
Models with different tokenizers can be compared.
"""

_INPUTS = """\
Args:
    predictions: each text's log-likelihood in nats, summed over its tokens.
    references: the texts.

Returns:
    bits_per_byte: a float.
    num_bytes: of all the texts, in UTF-8.
    n: the number of texts.

Example:
    >>> bits_per_byte = evaluate.load("eval/bits_per_byte")
    >>> bits_per_byte.compute(predictions=[-5.545177444479562], references=["byte"])
    {'bits_per_byte': 2.0, 'num_bytes': 4, 'n': 1}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class BitsPerByte(evaluate.Metric):
    """`compute(predictions=, references=)`; ValueError names the text that is wrong, see `compression.py`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://arxiv.org/abs/2101.00027"],
        )

    def _compute(self, predictions, references):
        num_bytes = [len(text.encode()) for text in references]
        return {
            "bits_per_byte": bits_per_byte(predictions, num_bytes),
            "num_bytes": sum(num_bytes),
            "n": len(references),
        }
