"""Evaluate during training: validation loss, HellaSwag and samples, on all processes of the run together."""

import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from common.cli import encodable
from eval import EvalError
from eval.scoring import Model, Tokenizer
from eval.task import ItemResult, LoadedTask, interleave_ranks, score_items

Batch = tuple[Tensor, Tensor, Tensor | None]
"""inputs, targets and position_ids (None for 0 ... T - 1), each [rows, T] int64; data.loader.Batch is one"""


class StopRequest(Protocol):
    """A request to stop the run, such as training.run.StopRequest."""

    @property
    def is_requested(self) -> bool:
        """True after a request to this process, whatever the others got."""


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
    seconds: float
    """time for the evaluation, without the samples"""
    samples: list[str]
    """a continuation of each prompt on the main process; none if the loss is not finite"""


class _Share(NamedTuple):
    """The results of one process."""

    losses: list[tuple[float, int]]  # `validation_loss` of each folder, up to a stop request
    item_results: list[ItemResult] | None  # None: HellaSwag was not scored
    hellaswag_seconds: float
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
    hellaswag: LoadedTask | None
    """HellaSwag with all its items; None to leave it out"""
    tokenizer: Tokenizer
    prompts: Sequence[str]
    """the beginnings of the samples"""
    sample_tokens: int
    """tokens per sample, after the prompt"""
    seed: int
    """of the samples"""
    stop: StopRequest

    def run(self, model: Model, loss_model: nn.Module, batch_size: int) -> EvaluationResult | None:
        """Evaluate a model and return the results, or None after a stop request to any process.

        Call it on every process, within the run's autocast.

        Args:
            model: the unwrapped and unsharded model, in eval mode.
            loss_model: the same model, compiled or not, for the validation loss.
            batch_size: of the validation loss.
        """
        start = time.perf_counter()
        shares: list[_Share] = gather_object([self._score_share(model, loss_model, batch_size)])
        if any(share.is_stop_requested for share in shares):
            return None
        sums = [map(sum, zip(*folder, strict=True)) for folder in zip(*(s.losses for s in shares), strict=True)]
        losses = [loss_sum / num_tokens for loss_sum, num_tokens in sums]
        val_loss = sum(weight * loss for weight, loss in zip(self.val_weights, losses, strict=True))
        item_results = [share.item_results for share in shares if share.item_results is not None]
        metrics = None
        if self.hellaswag is not None and len(item_results) == len(shares):
            metrics = self.hellaswag.task.aggregate(interleave_ranks(item_results))
            metrics["is_sample"] = self.hellaswag.data.is_sample
        seconds = time.perf_counter() - start
        is_broken = not math.isfinite(val_loss) or (self.hellaswag is not None and metrics is None)
        samples: list[str] = []
        if PartialState().is_main_process and not is_broken:
            samples = sample_texts(model, self.tokenizer, self.prompts, num_tokens=self.sample_tokens, seed=self.seed)
        gc.collect()  # generate leaves cycles of objects, and training switches the collector off
        return EvaluationResult(
            val_loss=val_loss,
            val_losses=dict(zip(self.val_batches, losses, strict=True)) if len(losses) > 1 else None,
            hellaswag=metrics,
            hellaswag_seconds=max(share.hellaswag_seconds for share in shares),
            seconds=seconds,
            samples=samples,
        )

    def _score_share(self, model: Model, loss_model: nn.Module, batch_size: int) -> _Share:
        losses: list[tuple[float, int]] = []
        item_results, seconds = None, 0.0
        try:
            for batches in self.val_batches.values():
                losses.append(validation_loss(loss_model, batches(batch_size), on_batch=self._check_stop))
            if self.hellaswag is not None:
                state = PartialState()
                items = self.hellaswag.items[state.process_index :: state.num_processes]
                start = time.perf_counter()
                item_results = score_items(self.hellaswag.task, model, items, on_batch=self._check_stop)
                seconds = time.perf_counter() - start
        except _Stopped:
            pass
        except EvalError as error:  # a diverged model, which its losses show too
            tqdm.write(encodable(f"warning: HellaSwag was not scored: {error}"))
        return _Share(losses, item_results, seconds, self.stop.is_requested)

    def _check_stop(self, *_: object) -> None:
        if self.stop.is_requested:
            raise _Stopped


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
