import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from tiny_run import ROOT

from training import TrainingError
from training.batch import batch_arithmetic, micro_batch_sizes
from training.config import DEFAULT_RECIPE, BatchConfig, Config, load_config, task_settings
from training.settings import RENAMED, _current_name, other_names, settings_of


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


def test_lecture_recipe_has_the_numbers_of_the_lecture():
    config = load_config(["--config", "recipes/gpt2_124m.yaml"])
    assert (config.model.n_layer, config.model.n_head, config.model.n_embd) == (12, 12, 768)
    assert (config.batch.tokens_per_step, config.batch.micro_batch_size, config.batch.seq_len) == (2**19, "auto", 1024)
    assert (config.optim.lr, config.optim.warmup_steps, config.max_steps) == (6e-4, 715, 19073)
    for num_processes in (1, 8):
        batch = dataclasses.replace(config.batch, micro_batch_size=64)
        assert batch_arithmetic(batch, num_processes) == (64, 8 // num_processes)


def value_of(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return list(config) if isinstance(config, tuple) else config


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_sets_its_values_and_leaves_the_defaults(path):
    content = yaml.safe_load(path.read_text())
    given = {}
    for name, value in content.items():
        given |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    config, defaults = load_config(["--config", str(path)]), Config(output_dir=f"runs/{path.stem}")
    for name in settings_of(Config):
        value, expected = value_of(config, name), given.get(name, value_of(defaults, name))
        assert value == expected and type(value) is type(expected), name


def test_defaults_are_accepted_in_a_recipe(recipe):
    defaults = dataclasses.replace(Config(), output_dir="runs/x")
    settings = dataclasses.asdict(defaults)
    settings["optim"]["betas"] = list(defaults.optim.betas)
    assert load_config(["--config", recipe(yaml.safe_dump(settings))]) == defaults


@pytest.mark.parametrize(
    ("arguments", "name", "expected"),
    [
        ("--max_steps 1e3", "max_steps", 1000),
        ("--max_steps 1_000", "max_steps", 1000),
        ("--max_steps 5.0", "max_steps", 5),
        ("--max_steps=7", "max_steps", 7),
        ("--max_steps 7 --max_steps 8", "max_steps", 8),
        ("--optim.lr 1e-3", "optim.lr", 1e-3),
        ("--optim.grad_clip .inf", "optim.grad_clip", float("inf")),
        ("--optim.grad_clip inf", "optim.grad_clip", float("inf")),
        ("--optim.betas 0.9 0.99", "optim.betas", [0.9, 0.99]),
        ("--optim.betas 0.9,0.99", "optim.betas", [0.9, 0.99]),
        ("--optim.betas (0.9, 0.99)", "optim.betas", [0.9, 0.99]),
        ("--optim.betas [0.9, 0.99]", "optim.betas", [0.9, 0.99]),
        ("--optim.betas=[0.9,0.99] --seed 1", "optim.betas", [0.9, 0.99]),
        ("--trackers tensorboard", "trackers", ["tensorboard"]),
        ("--trackers [tensorboard]", "trackers", ["tensorboard"]),
        ("--trackers []", "trackers", []),
        ("--trackers none", "trackers", []),
        ("--eval.prompts Hello, world", "eval.prompts", ["Hello,", "world"]),
        ("--eval.prompts ['Hello, world', b]", "eval.prompts", ["Hello, world", "b"]),
        ("--eval.prompts null", "eval.prompts", None),
        ("--eval.hellaswag none", "eval.hellaswag", None),
        ("--eval.hellaswag null", "eval.hellaswag", None),
        ("--eval.hellaswag 5.jsonl", "eval.hellaswag", "5.jsonl"),
        ("--output_dir 2024", "output_dir", "2024"),
        ("--mixed_precision no", "mixed_precision", "no"),
        ("--batch.micro_batch_size auto", "batch.micro_batch_size", "auto"),
        ("--batch.micro_batch_size 4", "batch.micro_batch_size", 4),
        ("--compile", "compile", True),
        ("--compile --seed 1", "compile", True),
        ("--compile False", "compile", False),
        ("--seed 1", "compile", False),
        ("--data.path elsewhere --data.prepare_sample", "data.prepare_sample", True),
        ("--data.prepare_sample --data.path elsewhere", "data.prepare_sample", True),
        # The sample is made only at the path that its recipe names.
        ("--data.path shards/sample", "data.prepare_sample", True),
        ("--data.path shards/smaple", "data.prepare_sample", False),
        ("--data.mix {a: 0.7, b/c: 3}", "data.mix", {"a": 0.7, "b/c": 3.0}),
        ("--data.mix {a: 0.7, b/c: 3}", "data.prepare_sample", False),
        ("--data.mix none", "data.prepare_sample", True),
        (f"--config {DEFAULT_RECIPE} --config recipes/shakespeare.yaml", "data.prepare_sample", False),
        ("--text book.txt", "data.text", "book.txt"),
        ("--text book.txt", "data.prepare_sample", False),
        ("--text book.txt", "eval.prompts", None),  # the sample recipe's are about Python
        ("--config recipes/gpt2_124m.yaml --data.path x/fineweb", "eval.prompts", ["Hello, I'm a language model,"]),
        ("--text book.txt --eval.prompts Once", "eval.prompts", ["Once"]),
        ("--text texts/book.txt", "output_dir", "runs/book"),
        ("--text texts/*.txt", "output_dir", "runs/text"),
        ("--config recipes/shakespeare.yaml --text book.txt", "output_dir", "runs/shakespeare"),
        ("--data.text null --data.path elsewhere", "data.path", "elsewhere"),
    ],
)
def test_command_line_forms(arguments, name, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    value = value_of(load_config(arguments.split(" ")), name)
    assert value == expected and type(value) is type(expected)


def test_home_folder_is_expanded_after_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    assert load_config(["--output_dir=~/runs/x"]).output_dir == "/home/me/runs/x"


def test_command_line_wins_also_if_it_comes_before_config(recipe):
    path = recipe("max_steps: 50\n")
    assert load_config(["--max_steps", "7", "--config", path]).max_steps == 7


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("mixed_precision: no\n", "mixed_precision", "no"),
        ("compile: yes\n", "compile", True),
        ("optim:\n  lr: 1e-3\n", "optim.lr", 1e-3),
        ("optim.lr: 1e-3\n", "optim.lr", 1e-3),
        ("max_steps: 1e3\n", "max_steps", 1000),
        ("save_every:\noptim:\n", "save_every", None),
        ("eval:\n  hellaswag: ~\n", "eval.hellaswag", None),
        ("trackers: tensorboard\n", "trackers", ["tensorboard"]),
        ("eval: {prompts: [null, 'a, b', 5]}\n", "eval.prompts", ["null", "a, b", "5"]),
        ("eval: {prompts: '[a'}\n", "eval.prompts", ["[a"]),
        ('{"max_steps": 5, "optim": {"betas": [0.8, 9e-1]}}', "optim.betas", [0.8, 0.9]),
        ("\ufeffmax_steps: 5\r\n", "max_steps", 5),
        ("data: {mix: {'my shards': 1, b: 2.5e-1}}\n", "data.mix", {"my shards": 1.0, "b": 0.25}),
        ("output_dir: 2024-01-01\n", "output_dir", "2024-01-01"),
    ],
)
def test_recipe_forms(recipe, text, name, expected):
    value = value_of(load_config(["--config", recipe(text)]), name)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--data.mix {a: 1, b: 1} --data.path c", "data.path and data.mix are given together"),
        ("--data.mix {a: 1}", "two or more different folders, got a; write --data.path"),
        ("--data.mix {a: 1, a/: 2}", "two or more different folders, got a, a/"),
        (
            "--data.mix {a: 1, b: 0}",
            r"data.mix must be a mapping such as .*number in \(0, inf\) or null, got '{a: 1, b: 0}'",
        ),
        ("--data.mix {a: 1, a: 2, b: 1}", "data.mix must be a mapping"),
        ("--data.mix a", "data.mix must be a mapping"),
        ("--data.mix {a: 1, b: 1} --data.prepare_sample", "prepare_sample is for data.path"),
        ("--data.mix {a: 1, b: 1} --data.order lecture", "data.order=lecture reads one folder"),
        ("--data.mix {a: 1, b: 1} --eval.val_tokens 200", "for each of the 2 folders of data.mix"),
    ],
)
def test_mixtures_that_are_not_possible_are_errors(arguments, words):
    with pytest.raises(TrainingError, match=words):
        load_config(arguments.split(" "))


