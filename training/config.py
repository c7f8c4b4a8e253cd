"""Define a run's settings: the defaults below < the recipe (`--config recipes/x.yaml`) < the command line.

    accelerate launch train.py --config recipes/gpt2_124m.yaml --optim.lr 3e-4 --batch.micro_batch_size 32

takes `optim.betas` from the defaults, `max_steps` from the recipe and the two named values from the command
line. The resolved settings are written to the run's provenance.json before the first step.
"""

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from common.cli import say
from common.models import check_name, load_gpt2_config
from modeling_gpt2repro import GPT2ReproConfig
from training import TrainingError
from training.profiling import WARM_UP_STEPS
from training.settings import (
    NULLS,
    RawValue,
    build,
    format_value,
    help_text,
    read_recipe,
    settings_of,
    split_command_line,
)

_DATA_NAMES = ("data.path", "data.mix", "data.text")  # a run has one of them
SHAPE = ("n_layer", "n_head", "n_embd", "n_positions")
CORE_MINI = 50  # items of each of CORE's tasks
# A share of bits_per_byte's windows would cut texts into pieces.
_TASK_LIMIT = r"[2-9]|[1-9]\d{1,8}|(?<!bits_per_byte:)(?:[1-9]\d?|100)%|(?<=core:)mini"
# Settings that do not change a run's losses.
WITHOUT_EFFECT = {
    *("output_dir", "resume", "log_every", "save_every", "keep_last", "keep_every", "keep_best", "trackers"),
    *("max_hours", "dollars_per_hour", "push_to_hub", "push_public", "profile", "dry_run", "card"),
}
DEFAULT_RECIPE = Path(__file__).parent.parent / "recipes" / "sample.yaml"

# Intervals of numbers: [ and ] include the end, ( and ) exclude it. The upper end of a count is above any real run's.
Count = Annotated[int, "[1, 1e9]"]
CountOrZero = Annotated[int, "[0, 1e9]"]
Positive = Annotated[float, "(0, inf)"]
PositiveOrZero = Annotated[float, "[0, inf)"]
Probability = Annotated[float, "[0, 1)"]
# The keys of CARDS in training/cards.py.
_GeForce = Literal["rtx3060", "rtx3090", "rtx4090", "rtx5090"]
_DataCenter = Literal["t4", "a10g", "l4", "l40s", "a100_40", "a100", "h100_pcie", "h100", "h200", "b200", "mi300x"]


@dataclass(kw_only=True)
class ModelConfig:
    """Shape of the model, in GPT-2's names. The vocabulary is that of the shards' tokenizer, by default GPT-2's."""

    n_layer: Annotated[int, "[1, 1000]"] = 12
    """number of blocks"""
    n_head: Count = 12
    """attention heads per block"""
    n_embd: Annotated[int, "[1, 1e6]"] = 768
    """width of the residual stream, a multiple of n_head"""
    n_positions: Count = 1024
    """longest sequence, in tokens"""
    dropout: Probability = 0.0
    """probability for GPT-2's three kinds of dropout: embeddings, attention weights, residual branches"""
    residual_in_autocast_dtype: bool = False
    """keep the residual stream in the 16-bit format of mixed precision, which moves an eighth fewer bytes on a GPU"""


@dataclass(kw_only=True)
class DataConfig:
    """Training and validation data."""

    path: str = "shards/sample"
    """folder of shards, as written by `python -m data.prepare`"""
    mix: dict[str, Positive] | None = None
    """weights of several folders of shards, in place of `path`: {shards/web: 0.7, shards/code: 0.3}. They are shares of
    the tokens of each step, to one window, and need not add up to 1. A run cannot change them when it is resumed"""
    text: str | None = None
    """instead of path: a file, folder or pattern ("notes/*.txt") of text, or a data set on the Hub; its
    shards are made in shards/NAME-HASH, unless they are there"""
    prepare_sample: bool = False
    """make the offline sample corpus in `path` if nothing is there"""
    order: Literal["shuffled", "sequential", "lecture"] = "shuffled"
    """order of the windows: shuffled by (seed, epoch); sequential, as in the shards; lecture, as the lecture's 8 GPUs
    read them at each step (not with `mix`)"""
    boundary: Literal["ignore", "document"] = "ignore"
    """ignore: a window is a range of the token stream and may span several documents; document: positions restart at
    each document of a window, and attention does not cross documents (slower: flash kernels do not take the mask)"""


