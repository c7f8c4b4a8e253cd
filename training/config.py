"""
A run's settings: the defaults below < the recipe (`--config recipes/x.yaml`) < the command line.

    accelerate launch train.py --config recipes/gpt2_124m.yaml --optim.lr 3e-4 --batch.micro_batch_size 32

takes `optim.betas` from the defaults, `max_steps` from the recipe and the two named values from the command
line. The finished settings are written to the run's provenance.json before the first step.
"""

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, set_parsing_settings

from training import TrainingError
from training.trackers import check_trackers

DEFAULT_RECIPE = Path(__file__).parent.parent / "recipes" / "sample.yaml"


@dataclass(kw_only=True)
class ModelConfig:
    """The model's shape; the names are GPT-2's. The vocabulary is always GPT-2's 50,257."""

    n_layer: int = 12
    """blocks"""
    n_head: int = 12
    """attention heads a block"""
    n_embd: int = 768
    """width of the residual stream, a multiple of n_head"""
    n_positions: int = 1024
    """longest sequence, in tokens"""
    dropout: float = 0.0
    """one probability for GPT-2's three places: embeddings, attention weights, residual branches"""


@dataclass(kw_only=True)
class DataConfig:
    """What the model is trained on."""

    path: str = "shards/sample"
    """folder of shards, as `python -m data.prepare` leaves it"""
    prepare_sample: bool = False
    """make the offline sample corpus in `path` when nothing is there"""
    order: Literal["shuffled", "sequential", "lecture"] = "shuffled"
    """of the windows: by (seed, epoch); as they lie in the shards; or what the lecture's 8 GPUs read at each step"""
    boundary: Literal["ignore", "document"] = "ignore"
    """document: positions begin again with each document of a window, and attention stays inside it"""


@dataclass(kw_only=True)
class BatchConfig:
    """One optimizer step: micro-batches are accumulated until tokens_per_step have been seen."""

    tokens_per_step: int = 524288
    """tokens in an optimizer step, over all processes"""
    seq_len: int = 1024
    """tokens in a training sequence, at most n_positions"""
    micro_batch_size: int | Literal["auto"] = 64
    """sequences in one forward pass of one process, at most (a process with fewer takes them all at once); auto: the
    largest that fits into memory"""


@dataclass(kw_only=True)
class OptimConfig:
    """Optimizer and learning rate; the defaults are the GPT-3 paper's for 125M (table 2.1, appendix B)."""

    lr: float = 6e-4
    """peak learning rate"""
    warmup_steps: int = 715
    """steps of linear warm-up"""
    final_lr_fraction: float = 0.1
    """where it ends, as a fraction of the peak"""
    cooldown_fraction: float | None = None
    """stay at the peak, and go down on a straight line over this last part of max_steps; null: a cosine all the way"""
    betas: tuple[float, float] = (0.9, 0.95)
    """decay of AdamW's two moments"""
    eps: float = 1e-8
    """AdamW's epsilon"""
    weight_decay: float = 0.1
    """AdamW's, on matrices and embeddings; never on biases and LayerNorms"""
    muon_lr: float | None = None
    """peak learning rate of Muon, which then trains the blocks' matrices (AdamW the rest); null: AdamW trains all"""
    muon_weight_decay: float = 0.05
    """Muon's"""
    grad_clip: float = 1.0
    """largest norm of the whole gradient; .inf: any"""
    max_skipped_steps: int = 10
    """a step whose loss or gradient is not finite is skipped; after so many in a row the run stops"""


@dataclass(kw_only=True)
class EvalConfig:
    """What happens every `eval_every` steps, and before the first and after the last."""

    val_tokens: int = 10_485_760
    """validation tokens scored, from the start of the validation split"""
    ngram_baselines: bool = False
    """count the corpus's own unigram and bigram loss, for comparison (small corpora only)"""
    hellaswag: str | None = "hub"
    """items: `hub` (Rowan/hellaswag), `sample` (40 items of this project's own), a .jsonl file; null: none"""
    hellaswag_limit: int | None = None
    """score only the first so many items"""
    prompts: list[str] = field(default_factory=lambda: ["Hello, I'm a language model,"])
    """texts that the model continues, to be read by a person"""
    sample_tokens: int = 32
    """tokens in each continuation"""


