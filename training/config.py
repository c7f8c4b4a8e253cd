"""
A run's settings: the defaults below < the recipe (`--config recipes/x.yaml`) < the command line.

    accelerate launch train.py --config recipes/gpt2_124m.yaml --optim.lr 3e-4 --batch.micro_batch_size 32

takes `optim.betas` from the defaults, `max_steps` from the recipe and the two named values from the command
line. The finished settings are written to the run's provenance.json before the first step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from training import TrainingError
from training.settings import Given, SettingsParser, read_recipe, shown, split_command_line
from training.trackers import check_trackers

DEFAULT_RECIPE = Path(__file__).parent.parent / "recipes" / "sample.yaml"

# A number's interval; ) and ( leave the end out. Whole numbers have an upper end that is out of every run's reach.
Count = Annotated[int, "[1, 1e9]"]
CountOrZero = Annotated[int, "[0, 1e9]"]
Positive = Annotated[float, "(0, inf)"]
PositiveOrZero = Annotated[float, "[0, inf)"]
Probability = Annotated[float, "[0, 1)"]


@dataclass(kw_only=True)
class ModelConfig:
    """The model's shape; the names are GPT-2's. The vocabulary is always GPT-2's 50,257."""

    n_layer: Annotated[int, "[1, 1000]"] = 12
    """blocks"""
    n_head: Count = 12
    """attention heads a block"""
    n_embd: Annotated[int, "[1, 1e6]"] = 768
    """width of the residual stream, a multiple of n_head"""
    n_positions: Count = 1024
    """longest sequence, in tokens"""
    dropout: Probability = 0.0
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

    tokens_per_step: Count = 524288
    """tokens in an optimizer step, over all processes"""
    seq_len: Count = 1024
    """tokens in a training sequence, at most n_positions"""
    micro_batch_size: Count | Literal["auto"] = 64
    """sequences in one forward pass of one process, at most (a process with fewer takes them all at once); auto: the
    largest that fits into memory"""


@dataclass(kw_only=True)
class OptimConfig:
    """Optimizer and learning rate; the defaults are the GPT-3 paper's for 125M (table 2.1, appendix B)."""

    lr: Positive = 6e-4
    """peak learning rate"""
    warmup_steps: CountOrZero = 715
    """steps of linear warm-up"""
    final_lr_fraction: Annotated[float, "[0, 1]"] = 0.1
    """where it ends, as a fraction of the peak"""
    cooldown_fraction: Annotated[float, "(0, 1]"] | None = None
    """stay at the peak, and go down on a straight line over this last part of max_steps; null: a cosine all the way"""
    betas: tuple[Probability, Probability] = (0.9, 0.95)
    """decay of AdamW's two moments"""
    eps: Positive = 1e-8
    """AdamW's epsilon"""
    weight_decay: PositiveOrZero = 0.1
    """AdamW's, on matrices and embeddings; never on biases and LayerNorms"""
    muon_lr: Positive | None = None
    """peak learning rate of Muon, which then trains the blocks' matrices (AdamW the rest); null: AdamW trains all"""
    muon_weight_decay: PositiveOrZero = 0.05
    """Muon's"""
    grad_clip: Annotated[float, "(0, inf]"] = 1.0
    """largest norm of the whole gradient; .inf: any"""
    max_skipped_steps: Count = 10
    """a step whose loss or gradient is not finite is skipped; after so many in a row the run stops"""


