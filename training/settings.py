"""Read a run's settings with jsonargparse: defaults of a dataclass < recipe (YAML) < command line.

jsonargparse checks and converts the values, describes the settings and builds the dataclass. This module collects the
values as text from the recipe and the command line, and replaces the library's errors with one line that names the
setting, the value and the allowed values. YAML's own types are not used: here 1e-3 is a number and "no" in
`mixed_precision: no` is text, while YAML reads text and false.
"""

import argparse
import dataclasses
import difflib
import functools
import operator
import re
import sys
from collections.abc import Iterator, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import GenericAlias, NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from jsonargparse.typing import register_type

from common.cli import is_main_process
from training import TrainingError

RENAMED = {"dollars_an_hour": "dollars_per_hour"}  # an old name works in this release and prints the new one
SHORT = {"text": "data.text"}
HELP = "`python train.py --help` lists the settings"
_MAX_RECIPE_BYTES = 1_000_000  # a larger file is not a recipe but perhaps weights
NULLS = ("null", "none", "~")
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text (not empty)", NoneType: "null"}


class Setting(NamedTuple):
    """A field that is not itself a group of settings."""

    type_hint: Any
    description: str


class RawValue(NamedTuple):
    """A value as the user wrote it: text, or lists and mappings of texts."""

    value: str | list | dict
    location: str = ""
    """the start of a message about the value: "FILE:LINE: " if it is from a recipe"""


def settings_of(config_class: type) -> dict[str, Setting]:
    """Return the settings of a dataclass by dotted name: `max_steps`, `optim.lr`, ..."""
    return _parser_and_settings(config_class)[1]


def help_text(config_class: type) -> str:
    """Describe every setting, by group."""
    return _parser_and_settings(config_class)[0].format_help()


def build(config_class: type, raw_values: dict[str, RawValue]) -> Any:
    """Make a dataclass from values by dotted name, and defaults for the others.

    Raises:
        TrainingError: a value does not have its setting's type.
    """
    parser, settings = _parser_and_settings(config_class)
    values: dict[str, object] = {}
    name = ""
    try:
        for name, raw in raw_values.items():
            values[name] = _normalize(raw.value, settings[name].type_hint)
        parsed = parser.parse_object(values)
        for name in values:
            if parsed[name] is None and values[name] is not None:  # jsonargparse tries YAML, where "# 5" is null
                raise ValueError
    except ArgumentError as error:
        name = str(error).split('"')[1]  # Parser key "NAME": ...
    except (ValueError, RecursionError, yaml.YAMLError):
        pass
    else:
        config = parser.instantiate(parsed)
        return config_class(**{f.name: config[f.name] for f in dataclasses.fields(config_class)})
    value, location = raw_values[name]
    expected = describe_type(settings[name].type_hint)
    raise TrainingError(f"{location}{name} must be {expected}, got {format_value(value)}")


@functools.cache
def _parser_and_settings(config_class: type) -> tuple[ArgumentParser, dict[str, Setting]]:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="train.py",
        usage="train.py [--config RECIPE] [--SETTING VALUE ...]",
        description="Train a GPT-2. The command line overrides the recipe, and the recipe overrides the defaults.",
        formatter_class=argparse.HelpFormatter,
        parser_mode="json",  # not YAML, where the text "# c" is null
        add_help=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", metavar="RECIPE", help="a file of settings (default: recipes/sample.yaml)")
    parser.add_class_arguments(config_class)
    settings = {}
    action: Any
    for action in parser._actions:
        if hasattr(action, "_typehint"):
            action._typehint = _with_intervals(action._typehint)
            settings[action.dest] = Setting(action._typehint, " ".join(action.help.split()))
            text = f"{action.help} [{describe_type(action._typehint)}; default: {format_value(action.default)}]"
            names = [*(short for short, name in SHORT.items() if name == action.dest), action.dest]
            action.option_strings = [f"--{name}" for name in names]
            action.metavar, action.help = "", text.replace("%", "%%")
        elif action.dest != "config":  # --optim and the other groups, which take no value here
            action.help = argparse.SUPPRESS
    return parser, settings


# ---------------------------------------------------------------------------------------------------------------
# Types and values.