@dataclass(kw_only=True)
class Config:
    """The run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """the model's shape"""
    data: DataConfig = field(default_factory=DataConfig)
    """what it is trained on"""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """the batch"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """optimizer and learning rate"""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """evaluation during training"""
    output_dir: str | None = None
    """the run's folder; by default runs/<name of the recipe>"""
    max_steps: int = 19073
    """optimizer steps; the learning rate's schedule ends here"""
    eval_every: int = 250
    """steps between evaluations"""
    save_every: int | None = None
    """steps between checkpoints; null: only after the last step"""
    keep_last: int | None = None
    """how many of the newest checkpoints stay on the disk; null: all"""
    keep_every: int | None = None
    """with keep_last: checkpoints of steps that are multiples of it stay as well"""
    keep_best: bool = True
    """with keep_last: the checkpoint with the lowest validation loss stays as well (save_every should be a multiple of
    eval_every)"""
    log_every: int = 10
    """steps between lines on the console (metrics.jsonl has every step)"""
    seed: int = 1337
    """seed of the initial weights, the order of the data, dropout and the text samples"""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """auto: what the launcher was told, else bf16 where the hardware has it"""
    compile: bool = False
    """torch.compile the training and validation step"""
    init_from: str | None = None
    """start from these weights and their shape: a checkpoint, a folder or Hub id of a GPT-2 (openai-community/gpt2)"""
    resume: str | None = None
    """`auto`: go on from the newest whole checkpoint in output_dir, if there is one; or a checkpoint's path"""
    max_hours: float | None = None
    """save, stop and exit with code 75 ("resume me") so many hours after the start; null: no limit"""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=lambda: ["tensorboard"])
    """where accelerate logs the numbers to, beside metrics.jsonl"""
    dollars_an_hour: float | None = None
    """what one device costs, for the money on the console; null: training/hardware.py's price, where it has one"""
    push_to_hub: str | None = None
    """USER/NAME: share the last checkpoint there, with a model card; the token is HF_TOKEN's or `hf auth login`'s"""
    push_public: bool = False
    """for everybody to see; else for the token's owner alone"""
    dry_run: bool = False
    """print the plan and stop"""


def load_config(argv):
    """
    Args:
        argv: the command line without the program's name.

    Returns:
        Config, checked as far as it can be without knowing the hardware.

    Raises:
        TrainingError: an unknown key (with the nearest known one), a value of the wrong type, a missing or
            broken recipe, values that cannot be together.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="train.py", exit_on_error=False, description="Train a GPT-2; see recipes/.")
    parser.add_argument("--config", action=ActionConfigFile, help="recipe (default: recipes/sample.yaml)")
    parser.add_class_arguments(Config)
    argv = [_bare_flag_means_true(argument, following) for argument, following in pairwise([*argv, "--"])]
    argv = [piece for pieces in argv for piece in pieces]
    if not any(argument == "--config" or argument.startswith("--config=") for argument in argv):
        argv = ["--config", str(DEFAULT_RECIPE), *argv]
    try:
        namespace = parser.parse_args(argv)
    except ArgumentError as error:
        raise TrainingError(_readable(error)) from None
    recipe = Path(str(namespace.config[-1])).stem
    config = parser.instantiate(namespace)
    config = Config(**{f.name: config[f.name] for f in dataclasses.fields(Config)})
    if config.output_dir is None:
        config.output_dir = str(Path("runs") / recipe)
    _check(config)
    return config


def _bare_flag_means_true(argument, following):
    """`--compile` alone is `--compile true`."""
    names = {f"--{f.name}" for f in dataclasses.fields(Config) if f.type is bool}
    return [argument, "true"] if argument in names and following.startswith("--") else [argument]


def known_keys(config_class=Config, prefix=""):
    """Every setting's dotted name: `max_steps`, `optim.lr`, ..."""
    keys = []
    for f in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(f.type):
            keys += [f"{prefix}{f.name}", *known_keys(f.type, f"{prefix}{f.name}.")]
        else:
            keys.append(f"{prefix}{f.name}")
    return keys


def _readable(error):
    """jsonargparse's message on one line, and for an unknown key the nearest known one."""
    message = " ".join(str(error).split())
    unknown = (
        re.search(r"Group '(?P<group>\S+)' does not accept option '(?P<key>\S+)'", message)
        or re.search(r"Option '(?P<key>\S+)' is not accepted", message)
        or re.search(r"[Uu]nrecognized arguments: --(?P<key>[^\s=]+)", message)
    )
    if not unknown:
        return message
    key = ".".join(part for part in (unknown.groupdict().get("group"), unknown["key"]) if part)
    if key == "push_every_save":  # removed 2026-12
        return "push_every_save was removed: --push_to_hub USER/NAME pushes the last checkpoint; remove the setting"
    near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "`python train.py --help` lists the known ones"
    return f"unknown setting {key!r}; {hint}"


