"""Train a GPT-2.

Read `train_steps` first: (a) evaluate, (b) save, (c) take one optimizer step, (d) log. `train` sets up what it uses.

    accelerate launch train.py                                        small model, offline sample corpus
    accelerate launch train.py --text book.txt                        the same on your file, folder or Hub data set
    accelerate launch train.py --config recipes/gpt2_124m.yaml        the lecture's run, on all GPUs here
    accelerate launch train.py --config recipes/gpt2_124m.yaml --dry_run        the plan, nothing written
    accelerate launch train.py --config ... --resume auto             continue from the newest checkpoint
    accelerate launch train.py --config ... --push_to_hub USER/NAME   share the last checkpoint, privately

Writes into --output_dir (runs/<recipe>, or runs/<name of the text>):

    checkpoints/step_000100/   a Hugging Face folder: AutoModelForCausalLM.from_pretrained opens it
                               (checkpoints/best is an alias, not a folder: the one with the lowest validation loss,
                               for --resume, --init_from, sample.py, eval and hub)
    metrics.jsonl              one object per training step, one per evaluation
    curves.png                 losses and scores over tokens
    report.html                the run on one page: results, curves, samples, settings, provenance
    tensorboard/               the same numbers for TensorBoard
    provenance.json            settings, code, versions, hardware, data: what made this run
    status.json                "running", "resume me", "failed" or "finished"

On SIGTERM, SIGUSR1, Ctrl-C or --max_hours it finishes its step, saves a checkpoint and exits with code 75
(resume with --resume auto). `accelerate launch` turns every code but 0 into 1, so scripts should read status.json.
"the lecture" is Andrej Karpathy's "Let's reproduce GPT-2 (124M)", https://youtu.be/l8pRSuU81PU.
Every setting is described by `python train.py --help` and in training/config.py.
"""

from common.cli import is_main_process, prepare_process, run_command, say

# Before the imports that take seconds: Ctrl-C during them is one line, too.
if __name__ == "__main__":
    prepare_process()

import time

STARTED = time.monotonic()  # --max_hours counts from here

import dataclasses
import gc
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, set_seed

from common.models import load_gpt2
from data.loader import Batch, WindowLoader
from data.manifest import dataset_fingerprint, open_split, shard_tokenizer
from data.mixture import mixture_fingerprint, normalize
from data.ngram import ngram_baselines
from data.prepare import prepare_sample_if_missing
from data.shards import Shard
from data.text_cache import prepare_text
from data.tokenizer import Tokenizer, check_same_tokenizer
from eval.during_training import TrainingEvaluation, check_prompts, load_task, prompts_of
from eval.published import reference_lines
from eval.task import task_class
from hub.push import Repository, push_last_checkpoint
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from training.batch import check_memory, choose_micro_batch_size, out_of_memory_as_one_line, pieces_per_sequence
from training.checkpoint import CheckpointWriter, LoopState, checkpoint_folder, load_state, load_training_state
from training.config import SHAPE, Config, apply_shape, load_config, load_shape, task_settings
from training.distributed import isolated_accelerator_state, leave_process_group, run_on_main, start_accelerator
from training.estimate import Plan, make_plan, warn_of_repetition
from training.hardware_table import describe_cards
from training.logging import RunLog
from training.machine import can_compile, find_device
from training.optim import build_optimizer, clip_gradients, learning_rate, step_if_finite, windows_with_nonfinite_loss
from training.profiling import profiled
from training.run import RunFolder, StopRequest, ignore_signals
from training.sharding import TrainingModels, checkpoint_activations, compile_and_wrap, unsharded_model


