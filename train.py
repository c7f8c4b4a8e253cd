"""
Trains a GPT-2 from a random start.

    accelerate launch train.py                                        small model, offline sample corpus
    accelerate launch train.py --config recipes/gpt2_124m.yaml        the lecture's run, on all GPUs here
    accelerate launch train.py --config recipes/gpt2_124m.yaml --dry_run        the plan, nothing written
    accelerate launch train.py --config ... --resume auto             go on from the newest checkpoint

Writes into --output_dir (runs/<recipe>):

    checkpoints/step_000100/   a Hugging Face folder: AutoModelForCausalLM.from_pretrained opens it
    checkpoints/best           a link to the one with the lowest validation loss
    metrics.jsonl              one object a training step, one an evaluation
    curves.png                 losses and HellaSwag over tokens
    tensorboard/               the same numbers for TensorBoard
    provenance.json            settings, code, versions, hardware, data: what made this run
    status.json                "running", "resume me", "failed" or "finished"

Asked to stop (SIGTERM, SIGUSR1, Ctrl-C, --max_hours) it finishes the step, saves and exits with code 75: resume me.
Every setting is described by `python train.py --help` and in training/config.py.
"""

import contextlib
import dataclasses
import errno
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, set_seed
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from data import DataError
from data.loader import WindowLoader, validation_batches
from data.manifest import identity, is_to_be_prepared, open_split
from data.ngram import ngram_baselines
from data.prepare import prepare_sample
from data.tokenizer import EOT, VOCAB_SIZE, load_hf_tokenizer
from eval import EvalError
from eval.hellaswag.accuracy import accuracy
from eval.hellaswag.items import load_items
from eval.hellaswag.task import score_hellaswag
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from training import TrainingError
from training.checkpoint import (
    CheckpointWriter,
    SaveError,
    checkpoint_folder,
    clear_left_overs,
    find_checkpoint,
    load_optimizer,
    load_rng,
    load_state,
)
from training.config import batch_arithmetic, load_config, micro_batch_sizes
from training.cpu import keep_freed_memory, use_all_cores
from training.curves import plot_curves, published_lines
from training.hardware import device_name, look_up, peak_flops
from training.metrics import MetricsLog, read_metrics
from training.microbatch import largest_that_fits, trial_step
from training.optim import build_optimizer
from training.plan import duration, estimate_memory, flops_per_token, time_and_money
from training.precision import resolve_mixed_precision
from training.progress import Progress
from training.provenance import provenance, write_provenance
from training.run_folder import lock, unlock, write_status
from training.schedule import learning_rate
from training.state import blank_copy, prepare, whole_model
from training.stopping import RESUME_ME, StoppedInEvaluation, StopRequest
from training.trackers import start_trackers

STARTED = time.monotonic()