@dataclass(kw_only=True)
class BatchConfig:
    """One optimizer step: gradients are accumulated over micro-batches until tokens_per_step is reached."""

    tokens_per_step: Count = 524288
    """tokens per optimizer step, over all processes"""
    seq_len: Count = 1024
    """tokens in a training sequence, at most n_positions"""
    seq_len_warmup: Probability = 0.0
    """cut the sequences into quarters for the first half of this fraction of max_steps, and into halves for the second
    half (Li et al. 2021, https://arxiv.org/abs/2108.06084); 0: never cut them"""
    micro_batch_size: Count | Literal["auto"] = 64
    """maximum sequences in one forward pass of one process (a process with fewer takes all of them at once); auto: the
    largest number that fits into memory, found by a trial on a GPU, and used again when the run is resumed"""


@dataclass(kw_only=True)
class OptimConfig:
    """Optimizer and learning rate. The defaults are the GPT-3 paper's for 125M (table 2.1, appendix B)."""

    lr: Positive = 6e-4
    """peak learning rate"""
    warmup_steps: CountOrZero = 715
    """steps of linear warm-up"""
    final_lr_fraction: Annotated[float, "[0, 1]"] = 0.1
    """final learning rate, as a fraction of the peak"""
    cooldown_fraction: Annotated[float, "(0, 1]"] | None = None
    """keep the peak learning rate, then decay linearly over this last fraction of max_steps; null: a cosine over all
    steps after the warm-up"""
    betas: tuple[Probability, Probability] = (0.9, 0.95)
    """decay of AdamW's two moments"""
    eps: Positive = 1e-8
    """AdamW's epsilon"""
    weight_decay: PositiveOrZero = 0.1
    """AdamW's weight decay, on matrices and embeddings; never on biases and LayerNorms"""
    muon_lr: Positive | None = None
    """peak learning rate of Muon, for the matrices of the blocks (AdamW trains the rest); null: AdamW trains all"""
    muon_weight_decay: PositiveOrZero = 0.05
    """Muon's weight decay"""
    grad_clip: Annotated[float, "(0, inf]"] = 1.0
    """maximum global gradient norm; .inf disables clipping"""
    max_skipped_steps: Count = 10
    """steps with a loss or gradient that is not finite are skipped; the run stops after this many in a row"""


@dataclass(kw_only=True)
class EvalConfig:
    """Evaluation every `eval_every` steps, before the first step and after the last."""

    val_tokens: Annotated[int, "[1, 1e12]"] = 10_485_760
    """validation tokens to score, from the start of the validation split; with data.mix, each folder has an equal part
    of them, and the total is the mean of the folders' losses by their weights"""
    ngram_baselines: bool = False
    """compute the unigram and bigram loss of the corpus for comparison (small corpora only, and not with data.mix)"""
    hellaswag: str | None = "hub"
    """source of the items: `hub` (Rowan/hellaswag), `sample` (40 items written for this project), a .jsonl file;
    null: HellaSwag is not scored"""
    hellaswag_limit: Annotated[int, "[2, 1e9]"] | None = None
    """score only this many items, from the first on; at least 2, since one item has no error bar"""
    tasks: list[str] = field(default_factory=list)
    """other tasks of `python -m eval`, as NAME[:LIMIT][@STEPS], such as [lambada:500, core:mini@1000]; LIMIT: a number
    of items, or a share such as 10% (core:mini: 50 items of each of CORE's tasks); STEPS: a multiple of eval_every.
    `hellaswag` has the items of eval.hellaswag; its LIMIT and STEPS replace eval.hellaswag_limit and eval_every"""
    task_data: dict[str, str] | None = None
    """where the tasks find their items, as --data of `python -m eval`: {lambada: FILE, core: FOLDER}; null: the Hub"""
    prompts: list[str] | None = None
    """texts that the model continues, to be read by a person; null: words of two passages of the validation text (a
    recipe's prompts are left out if --text or data.mix replaces its data)"""
    sample_tokens: Count = 32
    """tokens in each continuation"""


