"""Evaluate during training: validation loss, tasks and samples, on all processes of the run together."""

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from common.cli import say
from common.errors import UserError, one_line
from data.shards import Shard
from eval import EvalError
from eval.hellaswag.task import LECTURE
from eval.scoring import Model, NotFiniteError, Tokenizer
from eval.task import ItemResult, LoadedTask, interleave_ranks, score_items, task_class

T = TypeVar("T")
Batch = tuple[Tensor, Tensor, Tensor | None]
"""inputs, targets and position_ids (None for 0 ... T - 1), each [rows, T] int64; data.loader.Batch is one"""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The results of one evaluation, the same on every process except for the samples."""

    val_loss: float
    """nats per token; for a mixture, the mean of the folders' losses by their weights"""
    val_losses: dict[str, float] | None
    """loss of each folder of a mixture; None for one folder"""
    hellaswag: dict[str, float] | None
    """HellaSwag's metrics, n, num_truncated and is_sample; None if it was not scored"""
    hellaswag_seconds: float
    """time for HellaSwag on the slowest process"""
    scores: dict[str, dict[str, float]]
    """the same of each other task that was scored, its main metric first"""
    score_seconds: dict[str, float]
    """time for each of them on the slowest process"""
    seconds: float
    """time for the evaluation, without the samples"""
    samples: list[str]
    """a continuation of each prompt on the main process; none if the loss or log-likelihoods are not finite"""


class _Failure(NamedTuple):
    """Why a task has no scores."""

    reason: str
    is_diverged: bool  # the model is to blame, and may be better at the next evaluation


class _Share(NamedTuple):
    """The results of one process, up to a stop request."""

    losses: list[tuple[float, int]]  # `validation_loss` of each folder
    results: dict[str, list[ItemResult] | _Failure]  # by task
    seconds: dict[str, float]
    is_stop_requested: bool


class _Stopped(Exception):
    """Aborts an evaluation after a stop request."""


@dataclass(frozen=True, kw_only=True)
class TrainingEvaluation:
    """The evaluations of a run. Every process creates one and calls `run` at the same steps."""

    val_batches: Mapping[str, Callable[[int], Iterable[Batch]]]
    """of each folder: called with a batch size, returns this process's share of the validation batches"""
    val_weights: Sequence[float] = (1.0,)
    """of the folders, in order; they add up to 1"""
    tasks: Sequence[tuple[LoadedTask, int]]
    """with the steps between scorings"""
    tokenizer: Tokenizer
    prompts: Sequence[str]
    """the beginnings of the samples"""
    sample_tokens: int
    """tokens per sample, after the prompt"""
    seed: int
    """of the samples"""
    should_stop: Callable[[], bool]
    """True after a request to stop the run came to this process, whatever the others got"""
    _failed: set[str] = field(default_factory=set)  # tasks that are not scored again

    def run(
        self, model: Model, loss_model: nn.Module, batch_size: int, *, step: int, is_last: bool
    ) -> EvaluationResult | None:
        """Evaluate a model and return the results, or None after a stop request to any process.

        Call it on every process, within the run's autocast.

        Args:
            model: the unwrapped and unsharded model, in eval mode.
            loss_model: the same model, compiled or not, for the validation loss.
            batch_size: of the validation loss.
            step: tasks are scored at multiples of their intervals.
            is_last: score all tasks.
        """
        start = time.perf_counter()
        tasks = [task for task, every in self.tasks if is_last or step % every == 0]
        tasks = [task for task in tasks if task.name not in self._failed]
        shares: list[_Share] = gather_object([self._score_share(model, loss_model, batch_size, tasks)])
        if any(share.is_stop_requested for share in shares):
            return None
        sums = [map(sum, zip(*folder, strict=True)) for folder in zip(*(s.losses for s in shares), strict=True)]
        losses = [loss_sum / num_tokens for loss_sum, num_tokens in sums]
        val_loss = sum(weight * loss for weight, loss in zip(self.val_weights, losses, strict=True))
        is_diverged = not math.isfinite(val_loss)
        scores, score_seconds = {}, {}
        for task in tasks:
            result = _scores_of(task, [share.results[task.name] for share in shares])
            if isinstance(result, _Failure):
                is_diverged |= result.is_diverged
                again = "" if result.is_diverged else "; it is left out until the run is resumed"
                say(f"warning: {task.name} was not scored: {result.reason}{again}")
                self._failed.update([] if result.is_diverged else [task.name])
            else:
                scores[task.name] = result
                score_seconds[task.name] = max(share.seconds[task.name] for share in shares)
        seconds = time.perf_counter() - start
        samples: list[str] = []
        if PartialState().is_main_process and not is_diverged:
            samples = sample_texts(model, self.tokenizer, self.prompts, num_tokens=self.sample_tokens, seed=self.seed)
        gc.collect()  # generate leaves cycles of objects, and training switches the collector off
        return EvaluationResult(
            val_loss=val_loss,
            val_losses=dict(zip(self.val_batches, losses, strict=True)) if len(losses) > 1 else None,
            hellaswag=scores.pop("hellaswag", None),
            hellaswag_seconds=score_seconds.pop("hellaswag", 0.0),
            scores=scores,
            score_seconds=score_seconds,
            seconds=seconds,
            samples=samples,
        )

    def _score_share(self, model: Model, loss_model: nn.Module, batch_size: int, tasks: Sequence[LoadedTask]) -> _Share:
        state, losses, results, seconds = PartialState(), [], {}, {}
        with contextlib.suppress(_Stopped):
            for batches in self.val_batches.values():
                losses.append(validation_loss(loss_model, batches(batch_size), on_batch=self._check_stop))
            for task in tasks:
                items = task.items[state.process_index :: state.num_processes]
                start = time.perf_counter()
                results[task.name] = _attempt(score_items, task.task, model, items, on_batch=self._check_stop)
                seconds[task.name] = time.perf_counter() - start
        return _Share(losses, results, seconds, self.should_stop())

    def _check_stop(self, *_: object) -> None:
        if self.should_stop():
            raise _Stopped