def test_tasks_have_limits_intervals_and_data(recipe):
    text = "eval: {tasks: [lambada, 'blimp:10%', core:mini@500, arc:7], task_data: {lambada: ~/x.jsonl}}\n"
    hellaswag, *tasks = task_settings(load_config(["--config", recipe(text)]))
    assert hellaswag == ("hellaswag", "hub", None, 250)
    assert tasks[1:] == [("blimp", None, "10%", 250), ("core", None, 50, 500), ("arc", None, 7, 250)]
    assert tasks[0] == ("lambada", str(Path("~/x.jsonl").expanduser()), None, 250)
    for arguments, expected in (
        ("[hellaswag@500] --eval.hellaswag_limit 9", ("sample", 9, 500)),
        ("[hellaswag:20%] --eval.hellaswag_limit 9 --eval.hellaswag x.jsonl", ("x.jsonl", "20%", 250)),
        ("[hellaswag:7] --eval.hellaswag null", ("hub", 7, 250)),
    ):
        assert task_settings(load_config(["--eval_every", "250", "--eval.tasks", *arguments.split()])) == [
            ("hellaswag", *expected)
        ]


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        *(
            (text, "is not NAME")
            for text in ("lambada:1", "x:0%", "x:101%", "x:mini", "bits_per_byte:5%", "x@0", "a,b")
        ),
        ("lm-eval:piqa", "for tasks of lm-eval use python -m eval"),
        ("core@300", "core@300 needs a multiple of eval_every=250: @250 or 500"),
        ("core core:5", "core is listed twice"),
        ("core --eval.task_data {cor: x}", "eval.task_data has cor, which eval.tasks does not have"),
        ("core --eval.task_data x", "task_data must be a mapping such as {a: x, b: y}, each value text"),
    ],
)
def test_tasks_that_are_not_possible_are_errors(tasks, words):
    with pytest.raises(TrainingError, match=re.escape(words)):
        load_config(["--eval_every", "250", "--eval.tasks", *tasks.split(" ")])


