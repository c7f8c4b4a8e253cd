"""
Trains a GPT-2 from a random start.

    accelerate launch train.py                                        small model, offline sample corpus
    accelerate launch train.py --config recipes/gpt2_124m.yaml        the lecture's run, on all GPUs here
    accelerate launch train.py --config recipes/gpt2_124m.yaml --dry_run        the plan, nothing written
    accelerate launch train.py --config ... --resume auto             go on from the newest checkpoint

Writes into --output_dir (runs/<recipe>):

    checkpoints/step_000100/   a Hugging Face folder: AutoModelForCausalLM.from_pretrained opens it
    metrics.jsonl              one object a training step, one an evaluation
    curves.png                 losses and HellaSwag over tokens
    tensorboard/               the same numbers for TensorBoard
    provenance.json            settings, code, versions, hardware, data: what made this run

Every setting is described by `python train.py --help` and in training/config.py.
"""

import dataclasses
import math
import os
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
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
    checkpoint_folder,
    find_checkpoint,
    load_optimizer,
    load_rng,
    load_state,
    save_checkpoint,
)
from training.config import batch_arithmetic, load_config
from training.memory import keep_freed_memory
from training.metrics import MetricsLog, plot_curves, read_metrics, write_json
from training.optim import build_optimizer
from training.precision import resolve_mixed_precision
from training.provenance import device_name, provenance
from training.schedule import learning_rate


