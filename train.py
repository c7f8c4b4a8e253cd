"""
Train a GPT-2. Read the loop first (`while True`): (a) evaluate and save, (b) one optimizer step, (c) log. The code
before the loop prepares what it uses, in the order in which it is needed.

    accelerate launch train.py                                        small model, offline sample corpus
    accelerate launch train.py --config recipes/gpt2_124m.yaml        the lecture's run, on all GPUs here
    accelerate launch train.py --config recipes/gpt2_124m.yaml --dry_run        the plan, nothing written
    accelerate launch train.py --config ... --resume auto             continue from the newest checkpoint
    accelerate launch train.py --config ... --push_to_hub USER/NAME   share the last checkpoint, privately

Writes into --output_dir (runs/<recipe>):

    checkpoints/step_000100/   a Hugging Face folder: AutoModelForCausalLM.from_pretrained opens it
                               (checkpoints/best, as a name, is the one with the lowest validation loss: for --resume,
                               --init_from, sample.py, eval and hub)
    metrics.jsonl              one object a training step, one an evaluation
    curves.png                 losses and HellaSwag over tokens
    tensorboard/               the same numbers for TensorBoard
    provenance.json            settings, code, versions, hardware, data: what made this run
    status.json                "running", "resume me", "failed" or "finished"

On SIGTERM, SIGUSR1, Ctrl-C or --max_hours it finishes the current step, saves a checkpoint and exits with code 75
(resume with --resume auto).
Every setting is described by `python train.py --help` and in training/config.py.
"""

import gc

gc.disable()  # what is imported stays; looking for garbage in it takes half a second here and more later

from common.cli import encodable, interrupt_exit_code, prepare_process, print_error, print_interrupted

if __name__ == "__main__":
    prepare_process()

import contextlib
import dataclasses
import errno
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from accelerate.utils import gather_object, set_seed
from tqdm import tqdm

from common.checkpoints import resolve_checkpoint
from common.errors import UserError
from common.models import check_name, load_gpt2
from common.models import load_config as load_model_config
from data.loader import WindowLoader, validation_batches
from data.manifest import dataset_fingerprint, needs_preparing, open_split
from data.ngram import ngram_baselines
from data.prepare import prepare_sample
from data.tokenizer import VOCAB_SIZE, load_hf_tokenizer
from eval.during_training import TrainingEvaluation, check_prompts
from eval.hellaswag.task import LECTURE
from eval.hellaswag.task import Task as HellaSwag
from eval.published import published_lines
from hub.push import Repository, push_last_checkpoint
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from training import TrainingError
from training.batch import check_memory, choose_micro_batch_size
from training.checkpoint import (
    CheckpointWriter,
    SaveError,
    check_start,
    checkpoint_folder,
    find_checkpoint,
    load_optimizer,
    load_rng,
    load_state,
    remove_leftovers,
    run_folder_of,
)
from training.config import check_lengths, load_config
from training.distributed import isolated_accelerator_state, leave_process_group, run_on_main, start_accelerator
from training.estimate import Plan, find_hardware, warn_of_repetition
from training.logging import RunLog
from training.optim import build_optimizer, learning_rate, step_if_finite, windows_with_nonfinite_loss
from training.provenance import write_provenance
from training.run import RunFolder, StopRequest, ignore_signals, stop_exit_code
from training.sharding import clip_gradients, compile_and_wrap, copy_from_file, meta_copy, unsharded_model

gc.freeze()
gc.enable()
STARTED = time.monotonic()  # what --max_hours counts from


def train(argv, *, started=None):
    """
    Train, also several times in a row in one process, as in a notebook.

    Args:
        argv: list of str, the command line's arguments.
        started: time.monotonic() from which --max_hours counts; None: now.

    Returns:
        exit code: 0, 75 (resume me), or 1 (the training diverged, or the last checkpoint could not be pushed).

    Raises:
        UserError: an error that the user can fix.
    """
    # Leaving this gives everything back, whatever happens: the folder's lock, the signal handlers, threads, open files.
    with isolated_accelerator_state(), contextlib.ExitStack() as held:
        return _train(argv, held, time.monotonic() if started is None else started)