def train(argv: Sequence[str], *, started: float | None = None) -> int:
    """Train. Can be called repeatedly in one process, as in a notebook. Raises UserError for what the user can fix.

    Args:
        started: time.monotonic() from which --max_hours counts; None: now.

    Returns:
        exit code: 0, 75 (resume me), or 1 (the training diverged, or the last checkpoint could not be pushed).
    """
    config = load_config(argv)
    device_type = find_device(use_cpu=config.cpu)
    config.compile = config.compile and can_compile(device_type, is_dry_run=config.dry_run)
    if config.data.text is not None:  # before the process group, whose timeout would end a long preparation
        config.data.path = prepare_text(config.data.text, is_dry_run=config.dry_run)
    # Leaving this gives everything back, whatever happens: the folder's lock, signal handlers, threads, open files.
    with isolated_accelerator_state(), ExitStack() as cleanup:
        cleanup.callback(gc.unfreeze)  # train_steps freezes the garbage collector and switches it off
        if gc.isenabled():
            cleanup.callback(gc.enable)
        accelerator = start_accelerator(config.mixed_precision, device_type)
        stop = StopRequest(config.max_hours, time.monotonic() if started is None else started)
        run = cleanup.enter_context(RunFolder(str(config.output_dir)))
        resume_from = None if config.dry_run else run_on_main(run.open, config.resume)
        repository = None
        if config.push_to_hub is not None and not config.dry_run:  # check that we may push before spending compute
            repository = run_on_main(Repository, config.push_to_hub, private=not config.push_public)
        folder, *_ = config.data.mix or [config.data.path]  # all folders of a mixture must have the same tokenizer
        tokenizer = run_on_main(shard_tokenizer, folder)  # GPT-2's if the shards are not there yet
        resolved_init_from, shape = run_on_main(load_shape, config.init_from, resume_from, tokenizer.vocab_size)
        if resolved_init_from is not None and resume_from is None:
            run_on_main(check_same_tokenizer, resolved_init_from, tokenizer)
        model_config = apply_shape(config, shape, **tokenizer.config_fields())
        plan = make_plan(config, model_config, accelerator)
        say(plan.describe())
        check_memory(plan, is_dry_run=config.dry_run)
        if config.dry_run:
            return print_dry_run(config, accelerator, plan)
        data_info, loader, val_sources, baselines = load_data(config, accelerator)
        evaluation = make_evaluation(config, tokenizer, loader, val_sources, stop)

        resume_fingerprint = {  # what defines step N: the checkpoint to resume from must have the same
            "seed": config.seed,
            "init_from": config.init_from,  # as it was given: `best` may mean another checkpoint by now
            "model": {name: getattr(config.model, name) for name in SHAPE},
            "tokens_per_step": config.batch.tokens_per_step,
            "seq_len": config.batch.seq_len,
            "seq_len_warmup": round(config.batch.seq_len_warmup * config.max_steps) or None,  # in steps
            "order": config.data.order,
            "boundary": config.data.boundary,
            "tokenizer": None if tokenizer.is_gpt2 else tokenizer.sha256,  # runs before 2026-12 had GPT-2's, and no key
            **{name: data_info.get(name) for name in ("mix_weights", "train_tokens", "train_sha256")},
        }
        state = LoopState() if resume_from is None else load_state(resume_from, resume_fingerprint, run.path)
        if state.saved and state.evaluated and state.step >= config.max_steps:
            say(f"resume    {resume_from} has all {config.max_steps:,} steps: nothing left to do")
            return finish(run, state, stop, repository)

        model = build_model(model_config, config.seed, resume_from or resolved_init_from).to(accelerator.device).train()
        if plan.activation_checkpointing:
            checkpoint_activations(model)
        micro_batch_size, accumulation = choose_micro_batch_size(plan, accelerator, model, saved=state)
        state.micro_batch_size, state.num_processes = micro_batch_size, accelerator.num_processes
        say(plan.describe_batch(micro_batch_size, accumulation))
        settings = dataclasses.asdict(config) | {"init_from": resolved_init_from}
        tasks = [task for task, _ in evaluation.tasks]
        losses, scores = reference_lines(model_config, data_info["source"], tasks, is_gpt2_tokenizer=tokenizer.is_gpt2)
        log = RunLog(run.path, plan, settings, argv, state.step, loss_lines=baselines | losses, score_lines=scores)
        cleanup.enter_context(log)  # its report has the one line of out_of_memory_as_one_line
        cleanup.enter_context(out_of_memory_as_one_line(plan, micro_batch_size))
        optimizer = build_optimizer(model, config.optim)
        models = compile_and_wrap(accelerator, model, optimizer, accumulation, use_compile=config.compile)
        torch.manual_seed(config.seed + accelerator.process_index)  # each process drops other units
        if resume_from is not None:
            load_training_state(resume_from, models, accelerator)
        checkpoints = CheckpointWriter(
            run.path,
            accelerator,
            models,
            evaluation.tokenizer,
            resume_fingerprint,
            keep_last=config.keep_last,
            keep_every=config.keep_every,
            keep_best=config.keep_best,
        )
        cleanup.callback(checkpoints.close)
        # A resumed run warns if the learning rate of its last step is not the one in its log.
        last_lr = None if resume_from is None else learning_rate(state.step - 1, config.optim, config.max_steps)
        run_on_main(log.open, state, data_info, resume_from, last_lr)
        cleanup.enter_context(stop)
        run.mark_running()
        say(f"training  from step {state.step:,} to {config.max_steps:,}, into {run.path}")
        batches = loader.batches(state.step, config.max_steps, pin_memory=accelerator.device.type == "cuda")
        batches = profiled(batches, config.profile, run.path)
        cleanup.callback(batches.close)  # ends the thread that reads ahead
        is_stopped = train_steps(
            config, accelerator, models, micro_batch_size, state, loader, batches, evaluation, checkpoints, log, stop
        )
        return finish(run, state, stop, repository, log=log, is_stopped=is_stopped)