@dataclass(kw_only=True)
class Config:
    """The run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Model"""
    data: DataConfig = field(default_factory=DataConfig)
    """Data"""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """Batch"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning rate"""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation during training"""
    output_dir: str | None = None
    """the run's folder; null: runs/<name of the recipe, or of data.text without one>"""
    max_steps: Count = 19073
    """optimizer steps; the learning rate schedule ends here"""
    eval_every: Count = 250
    """steps between evaluations"""
    save_every: Count | None = None
    """steps between checkpoints; null: only after the last step"""
    keep_last: Count | None = None
    """number of newest checkpoints to keep; null: all"""
    keep_every: Count | None = None
    """with keep_last: also keep the checkpoints of steps that are multiples of this number"""
    keep_best: bool = True
    """with keep_last: also keep the checkpoint with the lowest validation loss (save_every should be a multiple of
    eval_every)"""
    log_every: Count = 10
    """steps between lines on the console (metrics.jsonl has every step)"""
    seed: Annotated[int, "[0, 4294967295]"] = 1337
    """seed of the initial weights, the order of the data, dropout and the text samples"""
    cpu: bool = False
    """train on the CPU, even if there is a GPU"""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto: the launcher's setting, otherwise bf16 if the hardware supports it, or fp16 on a GPU that has only that"""
    compile: bool = False
    """torch.compile the training and validation step (not on Apple's GPUs)"""
    activation_checkpointing: Literal["none", "block"] = "none"
    """block: keep only the inputs of the blocks for the backward pass, which computes each block again: the same loss
    and gradients with much less memory, in about a third more time"""
    profile: Count | None = None
    """record this many steps, from the fourth on, with torch's profiler: profile.json.gz, and a table on the console"""
    init_from: str | None = None
    """start from these weights and their shape: a checkpoint, a folder or Hub id of a GPT-2 (openai-community/gpt2)"""
    resume: str | None = None
    """`auto`: continue from the newest complete checkpoint in output_dir, if there is one; or a checkpoint's path"""
    max_hours: Positive | None = None
    """save, stop and exit with code 75 ("resume me") this many hours after the start; null: no limit"""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=lambda: ["tensorboard"])
    """trackers to log the metrics to, in addition to metrics.jsonl"""
    dollars_per_hour: Positive | None = None
    """price of one device, for the cost on the console; null: the price in training/cards.py, if it has one"""
    push_to_hub: str | None = None
    """USER/NAME: push the last checkpoint there, with a model card; the token is HF_TOKEN or from `hf auth login`"""
    push_public: bool = False
    """make a new Hub repository public; without it, only the owner of the token can see it"""
    dry_run: bool = False
    """print the plan and stop"""
    card: Literal[_GeForce, _DataCenter] | None = None
    """with dry_run: plan for this card in place of the device here"""


class TaskSetting(NamedTuple):
    """A task that is scored during training."""

    name: str
    data: str | None  # where its items are; None: the task's default
    limit: int | str | None  # number of items to score, or a share such as "10%"; None: all
    every: int  # steps between scorings


def load_config(argv: Sequence[str]) -> Config:
    """Read a run's settings, and check all that can be checked without knowing the hardware.

    Raises:
        TrainingError: an unknown setting (the message has the one that was probably meant), a value that its setting
            does not take, a recipe that is missing or broken, values that contradict each other.
    """
    if {"--help", "-h"} & set(argv):
        print(help_text(Config), end="")
        raise SystemExit(0)
    settings = settings_of(Config)
    given_recipes, options = split_command_line(argv, settings)
    recipes = given_recipes or [str(DEFAULT_RECIPE)]
    values: dict[str, RawValue] = {}
    for layer in (*(read_recipe(recipe, settings) for recipe in recipes), options):
        named = [name for name in _DATA_NAMES if name in layer and str(layer[name].value).lower() not in NULLS]
        if len(named) > 1:
            raise TrainingError(
                f"{layer[named[0]].location}{named[0]} and {named[1]} are given together: leave one of them out"
            )
        for name in named:
            # The data of a later layer replaces that of an earlier one, in whichever way it is named. prepare_sample
            # belongs to the path given with it: do not make the sample at another, perhaps mistyped one.
            if name not in values or values[name].value != layer[name].value:
                is_sample = values.pop("data.prepare_sample", None) is not None
                # Prompts belong to the text. Another path usually has a copy of the same one.
                if is_sample or name != "data.path":
                    values.pop("eval.prompts", None)
            for other in _DATA_NAMES:
                values.pop(other, None)
        values |= layer
    config = build(Config, values)
    if config.output_dir is None:
        name = Path(recipes[-1]).stem
        if config.data.text is not None and not given_recipes:  # the text's name; a pattern has none
            name = re.sub(r"[^\w.-]+", "-", Path(config.data.text).absolute().stem).strip("-.") or "text"
        config.output_dir = str(Path("runs") / name)
    for name in ("output_dir", "data.path", "data.text", "init_from", "resume", "eval.hellaswag"):
        group, _, field_name = name.rpartition(".")
        owner = getattr(config, group) if group else config
        setattr(owner, field_name, _expand_path(name, getattr(owner, field_name)))
    if config.data.mix is not None:
        config.data.mix = {str(_expand_path("data.mix", path)): weight for path, weight in config.data.mix.items()}
        _check_mix(config, config.data.mix)
    if config.eval.task_data is not None:
        paths = config.eval.task_data.items()
        config.eval.task_data = {name: str(_expand_path(f"eval.task_data {name}", path)) for name, path in paths}
    _check(config)
    return config


