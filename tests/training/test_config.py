import pytest

from training import TrainingError
from training.config import DEFAULT_RECIPE, BatchConfig, known_keys, load_config
from training.microbatch import batch_arithmetic


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_command_line_over_recipe_over_defaults(recipe):
    path = recipe("max_steps: 50\noptim:\n  lr: 1e-3\n  warmup_steps: 5\n")
    config = load_config(["--config", path, "--optim.lr", "2e-3"])
    assert config.optim.lr == 2e-3
    assert (config.max_steps, config.optim.warmup_steps) == (50, 5)
    assert config.optim.betas == (0.9, 0.95)
    assert config.output_dir == "runs/mine"


def test_no_arguments_means_the_sample_recipe():
    assert load_config([]).output_dir == "runs/sample"
    assert load_config([]) == load_config(["--config", str(DEFAULT_RECIPE)])


@pytest.mark.parametrize(
    ("arguments", "expected"), [(["--compile"], True), (["--compile", "false"], False), ([], False)]
)
def test_flags_need_no_value(arguments, expected):
    assert load_config([*arguments, "--seed", "1"]).compile is expected


def test_the_lecture_recipe_is_the_lectures():
    config = load_config(["--config", "recipes/gpt2_124m.yaml"])
    assert (config.model.n_layer, config.model.n_head, config.model.n_embd) == (12, 12, 768)
    assert (config.batch.tokens_per_step, config.batch.micro_batch_size, config.batch.seq_len) == (2**19, 64, 1024)
    assert (config.optim.lr, config.optim.warmup_steps, config.max_steps) == (6e-4, 715, 19073)
    assert batch_arithmetic(config.batch, 1) == (64, 8)
    assert batch_arithmetic(config.batch, 8) == (64, 1)


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("max_stepz: 5\n", ["max_stepz", "max_steps"]),
        ("optim:\n  learning_rat: 5\n", ["optim.learning_rat"]),
        ("optim:\n  warmup_step: 5\n", ["optim.warmup_step", "optim.warmup_steps"]),
        ("optim:\n  lr: fast\n", ["optim.lr", "fast"]),
        ("optim: [1\n", ["config"]),
        ("max_steps: 0\n", ["max_steps", "0"]),
        ("optim:\n  betas: [0.9, 1.0]\n", ["optim.betas[1]", "1.0"]),
        ("seed: -1\n", ["seed", "-1"]),
        ("batch:\n  seq_len: 2048\nmodel:\n  n_positions: 1024\n", ["2048", "1024"]),
        ("batch:\n  seq_len: 1000\n  tokens_per_step: 524288\n", ["524288", "1000", "524000 or 525000"]),
        ("mixed_precision: fp16\n", ["mixed_precision", "fp16"]),
    ],
)
def test_a_bad_recipe_is_one_line_that_names_it(recipe, yaml, words):
    with pytest.raises(TrainingError) as error:
        load_config(["--config", recipe(yaml)])
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_bad_command_lines():
    with pytest.raises(TrainingError, match="did you mean 'max_steps'"):
        load_config(["--max_stepz", "3"])
    with pytest.raises(TrainingError, match=r"did you mean 'optim\.lr'"):
        load_config(["--optim.lrr=3"])
    with pytest.raises(TrainingError, match=r"nowhere\.yaml"):
        load_config(["--config", "nowhere.yaml"])


def test_every_setting_has_a_description(capsys):
    with pytest.raises(SystemExit):
        load_config(["--help"])
    text = capsys.readouterr().out
    for key in known_keys():
        assert f"--{key}" in text
    assert "peak learning rate" in text


def test_batch_arithmetic_is_exact():
    batch = BatchConfig(tokens_per_step=48 * 128, seq_len=128, micro_batch_size=16)
    assert batch_arithmetic(batch, 1) == (16, 3)
    assert batch_arithmetic(batch, 6) == (8, 1)  # fewer than a micro-batch: all at once
    for processes in (1, 3, 6, 8, 48):
        micro, accumulation = batch_arithmetic(batch, processes)
        assert micro * accumulation * processes == 48
    with pytest.raises(TrainingError, match=r"5 processes.*5760 or 6400"):
        batch_arithmetic(batch, 5)
    with pytest.raises(TrainingError, match=r"2 sequences.*4 processes.*nearest tokens_per_step: 512"):
        batch_arithmetic(BatchConfig(tokens_per_step=256, seq_len=128, micro_batch_size="auto"), 4)
    with pytest.raises(TrainingError, match=r"micro_batch_size=7.*48.*6 or 8"):
        batch_arithmetic(BatchConfig(tokens_per_step=48 * 128, seq_len=128, micro_batch_size=7), 1)