def test_folder_twice_in_a_recipe_is_an_error(recipe):
    with pytest.raises(TrainingError, match=r":2: .*a appears twice"):
        load_config(["--config", recipe("data: {mix: {a: 1,\n  a: 2, b: 1}}\n")])


def test_path_on_the_command_line_replaces_a_recipes_mix(recipe):
    data = load_config(["--config", recipe("data: {mix: {a: 1, b: 2}}\n"), "--data.path", "c"]).data
    assert (data.path, data.mix) == ("c", None)


def test_hints_name_existing_settings_and_files():
    settings, hints = settings_of(Config), other_names()
    last = {name.rpartition(".")[2] for name in settings}
    assert not last & set(hints)  # a setting without its group is found without a hint
    words = {word.strip(",;`") for hint in hints.values() for word in hint.split()}
    groups = {name.partition(".")[0] for name in settings if "." in name}
    assert {word for word in words if word.partition(".")[0] in groups and "." in word} - {"data.prepare"} <= set(
        settings
    )
    names = {hint.split(" ")[0].strip(",;") for hint in hints.values() if "_" in hint.split(" ")[0]}
    assert {name for name in names if "/" not in name} - {"HF_TOKEN"} <= set(settings)
    assert all((ROOT / path).is_file() for path in re.findall(r"(?:recipes|accelerate_configs)/\w+\.yaml", str(hints)))
    assert not set(RENAMED) & set(settings) and set(RENAMED.values()) <= set(settings)


def test_old_name_works_and_prints_the_new_one_once(recipe, capsys):
    _current_name.cache_clear()
    path = recipe("dollars_an_hour: 2\n")
    assert load_config(["--config", path]).dollars_per_hour == 2
    assert load_config(["--config", path, "--dollars_an_hour", "3"]).dollars_per_hour == 3
    assert capsys.readouterr().err == "--dollars_an_hour is now called --dollars_per_hour\n"


def test_configs_share_no_list():
    load_config([]).trackers.append("wandb")
    load_config([]).eval.tasks.append("copa")
    assert load_config([]) == load_config(["--trackers", "tensorboard"]) and not load_config([]).eval.tasks


def test_text_that_is_null_in_yaml_is_not_null():
    assert load_config(["--eval.hellaswag", "# 5"]).eval.hellaswag == "# 5"
    with pytest.raises(TrainingError, match=r"save_every must be .*, got '# 5'"):
        load_config(["--save_every", "# 5"])


def test_help_describes_every_setting(capsys):
    with pytest.raises(SystemExit):
        load_config(["--help"])
    text = capsys.readouterr().out
    for name, setting in settings_of(Config).items():
        assert f"--{name} " in text
        assert setting.description
    assert "peak learning rate" in text


def test_batch_arithmetic_is_exact():
    batch = BatchConfig(tokens_per_step=48 * 128, seq_len=128, micro_batch_size=16)
    assert batch_arithmetic(batch, 1) == (16, 3)
    assert batch_arithmetic(batch, 6) == (8, 1)  # fewer than a micro-batch: all at once
    for processes in (1, 3, 6, 8, 48):
        micro, accumulation = batch_arithmetic(batch, processes)
        assert micro * accumulation * processes == 48
    assert micro_batch_sizes(batch, 2) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert micro_batch_sizes(BatchConfig(tokens_per_step=36, seq_len=1), 1) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    with pytest.raises(TrainingError, match=r"5 processes.*5760 or 6400"):
        batch_arithmetic(batch, 5)
    with pytest.raises(TrainingError, match=r"2 sequences.*4 processes.*nearest tokens_per_step: 512"):
        batch_arithmetic(BatchConfig(tokens_per_step=256, seq_len=128, micro_batch_size="auto"), 4)
    with pytest.raises(TrainingError, match=r"micro_batch_size=7.*48.*6 or 8"):
        batch_arithmetic(BatchConfig(tokens_per_step=48 * 128, seq_len=128, micro_batch_size=7), 1)