def _attempt(function: Callable[..., T], *args: Any, **kwargs: Any) -> T | _Failure:
    """Return the function's result, or its error: a failing task does not end the run."""
    try:
        return function(*args, **kwargs)
    except _Stopped:
        raise
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return _Failure(kind + one_line(error), isinstance(error, NotFiniteError))


def _scores_of(task: LoadedTask, shares: Sequence[list[ItemResult] | _Failure]) -> dict[str, float] | _Failure:
    """Return a task's metrics, the main one first, n, num_truncated and is_sample, from the shares of all processes."""
    failures = [share for share in shares if isinstance(share, _Failure)]
    metrics = failures[0] if failures else _attempt(task.task.aggregate, interleave_ranks(shares))
    if isinstance(metrics, _Failure):
        return metrics
    names = [task.task.main_metric, *task.task.metrics]
    return {name: metrics[name] for name in names if name in metrics} | metrics | {"is_sample": task.data.is_sample}


def load_task(
    name: str, data: str | None, limit: int | str | None, tokenizer: Tokenizer, max_length: int
) -> LoadedTask:
    """Load a task for training; see training.config.TaskSetting.

    Raises:
        UserError: the task does not exist, or its items are missing, malformed or too long for the model.
    """
    settings: dict[str, Any] = {} if data is None else {"data": data}
    if name == "hellaswag":
        settings["prompts"] = (LECTURE,)  # scoring both prompts would take twice as long
    if isinstance(limit, int):
        settings["limit"] = limit
    try:
        task = task_class(name)(**settings)
        loaded = task.load(tokenizer, max_length)
    except EvalError as error:
        raise EvalError(str(error).replace(f"--data {name}=", f"eval.task_data {name}: ")) from error
    if not isinstance(limit, str):
        return loaded
    # Evenly spread, since some tasks have one kind of items after the other. `limit` marks CORE as partial.
    total = len(loaded.items)
    count = min(total, max(2, total * int(limit.removesuffix("%")) // 100))
    items = [loaded.items[index * total // count] for index in range(count)]
    data_info = replace(loaded.data, description=f"{loaded.data.description}, {limit} of them")
    return LoadedTask(replace(task, limit=count), items, data_info)


@torch.no_grad()
def validation_loss(
    model: nn.Module, batches: Iterable[Batch], *, on_batch: Callable[[], object] | None = None
) -> tuple[float, int]:
    """Return (sum of -ln p(target) in nats, number of targets), which can be added up over processes.

    `model` is a GPT2ReproForCausalLM in eval mode, wrapped or not; the batches may be on any device.
    """
    device = next(model.parameters()).device
    loss_sum, num_tokens = 0.0, 0
    for inputs, targets, position_ids in batches:
        loss = model(
            input_ids=inputs.to(device),
            position_ids=None if position_ids is None else position_ids.to(device),
            shift_labels=targets.to(device),
            num_items_in_batch=1,  # the sum, not the mean
            return_logits=False,
        ).loss
        loss_sum += loss.item()
        num_tokens += targets.numel()
        if on_batch is not None:
            on_batch()
    return loss_sum, num_tokens


def prompts_of(shards: Sequence[Shard], tokenizer: Tokenizer, *, max_tokens: int) -> list[str]:
    """Return a few words of two passages of a validation text, as prompts for a run that was not given any.

    Args:
        shards: of the text.
        max_tokens: that a prompt may have; a longer one is left out.
    """
    longest = max(shards, key=len)
    prompts = []
    for start in (0, len(longest) // 2):
        text = str(tokenizer.decode(longest[start : start + 48], skip_special_tokens=True))
        words = text.split()[1:6]  # the first one may be a part of a word
        prompt = " ".join(words) or text.strip()[:12]  # a language without spaces
        if 0 < len(tokenizer(prompt).input_ids) <= max_tokens:
            prompts.append(prompt)
    return prompts


def check_prompts(tokenizer: Tokenizer, prompts: Sequence[str], *, num_tokens: int, n_positions: int) -> None:
    """Raise EvalError for a prompt without tokens, or one that leaves no room for `num_tokens` more."""
    for prompt in prompts:
        length = len(tokenizer(prompt).input_ids)
        if length == 0:
            raise EvalError(f"eval.prompts: {prompt!r} has no tokens; remove it, or write at least one word")
        if length + num_tokens > n_positions:
            raise EvalError(
                f"eval.prompts: {prompt!r} and eval.sample_tokens={num_tokens} more tokens do not fit "
                f"model.n_positions={n_positions}; lower eval.sample_tokens"
            )


@torch.no_grad()
def sample_texts(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[str], *, num_tokens: int, seed: int
) -> list[str]:
    """Return each prompt with a continuation of `num_tokens`, from the 50 most probable tokens as in the lecture.

    The same seed and weights give the same texts. The global random state is not changed.
    """
    device = model.device
    own_rng = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    texts: list[str] = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").to(device)
        with torch.random.fork_rng(**own_rng):
            torch.manual_seed(seed)
            output = model.generate(  # type: ignore[operator]  # in GenerationMixin, not in PreTrainedModel
                **ids, max_new_tokens=num_tokens, do_sample=True, top_k=50, pad_token_id=tokenizer.eos_token_id
            )
        texts += tokenizer.batch_decode(output)
    return texts