def _with_intervals(type_hint: Any) -> Any:
    """Replace Annotated[int, "[1, 10]"] by a type that jsonargparse checks."""
    origin, options = get_origin(type_hint), get_args(type_hint)
    if origin in (Union, UnionType):
        return functools.reduce(operator.or_, map(_with_intervals, options))
    if origin in (tuple, dict):
        return GenericAlias(origin, tuple(map(_with_intervals, options)))
    if origin is not Annotated:
        return type_hint
    base, interval = options
    low, high = (float(end) for end in interval[1:-1].split(","))

    def convert(text: str) -> int | float:
        value = _integer(text) if base is int else float(text.lower().replace(".inf", "inf"))  # .inf is YAML's
        if not low <= value <= high or (value == low and interval[0] == "(") or (value == high and interval[-1] == ")"):
            raise ValueError
        return value

    constrained = type(f"{_WORDS[base]} in {interval}", (base,), {})
    register_type(constrained, base, convert, type_check=lambda value, _: type(value) is base)
    return constrained


def _integer(text: str) -> int:
    """Convert text to an integer; 1e3, 1_000 and 5.0 are exact, and so they are integers too."""
    try:
        number = Decimal(text)
        if number.is_finite() and number.adjusted() < 30 and number == number.to_integral_value():
            return int(number)
    except InvalidOperation:
        pass
    raise ValueError


def _normalize(value: str | list | dict, type_hint: Any) -> object:
    """Return a value in the form that jsonargparse takes, or raise ValueError or YAMLError.

    A list can also be one item, or `a,b`, `a b` and `[a, b]` on the command line.
    """
    container = _container_type(type_hint)
    is_mapping = get_origin(container) is dict
    is_list = container is not None and not is_mapping
    is_text_list = is_list and get_args(container)[0] is str
    if isinstance(value, str):
        if (is_mapping and value[:1] == "{") or (is_text_list and value[:1] + value[-1:] == "[]"):
            value = _to_texts(yaml.compose(value, Loader=yaml.BaseLoader))
        elif value.lower() in NULLS:
            if NoneType in get_args(type_hint):
                return None
            if is_list:
                return []
    if is_list:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError
        if not is_text_list:
            return [item for text in texts for item in re.split(r"[\s,()\[\]'\"]+", text) if item]
        "".join(texts).encode()  # raises UnicodeEncodeError, a ValueError, for an argument whose bytes are not UTF-8
        return texts
    if type_hint is bool and value in ("0", "1"):
        return value == "1"
    if isinstance(value, dict) and not all(isinstance(text, str) for text in value.values()):
        raise ValueError
    if isinstance(value, str) and (not value.strip() or "\0" in value):
        raise ValueError
    return value


def _container_type(type_hint: Any) -> Any:
    """Return `list[...]`, `tuple[...]` or `dict[...]`, perhaps without its `| None`; None for another type."""
    options = (type_hint, *get_args(type_hint))
    return next((option for option in options if get_origin(option) in (list, tuple, dict)), None)


def describe_type(type_hint: Any) -> str:
    """Say in words which values a setting takes."""
    origin, options = get_origin(type_hint), get_args(type_hint)
    if origin in (Union, UnionType):
        return " or ".join(map(describe_type, options))
    if origin is Literal:
        return ", ".join(options[:-1]) + " or " * (len(options) > 1) + options[-1]
    if origin is tuple:
        return f"{len(options)} values such as 0.9 0.95, each {describe_type(options[0])}"
    if origin is list:
        return f"a list of {describe_type(options[0])}"
    if origin is dict:
        example = "{a: x, b: y}" if options[1] is str else "{a: 0.7, b: 0.3}"
        return f"a mapping such as {example}, each value {describe_type(options[1])}"
    return _WORDS.get(type_hint) or type_hint.__name__


def format_value(value: object) -> str:
    """Format a value for a message: short, and in quotes where it could be mistaken for something else."""
    if value is None:
        return "null"
    text = value if isinstance(value, str) and re.fullmatch(r"[\w.,+/-]+", value) else repr(value)
    text = text.lower() if isinstance(value, bool) else text
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---------------------------------------------------------------------------------------------------------------
# The command line.