def train(argv):
    """Returns the exit code: 0, or RESUME_ME."""
    # ------------------------------------------------------------------------------------------------------
    # Settings: defaults < recipe < command line.
    config = load_config(argv)
    output_dir = Path(config.output_dir)
    metrics_path = output_dir / "metrics.jsonl"

    # ------------------------------------------------------------------------------------------------------
    # Hardware.
    # cpu=True where there is no accelerator: without it, processes started on a CPU never find each other.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=resolve_mixed_precision(config.mixed_precision),
    )
    device, is_main = accelerator.device, accelerator.is_main_process
    rank, world_size = accelerator.process_index, accelerator.num_processes
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != world_size:
        raise TrainingError(
            f"the launcher started {launched} processes, but this one sees {world_size}: they would train "
            "separate models side by side. Launch with one of accelerate_configs/*.yaml that fits this machine"
        )
    if device.type == "cpu":
        use_all_cores(processes_here)
        keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    transformers.utils.logging.disable_progress_bar()

    def say(text=""):
        if is_main:
            with contextlib.suppress(OSError):  # the log's disk may be the full one
                tqdm.write(text)

    def to_device(tensor):
        return tensor.to(device, non_blocking=True)

    # ------------------------------------------------------------------------------------------------------
    # The run's folder: fresh, or with a checkpoint to go on from. One process looks, the others are told.
    found = [None]
    if is_main and not config.dry_run:
        lock(output_dir, say)
        clear_left_overs(output_dir)
        found = [find_checkpoint(config.resume, output_dir, say)]
    resume_from = broadcast_object_list(found)[0]

    # ------------------------------------------------------------------------------------------------------
    # Model: its shape, then what it costs to train it.
    if config.init_from is not None:
        # Once a run has begun, its own checkpoints have the shape.
        config.model = dataclasses.replace(config.model, **shape_of(resume_from or config.init_from))
    if config.batch.seq_len > config.model.n_positions:
        raise TrainingError(
            f"batch.seq_len={config.batch.seq_len} is longer than the model's {config.model.n_positions} positions; "
            "shorten seq_len"
        )
    dropout = {name: config.model.dropout for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    shape = {name: getattr(config.model, name) for name in ("n_layer", "n_head", "n_embd", "n_positions")}
    try:
        model_config = GPT2ReproConfig(vocab_size=VOCAB_SIZE, **shape, **dropout)
    except ValueError as error:
        raise TrainingError(f"model: {error}") from error
    set_seed(config.seed)  # the same seed on every process gives the same weights
    with torch.device("meta") if config.dry_run or resume_from or config.init_from else nullcontext():
        model = GPT2ReproForCausalLM(model_config)
    model.tie_weights()  # transformers 5.0 leaves that out on the meta device
    num_parameters = model.num_parameters()

    batch = config.batch
    flops_of_a_token = flops_per_token(model_config, num_parameters=num_parameters, seq_len=batch.seq_len)
    total_tokens = config.max_steps * batch.tokens_per_step
    say(
        f"model     {num_parameters:,} parameters: {model_config.n_layer} layers, {model_config.n_embd} wide, "
        f"{model_config.n_head} heads, {flops_of_a_token / 1e9:.3f} GFLOP a token"
    )
    say(f"plan      {config.max_steps:,} steps, {total_tokens:,} tokens, {total_tokens * flops_of_a_token:.2e} FLOP")

    def memory(micro_batch_size):
        return estimate_memory(
            model_config,
            num_parameters=num_parameters,
            micro_batch_size=micro_batch_size,
            seq_len=batch.seq_len,
            mixed_precision=accelerator.mixed_precision,
            accumulation=batch.tokens_per_step // (micro_batch_size * batch.seq_len * world_size),
            dropout=config.model.dropout,
            device_type=device.type,
            num_processes=world_size,
        )

    # Weights: of a checkpoint, of another model, or the random ones from above.
    if not config.dry_run:
        if resume_from is not None:
            model = GPT2ReproForCausalLM.from_pretrained(resume_from, dtype=torch.float32, **dropout)
        elif config.init_from is not None:
            model = load_weights(config.init_from, dropout)
            say(f"weights   from {config.init_from}, and the shape too: settings of model.* but dropout do not count")
        model.to(device).train()

    # ------------------------------------------------------------------------------------------------------
    # The batch: micro x seq_len x accumulation x processes = tokens an optimizer step.
    largest = None
    if batch.micro_batch_size == "auto":
        largest = largest_that_fits(
            micro_batch_sizes(batch, world_size),
            needs=lambda size: memory(size).total,
            step_of=None if config.dry_run else trial_step(model, accelerator, batch.seq_len),
            device=device,
            processes_here=processes_here,
        )
        largest = int(accelerator.gather(torch.tensor([largest], device=device)).min())
    micro_batch_size, accumulation = batch_arithmetic(batch, world_size, largest)
    say(
        f"batch     {micro_batch_size} sequences x {batch.seq_len} tokens x {accumulation} accumulated x "
        f"{world_size} process(es) = {batch.tokens_per_step:,} tokens a step"
    )
    needed = memory(micro_batch_size)
    say(
        f"memory    about {needed.total / 1e9:.2f} GB a process: "
        + ", ".join(f"{name} {value / 1e9:.2f}" for name, value in needed._asdict().items())
    )
    threads = f", {torch.get_num_threads()} threads each" if device.type == "cpu" else ""
    peak, peak_source = peak_flops(device, torch.float32 if accelerator.mixed_precision == "no" else torch.bfloat16)
    say(
        f"hardware  {world_size} x {device_name(device)}{threads}, mixed precision {accelerator.mixed_precision}, peak "
        f"{peak / 1e12:,.3g} TFLOP/s each ({peak_source})"
    )
    if config.dry_run:
        for line in time_and_money(total_tokens, flops_of_a_token):
            say(f"on        {line}")
        if Path(config.data.path).exists():
            say(f"data      {config.data.path}: {identity(config.data.path)['train_tokens']:,} training tokens")
        else:
            say(f"data      {config.data.path}: not there yet")
        say(f"run       {output_dir} (dry run: nothing was written)")
        return 0

    # ------------------------------------------------------------------------------------------------------
    # Data. Prepared by one process while the others wait; windows in a seeded order.
    tokenizer = load_hf_tokenizer(model_max_length=model_config.n_positions)
    for prompt in config.eval.prompts:
        if len(tokenizer(prompt).input_ids) + config.eval.sample_tokens > model_config.n_positions:
            raise TrainingError(
                f"eval.prompts: {prompt!r} and eval.sample_tokens={config.eval.sample_tokens} more tokens do not fit "
                f"model.n_positions={model_config.n_positions}; ask for fewer"
            )
    with accelerator.main_process_first():
        if config.data.prepare_sample and is_to_be_prepared(config.data.path):
            say(f"data      preparing the offline sample corpus in {config.data.path}")
            prepare_sample(config.data.path)
    data = {"path": config.data.path, **identity(config.data.path)}
    train_shards = open_split(config.data.path, "train")
    val_shards = open_split(config.data.path, "val")
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
        f"tokens; the run is {total_tokens / loader.tokens_per_epoch:.2f} epochs"
    )
    hellaswag_items, hellaswag_source = [], None
    if config.eval.hellaswag is not None:
        with accelerator.main_process_first():  # one download, the others find it in the cache
            hellaswag_items, hellaswag_source = load_items(config.eval.hellaswag, config.eval.hellaswag_limit)
        say(f"hellaswag {hellaswag_source.description}")
    baselines = {}
    if config.eval.ngram_baselines:
        baselines = ngram_baselines(train_shards, val_shards)
        say("baseline  " + ", ".join(f"{name} {value:.4f}" for name, value in baselines.items()) + " nats a token")
    published_losses, published_hellaswag = published_lines(
        n_layer=model_config.n_layer,
        n_embd=model_config.n_embd,
        data_source=data["source"],
        hellaswag_is_sample=bool(hellaswag_source and hellaswag_source.is_sample),
    )

    # ------------------------------------------------------------------------------------------------------
    # The state of the loop. What a step number means must be the same as when the checkpoint was saved.
    run_identity = {
        "seed": config.seed,
        "tokens_per_step": batch.tokens_per_step,
        "seq_len": batch.seq_len,
        "train_tokens": data["train_tokens"],
        "order": config.data.order,
        "boundary": config.data.boundary,
        "init_from": config.init_from,
        "model": shape,
    }
    step, num_skipped, skipped_in_a_row = 0, 0, 0
    evaluated, last_saved = False, None  # at this step; at which one
    if resume_from is not None:
        saved = load_state(resume_from, must_match=run_identity)
        step, evaluated = saved["step"], saved["evaluated"]
        num_skipped, skipped_in_a_row = saved["num_skipped"], saved["skipped_in_a_row"]
        if step >= config.max_steps and evaluated:
            say(f"resume    {resume_from} has all {config.max_steps:,} steps: nothing left to do")
            return 0
        say(f"resume    from {resume_from}, step {step:,}")
        # Stopped before its last evaluation, it is saved once more with the result.
        last_saved = step if evaluated or step < config.max_steps else None
    if is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        record = provenance(
            config=dataclasses.asdict(config),
            data=data,
            model={"parameters": num_parameters, "flops_per_token": flops_of_a_token},
            accelerator=accelerator,
            step=step,
        )
        write_provenance(output_dir / "provenance.json", record, resumed=resume_from is not None)
        metrics = MetricsLog(metrics_path, resume_step=step if resume_from else None, warn=say)
        write_status(output_dir, "running")
    start_trackers(
        config.trackers,
        accelerator,
        output_dir,
        dataclasses.asdict(config),
        resume_step=step if resume_from else None,
    )

    # ------------------------------------------------------------------------------------------------------
    # Compile and prepare. `model` stays the bare module, for saving, scoring and sampling at any shape;
    # `step_model` is what training and validation call, compiled where asked.
    optim = config.optim
    optimizer = build_optimizer(
        model,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        device_type=device.type,
    )
    checkpoints = CheckpointWriter(
        output_dir,
        accelerator=accelerator,
        model=model,
        tokenizer=tokenizer,
        keep_last=config.keep_last,
        keep_every=config.keep_every,
        keep_best=config.keep_best,
    )
    blank = blank_copy(model)
    step_model = model
    if config.compile and accelerator.distributed_type == DistributedType.FSDP:
        for block in model.transformer.h:  # each by itself: its weights are gathered just before it is called
            block.compile()
    elif config.compile:
        step_model = torch.compile(model)
    ddp_model, optimizer = prepare(
        accelerator,
        model,
        step_model,
        optimizer,
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
        grad_clip=optim.grad_clip,
    )
    torch.manual_seed(config.seed + rank)  # from here on, dropout: each process its own
    if resume_from is not None:
        load_optimizer(resume_from, model, optimizer, accelerator)
        load_rng(resume_from, rank, device)

    def track(values):
        try:
            accelerator.log(values, step=step)
        except OSError as error:  # a full disk, a lost network: TensorBoard's writer does not come back from it
            say(f"warning: the trackers stop at step {step:,} ({error}); metrics.jsonl goes on, they do when resumed")
            accelerator.trackers = []

    def report_saved():
        try:
            folder = checkpoints.finished()
        except SaveError as error:
            say(f"warning: {error}. Training goes on")
        else:
            if folder is not None:
                say(f"saved     {folder}")

    # ------------------------------------------------------------------------------------------------------
    # The loop goes round max_steps + 1 times: the last round only evaluates and saves.
    say(f"training  from step {step:,} to {config.max_steps:,}, into {output_dir}")
    device_price = config.dollars_an_hour or getattr(look_up(device_name(device)), "dollars_an_hour", None)
    progress = Progress(
        say,
        step=step,
        max_steps=config.max_steps,
        log_every=config.log_every,
        eval_every=config.eval_every,
        tokens_per_step=batch.tokens_per_step,
        flops_per_token=flops_of_a_token,
        peak_flops=peak * world_size,
        dollars_an_hour=device_price and device_price * world_size,
        has_bar=is_main,
    )
    batches = loader.batches(step, config.max_steps, pin_memory=device.type == "cuda")  # read ahead by a thread
    stop = StopRequest(config.max_hours, STARTED)
    stopping = False  # agreed on by all processes
    val_loss = None
    while True:
        is_last = step >= config.max_steps

        # (a) Boundaries: evaluate and save. A resumed run did both before it was stopped.
        if (is_last or step % config.eval_every == 0) and not evaluated and not stopping:
            started = time.perf_counter()
            scored_model = whole_model(model, blank)
            scored_model.eval()
            # Validation loss, on the same tokens each time, shared out over the processes.
            totals = torch.zeros(3, dtype=torch.float64)  # loss, tokens, processes that were asked to stop
            hellaswag = None
            try:
                with torch.no_grad(), accelerator.autocast():
                    for micro_batch in validation_batches(
                        val_shards,
                        seq_len=batch.seq_len,
                        batch_size=micro_batch_size,
                        max_tokens=config.eval.val_tokens,
                        boundary=config.data.boundary,
                        rank=rank,
                        world_size=world_size,
                    ):
                        inputs, targets, position_ids = micro_batch.map(to_device)
                        loss_sum = (step_model if scored_model is model else scored_model)(
                            input_ids=inputs,
                            position_ids=position_ids,
                            shift_labels=targets,
                            num_items_in_batch=1,
                            return_logits=False,
                        ).loss
                        totals += torch.tensor([loss_sum.item(), targets.numel(), 0], dtype=torch.float64)
                        stop.check()
                # HellaSwag, each process its share of the items.
                indices = list(range(len(hellaswag_items)))[rank::world_size]
                with accelerator.autocast():
                    predictions = score_hellaswag(
                        scored_model, tokenizer, [hellaswag_items[i] for i in indices], on_batch=stop.check
                    )
            except StoppedInEvaluation:
                totals[2] = 1
            loss_sum, num_val_tokens, asked = accelerator.reduce(totals.to(device, torch.float32), "sum").tolist()
            stopping = asked > 0
            evaluated = not stopping
            if hellaswag_items and evaluated:
                by_index = dict(gather_object(list(zip(indices, predictions, strict=True))))
                hellaswag = accuracy(
                    [by_index[i] for i in range(len(hellaswag_items))], [item.label for item in hellaswag_items]
                )
                hellaswag["is_sample"] = hellaswag_source.is_sample

            if evaluated:
                val_loss = loss_sum / num_val_tokens
                tracked = {"val_loss": val_loss}
                if hellaswag:
                    tracked |= {"hellaswag_acc": hellaswag["acc"], "hellaswag_acc_norm": hellaswag["acc_norm"]}
                track(tracked)
            if is_main and evaluated:
                record = {
                    "step": step,
                    "tokens": step * batch.tokens_per_step,
                    "val_loss": val_loss,
                    "hellaswag": hellaswag,
                    "seconds": time.perf_counter() - started,
                }
                metrics.write(record)
                progress.evaluated(record)
                try:
                    plot_curves(
                        read_metrics(metrics_path),
                        output_dir / "curves.png",
                        title=f"{output_dir.name}: {num_parameters / 1e6:.1f}M parameters",
                        loss_lines={f"{name} baseline": value for name, value in baselines.items()} | published_losses,
                        hellaswag_lines=published_hellaswag,
                    )
                except OSError as error:
                    say(f"warning: curves.png could not be written ({error})")
                # Text, from this seed at every evaluation, without touching dropout's random state.
                own_rng = {"devices": [device], "device_type": device.type} if device.type != "cpu" else {"devices": []}
                for prompt in config.eval.prompts:
                    with torch.random.fork_rng(**own_rng), torch.no_grad(), accelerator.autocast():
                        torch.manual_seed(config.seed)
                        ids = tokenizer(prompt, return_tensors="pt").to(device)
                        output = scored_model.generate(
                            **ids, max_new_tokens=config.eval.sample_tokens, do_sample=True, top_k=50, pad_token_id=EOT
                        )
                    say(f"    {tokenizer.decode(output[0])!r}")
            model.train()
            if scored_model is not model:
                scored_model.to("meta")

        is_save_due = step > 0 and config.save_every is not None and step % config.save_every == 0
        if (is_last or is_save_due or stopping) and step != last_saved:
            report_saved()  # the one before, which writing this one waits for
            state = {
                "step": step,
                "tokens": step * batch.tokens_per_step,
                "val_loss": val_loss if evaluated else None,
                "evaluated": evaluated,
                "num_skipped": num_skipped,
                "skipped_in_a_row": skipped_in_a_row,
                **run_identity,
            }
            checkpoints.save(model, optimizer, state)
            last_saved = step
        if is_last or stopping:
            break
        report_saved()
        evaluated = False

        # (b) One optimizer step over all micro-batches of the global batch.
        started = time.perf_counter()
        lr = learning_rate(
            step,
            peak=optim.lr,
            warmup_steps=optim.warmup_steps,
            max_steps=config.max_steps,
            final_fraction=optim.final_lr_fraction,
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = next(batches)  # this process's: [micro * accumulation, T]
        losses = []
        for micro_batch in rows.split(micro_batch_size):
            inputs, targets, position_ids = micro_batch.map(to_device)
            # Gradients are exchanged once a step, with the last micro-batch. It acts on forward and backward alike.
            with accelerator.accumulate(ddp_model):
                # The model divides by the tokens of the whole global batch. DDP averages over processes and accelerate
                # divides by the accumulation: times both, the gradient is the mean over those tokens.
                loss = ddp_model(
                    input_ids=inputs,
                    position_ids=position_ids,  # None unless documents are kept apart
                    shift_labels=targets,
                    num_items_in_batch=batch.tokens_per_step,
                ).loss
                accelerator.backward(loss * (world_size * accumulation))
            losses.append(loss.detach())
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), optim.grad_clip)
        grad_norm = float(grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm)
        asked = torch.tensor(float(stop.is_requested), device=device)
        train_loss, asked = accelerator.reduce(torch.stack([sum(losses), asked]), "sum").tolist()
        stopping = asked > 0
        is_finite = math.isfinite(train_loss) and math.isfinite(grad_norm)
        if is_finite:
            optimizer.step()
        optimizer.zero_grad()
        step += 1

        # (c) Log. Reading the loss above has already waited for the device.
        seconds = time.perf_counter() - started
        record = {
            "step": step,
            "tokens": step * batch.tokens_per_step,
            "loss": train_loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "ms": round(1000 * seconds, 2),
            "tokens_per_s": round(batch.tokens_per_step / seconds, 1),
        }
        if is_finite:
            skipped_in_a_row = 0
            track({name: value for name, value in record.items() if name != "step"})
        else:
            # The parameters stay as they are. Written down: windows of the micro-batches with such a loss, or all.
            num_skipped, skipped_in_a_row = num_skipped + 1, skipped_in_a_row + 1
            places = loader.places(step - 1)
            bad = torch.stack(losses).isfinite().logical_not().repeat_interleave(micro_batch_size).tolist()
            bad = gather_object([place for place, is_bad in zip(places, bad, strict=True) if is_bad])
            record["skipped"] = {
                "loss": str(train_loss),
                "grad_norm": str(grad_norm),
                "windows": bad or gather_object(places),
            }
            say(
                f"step {step:>6,} | SKIPPED: loss {train_loss}, gradient norm {grad_norm}; its windows are in "
                f"metrics.jsonl; skipped so far: {num_skipped}, in a row: {skipped_in_a_row}"
            )
        if is_main:
            metrics.write(record)
            progress.stepped(record)
        if skipped_in_a_row >= optim.max_skipped_steps:
            if is_main:
                write_status(output_dir, "failed", step=step)
            raise TrainingError(
                f"step {step}: loss {train_loss}, gradient norm {grad_norm}; the last {skipped_in_a_row} steps were "
                "not finite. The parameters are those from before, and so are the checkpoints. Lower optim.lr or raise "
                "optim.warmup_steps, look at the windows in metrics.jsonl, and go on with --resume auto"
            )

    # ------------------------------------------------------------------------------------------------------
    # Summary, and what to do next.
    progress.close()
    reasons = [reason for reason in gather_object([stop.reason]) if reason]
    try:
        folder = checkpoints.finished(wait=True) or checkpoint_folder(output_dir, step)
    except SaveError:
        with contextlib.suppress(OSError):
            write_status(output_dir, "failed", step=step)
        raise
    # Without it, gloo's threads may still hold what was gathered when the group is taken down, and hang (torch 2.13).
    accelerator.wait_for_everyone()
    accelerator.end_training()
    say(f"saved     {folder}")
    if stopping:
        say(f"\nstopped at step {step:,} ({reasons[0]}); go on with the same command and --resume auto")
        if is_main:
            write_status(output_dir, "resume me", step=step, exit_code=RESUME_ME)
        return RESUME_ME
    if is_main:
        write_status(output_dir, "finished", step=step, val_loss=val_loss, checkpoint=str(folder))
    say(f"\ntrained for {duration(progress.training_seconds)}, evaluations and saving aside")
    if num_skipped:
        say(f"skipped {num_skipped} steps that were not finite; their windows are in {metrics_path}")
    say(f"validation loss {val_loss:.4f}" + "".join(f", {name} {value:.4f}" for name, value in baselines.items()))
    board = f"    (tensorboard --logdir {output_dir / 'tensorboard'})" if "tensorboard" in config.trackers else ""
    say(WHAT_NEXT.format(folder=folder, curves=output_dir / "curves.png", metrics=f"{metrics_path}{board}"))
    return 0