def train_steps(
    config: Config,
    accelerator: Accelerator,
    models: TrainingModels,
    micro_batch_size: int,
    state: LoopState,
    loader: WindowLoader,
    batches: Iterator[Batch],
    evaluation: TrainingEvaluation,
    checkpoints: CheckpointWriter,
    log: RunLog,
    stop: StopRequest,
) -> bool:
    """Train until config.max_steps, or until a request to stop. Return True if it was stopped."""
    optim, device, world_size = config.optim, accelerator.device, accelerator.num_processes
    is_stopped = False  # agreed on by all processes
    while True:
        is_last = state.step >= config.max_steps  # the loop runs max_steps + 1 times, to evaluate and save at the end

        # (a) Evaluate every eval_every steps and at both ends.
        if (is_last or state.step % config.eval_every == 0) and not state.evaluated and not is_stopped:
            with unsharded_model(models) as (eval_model, loss_model), accelerator.autocast():
                result = evaluation.run(eval_model, loss_model, micro_batch_size, step=state.step, is_last=is_last)
            if result is None:  # a request to stop came in
                is_stopped = True
            else:
                state.evaluated, state.val_loss = True, result.val_loss
                log.log_evaluation(state.step, dataclasses.asdict(result))
                if state.saved:  # this run was resumed from a checkpoint of this step without its loss
                    checkpoints.save(state)

        # (b) Save every save_every steps and at the end.
        is_due = config.save_every is not None and state.step > 0 and state.step % config.save_every == 0
        if (is_due or is_last or is_stopped) and not state.saved:
            checkpoints.save(state)
        if is_last or is_stopped:
            run_on_main(checkpoints.finish)
            return is_stopped
        checkpoints.report_if_done()

        # (c) Take one optimizer step over all micro-batches. The host does not wait for the device until its end.
        start = time.perf_counter()
        lr = learning_rate(state.step, optim, config.max_steps)
        for group in models.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        pieces = pieces_per_sequence(state.step, config.batch.seq_len_warmup, config.max_steps)
        losses = []
        for micro_batch in next(batches).split(micro_batch_size):  # [micro_batch_size, T] each, of this process's rows
            # Micro-batches have the same number of tokens, so averaging their gradients gives that of the global batch.
            # `backward` divides by their number; DDP or FSDP2 averages over processes, after the last one only.
            inputs, targets, position_ids = micro_batch.to(device)  # position_ids: None unless documents are kept apart
            if pieces > 1:  # seq_len_warmup: the same tokens, as shorter sequences
                inputs, targets = (x.reshape(pieces * len(x), -1) for x in (inputs, targets))
            with accelerator.accumulate(models.wrapped):
                loss = models.wrapped(input_ids=inputs, position_ids=position_ids, shift_labels=targets).loss
                accelerator.backward(loss)
            losses.append(loss.detach())
        grad_norm = clip_gradients(accelerator, models.bare, optim.grad_clip)
        # One exchange for both: the mean loss of all processes, and the share of them that was asked to stop.
        stop_vote = torch.full((), float(stop.is_requested), device=device)
        means = accelerator.reduce(torch.stack([torch.stack(losses).mean(), stop_vote]), "mean")
        loss_scale = step_if_finite(models.optimizer, means[0].isfinite() & grad_norm.isfinite(), accelerator.scaler)
        models.optimizer.zero_grad()
        # Read the step's numbers with one copy from the device, on CUDA the only one of a step.
        train_loss, stop_share, norm, scale = torch.cat([means, torch.stack([grad_norm, loss_scale])]).tolist()
        seconds = time.perf_counter() - start
        # A request after the vote: a single process stops now, several processes one step later.
        is_stopped = stop_share > 0 or (world_size == 1 and stop.is_requested)

        # (d) Log. A step that is not finite was skipped: log which windows caused it. Too many in a row are an error,
        # but not with fp16 while a lower loss scale is still to be tried: that is how the scale is found.
        is_finite = math.isfinite(train_loss) and (math.isfinite(norm) or scale > 1)
        windows = [] if is_finite else windows_with_nonfinite_loss(losses, loader.window_origins(state.step))
        state.advance(is_finite)
        log.log_step(state, loss=train_loss, lr=lr, grad_norm=norm, seconds=seconds, windows=windows, loss_scale=scale)
        if gc.isenabled():  # after the first step, which may have compiled: later pauses would delay the device
            gc.collect()
            gc.freeze()  # evaluations collect their own garbage, and skip what exists now (benchmarks/LOG.md)
            gc.disable()