def split_command_line(argv: Sequence[str], settings: dict[str, Setting]) -> tuple[list[str], dict[str, RawValue]]:
    """Return the recipes that --config names, and the values of the settings by name.

    If a setting is repeated, the last value counts.

    Raises:
        TrainingError: an unknown setting, a setting without a value, an argument that belongs to no setting.
    """
    options: list[tuple[str, list[str]]] = []
    for argument in argv:
        if re.match(r"--[^-]", argument):
            name, equals, text = argument[2:].partition("=")
            options.append((_current_name(name), [text] if equals else []))
        elif options and _takes_value(*options[-1], argument, settings):
            options[-1][1].append(argument)
        else:
            raise TrainingError(_describe_unexpected(argument, settings, after=options[-1] if options else None))
    recipes, raw_values = [], {}
    for name, texts in options:
        if name != "config" and name not in settings:
            raise TrainingError(describe_unknown(name, settings))
        if not texts and name == "config":
            raise TrainingError("--config needs a value, a recipe")
        if name == "config":
            recipes += texts
            continue
        type_hint, description = settings[name]
        if not texts and type_hint is not bool:
            raise TrainingError(f"--{name} needs a value, {describe_type(type_hint)}: {description}")
        texts = texts or ["true"]
        is_one_list = texts[0][:1] + texts[-1][-1:] in ("[]", "{}")  # [a, b] without quotes
        raw_values[name] = RawValue(" ".join(texts) if is_one_list or len(texts) == 1 else texts)
    return recipes, raw_values


def _takes_value(name: str, texts: list[str], argument: str, settings: dict[str, Setting]) -> bool:
    """Return True if an argument is a value of the setting before it, which has the values `texts` so far."""
    type_hint = settings[name].type_hint if name in settings else None
    if type_hint is bool and _looks_like_recipe(argument):
        return False
    return not texts or _container_type(type_hint) is not None or (type_hint is None and name != "config")


def _looks_like_recipe(argument: str) -> bool:
    return Path(argument).suffix in (".yaml", ".yml", ".json")


def _describe_unexpected(argument: str, settings: dict[str, Setting], after: tuple[str, list[str]] | None) -> str:
    name, equals, text = argument.lstrip("-\N{EN DASH}\N{EM DASH}").partition("=")
    if not argument.strip():
        return "an argument is blank: is a variable not set, or is a space after the backslash at the end of a line?"
    if name in settings or name == "config":
        return f"{argument!r}: a setting starts with two dashes: --{name} {text or 'VALUE'}"
    if _looks_like_recipe(argument):
        return f"{argument!r}: a recipe needs --config in front of it: --config {argument}"
    if equals and name:
        return describe_unknown(name, settings)
    where = f" after --{after[0]} {' '.join(map(format_value, after[1]))}".rstrip() if after else ""
    return f"unexpected argument {format_value(argument)}{where}; write settings as --NAME VALUE ({HELP})"


# ---------------------------------------------------------------------------------------------------------------
# Recipes.