@dataclass(kw_only=True)
class EvalConfig:
    """What happens every `eval_every` steps, and before the first and after the last."""

    val_tokens: Annotated[int, "[1, 1e12]"] = 10_485_760
    """validation tokens scored, from the start of the validation split"""
    ngram_baselines: bool = False
    """count the corpus's own unigram and bigram loss, for comparison (small corpora only)"""
    hellaswag: str | None = "hub"
    """items: `hub` (Rowan/hellaswag), `sample` (40 items of this project's own), a .jsonl file; null: none"""
    hellaswag_limit: Annotated[int, "[2, 1e9]"] | None = None
    """score only the first so many items; one alone has no error bar"""
    prompts: list[str] = field(default_factory=lambda: ["Hello, I'm a language model,"])
    """texts that the model continues, to be read by a person"""
    sample_tokens: Count = 32
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
    max_steps: Count = 19073
    """optimizer steps; the learning rate's schedule ends here"""
    eval_every: Count = 250
    """steps between evaluations"""
    save_every: Count | None = None
    """steps between checkpoints; null: only after the last step"""
    keep_last: Count | None = None
    """how many of the newest checkpoints stay on the disk; null: all"""
    keep_every: Count | None = None
    """with keep_last: checkpoints of steps that are multiples of it stay as well"""
    keep_best: bool = True
    """with keep_last: the checkpoint with the lowest validation loss stays as well (save_every should be a multiple of
    eval_every)"""
    log_every: Count = 10
    """steps between lines on the console (metrics.jsonl has every step)"""
    seed: Annotated[int, "[0, 4294967295]"] = 1337
    """seed of the initial weights, the order of the data, dropout and the text samples"""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """auto: what the launcher was told, else bf16 where the hardware has it"""
    compile: bool = False
    """torch.compile the training and validation step"""
    init_from: str | None = None
    """start from these weights and their shape: a checkpoint, a folder or Hub id of a GPT-2 (openai-community/gpt2)"""
    resume: str | None = None
    """`auto`: go on from the newest whole checkpoint in output_dir, if there is one; or a checkpoint's path"""
    max_hours: Positive | None = None
    """save, stop and exit with code 75 ("resume me") so many hours after the start; null: no limit"""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=lambda: ["tensorboard"])
    """where accelerate logs the numbers to, beside metrics.jsonl"""
    dollars_an_hour: Positive | None = None
    """what one device costs, for the money on the console; null: training/hardware.py's price, where it has one"""
    push_to_hub: str | None = None
    """USER/NAME: share the last checkpoint there, with a model card; the token is HF_TOKEN's or `hf auth login`'s"""
    push_public: bool = False
    """for everybody to see; else for the token's owner alone"""
    dry_run: bool = False
    """print the plan and stop"""


def load_config(argv: Sequence[str]) -> Config:
    """
    Read and check a run's settings, as far as they can be checked without knowing the hardware.

    Args:
        argv: the command line without the program's name.

    Raises:
        TrainingError: an unknown setting (with the one that was probably meant), a value of another kind, a recipe
            that is missing or broken, values that cannot be together.
    """
    parser = SettingsParser(Config)
    if {"--help", "-h"} & set(argv):
        print(parser.format_help(), end="")
        raise SystemExit(0)
    settings = parser.settings
    recipes, options = split_command_line(argv, settings)
    recipes = recipes or [str(DEFAULT_RECIPE)]
    values = {}
    for layer in (*(read_recipe(recipe, settings) for recipe in recipes), options):
        if "data.path" in layer and layer["data.path"].value != values.get("data.path", Given("")).value:
            # The sample is made under the name that came with prepare_sample, and not under a mistyped one.
            values.pop("data.prepare_sample", None)
        values |= layer
    config = parser.build(values)
    if config.output_dir is None:
        config.output_dir = str(Path("runs") / Path(recipes[-1]).stem)
    for name in ("output_dir", "data.path", "init_from", "resume", "eval.hellaswag"):
        part, last = getattr(config, name.rpartition(".")[0], config), name.rpartition(".")[2]
        setattr(part, last, _path(name, getattr(part, last)))
    _check(config)
    return config


def _path(name: str, text: str | None) -> str | None:
    """Expand ~/x as the shell does (bash leaves it as it is in --output_dir=~/x), and check that it can be a path."""
    if text is None:
        return None
    text = str(Path(text).expanduser()) if text.startswith("~/") else text
    try:
        Path(text).exists()
    except OSError as error:
        raise TrainingError(f"{name} cannot be used ({error.strerror or error}), got {shown(text)}") from None
    return text


def _check(config):
    """Values that cannot be, or cannot be together."""
    check_trackers(config.trackers)
    if config.keep_every is not None and config.keep_last is None:
        raise TrainingError(f"keep_every={config.keep_every} needs keep_last: without it, all checkpoints stay")
    if config.push_to_hub is None and config.push_public:
        raise TrainingError("push_public needs push_to_hub=USER/NAME, the repository to push to")
    checkout = DEFAULT_RECIPE.parent.parent
    if Path(config.output_dir).absolute() in (checkout, *checkout.parents):
        raise TrainingError(f"output_dir must be a folder of the run's own, such as runs/x, got {config.output_dir}")
    if config.init_from in ("scratch", "resume") and not Path(config.init_from).exists():  # nanoGPT's
        remedy = "leave it out for random weights" if config.init_from == "scratch" else "write --resume auto"
        raise TrainingError(f"init_from must be a checkpoint or a model, got {config.init_from}; {remedy}")
    if config.resume in ("true", "last", "latest", "newest") and not Path(config.resume).exists():
        raise TrainingError(f"resume must be auto or a checkpoint's path, got {config.resume}")
    if config.push_to_hub in ("true", "false"):
        raise TrainingError(f"push_to_hub must be USER/NAME, got {config.push_to_hub}")
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