def _train(argv, held, started):
    # ------------------------------------------------------------------------------------------------------
    # Settings: defaults < recipe < command line.
    config = load_config(argv)
    batch, optim = config.batch, config.optim
    output_dir = Path(config.output_dir)

    # ------------------------------------------------------------------------------------------------------
    # Hardware: this process, and the others that train with it.
    accelerator = start_accelerator(config.mixed_precision)
    device, is_main = accelerator.device, accelerator.is_main_process
    rank, world_size = accelerator.process_index, accelerator.num_processes
    transformers.utils.logging.disable_progress_bar()

    def say(text=""):
        if is_main:
            with contextlib.suppress(OSError):  # the log's disk may be the full one
                tqdm.write(encodable(text))

    def to_device(tensor):
        return tensor.to(device, non_blocking=device.type == "cuda")

    # ------------------------------------------------------------------------------------------------------
    # The run's folder: new, or with a checkpoint to resume from.
    run_folder = held.enter_context(RunFolder(output_dir, say))

    def open_run_folder():
        run_folder.lock(lambda: check_start(config.resume, output_dir, lambda line: None))
        remove_leftovers(output_dir)
        return find_checkpoint(config.resume, output_dir, say)

    resume_from = None if config.dry_run else run_on_main(accelerator, open_run_folder)

    # ------------------------------------------------------------------------------------------------------
    # Check that we may push to the Hub before spending compute.
    repository = None  # only on the main process, and only with --push_to_hub

    def open_repository():
        nonlocal repository
        repository = Repository(config.push_to_hub, private=not config.push_public)

    if config.push_to_hub is not None and not config.dry_run:
        run_on_main(accelerator, open_repository)

    # ------------------------------------------------------------------------------------------------------
    # The plan: the model's shape, and what it takes to train it.
    init_from = config.init_from  # as it was given, also on resuming
    if init_from is not None:
        if resume_from is None:  # runs/x/checkpoints/best is one checkpoint now, and may be another one later
            config.init_from = run_on_main(accelerator, resolve_checkpoint, config.init_from, say)
        # Once a run has begun, its own checkpoints have the shape.
        source_shape = run_on_main(accelerator, shape_of, str(resume_from or config.init_from))
        config.model = dataclasses.replace(config.model, **source_shape)
    check_lengths(config)
    shape = {name: getattr(config.model, name) for name in ("n_layer", "n_head", "n_embd", "n_positions")}
    dropout = {name: config.model.dropout for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    try:
        model_config = GPT2ReproConfig(vocab_size=VOCAB_SIZE, **shape, **dropout)
    except ValueError as error:
        raise TrainingError(f"model: {error}") from error
    with torch.device("meta"):  # shapes without values
        model = GPT2ReproForCausalLM(model_config)
    model.tie_weights()  # transformers 5.0 leaves that out on the meta device
    plan = Plan(
        shape=model_config,
        num_parameters=model.num_parameters(),
        batch=batch,
        max_steps=config.max_steps,
        dropout=config.model.dropout,
        hardware=find_hardware(accelerator, config.dollars_per_hour),
    )
    for line in [*plan.describe(), *check_memory(plan, accelerator, is_dry_run=config.dry_run)]:
        say(line)
    if config.dry_run:
        micro_batch_size, accumulation = choose_micro_batch_size(plan, accelerator)
        for line in plan.describe_batch(micro_batch_size, accumulation) + plan.describe_rental():
            say(line)
        is_there = Path(config.data.path).exists()
        tokens = (
            f"{dataset_fingerprint(config.data.path)['train_tokens']:,} training tokens"
            if is_there
            else "not there yet"
        )
        say(f"data      {config.data.path}: {tokens}")
        say(f"run       {output_dir} (dry run: nothing was written)")
        return 0

    # ------------------------------------------------------------------------------------------------------
    # Data: windows of tokens in a seeded order, the same for any number of processes.
    def prepare_data():
        if config.data.prepare_sample and needs_preparing(config.data.path):
            say(f"data      preparing the offline sample corpus in {config.data.path}")
            prepare_sample(config.data.path)
        return dataset_fingerprint(config.data.path)

    data = run_on_main(accelerator, prepare_data)
    train_shards, val_shards = (open_split(config.data.path, split) for split in ("train", "val"))
    loader = WindowLoader(
        train_shards,
        seq_len=batch.seq_len,
        batch_size=batch.tokens_per_step // batch.seq_len,
        seed=config.seed,
        order=config.data.order,
        boundary=config.data.boundary,
        rank=rank,
        world_size=world_size,
    )
    say(
        f"data      {config.data.path}: {data['train_tokens']:,} training and {data['val_tokens']:,} validation "
        f"tokens; the run is {plan.total_tokens / loader.tokens_per_epoch:.2f} epochs"
    )
    for line in warn_of_repetition(plan.total_tokens / loader.tokens_per_epoch):
        say(line)
    baselines = ngram_baselines(train_shards, val_shards) if config.eval.ngram_baselines else {}
    if baselines:
        say("baseline  " + ", ".join(f"{name} {value:.4f}" for name, value in baselines.items()) + " nats per token")
    tokenizer = load_hf_tokenizer(model_max_length=model_config.n_positions)
    hellaswag = None
    if config.eval.hellaswag is not None:
        task = HellaSwag(data=config.eval.hellaswag, limit=config.eval.hellaswag_limit, prompts=(LECTURE,))
        hellaswag = run_on_main(accelerator, task.load, tokenizer, model_config.n_positions)
        say(f"hellaswag {hellaswag.data.description}")
    check_prompts(
        tokenizer, config.eval.prompts, num_tokens=config.eval.sample_tokens, n_positions=model_config.n_positions
    )

    # ------------------------------------------------------------------------------------------------------
    # Loop state. These settings define what step N means and must match the checkpoint.
    resume_fingerprint = {
        "seed": config.seed,
        "tokens_per_step": batch.tokens_per_step,
        "seq_len": batch.seq_len,
        "train_tokens": data["train_tokens"],
        "train_sha256": data["train_sha256"],
        "order": config.data.order,
        "boundary": config.data.boundary,
        "init_from": init_from,
        "model": shape,
    }

    def is_evaluation_due(step):
        return step >= config.max_steps or step % config.eval_every == 0

    def is_save_due(step):
        return step >= config.max_steps or (step > 0 and step % (config.save_every or config.max_steps) == 0)

    step, num_skipped, consecutive_skips = 0, 0, 0
    is_evaluated, val_loss = False, None  # of this step
    saved_at = None  # the step of this run's newest checkpoint, if nothing has come to it since
    if resume_from is not None:
        saved = load_state(resume_from, resume_fingerprint)
        step, num_skipped = saved["step"], saved["num_skipped"]
        consecutive_skips = saved["skipped_in_a_row"]
        is_evaluated, val_loss = saved["evaluated"], saved["val_loss"]
        is_own = resume_from.resolve() == checkpoint_folder(output_dir, step).resolve()
        if is_own and (is_evaluated or not is_evaluation_due(step)):
            saved_at = step  # the folder has already what would be saved here
        if step >= config.max_steps and saved_at == step:
            if not is_finite_loss(val_loss):
                return fail_as_diverged(run_folder, resume_from, is_main)
            say(f"resume    {resume_from} has all {config.max_steps:,} steps: nothing left to do")
            if is_main:
                run_folder.mark_finished(resume_from, step, saved["val_loss"])
            return 0 if repository is None or push_last_checkpoint(repository, resume_from, say) else 1
        say(f"resume    from {resume_from}, step {step:,}")

    # ------------------------------------------------------------------------------------------------------
    # Model: the weights of a checkpoint, of another model, or random ones.
    if resume_from is not None:
        model = GPT2ReproForCausalLM.from_pretrained(resume_from, dtype=torch.float32, **dropout)
    elif config.init_from is not None:
        model = load_weights(config.init_from, dropout, say)
        say(f"weights   from {config.init_from}, and the shape too: settings of model.* but dropout do not count")
    else:
        set_seed(config.seed)  # the same on every process
        model = GPT2ReproForCausalLM(model_config)
    model.to(device).train()
    copy_from_file(model)
    meta_model = meta_copy(model)  # filled with gathered weights to evaluate a sharded model

    # ------------------------------------------------------------------------------------------------------
    # The batch: micro x T x accumulation x processes = tokens an optimizer step.
    micro_batch_size, accumulation = choose_micro_batch_size(plan, accelerator, model)
    for line in plan.describe_batch(micro_batch_size, accumulation):
        say(line)

    # ------------------------------------------------------------------------------------------------------
    # Compile and wrap. `model` stays the bare module, for saving, scoring and sampling at any shape; `step_model` is
    # the same, compiled where asked; `train_model` is that wrapped, by DDP for instance, to exchange gradients.
    optimizer = build_optimizer(model, optim, device.type)
    checkpoints = CheckpointWriter(
        output_dir,
        accelerator=accelerator,
        model=model,
        tokenizer=tokenizer,
        keep_last=config.keep_last,
        keep_every=config.keep_every,
        keep_best=config.keep_best,
        warn=say,
    )
    held.callback(checkpoints.close)
    train_model, step_model, optimizer = compile_and_wrap(
        accelerator, model, optimizer, use_compile=config.compile, accumulation=accumulation
    )
    torch.manual_seed(config.seed + rank)  # from here on, dropout: each process its own
    if resume_from is not None:
        load_optimizer(resume_from, model, optimizer, device)
        load_rng(resume_from, rank, device)

    # ------------------------------------------------------------------------------------------------------
    # The loop runs max_steps + 1 times: the last time it only evaluates and saves.
    published_losses, published_scores = published_lines(
        model_config, data["source"], None if hellaswag is None else hellaswag.data
    )
    log = RunLog(
        output_dir,
        say=say,
        is_main_process=is_main,
        plan=plan,
        step=step,
        log_every=config.log_every,
        eval_every=config.eval_every,
        loss_lines=baselines | published_losses,
        score_lines=published_scores,
    )
    held.push(lambda kind, error, traceback: log.close(has_failed=error is not None))
    previous_folder = None if resume_from is None else run_folder_of(resume_from, output_dir)
    settings = dataclasses.asdict(config)
    run_on_main(
        accelerator,
        log.open,
        config.trackers,
        settings,
        step=step,
        previous_folder=previous_folder,
        is_evaluated=is_evaluated,
        last_lr=learning_rate(step - 1, optim, config.max_steps) if step > 0 else None,
    )
    run_on_main(
        accelerator,
        write_provenance,
        output_dir / "provenance.json",
        settings=settings,
        data=data,
        plan=plan,
        distributed_type=accelerator.distributed_type.value,
        step=step,
        previous_path=previous_folder and previous_folder / "provenance.json",
    )
    run_folder.mark_running(is_main)
    say(f"training  from step {step:,} to {config.max_steps:,}, into {output_dir}")

    def report_saved(wait=False):
        try:
            folder = checkpoints.poll(wait)
        except SaveError as error:
            say(f"warning: {error}. Training continues")
        else:
            if folder is not None:
                say(f"saved     {folder}")

    batches = loader.batches(step, config.max_steps, pin_memory=device.type == "cuda")  # read ahead by a thread
    held.callback(batches.close)
    stop = held.enter_context(StopRequest(config.max_hours, started, say))
    evaluation = TrainingEvaluation(
        val_batches=partial(
            validation_batches,
            val_shards,
            seq_len=batch.seq_len,
            batch_size=micro_batch_size,
            max_tokens=config.eval.val_tokens,  # the same ones at each evaluation
            boundary=config.data.boundary,
            rank=rank,
            world_size=world_size,
        ),
        hellaswag=hellaswag,
        tokenizer=tokenizer,
        prompts=config.eval.prompts,
        sample_tokens=config.eval.sample_tokens,
        seed=config.seed,
        stop=stop,
    )
    stopping = False  # agreed on by all processes

    while True:
        is_last = step >= config.max_steps

        # (a) Evaluate every eval_every steps and at both ends; save every save_every steps and at the end.
        if is_evaluation_due(step) and not is_evaluated and not stopping:
            with unsharded_model(model, meta_model) as eval_model, accelerator.autocast():
                result = evaluation.run(eval_model, step_model if eval_model is model else None)
            stopping = result is None  # a stop request came in
            if result is not None:
                is_evaluated, val_loss = True, result.val_loss
                log.log_evaluation(
                    {
                        "step": step,
                        "tokens": step * batch.tokens_per_step,
                        "val_loss": val_loss,
                        "hellaswag": result.hellaswag,
                        "hellaswag_seconds": result.hellaswag_seconds,
                        "seconds": result.seconds,
                    }
                )
                for text in result.samples:
                    say(f"    {text!r}")
        if (is_save_due(step) or stopping) and step != saved_at:
            report_saved(wait=True)  # the one before: at most one waits in memory for the disk
            state = {
                "step": step,
                "tokens": step * batch.tokens_per_step,
                "val_loss": val_loss if is_evaluated else None,
                "evaluated": is_evaluated,
                "num_skipped": num_skipped,
                "skipped_in_a_row": consecutive_skips,
                **resume_fingerprint,
            }
            checkpoints.save(model, optimizer, state)
            saved_at = step
        if is_last or stopping:
            break
        report_saved()
        is_evaluated = False

        # (b) One optimizer step over all micro-batches of the global batch. Until its end, the host does not wait.
        started = time.perf_counter()
        lr = learning_rate(step, optim, config.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        losses = []
        for micro_batch in next(batches).split(micro_batch_size):  # of this process's [micro * accumulation, T]
            inputs, targets, position_ids = micro_batch.map(to_device)
            # DDP exchanges gradients once a step: accelerate lets it do so in the last micro-batch.
            with accelerator.accumulate(train_model):
                # The model divides by the tokens of the global batch. DDP averages over processes and accelerate
                # divides by the accumulation: times both, the gradient is the mean over those tokens.
                loss = train_model(
                    input_ids=inputs,
                    position_ids=position_ids,  # None unless documents are kept apart
                    shift_labels=targets,
                    num_items_in_batch=batch.tokens_per_step,
                ).loss
                accelerator.backward(loss * (world_size * accumulation))
            losses.append(loss.detach())
        grad_norm = clip_gradients(accelerator, model, optim.grad_clip)
        # One exchange for both: the loss over all processes, and whether any of them was asked to stop.
        stop_vote = torch.full((), float(stop.is_requested), device=device)
        sums = accelerator.reduce(torch.stack([sum(losses), stop_vote]), "sum")
        step_if_finite(optimizer, sums[0].isfinite() & grad_norm.isfinite())
        optimizer.zero_grad()
        step += 1
        # Read the step's numbers with one copy from the device, the only one of a step.
        train_loss, stop_votes, grad_norm = torch.cat([sums, grad_norm.view(1)]).tolist()
        seconds = time.perf_counter() - started
        # A single process also stops for a request that came after its vote.
        stopping = stop_votes > 0 or (world_size == 1 and stop.is_requested)

        # (c) Log.
        record = {
            "step": step,
            "tokens": step * batch.tokens_per_step,
            "loss": train_loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "ms": round(1000 * seconds, 2),
            "tokens_per_s": round(batch.tokens_per_step / seconds, 1),
        }
        is_finite = math.isfinite(train_loss) and math.isfinite(grad_norm)
        consecutive_skips = 0 if is_finite else consecutive_skips + 1
        if not is_finite:  # the update was skipped; log which windows caused it
            num_skipped += 1
            record["skipped"] = {
                "loss": str(train_loss),
                "grad_norm": str(grad_norm),
                "so_far": num_skipped,
                "in_a_row": consecutive_skips,
                "windows": windows_with_nonfinite_loss(losses, loader.window_origins(step - 1)),
            }
        log.log_step(record)
        if consecutive_skips >= optim.max_skipped_steps:
            raise TrainingError(
                f"step {step}: loss {train_loss}, gradient norm {grad_norm}; the last {consecutive_skips} steps were "
                "not finite. The parameters are those from before, and so are the checkpoints. Lower optim.lr or raise "
                "optim.warmup_steps, look at the windows in metrics.jsonl, and resume with --resume auto"
            )

    # ------------------------------------------------------------------------------------------------------
    # Summary. status.json first: a launcher that stops the run kills it after 30 seconds, and trackers may need more.
    reasons = [reason for reason in gather_object([stop.reason]) if reason]
    folder = checkpoint_folder(output_dir, step)
    run_on_main(accelerator, checkpoints.poll, wait=True)
    if not stopping and not is_finite_loss(val_loss):
        log.close()
        return fail_as_diverged(run_folder, folder, is_main)
    if is_main and stopping:
        run_folder.write_status("resume me", step=step, exit_code=stop_exit_code(reasons[0]))
    elif is_main:
        run_folder.mark_finished(folder, step, val_loss)
    accelerator.wait_for_everyone()
    log.close()
    say(f"saved     {folder}")
    if stopping:
        say(f"\nstopped at step {step:,} ({reasons[0]}); resume with the same command and --resume auto")
        return stop_exit_code(reasons[0])
    log.print_summary(val_loss=val_loss, num_skipped=num_skipped, checkpoint=folder)
    # The others need not wait.
    if repository is None:
        return 0
    return 0 if push_last_checkpoint(repository, folder, say, is_stopped=lambda: stop.is_requested) else 1


def is_finite_loss(loss: float | None) -> bool:
    """Return True for a number; a loss that was not finite is None where it was read from a JSON file."""
    return loss is not None and math.isfinite(loss)


def fail_as_diverged(run_folder: RunFolder, checkpoint: Path, is_main: bool) -> int:
    """Print and write down that the training diverged, and return the exit code."""
    if is_main:
        problem = (
            f"the validation loss of {checkpoint} is not finite: the training diverged. Train again in another "
            "--output_dir with a lower optim.lr or more optim.warmup_steps, from the start or from an earlier "
            "checkpoint (--resume)"
        )
        print_error(problem)
        run_folder.mark_failed(problem)
    return 1


def shape_of(source: str) -> dict[str, int]:
    """
    Return the shape of a checkpoint that a run can start from: {"n_layer", "n_head", "n_embd", "n_positions"}.

    Args:
        source: a checkpoint of ours or a GPT-2 of transformers: a folder or a Hub id.

    Raises:
        EvalError: it cannot be opened.
        TrainingError: it is not a GPT-2, or has fewer tokens than GPT-2.
    """
    check_name(source)
    config = load_model_config(source)
    if config.model_type not in ("gpt2", "gpt2repro"):
        raise TrainingError(f"init_from: {source} is a {config.model_type!r} model; it must be 'gpt2' or 'gpt2repro'")
    if config.vocab_size < VOCAB_SIZE:
        raise TrainingError(
            f"init_from: {source} has a vocabulary of {config.vocab_size:,} tokens; the data has GPT-2's {VOCAB_SIZE:,}"
        )
    return {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "n_positions")}


def load_weights(source: str, dropout: dict[str, float], say: Callable[[str], None]) -> GPT2ReproForCausalLM:
    """Open a checkpoint that `shape_of` accepts, in float32, with GPT-2's vocabulary. Raises EvalError."""
    model = load_gpt2(source, **dropout)
    if added := model.config.vocab_size - VOCAB_SIZE:  # padding (nanoGPT's 50,304), or added tokens
        say(
            f"weights   the last {added} rows of the embedding are dropped: GPT-2's tokenizer has {VOCAB_SIZE:,} tokens"
        )
        gpt2 = model.to_gpt2()
        gpt2.resize_token_embeddings(VOCAB_SIZE)
        model = GPT2ReproForCausalLM.from_gpt2(gpt2)
    return model


def main():
    """
    Run `train` on the command line's arguments and exit.

    Exit codes: 0, 75 (resume me), 2 for a mistake that was found before the run began, 1 for a run that failed.
    """
    try:
        code = train(sys.argv[1:], started=STARTED)
        ignore_signals()
        leave_process_group()
    except UserError as error:
        print_error(error)
        code = error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print_error(f"no space left on the disk for {error.filename or 'what the run writes'}: make room there")
        code = 1
    except KeyboardInterrupt:
        print_interrupted("interrupted; checkpoints saved before are complete: resume with --resume auto")
        code = interrupt_exit_code()
    sys.exit(code)


if __name__ == "__main__":
    main()