def read_recipe(path: str, settings: dict[str, Setting]) -> dict[str, RawValue]:
    """Return the values of a YAML file (JSON is YAML too) by dotted name.

    Raises:
        TrainingError: the file does not exist, is not a recipe, or has an unknown setting.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_RECIPE_BYTES + 1)
        if len(content) > _MAX_RECIPE_BYTES:
            raise _not_a_recipe(path, f"larger than {_MAX_RECIPE_BYTES:,} bytes")
        root = yaml.compose(content.decode("utf-8-sig"), Loader=yaml.BaseLoader)
        if not isinstance(root, yaml.MappingNode):
            raise _not_a_recipe(path, "it has no settings" if root is None else "its settings have no names")
        raw_values: dict[str, RawValue] = {}
        for name, node, location in _iterate_settings(root, settings, path):
            if name in raw_values:
                raise TrainingError(f"{location}{name} appears twice")
            raw_values[name] = RawValue(_to_texts(node), location)
    except OSError as error:
        reason = f"{error.strerror or error}; {_suggest_recipes(path)}"
        raise TrainingError(f"--config {format_value(path)}: {reason}") from None
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        tabs = "; indent YAML with spaces, not tabs" if "'\\t'" in problem else ""
        line = f":{mark.line + 1}" if mark else ""
        raise TrainingError(f"{format_value(path)}{line}: not YAML ({problem}){tabs}") from None
    except UnicodeDecodeError:
        raise _not_a_recipe(path, "not text in UTF-8") from None
    except yaml.YAMLError:  # control characters
        raise _not_a_recipe(path, "not text") from None
    except RecursionError:
        raise _not_a_recipe(path, "brackets nested too deeply") from None
    return raw_values


def _not_a_recipe(path: str, reason: str) -> TrainingError:
    return TrainingError(f"--config {format_value(path)}: not a recipe ({reason}); see recipes/sample.yaml for one")


def _iterate_settings(
    node: yaml.MappingNode, settings: dict[str, Setting], path: str, prefix: str = ""
) -> Iterator[tuple[str, yaml.Node, str]]:
    """Yield the dotted name, the value and "FILE:LINE: " of each setting."""
    for key, value in node.value:
        key_text = key.value if isinstance(key, yaml.ScalarNode) else format_value(_to_texts(key))
        name = _current_name(prefix + key_text)
        location = f"{format_value(path)}:{key.start_mark.line + 1}: "
        members = _group_members(name, settings)
        if members and isinstance(value, yaml.MappingNode):
            yield from _iterate_settings(value, settings, path, f"{name}.")
        elif members and _to_texts(value) == "null":
            continue  # all of its lines are commented out
        elif members:
            got = format_value(_to_texts(value))
            raise TrainingError(f"{location}{name} is a group of settings ({members}), got {got}")
        elif name not in settings:
            raise TrainingError(f"{location}{describe_unknown(name, settings)}")
        else:
            yield name, value, location


def _to_texts(node: yaml.Node) -> str | list | dict:
    if isinstance(node, yaml.ScalarNode):
        return node.value or ("null" if node.style is None else "")
    if isinstance(node, yaml.SequenceNode):
        return [_to_texts(item) for item in node.value]
    values = {}
    for key, value in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else format_value(_to_texts(key))
        if name in values:
            raise yaml.MarkedYAMLError(problem=f"{name} appears twice", problem_mark=key.start_mark)
        values[name] = _to_texts(value)
    return values


def _suggest_recipes(path: str) -> str:
    recipes = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
    near = difflib.get_close_matches(Path(path).stem, [recipe.stem for recipe in recipes], n=3, cutoff=0.6)
    names = ", ".join(f"recipes/{recipe.name}" for recipe in recipes if not near or recipe.stem in near)
    return f"did you mean {names}?" if near else f"the recipes are {names}"


# ---------------------------------------------------------------------------------------------------------------
# Names.


@functools.cache
def _current_name(name: str) -> str:
    """Return the name that a setting has now, for a short or an earlier one. Print it once for an earlier one."""
    if name in RENAMED and is_main_process():
        print(f"--{name} is now called --{RENAMED[name]}", file=sys.stderr)
    return RENAMED.get(name) or SHORT.get(name, name)


@functools.cache
def other_names() -> dict[str, str]:
    """Return the hints by other projects' names of the settings."""
    names_by_hint = yaml.safe_load(Path(__file__).with_name("setting_names.yaml").read_text(encoding="utf-8"))
    return {name: hint for hint, names in names_by_hint.items() for name in names.split()}


def describe_unknown(name: str, settings: dict[str, Setting]) -> str:
    """Say that a setting does not exist, and which one was probably meant."""
    if members := _group_members(name, settings):
        return f"{name} is a group of settings: give one of {members}"
    plain = re.sub(r"[^a-z0-9.]+", "_", name.lower())
    last = plain.rpartition(".")[2]
    by_last = {setting.rpartition(".")[2]: setting for setting in settings}
    switch = by_last.get(re.sub(r"^(no|disable)_", "", last))
    if switch and last not in by_last and settings[switch].type_hint is bool:
        return f"unknown setting {format_value(name)!r}; write --{switch} false"
    hints = other_names()
    if last not in by_last and last not in hints:
        near = difflib.get_close_matches(last, [*by_last, *hints, "config"], n=1, cutoff=0.8)
        last = near[0] if near else plain.replace(".", "_")  # `eval.every` is eval_every
    hint = by_last.get(last) or ("--config" if last == "config" else hints.get(last))
    if hint is None:
        return f"unknown setting {format_value(name)!r}; {HELP}"
    is_name = hint in settings or hint == "--config"
    return f"unknown setting {format_value(name)!r}; " + (f"did you mean {hint!r}?" if is_name else f"here: {hint}")


def _group_members(group: str, settings: dict[str, Setting]) -> str:
    return ", ".join(name for name in settings if name.startswith(f"{group}."))
