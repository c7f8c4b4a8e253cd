"""The documents: their Python blocks run on a terminal and ask nothing, and their commands have the options shown."""

import argparse
import importlib
import importlib.util
import json
import re
import sys
from functools import cache
from itertools import chain, pairwise

import pytest
import torch
from documents import commands_of, inline_options, python_program
from fresh_process import QUESTION
from test_imports import extras
from tiny_run import ROOT

from data.tokenizer import GPT2
from hub.card import model_card
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from training.config import Config, load_config
from training.logging import NEXT_STEPS
from training.settings import SHORT, settings_of

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
# docs/sharing.md's blocks need exports: tests/hub/test_export.py runs them.
WITH_PYTHON = [path for path in DOCUMENTS if "```python" in path.read_text(encoding="utf-8") and path.stem != "sharing"]
STEP = "runs/sample/checkpoints/step_000660"
SETTINGS = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder like a reader's checkout after the first command, with small models where the documents have theirs."""
    folder = tmp_path_factory.mktemp("checkout")
    for room in ("common", "data", "eval", "hub", "modeling_gpt2repro", "training"):
        (folder / room).symlink_to(ROOT / room)
    torch.manual_seed(0)
    model, tokenizer = GPT2ReproForCausalLM(GPT2ReproConfig(**SETTINGS)), GPT2.hf(SETTINGS["n_positions"])
    for path in (STEP, "me/model"):
        model.save_pretrained(folder / path)
        tokenizer.save_pretrained(folder / path)
    model.to_gpt2().save_pretrained(folder / "openai-community/gpt2")  # a folder of that name is opened before the Hub
    items = (ROOT / "eval/hellaswag/sample.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    (folder / "hellaswag_val.jsonl").write_text("\n".join(items), encoding="utf-8")
    (folder / "lambada_test.jsonl").write_text(json.dumps({"text": "A man went home to his wife"}), encoding="utf-8")
    return folder


def runs(finished):
    assert QUESTION not in finished.output and finished.returncode == 0, finished.output


@pytest.mark.parametrize("path", WITH_PYTHON, ids=lambda path: path.stem)
def test_python_blocks_run_and_ask_nothing(path, checkout, fresh):
    program = python_program(path, path.read_text(encoding="utf-8"))
    runs(fresh.run(program, cwd=checkout))


def test_model_card_opens_the_checkpoint(checkout, fresh):
    card = model_card("me/model", config=GPT2ReproConfig(**SETTINGS), num_parameters=1)
    runs(fresh.run(python_program(checkout / "card", card), cwd=checkout))
    assert (checkout / "plain-gpt2" / "tokenizer.json").is_file()  # the last line of the card


def test_only_trust_remote_code_keeps_the_auto_classes_from_asking(checkout, fresh, tmp_path):
    program = """
import sys
import transformers

path, name, trust = sys.argv[1:]
getattr(transformers, name).from_pretrained(path, **({"trust_remote_code": True} if trust == "True" else {}))
"""
    for name in ("AutoTokenizer", "AutoConfig", "AutoProcessor", "AutoModelForCausalLM"):
        runs(fresh.run(program, checkout / STEP, name, "True", cwd=tmp_path))
        # transformers 5.9 to 5.24; where this fails, the documents' trust_remote_code for tokenizers can go
        assert QUESTION in fresh.run(program, checkout / STEP, name, "False", cwd=tmp_path).output
    for name in ("GenerationConfig", "GPT2Tokenizer"):
        runs(fresh.run(program, checkout / STEP, name, "False", cwd=tmp_path))


# ---------------------------------------------------------------------------------------------------------------
# Commands: parsed by the parser of the program that they start, which does nothing else.

# Programs of others, whose options are theirs. `transformers serve` is run in tests/hub/test_export.py.
OTHERS = {
    *("curl", "diff", "echo", "hf", "jq", "lm_eval", "mlx_lm.generate", "mypy", "python3", "ruff", "source"),
    *("transformers", "vllm"),
}


class _Found(BaseException):
    """Carries a parser out of a program's `main`."""


@cache
def parser_of(program: str) -> argparse.ArgumentParser:
    """Return the parser of a module of ours ("eval", "data.prepare") or of a script ("sample.py")."""

    def stop(self, *_, **__):
        raise _Found(self)

    if program.endswith(".py"):
        spec = importlib.util.spec_from_file_location(f"documented_{program[:-3].replace('/', '_')}", ROOT / program)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        is_package = (ROOT / program.replace(".", "/")).is_dir()
        module = importlib.import_module(f"{program}.__main__" if is_package else program)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [program])
        try:
            module.main()
        except _Found as found:
            return in_full(found.args[0])
    raise AssertionError(f"{program} did not parse its arguments")