def _expand_path(name: str, text: str | None) -> str | None:
    """Expand ~/x, which bash does not do in --output_dir=~/x, and check that the text can be a path."""
    if text is None:
        return None
    text = str(Path(text).expanduser()) if text.startswith("~/") else text
    try:
        Path(text).exists()
    except OSError as error:
        raise TrainingError(f"{name} cannot be used ({error.strerror or error}), got {format_value(text)}") from None
    return text


def _check(config: Config) -> None:
    """Raise TrainingError for values that are not possible, alone or together."""
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise TrainingError(f"trackers: {name} is not installed: pip install {name}, or leave it out")
    if config.card is not None and not config.dry_run:
        raise TrainingError(
            f"card={config.card} is for a plan: add --dry_run, or leave it out to train on the device here"
        )
    if config.keep_every is not None and config.keep_last is None:
        raise TrainingError(f"keep_every={config.keep_every} needs keep_last: without it, all checkpoints are kept")
    if config.profile is not None and config.profile + WARM_UP_STEPS >= config.max_steps:
        raise TrainingError(
            f"profile={config.profile} needs {config.profile + WARM_UP_STEPS + 1} steps ({WARM_UP_STEPS} before those "
            f"recorded, and one after), got max_steps={config.max_steps}"
        )
    if config.push_to_hub is None and config.push_public:
        raise TrainingError("push_public needs push_to_hub=USER/NAME, the repository to push to")
    task_settings(config)
    checkout = DEFAULT_RECIPE.parent.parent
    assert config.output_dir is not None  # load_config has set it
    if Path(config.output_dir).absolute() in (checkout, *checkout.parents):
        raise TrainingError(f"output_dir must be a folder of the run's own, such as runs/x, got {config.output_dir}")
    if config.init_from in ("scratch", "resume") and not Path(config.init_from).exists():  # values of nanoGPT
        remedy = "leave it out for random weights" if config.init_from == "scratch" else "write --resume auto"
        raise TrainingError(f"init_from must be a checkpoint or a model, got {config.init_from}; {remedy}")
    if config.resume in ("true", "last", "latest", "newest") and not Path(config.resume).exists():
        raise TrainingError(f"resume must be auto or a checkpoint's path, got {config.resume}")
    if config.push_to_hub in ("true", "false"):
        raise TrainingError(f"push_to_hub must be USER/NAME, got {config.push_to_hub}")
    if config.init_from is None:  # otherwise the shape is that of the weights
        check_lengths(config)
    if config.eval.val_tokens < config.batch.seq_len:
        raise TrainingError(
            f"eval.val_tokens={config.eval.val_tokens} is less than a sequence of batch.seq_len={config.batch.seq_len}"
        )
    if config.batch.seq_len_warmup and (config.batch.seq_len % 4 or config.data.boundary == "document"):
        raise TrainingError(
            f"batch.seq_len_warmup={config.batch.seq_len_warmup} cuts sequences into quarters: it needs a "
            f"batch.seq_len that is a multiple of 4, got {config.batch.seq_len}, and data.boundary=ignore, got "
            f"{config.data.boundary}"
        )
    if config.batch.tokens_per_step % config.batch.seq_len:
        raise TrainingError(
            f"batch.tokens_per_step={config.batch.tokens_per_step} is not a multiple of "
            f"batch.seq_len={config.batch.seq_len}; "
            f"nearest: {nearest_multiples(config.batch.tokens_per_step, config.batch.seq_len)}"
        )


def _check_mix(config: Config, mix: dict[str, float]) -> None:
    if len({Path(folder).resolve() for folder in mix}) < max(2, len(mix)):
        raise TrainingError(
            f"data.mix needs two or more different folders, got {', '.join(mix) or '{}'}; write --data.path for one"
        )
    if config.data.prepare_sample:
        raise TrainingError("data.prepare_sample is for data.path, not for data.mix: prepare the folders first")
    if config.data.order == "lecture":
        raise TrainingError("data.order=lecture reads one folder, and data.mix has several; use shuffled")
    if config.eval.val_tokens // len(mix) < config.batch.seq_len:
        raise TrainingError(
            f"eval.val_tokens={config.eval.val_tokens} is less than a sequence of "
            f"batch.seq_len={config.batch.seq_len} for each of the {len(mix)} folders of data.mix"
        )


