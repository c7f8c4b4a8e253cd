"""WikiText-2 as lm-evaluation-harness scores it (wikitext, version 2), and as transformers' page on perplexity does."""

import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import one_line
from common.jsonl import COMPRESSIONS, name_unreadable_file
from eval import EvalError
from eval.items import DataInfo, check_fields, check_text, first_items, sha256_of, task_records
from eval.scoring import Tokenizer
from eval.task import BaseTask, Item, ItemResult, ItemScores, encode, perplexity
from eval.windows import DEFAULT_MAX_LENGTH, rolling_requests, start_token, strided_requests

HUB_ID, SUBSET = "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"
LM_EVAL, SLIDING, DISJOINT = PROTOCOLS = ("lm_eval", "sliding", "disjoint")
# " = Title = ", and not " = = Section = = ".
_TITLE = re.compile(r"= (?!=)(.*(?<!=))? =")
# Opening and closing marks that WikiText has spaces inside of.
_ENCLOSING = [("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'")]


@dataclass(frozen=True, kw_only=True)
class Task(BaseTask):
    """The perplexity of WikiText-2's test set, which is WikiText-103's too.

    lm_eval     each page by itself after the start token, detokenized, in windows of the full context; log-likelihoods
                per word and byte of the page before detokenization
    sliding     the raw rows as one text, joined by blank lines, in windows that overlap by half of the context
                (transformers' page: stride 512 of 1,024)
    disjoint    the same text in windows that do not overlap (transformers' page: stride 1,024)
    """

    version = 1
    metrics = {  # noqa: RUF012 (a constant)
        "word_perplexity": "detokenized pages, per word of the original (lm-evaluation-harness)",
        "byte_perplexity": "detokenized pages, per byte of the original (lm-evaluation-harness)",
        "bits_per_byte": "log2 of byte_perplexity (lm-evaluation-harness)",
        "sliding_perplexity": "raw text, per token, windows overlap by half (transformers' docs: stride 512 of 1,024)",
        "disjoint_perplexity": "raw text, per token, windows do not overlap (transformers' docs: stride 1,024)",
    }
    full_size = 62

    def read(self, tokenizer: Tokenizer, max_length: int | None) -> tuple[list[Item], DataInfo]:
        """Read the pages. `limit` counts pages. See BaseTask.

        `data` is "hub" (EleutherAI/wikitext_document_level), a file of JSON lines with a page each, a .parquet file
        of pages or of rows ("text"), or the text itself (wiki.test.raw, wiki.test.tokens).
        """
        pages, name = self._read_pages()
        kept, count = first_items(pages, self.limit)
        max_length = max_length or DEFAULT_MAX_LENGTH
        items = []
        start, texts = start_token(tokenizer), [detokenize(page) for page in kept]
        for page, tokens in zip(kept, encode(tokenizer, texts), strict=True):
            lengths = {"num_words": len(re.split(r"\s+", page)), "num_bytes": len(page.encode())}
            requests = rolling_requests([start, *tokens], max_length, max_length)
            items.append(Item(requests, {"protocol": LM_EVAL, **lengths}))
        [tokens] = encode(tokenizer, ["\n\n".join(rows_of(kept))], add_special_tokens=True)
        for protocol, stride in ((SLIDING, max(1, max_length // 2)), (DISJOINT, max_length)):
            requests = strided_requests(tokens, max_length, stride)
            items += [Item([request], {"protocol": protocol}) for request in requests]
        if not items:
            raise EvalError(f"wikitext: {name} has fewer than two tokens; give more text")
        return items, DataInfo(description=f"{name}, {count.replace('items', 'pages')}", sha256=sha256_of(kept))

    def _read_pages(self) -> tuple[list[str], str]:
        """Return the pages and where they come from."""
        path = Path(self.data)
        if self.data == "hub" or path.suffix in (".jsonl", *COMPRESSIONS) or not path.is_file():
            records, name = task_records(self.name, self.data, HUB_ID, "test", [SUBSET])
        else:
            try:
                with name_unreadable_file(path):
                    if path.suffix != ".parquet":
                        return split_pages(path.read_text(encoding="utf-8")), self.data
                    from pyarrow import parquet

                    rows = parquet.read_table(path).to_pylist()
            except ValueError as error:  # UnicodeDecodeError, ArrowInvalid
                raise EvalError(f"{path}: neither UTF-8 text nor readable as .parquet ({one_line(error)})") from error
            records, name = [(row, f"{path}, row {index}") for index, row in enumerate(rows)], self.data
        first = records[0][0] if records else {}
        field = "text" if isinstance(first, dict) and "text" in first else "page"
        for record, where in records:
            check_fields(record, (field,), where)
            check_text(record[field], f"{where}: {field}", may_be_empty=field == "text")
        texts = [record[field] for record, _ in records]
        return split_pages("".join(text or " \n" for text in texts)) if field == "text" else texts, name

    def process_item(self, item: Item, scores: ItemScores) -> ItemResult:
        """Return the protocol and the log-likelihood (nats) and number of tokens of a page, or of a window of text."""
        windows = [score for [score] in scores]
        return {
            **item.reference,
            "log_likelihood": math.fsum(score.log_likelihood for score in windows),
            "num_tokens": sum(score.num_tokens for score in windows),
        }

    def compute_metrics(self, item_results: Sequence[ItemResult]) -> dict[str, float]:
        """Return the metrics of each protocol, and n: pages.

        A share of a small text's items, as during training, may have none of a protocol; then its metrics are left out.
        """
        metrics: dict[str, float] = {}
        for protocol in PROTOCOLS:
            own = [result for result in item_results if result["protocol"] == protocol]
            if not own:
                continue
            nats = -math.fsum(result["log_likelihood"] for result in own)
            if protocol == LM_EVAL:
                metrics["word_perplexity"] = perplexity(nats / sum(result["num_words"] for result in own))
                nats_per_byte = nats / sum(result["num_bytes"] for result in own)
                metrics |= {"byte_perplexity": perplexity(nats_per_byte), "bits_per_byte": nats_per_byte / math.log(2)}
            else:
                metrics[f"{protocol}_perplexity"] = perplexity(nats / sum(result["num_tokens"] for result in own))
        return metrics | {"n": sum(result["protocol"] == LM_EVAL for result in item_results)}


def split_pages(text: str) -> list[str]:
    """Return the pages of WikiText's raw text: each begins with its title and ends before the next one."""
    lines = text.split("\n")
    titles = [index for index, line in enumerate(lines) if _TITLE.fullmatch(line.strip())]
    edges = itertools.pairwise([0, *titles, len(lines)])
    return [page for start, stop in edges if (page := "\n".join(lines[start:stop])).strip()]


def rows_of(pages: Sequence[str]) -> list[str]:
    """Return the rows of the dataset `wikitext` on the Hub: the text's lines with their line breaks, blank ones empty.

    The blank line before the first title, which is on no page, is the first row.
    """
    return [line if line.strip() else "" for line in io.StringIO(" \n" + "\n".join(pages))]


def detokenize(page: str) -> str:
    """Remove the spaces of WikiText's tokens as lm-evaluation-harness does (tasks/wikitext), its slips included."""
    text = re.sub("/' [0-9]/", "/'[0-9]/", page.replace("s '", "s'"))  # the replacement is literal there, too
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for opening, closing in _ENCLOSING:
        enclosed = rf"{re.escape(opening)}([^{re.escape(closing)}]*){re.escape(closing)}"
        text = re.sub(enclosed, lambda match: f"{match[0][0]}{match[1].strip()}{match[0][-1]}", text)
    for count in (4, 3, 2):
        text = text.replace(" ".join("=" * count), "=" * count)
    for before, after in ((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        text = text.replace(before, after)
    return text
