"""
Read a run's settings with jsonargparse: defaults of a dataclass < recipe (YAML) < command line.

jsonargparse has the types, the checks, the descriptions and the dataclasses; it takes the values as this file finds them.
A recipe's scalars are text until the setting's type is known, as on the command line. So 1e-3 is a number, and
`mixed_precision: no` is "no" (YAML itself would say text, and false).
"""

import argparse
import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from jsonargparse.typing import register_type

from training import TrainingError
from training.setting_names import HINTS

HELP = "`python train.py --help` lists the settings"
_MAX_RECIPE_BYTES = 1_000_000  # more is not a recipe; weights, perhaps
_NULLS = ("null", "none", "~")
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text (not empty)", NoneType: "null"}


class Given(NamedTuple):
    """A value as the user wrote it."""

    value: str | list | dict
    place: str = ""
    """FILE:LINE of a recipe"""


class Setting(NamedTuple):
    """A field that is not itself a group of settings."""

    kind: Any
    """type for jsonargparse"""
    description: str


class SettingsParser(ArgumentParser):
    """A parser for the fields of a dataclass and of the dataclasses in it."""

    def __init__(self, config_class: type) -> None:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        super().__init__(
            prog="train.py",
            usage="train.py [--config RECIPE] [--SETTING VALUE ...]",
            description="Train a GPT-2. The command line overrides the recipe, and the recipe the defaults.",
            formatter_class=argparse.HelpFormatter,
            add_help=False,
            exit_on_error=False,
            parser_mode="json",  # a value is not YAML: "# c" is text and not null
        )
        self.add_argument("--config", metavar="RECIPE", help="a file of settings (default: recipes/sample.yaml)")
        self.add_class_arguments(config_class)
        self.config_class = config_class
        self.settings = {}
        for action in self._actions:
            if hasattr(action, "_typehint"):
                action._typehint = _constrained(action._typehint)
                self.settings[action.dest] = Setting(action._typehint, action.help)
                about = f"{action.help} [{describe(action._typehint)}; default: {shown(action.default)}]"
                action.option_strings, action.metavar, action.help = [f"--{action.dest}"], "", about.replace("%", "%%")
            elif action.dest != "config":  # --optim and the other groups
                action.help = argparse.SUPPRESS

    def build(self, given: dict[str, Given]) -> object:
        """
        Make the dataclass.

        Raises:
            TrainingError: a value is not of its setting's type.
        """
        values = {}
        try:
            for name, item in given.items():
                values[name] = _prepare(item.value, self.settings[name].kind)
            config = self.instantiate(self.parse_object(values))
            return self.config_class(**{f.name: config[f.name] for f in dataclasses.fields(self.config_class)})
        except ArgumentError as error:
            name = re.search(r'Parser key "([^"]+)"', str(error))[1]
        except (ValueError, RecursionError):
            pass
        at = given[name].place and f"{given[name].place}: "
        raise TrainingError(f"{at}{name} must be {describe(self.settings[name].kind)}, got {shown(given[name].value)}")


# ---------------------------------------------------------------------------------------------------------------
# Types and values.


def _constrained(kind: Any) -> Any:
    """Make Annotated[int, "[1, 10]"] a type of jsonargparse."""
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return Union[tuple(map(_constrained, options))]
    if origin is tuple:
        return tuple[tuple(map(_constrained, options))]
    if origin is not Annotated:
        return kind
    base, interval = options
    low, high = (float(end) for end in interval[1:-1].split(","))

    def convert(given: object) -> int | float:
        value = _integer(given) if base is int else float(given.lower().replace(".inf", "inf"))  # YAML has a dot there
        if not low <= value <= high or (value == low and interval[0] == "(") or (value == high and interval[-1] == ")"):
            raise ValueError
        return value

    constrained = type(f"{_WORDS[base]} in {interval}", (base,), {})
    register_type(constrained, base, convert, type_check=lambda value, _: type(value) is base)
    return constrained


def _integer(text: str) -> int:
    """Also of 1e3, 1_000 and 5.0, which are exact."""
    try:
        number = Decimal(text)
        if number.is_finite() and number.adjusted() < 30 and number == number.to_integral_value():
            return int(number)
    except InvalidOperation:
        pass
    raise ValueError


def _prepare(given: str | list | dict, kind: Any) -> object:
    """Return a value in the form that jsonargparse takes, or raise ValueError."""
    is_list = get_origin(kind) in (list, tuple)
    if isinstance(given, str) and given.lower() in _NULLS and (is_list or NoneType in get_args(kind)):
        return [] if is_list else None
    if is_list:
        return _split(given, is_text=get_args(kind)[0] is str)
    if kind is bool and given in ("0", "1"):
        return given == "1"
    if isinstance(given, str) and (not given.strip() or "\0" in given):
        raise ValueError
    return given