@cache
def launch_parser() -> argparse.ArgumentParser:
    from accelerate.commands.launch import launch_command_parser

    return in_full(launch_command_parser())


def in_full(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Make a parser and its subcommands take options by their full names only."""
    for each in parsers_of(parser):
        each.allow_abbrev = False
    return parser


def parsers_of(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return a parser and those of its subcommands."""
    below = [action.choices.values() for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *chain(*below)]


def check(words: list[str]) -> None:
    """Raise (SystemExit, an error of ours, AssertionError) for a command that its program would not accept."""
    program, *words = [re.sub(r"\$\w+", "1", word) for word in words]
    program = program.removeprefix(".venv/bin/")
    if "..." in words[-1:]:  # "and so on"
        words = [*words[:-1], "recipes/sample.yaml"] if words[-2:-1] == ["--config"] else words[:-1]
    words = ["recipes/sample.yaml" if word == "..." else word for word in words]
    if program == "accelerate":
        assert words[0] == "launch"
        args = launch_parser().parse_args(words[1:])
        assert args.config_file is None or (ROOT / args.config_file).is_file(), args.config_file
        check(["python", *(["-m"] if args.module else []), args.training_script, *args.training_script_args])
    elif program == "python":
        program, *words = words[1:] if words[0] == "-m" else words
        if program == "train.py":
            load_config(words)
        elif program == "pytest":
            check([program, *words])
        else:
            parser_of(program).parse_args(words)
    elif program == "pip":
        for option, value in pairwise(words):
            assert option != "-c" or (ROOT / value).is_file(), value
            assert option != "-e" or not (extra := re.search(r"\[(.*)\]", value)) or extra[1] in extras(), value
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in words if "/" in word), words
    elif "/" in program:
        assert (ROOT / program).is_file(), program
    else:
        assert program in OTHERS, program


def texts():
    """(name, text) of everything that shows commands: the documents, and the comments of YAML files."""
    for path in DOCUMENTS:
        yield path.name, path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("recipes/*.yaml"), *ROOT.glob("accelerate_configs/*.yaml")]):
        comments = re.findall(r"^# {3,}(\S.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        lines = "\n".join(comments).replace("\\\n", " ").splitlines()
        yield path.name, "".join(f"    {line}\n" for line in lines if re.match("accelerate|python", line))
    lines = NEXT_STEPS.format(
        folder="runs/x", quoted="runs/x", report="", curves="", metrics="", prompt="'Hello'"
    ).splitlines()
    yield "a run's last lines", "".join(f"    {line[8:].partition('   ')[0]}\n" for line in lines if "python" in line)


@pytest.mark.parametrize(("name", "text"), [pytest.param(*pair, id=pair[0]) for pair in texts()])
def test_commands_have_the_options_they_show(name, text, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for command in commands_of(text):
        try:
            check(command)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{name}: {' '.join(command)}\n{error} {capsys.readouterr().err}")


def test_options_in_sentences_exist():
    known = {f"--{key}" for key in settings_of(Config)} | {"--help", "--config"}
    for program in ("data.prepare", "data.verify", "eval", "eval.miniseries", "hub", "sample.py"):
        for parser in parsers_of(parser_of(program)):
            known |= {*parser._option_string_actions}
    known |= {f"--{name}" for name in SHORT}
    theirs = {"--trust-remote-code"}  # of `transformers serve`
    for name, text in texts():
        assert inline_options(text) <= known | theirs, name


@pytest.mark.parametrize(
    "command",
    [
        "accelerate launch train.py --optim.learnrate 1",
        "accelerate launch --config_file accelerate_configs/none.yaml train.py",
        "accelerate launch --gpus 8 train.py",
        "accelerate launch -m eval --modell x",
        "python -m hub push x me/y --publik",
        "python -m data.prepare fineweb --out x --max_token 3",
        "python sample.py x --temp 1",
        'pip install -e ".[everything]"',
        "pytest tests/nothing",
        "unknown-program --x",
    ],
)
def test_command_that_does_not_exist_is_found(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    [words] = commands_of(f"    {command}\n")
    with pytest.raises((Exception, SystemExit)):
        check(words)