def train(argv):
    # ------------------------------------------------------------------------------------------------------
    # Settings: defaults < recipe < command line.
    config = load_config(argv)
    output_dir = Path(config.output_dir)
    metrics_path = output_dir / "metrics.jsonl"
    try:
        model_config = GPT2ReproConfig(
            vocab_size=VOCAB_SIZE,
            n_positions=config.model.n_positions,
            n_embd=config.model.n_embd,
            n_layer=config.model.n_layer,
            n_head=config.model.n_head,
            embd_pdrop=config.model.dropout,
            attn_pdrop=config.model.dropout,
            resid_pdrop=config.model.dropout,
        )
    except ValueError as error:
        raise TrainingError(f"model: {error}") from error

    # ------------------------------------------------------------------------------------------------------
    # Hardware.
    # cpu=True where there is no accelerator: without it, processes started on a CPU never find each other.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=resolve_mixed_precision(config.mixed_precision),
        log_with="tensorboard",
        project_dir=output_dir,
    )
    device, is_main = accelerator.device, accelerator.is_main_process
    rank, world_size = accelerator.process_index, accelerator.num_processes
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != world_size:
        raise TrainingError(
            f"the launcher started {launched} processes, but this one sees {world_size}: they would train "
            "separate models side by side. Launch with one of accelerate_configs/*.yaml that fits this machine"
        )
    if device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
        # What accelerate launch sets when told nothing, and all cores but one then idle. It is told with
        # --num_cpu_threads_per_process; a share of one core is what several processes get anyway.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if device.type == "cpu":
        keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    transformers.utils.logging.disable_progress_bar()

    def say(text=""):
        if is_main:
            tqdm.write(text)

    def to_device(tensor):
        return tensor.to(device, non_blocking=True)

    # ------------------------------------------------------------------------------------------------------
    # The batch: micro x seq_len x accumulation x processes = tokens an optimizer step.
    batch = config.batch
    micro_batch_size, accumulation = batch_arithmetic(batch, world_size)
    say(
        f"batch     {micro_batch_size} sequences x {batch.seq_len} tokens x {accumulation} accumulated x "
        f"{world_size} process(es) = {batch.tokens_per_step:,} tokens a step"
    )

    # ------------------------------------------------------------------------------------------------------
    # Model. The same seed on every process gives the same weights.
    set_seed(config.seed)
    with torch.device("meta") if config.dry_run else nullcontext():
        model = GPT2ReproForCausalLM(model_config)
    model.tie_weights()  # transformers 5.0 leaves that out on the meta device
    num_parameters = model.num_parameters()
    # 6 FLOPs a parameter and token (forward 2, backward 4), and attention's two T x T matmuls
    # (PaLM paper, appendix B). Position embeddings are looked up, not multiplied.
    matmul_parameters = num_parameters - model.transformer.wpe.weight.numel()
    flops_per_token = 6 * matmul_parameters + 12 * model_config.n_layer * model_config.n_embd * batch.seq_len
    total_tokens = config.max_steps * batch.tokens_per_step
    say(
        f"model     {num_parameters:,} parameters: {model_config.n_layer} layers, {model_config.n_embd} wide, "
        f"{model_config.n_head} heads, {flops_per_token / 1e9:.3f} GFLOP a token"
    )
    say(f"plan      {config.max_steps:,} steps, {total_tokens:,} tokens, {total_tokens * flops_per_token:.2e} FLOP")
    threads = f", {torch.get_num_threads()} threads each" if device.type == "cpu" else ""
    say(f"hardware  {world_size} x {device_name(device)}{threads}, mixed precision {accelerator.mixed_precision}")
    if config.dry_run:
        if Path(config.data.path).exists():
            say(f"data      {config.data.path}: {identity(config.data.path)['train_tokens']:,} training tokens")
        else:
            say(f"data      {config.data.path}: not there yet")
        say(f"run       {output_dir} (dry run: nothing was written)")
        return

    # ------------------------------------------------------------------------------------------------------
    # Data. Prepared by one process while the others wait; windows in a seeded order.
    tokenizer = load_hf_tokenizer(model_max_length=model_config.n_positions)
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
    hellaswag_items = []
    if config.eval.hellaswag is not None:
        with accelerator.main_process_first():  # one download, the others find it in the cache
            hellaswag_items, hellaswag_source = load_items(config.eval.hellaswag, config.eval.hellaswag_limit)
        say(f"hellaswag {hellaswag_source.description}")
    baselines = {}
    if config.eval.ngram_baselines:
        baselines = ngram_baselines(train_shards, val_shards)
        say("baseline  " + ", ".join(f"{name} {value:.4f}" for name, value in baselines.items()) + " nats a token")

    # ------------------------------------------------------------------------------------------------------
    # Fresh, or resumed. What a step number means must be the same as when the checkpoint was saved.
    run_identity = {
        "seed": config.seed,
        "tokens_per_step": batch.tokens_per_step,
        "seq_len": batch.seq_len,
        "train_tokens": data["train_tokens"],
        "order": config.data.order,
        "boundary": config.data.boundary,
        "model": {name: getattr(model_config, name) for name in ("n_layer", "n_head", "n_embd", "n_positions")},
    }
    resume_from = find_checkpoint(config.resume, output_dir)
    step = 0
    if resume_from is not None:
        step = load_state(resume_from, must_match=run_identity)["step"]
        if step >= config.max_steps:
            say(f"resume    {resume_from} has all {config.max_steps:,} steps: nothing left to do")
            return
        model = GPT2ReproForCausalLM.from_pretrained(resume_from, dtype=torch.float32)
        say(f"resume    from {resume_from}, step {step:,}")
    if is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(
            output_dir / "provenance.json",
            provenance(
                config=dataclasses.asdict(config),
                data=data,
                model={"parameters": num_parameters, "flops_per_token": flops_per_token},
                accelerator=accelerator,
            ),
        )
        metrics = MetricsLog(metrics_path, resume_step=step if resume_from else None)
    accelerator.init_trackers("tensorboard")

    # ------------------------------------------------------------------------------------------------------
    # Compile and prepare. `model` stays the bare module, for saving, scoring and sampling at any shape;
    # `step_model` is what training and validation call, compiled where asked.
    model.to(device).train()
    optim = config.optim
    optimizer = build_optimizer(
        model,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        device_type=device.type,
    )
    step_model = torch.compile(model) if config.compile else model
    ddp_model, optimizer = accelerator.prepare(step_model, optimizer)
    torch.manual_seed(config.seed + rank)  # from here on, dropout: each process its own
    if resume_from is not None:
        load_optimizer(resume_from, model, optimizer)
        load_rng(resume_from, rank, device)

    # ------------------------------------------------------------------------------------------------------
    # The loop goes round max_steps + 1 times: the last round only evaluates and saves.
    say(f"training  from step {step:,} to {config.max_steps:,}, into {output_dir}")
    bar = tqdm(total=config.max_steps, initial=step, unit="step", disable=not (is_main and sys.stderr.isatty()))
    batches = loader.batches(step, config.max_steps, pin_memory=device.type == "cuda")  # read ahead by a thread
    started_at_step, training_seconds = step, 0.0
    just_resumed = resume_from is not None
    while True:
        is_last = step >= config.max_steps

        # (a) Boundaries: evaluate and save. A resumed run did both before it was stopped.
        if (is_last or step % config.eval_every == 0) and not just_resumed:
            model.eval()
            # Validation loss, on the same tokens each time, shared out over the processes.
            totals = torch.zeros(2, dtype=torch.float64, device="cpu")
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
                    loss_sum = step_model(
                        input_ids=inputs,
                        position_ids=position_ids,
                        shift_labels=targets,
                        num_items_in_batch=1,
                        return_logits=False,
                    ).loss
                    totals += torch.tensor([loss_sum.item(), targets.numel()], dtype=torch.float64)
            loss_sum, num_val_tokens = accelerator.reduce(totals.to(device, torch.float32), "sum").tolist()
            val_loss = loss_sum / num_val_tokens

            # HellaSwag, each process its share of the items.
            hellaswag = None
            if hellaswag_items:
                indices = list(range(len(hellaswag_items)))[rank::world_size]
                with accelerator.autocast():
                    predictions = score_hellaswag(model, tokenizer, [hellaswag_items[i] for i in indices])
                by_index = dict(gather_object(list(zip(indices, predictions, strict=True))))
                hellaswag = accuracy(
                    [by_index[i] for i in range(len(hellaswag_items))], [item.label for item in hellaswag_items]
                )
                hellaswag["is_sample"] = hellaswag_source.is_sample

            if is_main:
                tokens = step * batch.tokens_per_step
                metrics.write({"step": step, "tokens": tokens, "val_loss": val_loss, "hellaswag": hellaswag})
                plot_curves(
                    read_metrics(metrics_path),
                    output_dir / "curves.png",
                    title=f"{output_dir.name}: {num_parameters / 1e6:.1f}M parameters",
                    baselines=baselines,
                )
                line = f"step {step:>6,} | val loss {val_loss:.4f}"
                if hellaswag:
                    line += (
                        f" | hellaswag acc_norm {hellaswag['acc_norm']:.4f} ± {hellaswag['acc_norm_stderr']:.4f}"
                        f" ({'SAMPLE items' if hellaswag['is_sample'] else 'items'}, n={hellaswag['n']})"
                    )
                say(line)
                # Text, from this seed at every evaluation, without touching dropout's random state.
                for prompt in config.eval.prompts:
                    with torch.random.fork_rng(), torch.no_grad(), accelerator.autocast():
                        torch.manual_seed(config.seed)
                        ids = tokenizer(prompt, return_tensors="pt").to(device)
                        output = model.generate(
                            **ids, max_new_tokens=config.eval.sample_tokens, do_sample=True, top_k=50, pad_token_id=EOT
                        )
                    say(f"    {tokenizer.decode(output[0])!r}")
            tracked = {"val_loss": val_loss}
            if hellaswag:
                tracked |= {"hellaswag_acc": hellaswag["acc"], "hellaswag_acc_norm": hellaswag["acc_norm"]}
            accelerator.log(tracked, step=step)
            model.train()

        if (is_last or (config.save_every and step % config.save_every == 0 and step > 0)) and not just_resumed:
            folder = checkpoint_folder(output_dir, step)
            save_checkpoint(
                folder,
                accelerator=accelerator,
                model=model,
                tokenizer=tokenizer,
                optimizer=optimizer,
                state={"step": step, "tokens": step * batch.tokens_per_step, **run_identity},
            )
            say(f"step {step:>6,} | saved {folder}")

        if is_last:
            break
        just_resumed = False

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
        loss_sum = torch.zeros((), device=device)
        for micro_step, micro_batch in enumerate(rows.split(micro_batch_size)):
            inputs, targets, position_ids = micro_batch.map(to_device)
            # Gradients are exchanged once a step. The flag acts on forward and backward alike.
            is_last_micro = micro_step == accumulation - 1
            with nullcontext() if is_last_micro else accelerator.no_sync(ddp_model):
                # The model divides by the tokens of the whole global batch (nobody else divides), and DDP
                # averages over processes, so times world_size the gradient is the mean over those tokens.
                loss = ddp_model(
                    input_ids=inputs,
                    position_ids=position_ids,  # None unless documents are kept apart
                    shift_labels=targets,
                    num_items_in_batch=batch.tokens_per_step,
                ).loss
                accelerator.backward(loss * world_size)
            loss_sum += loss.detach()
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), optim.grad_clip).item()
        train_loss = accelerator.reduce(loss_sum, "sum").item()
        if not (math.isfinite(train_loss) and math.isfinite(grad_norm)):
            raise TrainingError(
                f"step {step + 1}: loss {train_loss}, gradient norm {grad_norm}. The parameters were not updated; "
                "lower optim.lr or raise optim.warmup_steps, and go on from the last checkpoint with --resume auto"
            )
        optimizer.step()
        optimizer.zero_grad()
        step += 1

        # (c) Log. Reading the loss above has already waited for the device.
        seconds = time.perf_counter() - started
        training_seconds += seconds
        tokens_per_s = batch.tokens_per_step / seconds
        record = {
            "step": step,
            "tokens": step * batch.tokens_per_step,
            "loss": train_loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_s": round(tokens_per_s, 1),
        }
        accelerator.log({k: v for k, v in record.items() if k != "step"}, step=step)
        if is_main:
            metrics.write(record)
            bar.set_postfix_str(f"loss {train_loss:.4f}, {tokens_per_s:,.0f} tok/s")
            bar.update()
            if bar.disable and (step % config.log_every == 0 or step == 1):
                seconds_left = training_seconds / (step - started_at_step) * (config.max_steps - step)
                left = str(timedelta(seconds=round(seconds_left)))
                say(
                    f"step {step:>6,}/{config.max_steps:,} {step / config.max_steps:4.0%} | loss {train_loss:.4f} | "
                    f"lr {lr:.2e} | norm {grad_norm:.2f} | {tokens_per_s:,.0f} tok/s | {left} left"
                )

    # ------------------------------------------------------------------------------------------------------
    # Summary, and what to do next.
    bar.close()
    accelerator.end_training()
    say(f"\ntrained for {timedelta(seconds=round(training_seconds))}, evaluations and saving aside")
    say(f"validation loss {val_loss:.4f}" + "".join(f", {name} {value:.4f}" for name, value in baselines.items()))
    say(
        f"""
checkpoint  {folder}
curves      {output_dir / "curves.png"}
numbers     {metrics_path}    (tensorboard --logdir {output_dir / "tensorboard"})

load    from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained("{folder}")
sample  from transformers import pipeline
        pipeline("text-generation", "{folder}", trust_remote_code=True)("Hello, I'm", max_new_tokens=30)
score   python -m eval --model {folder} --tasks hellaswag
share   model.push_to_hub("USER/NAME"); tokenizer.push_to_hub("USER/NAME")    (after: hf auth login)"""
    )


def main():
    try:
        train(sys.argv[1:])
    except (TrainingError, DataError, EvalError) as error:
        rank = os.environ.get("RANK", "0")
        sys.exit(f"error: {error}" if rank == "0" else f"error (process {rank}): {error}")


if __name__ == "__main__":
    main()