WHAT_NEXT = """
checkpoint  {folder}
curves      {curves}
numbers     {metrics}

load    from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained("{folder}")
sample  from transformers import pipeline
        pipeline("text-generation", "{folder}", trust_remote_code=True)("Hello, I'm", max_new_tokens=30)
score   python -m eval --model {folder} --tasks hellaswag
share   model.push_to_hub("USER/NAME"); tokenizer.push_to_hub("USER/NAME")    (after: hf auth login)"""


def shape_of(source):
    """
    Args:
        source: a checkpoint of ours or a GPT-2: a folder, or a Hub id.

    Returns:
        {"n_layer", "n_head", "n_embd", "n_positions"}

    Raises:
        TrainingError: it is not there, or neither of the two.
    """
    try:
        settings, _ = transformers.PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise TrainingError(f"init_from: {source} is no model's folder and no Hub id ({first_line})") from None
    kind, vocab_size = settings.get("model_type"), settings.get("vocab_size")
    if kind not in ("gpt2", "gpt2repro"):
        raise TrainingError(f"init_from: {source} is a {kind!r} model; it must be 'gpt2' or 'gpt2repro'")
    if vocab_size != VOCAB_SIZE:
        raise TrainingError(f"init_from: {source} has a vocabulary of {vocab_size}, and the data's is {VOCAB_SIZE}")
    published = GPT2ReproConfig()  # what a configuration that leaves a field out means
    return {
        name: settings.get(name, getattr(published, name)) for name in ("n_layer", "n_head", "n_embd", "n_positions")
    }


def load_weights(source, dropout):
    """A GPT2ReproForCausalLM with the weights of what `shape_of` accepted, in float32."""
    settings, _ = transformers.PreTrainedConfig.get_config_dict(source)
    is_gpt2 = settings["model_type"] == "gpt2"
    load = GPT2ReproForCausalLM.from_gpt2 if is_gpt2 else GPT2ReproForCausalLM.from_pretrained
    try:
        return load(source, dtype=torch.float32, **dropout)
    except (OSError, ValueError) as error:
        raise TrainingError(f"init_from: {source} cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def main():
    try:
        sys.exit(train(sys.argv[1:]))
    except (TrainingError, DataError, EvalError) as error:
        rank = os.environ.get("RANK", "0")
        sys.exit(f"error: {error}" if rank == "0" else f"error (process {rank}): {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f"error: no space left on the disk for {error.filename or 'what the run writes'}: make room there")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; what was saved before is whole, and --resume auto goes on from it")
    finally:
        unlock()


if __name__ == "__main__":
    main()
