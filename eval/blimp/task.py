"""BLiMP as lm-evaluation-harness scores it (group blimp, version 2), and without a start token."""

import csv
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from eval import EvalError
from eval.items import DataInfo, check_fields, check_text, first_items, sha256_of, task_records
from eval.scoring import Request, Tokenizer
from eval.task import BaseTask, Item, ItemResult, ItemScores, encode
from eval.windows import start_token

HUB_ID = "nyu-mll/blimp"
FIELDS = ("sentence_good", "sentence_bad", "UID", "linguistics_term")


class Paradigm(NamedTuple):
    """One of BLiMP's 67 sets of 1,000 pairs."""

    phenomenon: str
    gpt2_large: float
    """published accuracy"""


_LINES = Path(__file__).with_name("published.csv").read_text(encoding="utf-8").splitlines()
PARADIGMS = {
    row["paradigm"]: Paradigm(row["phenomenon"], float(row["gpt2_large"]))
    for row in csv.DictReader(line for line in _LINES if not line.startswith("#"))
}
# Paradigms per phenomenon. The data call two paradigms of argument_structure "s-selection"; the paper does not.
PHENOMENA = Counter(paradigm.phenomenon for paradigm in PARADIGMS.values())


@dataclass(frozen=True, kw_only=True)
class Task(BaseTask):
    """Choose the sentence with the higher log-likelihood, summed over its tokens.

    acc             the start token, a space and the sentence: lm-eval's empty context becomes the start token, and
                    its target_delimiter the space
    acc_no_start    the sentence as written; its first token is context and is not scored

    Equal log-likelihoods count as correct, as in lm-eval. Seven pairs consist of the same sentence twice.
    """

    version = 1
    metrics = {  # noqa: RUF012 (a constant)
        "acc": "grammatical sentence more probable, mean of paradigms (lm-evaluation-harness, blimp)",
        "acc_no_start": "without start token: all but the first token of a sentence are scored",
        **{name: f"acc of its {count} paradigms" for name, count in PHENOMENA.items()},
    }
    chance = 0.5
    full_size = 67_000

    def read(self, tokenizer: Tokenizer, max_length: int | None) -> tuple[list[Item], DataInfo]:
        """Read the pairs: the first one of each paradigm, then the second ones, and so on. See BaseTask.

        `data` is "hub" (nyu-mll/blimp), or a file of JSON lines with the fields sentence_good, sentence_bad, UID (the
        paradigm) and linguistics_term (the phenomenon, for paradigms that are not BLiMP's).
        """
        records, name = task_records(self.name, self.data, HUB_ID, "train", list(PARADIGMS))
        next_index: Counter[str] = Counter()
        pairs = []
        for record, where in records:
            check_fields(record, FIELDS, where)
            for field in FIELDS:
                check_text(record[field], f"{where}: {field}")
            *pair, paradigm, term = (record[field] for field in FIELDS)
            phenomenon = PARADIGMS[paradigm].phenomenon if paradigm in PARADIGMS else term
            pairs.append((next_index[paradigm], paradigm, phenomenon, pair))
            next_index[paradigm] += 1
        kept, count = first_items(sorted(pairs), self.limit)
        start, items = start_token(tokenizer), []
        # A pair of equal sentences is scored as one sentence, so that rounding cannot tell them apart.
        sentences = [sentence for *_, pair in kept for sentence in dict.fromkeys(pair)]
        after_space = iter(encode(tokenizer, [f" {sentence}" for sentence in sentences]))
        as_written = iter(encode(tokenizer, sentences))
        for index, paradigm, phenomenon, pair in kept:
            num_different = len(set(pair))
            requests = [Request([start], [next(after_space) for _ in range(num_different)])]
            for _ in range(num_different):
                tokens = next(as_written)
                if len(tokens) < 2:
                    raise EvalError(f"{paradigm}, pair {index}: a sentence has only one token; remove the pair")
                requests.append(Request(tokens[:1], [tokens[1:]]))
            items.append(Item(requests, {"paradigm": paradigm, "phenomenon": phenomenon, "pair": index}))
        return items, DataInfo(description=f"{name}, {count}", sha256=sha256_of(kept))

    def process_item(self, item: Item, scores: ItemScores) -> ItemResult:
        """Return the paradigm, its phenomenon, the pair's index in it, and [good, bad] log-likelihoods (nats)."""
        with_start, *without_start = scores
        return {
            **item.reference,
            "log_likelihoods": [with_start[0].log_likelihood, with_start[-1].log_likelihood],
            "no_start_log_likelihoods": [without_start[i][0].log_likelihood for i in (0, -1)],
        }

    def compute_metrics(self, item_results: Sequence[ItemResult]) -> dict[str, float]:
        """Return acc and acc_no_start, acc of each phenomenon and of each paradigm, under their names, and n.

        All are means over paradigms. The standard error of one paradigm is sqrt(p (1 - p) / (n - 1)), that of a mean
        follows from those of its paradigms, as in lm-eval's groups; nan if a paradigm has one pair only.
        """
        correct: dict[tuple[str, str], list[bool]] = defaultdict(list)
        phenomena: dict[str, str] = {}
        for result in item_results:
            phenomena[result["paradigm"]] = result["phenomenon"]
            for prefix in ("", "no_start_"):
                good, bad = result[f"{prefix}log_likelihoods"]
                correct[prefix, result["paradigm"]].append(good >= bad)
        metrics = _mean("acc", [correct["", paradigm] for paradigm in phenomena])
        metrics |= _mean("acc_no_start", [correct["no_start_", paradigm] for paradigm in phenomena])
        for phenomenon in sorted(set(phenomena.values())):
            paradigms = [paradigm for paradigm in phenomena if phenomena[paradigm] == phenomenon]
            metrics |= _mean(phenomenon, [correct["", paradigm] for paradigm in paradigms])
        for paradigm in sorted(phenomena):
            metrics |= _mean(paradigm, [correct["", paradigm]])
        return metrics | {"n": len(item_results)}


def _mean(name: str, paradigms: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Return the mean accuracy of paradigms as `name`, with its standard error."""
    accuracies = [sum(correct) / len(correct) for correct in paradigms]
    variances = [
        p * (1 - p) / (len(correct) - 1) if len(correct) > 1 else math.nan
        for p, correct in zip(accuracies, paradigms, strict=True)
    ]
    stderr = math.sqrt(math.fsum(variances)) / len(paradigms)
    return {name: math.fsum(accuracies) / len(paradigms), f"{name}_stderr": stderr}
