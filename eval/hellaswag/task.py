"""HellaSwag as build-nanogpt and llm.c score it, and as lm-evaluation-harness does, from one pass over the items."""

from dataclasses import dataclass

from eval import EvalError
from eval.hellaswag.accuracy import accuracy
from eval.hellaswag.items import CONTEXT_FIELDS, load_items
from eval.scoring import Request
from eval.task import BaseTask, Item, encode, encode_together

LECTURE, LM_EVAL = CONTEXT_FIELDS


@dataclass(frozen=True, kw_only=True)
class Task(BaseTask):
    """
    Two prompts, each with two ways to choose an ending:

        lecture    the context as it stands in the data; a space and the ending, encoded apart from it
                   (build-nanogpt hellaswag.py, llm.c dev/data/hellaswag.py)
        lm_eval    "activity_label: ctx_a Ctx_b", tags in brackets taken out of everything; encoded with the ending
                   (lm-evaluation-harness, tasks/hellaswag version 1)
    """

    prompts: tuple[str, ...] = (LECTURE, LM_EVAL)
    """which of the two to score; each costs as much as the other"""

    version = 2  # 1 had the lecture's prompt only
    figures = {  # noqa: RUF012 (a constant)
        "acc": "the most probable ending (build-nanogpt's and llm.c's acc)",
        "acc_norm": "the most probable a token (build-nanogpt's and llm.c's acc_norm)",
        "lm_eval_acc": "the most probable ending (lm-evaluation-harness's acc and prompt)",
        "lm_eval_acc_norm": "the most probable a character (lm-evaluation-harness's acc_norm and prompt)",
    }
    full_size = 10_042

    def read(self, tokenizer, max_inputs):
        """See BaseTask; `load_items` has where from, and the errors."""
        if not self.prompts or not set(self.prompts) <= set(_REQUESTS):
            raise EvalError(f"hellaswag's prompts are one or more of {', '.join(_REQUESTS)}, got {self.prompts}")
        examples, source = load_items(self.data, self.limit, self.prompts)
        requests = [_REQUESTS[prompt](tokenizer, examples) for prompt in self.prompts]
        items = [
            Item(
                list(of_item),
                {"label": example.label, "num_characters": [len(ending) for ending in example.lm_eval_endings]},
            )
            for example, *of_item in zip(examples, *requests, strict=True)
        ]
        return items, source

    def answer(self, item, scores):
        """The right ending, and the log-likelihoods (nats) and lengths of all four, for each prompt."""
        answer = {"label": item.reference["label"]}
        for prompt, of_endings in zip(self.prompts, scores, strict=True):
            answer[f"{prompt}_log_likelihoods"] = [score.log_likelihood for score in of_endings]
            answer[f"{prompt}_num_tokens"] = [score.num_tokens for score in of_endings]
        if LM_EVAL in self.prompts:
            answer["lm_eval_num_characters"] = item.reference["num_characters"]
        return answer

    def results(self, answers):
        """The figures with their standard errors, and n."""
        labels = [answer["label"] for answer in answers]
        results = {}
        for prompt in self.prompts:
            length = "num_tokens" if prompt == LECTURE else "num_characters"
            predictions = [
                {"log_likelihoods": a[f"{prompt}_log_likelihoods"], "lengths": a[f"{prompt}_{length}"]} for a in answers
            ]
            figures = accuracy(predictions, labels)
            n = figures.pop("n")
            results |= figures if prompt == LECTURE else {f"lm_eval_{name}": x for name, x in figures.items()}
        return results | {"n": n}


def _lecture_requests(tokenizer, examples):
    texts = [text for e in examples for text in (e.ctx, *(f" {ending}" for ending in e.endings))]
    tokens = iter(encode(tokenizer, texts))
    return [Request(next(tokens), [next(tokens) for _ in e.endings]) for e in examples]


def _lm_eval_requests(tokenizer, examples):
    pairs = [(e.lm_eval_query, [f" {ending}" for ending in e.lm_eval_endings]) for e in examples]
    return encode_together(tokenizer, pairs)


_REQUESTS = {LECTURE: _lecture_requests, LM_EVAL: _lm_eval_requests}