def _check(config):
    """Values that cannot be, or cannot be together."""
    positive = {
        "max_steps": config.max_steps,
        "eval_every": config.eval_every,
        "log_every": config.log_every,
        "batch.tokens_per_step": config.batch.tokens_per_step,
        "batch.seq_len": config.batch.seq_len,
        "optim.max_skipped_steps": config.optim.max_skipped_steps,
        "optim.lr": config.optim.lr,
        "optim.eps": config.optim.eps,
        "optim.grad_clip": config.optim.grad_clip,
        "eval.val_tokens": config.eval.val_tokens,
        "eval.sample_tokens": config.eval.sample_tokens,
    }
    optional = {name: getattr(config, name) for name in ("save_every", "keep_last", "keep_every", "max_hours")}
    optional["optim.muon_lr"] = config.optim.muon_lr
    positive |= {name: value for name, value in optional.items() if value is not None}
    if config.batch.micro_batch_size != "auto":
        positive["batch.micro_batch_size"] = config.batch.micro_batch_size
    check_trackers(config.trackers)
    if config.keep_every is not None and config.keep_last is None:
        raise TrainingError(f"keep_every={config.keep_every} needs keep_last: without it, all checkpoints stay")
    if config.push_to_hub is None and config.push_public:
        raise TrainingError("push_public needs push_to_hub=USER/NAME, the repository to push to")
    if config.eval.hellaswag_limit is not None and config.eval.hellaswag_limit < 2:
        raise TrainingError(
            f"eval.hellaswag_limit must be at least 2, got {config.eval.hellaswag_limit}: one item has no error bar"
        )
    for name, value in positive.items():
        if not 0 < value < math.inf and (name, value) != ("optim.grad_clip", math.inf):  # which clips nothing
            raise TrainingError(f"{name} must be above 0 and finite, got {value}")
    for name, value, below in (
        ("optim.warmup_steps", config.optim.warmup_steps, math.inf),
        ("optim.weight_decay", config.optim.weight_decay, math.inf),
        ("optim.muon_weight_decay", config.optim.muon_weight_decay, math.inf),
        ("optim.betas[0]", config.optim.betas[0], 1),
        ("optim.betas[1]", config.optim.betas[1], 1),
        ("seed", config.seed, 2**32),
    ):
        if not 0 <= value < below:
            raise TrainingError(f"{name} must be in [0, {below}), got {value}")
    if not 0 <= config.optim.final_lr_fraction <= 1:
        raise TrainingError(f"optim.final_lr_fraction must be in [0, 1], got {config.optim.final_lr_fraction}")
    if config.optim.cooldown_fraction is not None and not 0 < config.optim.cooldown_fraction <= 1:
        raise TrainingError(f"optim.cooldown_fraction must be in (0, 1], got {config.optim.cooldown_fraction}")
    if config.init_from is None:  # whose shape counts then
        check_lengths(config)
    if config.eval.val_tokens < config.batch.seq_len:
        raise TrainingError(
            f"eval.val_tokens={config.eval.val_tokens} is less than a sequence of batch.seq_len={config.batch.seq_len}"
        )
    if config.batch.tokens_per_step % config.batch.seq_len:
        raise TrainingError(
            f"batch.tokens_per_step={config.batch.tokens_per_step} is not a whole number of sequences of "
            f"batch.seq_len={config.batch.seq_len}; "
            f"nearest: {nearest_multiples(config.batch.tokens_per_step, config.batch.seq_len)}"
        )


def check_lengths(config):
    """Raises TrainingError where training sequences are longer than the model's."""
    if config.batch.seq_len > config.model.n_positions:
        raise TrainingError(
            f"batch.seq_len={config.batch.seq_len} is longer than the model's n_positions={config.model.n_positions}; "
            "shorten seq_len" + (" or raise n_positions" if config.init_from is None else "")
        )


def nearest_multiples(value, step):
    """The nearest values that can be, for a message."""
    below = value // step * step
    return f"{below} or {below + step}" if below else f"{step}"