def _split(given: str | list, is_text: bool) -> list:
    """Return the items of a list, which may also be one item, or `a,b`, `a b` and `[a, b]` on the command line."""
    if isinstance(given, str):
        if is_text and given.startswith("[") and given.endswith("]"):
            try:
                return yaml.load(given, Loader=yaml.BaseLoader)
            except yaml.YAMLError:
                raise ValueError from None
        given = [given]
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise ValueError
    if not is_text:
        return [item for text in given for item in re.split(r"[\s,()\[\]'\"]+", text) if item]
    "".join(given).encode()  # an argument whose bytes are not UTF-8 raises
    return given


def describe(kind: Any) -> str:
    """Say in words which values a setting takes."""
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(describe(option) for option in options)
    if origin is Literal:
        return ", ".join(options[:-1]) + " or " * (len(options) > 1) + options[-1]
    if origin is tuple:
        return f"{len(options)} values such as 0.9 0.95, each {describe(options[0])}"
    if origin is list:
        return f"a list, of {describe(options[0])}"
    return _WORDS.get(kind) or kind.__name__


def shown(value: object) -> str:
    """Return a value as a message shows it: short, and in quotes where it would be mistaken for something else."""
    if value is None:
        return "null"
    text = value if isinstance(value, str) and re.fullmatch(r"[\w.,+/-]+", value) else repr(value)
    text = text.lower() if isinstance(value, bool) else text
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---------------------------------------------------------------------------------------------------------------
# The command line.


def split_command_line(argv: Sequence[str], settings: dict[str, Setting]) -> tuple[list[str], dict[str, Given]]:
    """
    Return the recipes that --config names, and the values of the settings by name; the last one of a setting counts.

    Raises:
        TrainingError: an unknown setting, a value of another kind, an argument that belongs to no setting.
    """
    options = []  # [name, values]
    for argument in argv:
        if re.match(r"--[^-]", argument):
            name, equals, text = argument[2:].partition("=")
            options.append((name, [text] if equals else []))
        elif options and _takes(*options[-1], argument, settings):
            options[-1][1].append(argument)
        else:
            raise TrainingError(_unexpected(argument, settings, after=options[-1] if options else None))
    recipes, values = [], {}
    for name, texts in options:
        kind = settings[name].kind if name in settings else None
        if name != "config" and name not in settings:
            raise TrainingError(unknown(name, settings))
        if not texts and kind is bool:
            texts = ["true"]
        elif not texts:
            what = "a recipe" if kind is None else f"{describe(kind)}: {settings[name].description}"
            raise TrainingError(f"--{name} needs a value, {what}")
        if name == "config":
            recipes += texts
            continue
        is_cut = texts[0].startswith("[") and texts[-1].endswith("]")  # [a, b] without quotes
        values[name] = Given(" ".join(texts) if is_cut or len(texts) == 1 else texts)
    return recipes, values


def _takes(name: str, texts: list[str], argument: str, settings: dict[str, Setting]) -> bool:
    """Return True if an argument is a value of the setting before it."""
    kind = settings[name].kind if name in settings else None
    if kind is bool and _is_recipe(argument):
        return False
    return not texts or get_origin(kind) in (list, tuple) or (kind is None and name != "config")


def _is_recipe(argument: str) -> bool:
    return Path(argument).suffix in (".yaml", ".yml", ".json")


def _unexpected(argument: str, settings: dict[str, Setting], after: tuple[str, list[str]] | None) -> str:
    name, equals, text = argument.lstrip("-\N{EN DASH}\N{EM DASH}").partition("=")
    if not argument.strip():
        return "an argument is blank: a variable that is not set, or a space after the backslash at a line's end?"
    if name in settings or name == "config":
        return f"{argument!r}: settings have two dashes in front of them: --{name} {text or 'VALUE'}"
    if _is_recipe(argument):
        return f"{argument!r}: a recipe needs --config in front of it: --config {argument}"
    if equals and name:
        return unknown(name, settings)
    where = f" after --{after[0]} {' '.join(map(shown, after[1]))}".rstrip() if after else ""
    return f"unexpected argument {shown(argument)}{where}; settings are given as --NAME VALUE ({HELP})"


# ---------------------------------------------------------------------------------------------------------------
# Recipes.