# ----------------------------------------------------------------------------------------------------------
# Set-up, in the order in which `train` calls it.


def print_dry_run(config: Config, accelerator: Accelerator, plan: Plan) -> int:
    """Print the memory that the run takes, time and cost on rented GPUs, and the size of the data. Return 0."""
    say(plan.describe_batch(*choose_micro_batch_size(plan, accelerator)))
    say(describe_cards(plan, config.card))
    mix = config.data.mix or {config.data.path: 1.0}
    for folder, share in zip(mix, normalize([*mix.values()]), strict=True):
        if not Path(folder).exists():
            say(f"data      {folder}: not there yet")
            continue
        tokens = dataset_fingerprint(folder)["train_tokens"]
        epochs = plan.total_tokens * float(share) / tokens
        say(f"data      {folder}: {tokens:,} training tokens; the run is {epochs:.2f} epochs")
        warn_of_repetition(folder, epochs)
    for task in task_settings(config):
        task_class(task.name)  # raises an error for an unknown name
        say(f"task      {task.name}, limit {task.limit or 'none'}, every {task.every:,} steps")
    say(f"run       {config.output_dir} (dry run: nothing was written)")
    return 0


def load_data(
    config: Config, accelerator: Accelerator
) -> tuple[dict[str, Any], WindowLoader, dict[str, list[Shard]], dict[str, float]]:
    """Open the text. Return its fingerprint, the loader, validation shards by folder, and losses of n-gram models."""
    if config.data.prepare_sample:
        run_on_main(prepare_sample_if_missing, config.data.path)
    mix = config.data.mix or {config.data.path: 1.0}
    data_info = run_on_main(mixture_fingerprint, mix)
    train_sources, val_sources = ({folder: open_split(folder, split) for folder in mix} for split in ("train", "val"))
    loader = WindowLoader(  # decides the order of the data: windows in a seeded order, for any number of processes
        [*train_sources.values()],
        weights=[*mix.values()],
        seq_len=config.batch.seq_len,
        batch_size=config.batch.tokens_per_step // config.batch.seq_len,
        seed=config.seed,
        order=config.data.order,
        boundary=config.data.boundary,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    is_mixed = len(mix) > 1
    for folder, share, epochs in zip(mix, loader.weights, loader.epochs(config.max_steps), strict=True):
        train_tokens, val_tokens = (sum(map(len, sources[folder])) for sources in (train_sources, val_sources))
        say(
            f"data      {folder}: {f'weight {share:.4g}, ' if is_mixed else ''}{train_tokens:,} training and "
            f"{val_tokens:,} validation tokens; the run is {epochs:.2f} epochs"
        )
        warn_of_repetition(folder, epochs)
    baselines = {}
    if config.eval.ngram_baselines and not is_mixed:  # they describe one corpus
        path = config.data.path
        baselines = ngram_baselines(train_sources[path], val_sources[path], data_info["vocab_size"])
    return data_info, loader, val_sources, baselines


def make_evaluation(
    config: Config,
    shards_tokenizer: Tokenizer,
    loader: WindowLoader,
    val_sources: dict[str, list[Shard]],
    stop: StopRequest,
) -> TrainingEvaluation:
    """Load the tasks, and check that items and prompts fit the model's context."""
    n_positions = config.model.n_positions
    tokenizer = shards_tokenizer.hf(model_max_length=n_positions)
    sample_tokens = config.eval.sample_tokens
    if config.eval.prompts is None:
        first_folder = next(iter(val_sources.values()))
        config.eval.prompts = prompts_of(first_folder, tokenizer, max_tokens=n_positions - sample_tokens)
    check_prompts(tokenizer, config.eval.prompts, num_tokens=sample_tokens, n_positions=n_positions)
    tasks = []
    for name, data, limit, every in task_settings(config):
        tasks.append((run_on_main(load_task, name, data, limit, tokenizer, n_positions), every))
        say(f"{name:<9} {tasks[-1][0].data.description}{f', every {every:,} steps' * (every != config.eval_every)}")
    return TrainingEvaluation(
        val_batches={
            folder: partial(loader.val_batches, shards, max_tokens=config.eval.val_tokens // len(val_sources))
            for folder, shards in val_sources.items()
        },
        val_weights=loader.weights,
        tasks=tasks,
        tokenizer=tokenizer,
        prompts=config.eval.prompts,
        sample_tokens=sample_tokens,
        seed=config.seed,
        should_stop=lambda: stop.is_requested,
    )


def build_model(config: GPT2ReproConfig, seed: int, source: str | Path | None) -> GPT2ReproForCausalLM:
    """Return the model in float32, with the weights of a checkpoint or model, or random ones if `source` is None."""
    if source is None:
        set_seed(seed)  # the same on every process
        return GPT2ReproForCausalLM(config)
    dropout = {name: getattr(config, name) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    model = load_gpt2(str(source), vocab_size=config.vocab_size, **dropout)
    model.config.residual_in_autocast_dtype = config.residual_in_autocast_dtype
    return model


# ----------------------------------------------------------------------------------------------------------
# The end.


def finish(
    run: RunFolder,
    state: LoopState,
    stop: StopRequest,
    repository: Repository | None,
    *,
    log: RunLog | None = None,
    is_stopped: bool = False,
) -> int:
    """Write the run's last status, print the summary, and push the last checkpoint. Return the exit code."""
    folder = checkpoint_folder(run.path, state.step)
    reason = next(filter(None, gather_object([stop.reason if is_stopped else None])), None)
    # status.json first: a launcher that stops the run kills it after 30 seconds, and trackers may need more.
    exit_code = run.finish(state, reason)
    is_complete = reason is None and exit_code == 0
    if log is not None:
        log.close()
        if is_complete:
            log.print_summary(state, folder)
    PartialState().wait_for_everyone()  # a launcher may kill the others once one has ended
    if not is_complete or repository is None or not is_main_process():  # only the main process pushes
        return exit_code
    return 0 if push_last_checkpoint(repository, folder, should_stop=lambda: stop.is_requested) else 1


def command(argv: Sequence[str] | None) -> int:
    """Train and leave the process group. From then on, a late signal does not change the exit code."""
    code = train(sys.argv[1:] if argv is None else argv, started=STARTED)
    ignore_signals()
    leave_process_group()
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; in a notebook, call `train`.

    Returns:
        exit code: that of `train`, 2 for a user's mistake, or 130 for Ctrl-C before training begins, or twice.
    """
    return run_command(command, argv, on_interrupt="interrupted; what is complete is kept: add --resume auto")


if __name__ == "__main__":
    sys.exit(main())
