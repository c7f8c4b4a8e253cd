"""LAMBADA as lm-evaluation-harness scores it: task lambada_openai, version 1."""

from dataclasses import dataclass

from eval import EvalError
from eval.items import HubUnavailableError, Source, check_text, file_records, first_items, hub_records, sha256_of
from eval.lambada.word_prediction import word_prediction
from eval.task import BaseTask, Item, encode_together

HUB_ID = "EleutherAI/lambada_openai"
FIELDS = ("context", "continuation")


@dataclass(frozen=True, kw_only=True)
class Task(BaseTask):
    """The passage up to its last space is the context; a space and the last word, encoded with it, are scored."""

    version = 1
    figures = {  # noqa: RUF012 (a constant)
        "acc": "last words that are the model's own choice (lm-evaluation-harness, lambada_openai)",
        "perplexity": "of a last word (lm-evaluation-harness, lambada_openai; the GPT-2 paper's is another protocol)",
    }
    full_size = 5_153

    def read(self, tokenizer, max_inputs):
        """
        `data`: "hub" (EleutherAI/lambada_openai), or a .jsonl, .jsonl.gz or .jsonl.xz file with the fields context and
        continuation, or with the whole passage as text. See BaseTask.
        """
        if self.data == "hub":
            try:
                records, name = hub_records(HUB_ID, "test", "default"), f"{HUB_ID} (test)"
            except HubUnavailableError as error:
                raise EvalError(
                    f"{HUB_ID} was not to be had ({error}); name a local copy of LAMBADA with --data lambada=FILE"
                ) from error
        else:
            records = file_records(self.data, fields=FIELDS, or_field="text", others="'hub' or ")
            name = str(self.data)
        passages, count = first_items([_passage(record, where) for record, where in records], self.limit)
        requests = encode_together(tokenizer, [(context, [f" {word}"]) for context, word in passages])
        items = [Item([request], {"word": word}) for request, (_, word) in zip(requests, passages, strict=True)]
        return items, Source(description=f"{name}, {count}", sha256=sha256_of(passages))

    def answer(self, item, scores):
        """The word, its log-likelihood (nats) and number of tokens, and whether it is the model's own choice."""
        [[score]] = scores
        return {
            "word": item.reference["word"],
            "log_likelihood": score.log_likelihood,
            "num_tokens": score.num_tokens,
            "is_greedy": score.is_greedy,
        }

    def results(self, answers):
        """See `word_prediction`."""
        return word_prediction(answers)


def _passage(record, where):
    """(all but the last word, the last word)"""
    if "text" in record:
        check_text(record["text"], f"{where}: text")
        context, _, word = record["text"].rpartition(" ")
    else:
        context, word = (record[name] for name in FIELDS)
    check_text(context, f"{where}: context")
    check_text(word, f"{where}: continuation")
    return context, word.lstrip(" ")