def task_settings(config: Config) -> list[TaskSetting]:
    """Return the tasks that training scores: those of eval.tasks, and HellaSwag as eval.hellaswag has it.

    Raises:
        TrainingError: an entry of eval.tasks is not possible, or contradicts another setting.
    """
    sources = {"hellaswag": config.eval.hellaswag or "hub", **(config.eval.task_data or {})}
    tasks: dict[str, TaskSetting] = {}
    for text in config.eval.tasks:
        match = re.fullmatch(rf"(\w+)(?::({_TASK_LIMIT}))?(?:@([1-9]\d{{0,8}}))?", text)
        if match is None:
            raise TrainingError(
                f"eval.tasks: {format_value(text)} is not NAME[:LIMIT][@STEPS], with LIMIT a number from 2, 1% to 100% "
                "(not for bits_per_byte) or mini (only for core); for tasks of lm-eval use python -m eval"
            )
        name, limit, steps = match.groups()
        every = int(steps or config.eval_every)
        if name in tasks:
            raise TrainingError(f"eval.tasks: {name} is listed twice; list it once")
        if every % config.eval_every:
            nearest = nearest_multiples(every, config.eval_every)
            raise TrainingError(f"eval.tasks: {text} needs a multiple of eval_every={config.eval_every}: @{nearest}")
        items = int(limit) if str(limit).isdigit() else CORE_MINI if limit == "mini" else limit
        if name == "hellaswag":
            items = items or config.eval.hellaswag_limit
        tasks[name] = TaskSetting(name, sources.get(name), items, every)
    for name in config.eval.task_data or {}:
        if tasks and name not in tasks:
            raise TrainingError(f"eval.task_data has {name}, which eval.tasks does not have: add it, or leave it out")
    if config.eval.hellaswag is not None and "hellaswag" not in tasks:
        own = TaskSetting("hellaswag", config.eval.hellaswag, config.eval.hellaswag_limit, config.eval_every)
        return [own, *tasks.values()]
    return [*tasks.values()]


def load_shape(init_from: str | None, resume_from: Path | None, vocab_size: int) -> tuple[str | None, dict[str, int]]:
    """Return (the model that init_from means now, its shape by the names of SHAPE).

    Once a run has begun, its own checkpoints have the shape. Without init_from the shape is empty.

    Raises:
        UserError: init_from cannot be opened, or is not a GPT-2.
    """
    if init_from is None:
        return None, {}
    if resume_from is None:  # runs/x/checkpoints/best is one checkpoint now, and may be another one later
        init_from = check_name(init_from)
        say(f"weights   from {init_from}. Its shape replaces the settings model.*, except dropout")
    source = load_gpt2_config(str(resume_from or init_from), vocab_size=vocab_size)
    if added := source.vocab_size - vocab_size:  # padding (nanoGPT's 50,304), or added tokens
        say(f"weights   the last {added} rows of the embedding are dropped: the tokenizer has {vocab_size:,} tokens")
    return init_from, {name: getattr(source, name) for name in SHAPE}


def apply_shape(config: Config, shape: dict[str, Any], **vocabulary: Any) -> GPT2ReproConfig:
    """Write the shape from `load_shape` into the settings, and return the model's configuration.

    Args:
        vocabulary: vocab_size, bos_token_id, eos_token_id and pad_token_id of the tokenizer; by default GPT-2's.

    Raises:
        TrainingError: the shape is impossible, or too short for the training sequences.
    """
    config.model = replace(config.model, **shape)
    check_lengths(config)
    dropout = config.model.dropout
    try:
        return GPT2ReproConfig(
            **{name: getattr(config.model, name) for name in SHAPE},
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            residual_in_autocast_dtype=config.model.residual_in_autocast_dtype,
            **vocabulary,
        )
    except ValueError as error:
        raise TrainingError(f"model: {error}") from error


def check_lengths(config: Config) -> None:
    """Raise TrainingError if the training sequences are longer than the model's n_positions."""
    if config.batch.seq_len > config.model.n_positions:
        raise TrainingError(
            f"batch.seq_len={config.batch.seq_len} is longer than the model's n_positions={config.model.n_positions}; "
            "shorten seq_len" + (" or raise n_positions" if config.init_from is None else "")
        )


def nearest_multiples(value: int, step: int) -> str:
    """Return the nearest positive multiples of `step`, for a message."""
    below = value // step * step
    return f"{below} or {below + step}" if below else f"{step}"