def read_recipe(path: str, settings: dict[str, Setting]) -> dict[str, Given]:
    """
    Return the values of a YAML file (JSON is YAML too) by dotted name.

    Raises:
        TrainingError: there is no such file, it is not a recipe, a setting is unknown or of another kind.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_RECIPE_BYTES + 1)
        if len(content) > _MAX_RECIPE_BYTES:
            raise _not_a_recipe(path, f"larger than {_MAX_RECIPE_BYTES:,} bytes")
        root = yaml.compose(content.decode("utf-8-sig"), Loader=yaml.BaseLoader)
        if not isinstance(root, yaml.MappingNode):
            raise _not_a_recipe(path, "it has no settings in it" if root is None else "its settings have no names")
        values = {}
        for name, node, where in _leaves(root, settings, path):
            if name in values:
                raise TrainingError(f"{where}: {name} is there twice")
            values[name] = Given(_plain(node), where)
    except FileNotFoundError:
        raise TrainingError(f"--config {shown(path)}: there is no such file; {_recipes_near(path)}") from None
    except OSError as error:
        raise TrainingError(f"--config {shown(path)}: {error.strerror or error}; {_recipes_near(path)}") from None
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        line = (error.problem_mark or error.context_mark).line + 1
        tabs = "; YAML is indented with spaces, not tabs" if "'\\t'" in problem else ""
        raise TrainingError(f"{shown(path)}:{line}: not YAML ({problem}){tabs}") from None
    except UnicodeDecodeError:
        raise _not_a_recipe(path, "not text in UTF-8") from None
    except yaml.YAMLError:  # control characters
        raise _not_a_recipe(path, "not text") from None
    except RecursionError:
        raise _not_a_recipe(path, "brackets nested too deeply") from None
    return values


def _not_a_recipe(path: str, reason: str) -> TrainingError:
    return TrainingError(f"--config {shown(path)}: not a recipe ({reason}); see recipes/sample.yaml for one")


def _leaves(node: yaml.Node, settings: dict[str, Setting], path: str, prefix: str = "") -> Iterator[tuple]:
    """Yield (dotted name, node, where it is) of each setting."""
    for key, value in node.value:
        name = prefix + (key.value if isinstance(key, yaml.ScalarNode) else shown(_plain(key)))
        where = f"{shown(path)}:{key.start_mark.line + 1}"
        members = _members(name, settings)
        if members and isinstance(value, yaml.MappingNode):
            yield from _leaves(value, settings, path, f"{name}.")
        elif members and _plain(value) == "null":
            continue  # all of its lines are commented out
        elif members:
            raise TrainingError(f"{where}: {name} is a group of settings ({members}), got {shown(_plain(value))}")
        elif name not in settings:
            raise TrainingError(f"{where}: {unknown(name, settings)}")
        else:
            yield name, value, where


def _plain(node: yaml.Node) -> str | list | dict:
    if isinstance(node, yaml.ScalarNode):
        return node.value or ("null" if node.style is None else "")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    return {shown(_plain(key)): _plain(value) for key, value in node.value}


def _recipes_near(path: str) -> str:
    recipes = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
    near = difflib.get_close_matches(Path(path).stem, [recipe.stem for recipe in recipes], n=3, cutoff=0.6)
    names = [f"recipes/{recipe.name}" for recipe in recipes if not near or recipe.stem in near]
    return f"{'did you mean' if near else 'there are'} {', '.join(names)}{'?' if near else ''}"


# ---------------------------------------------------------------------------------------------------------------
# Names.


def unknown(name: str, settings: dict[str, Setting]) -> str:
    """Say that there is no such setting, and which one was probably meant."""
    if members := _members(name, settings):
        return f"{name} is a group of settings: give one of {members}"
    plain = re.sub(r"[^a-z0-9.]+", "_", name.lower())
    last = plain.rpartition(".")[2]
    by_last = {setting.rpartition(".")[2]: setting for setting in settings}
    switch = by_last.get(re.sub(r"^(no|disable)_", "", last))
    if switch and last not in by_last and settings[switch].kind is bool:
        return f"unknown setting {shown(name)!r}; write --{switch} false"
    if last not in by_last and last not in HINTS:
        near = difflib.get_close_matches(last, [*by_last, *HINTS, "config"], n=1, cutoff=0.8)
        last = near[0] if near else plain.replace(".", "_")  # `eval.every` is eval_every
    hint = by_last.get(last) or ("--config" if last == "config" else HINTS.get(last))
    if hint is None:
        return f"unknown setting {shown(name)!r}; {HELP}"
    is_name = hint in settings or hint == "--config"
    return f"unknown setting {shown(name)!r}; " + (f"did you mean {hint!r}?" if is_name else f"here: {hint}")


def _members(group: str, settings: dict[str, Setting]) -> str:
    return ", ".join(name for name in settings if name.startswith(f"{group}."))
