"""The code blocks and commands of the Markdown documents, as a reader would copy them."""

import importlib.util
import re
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

_BLOCK = re.compile(
    r"(?:^ *<!-- (?P<note>[^\n]*?) -->\n)?^ *```(?P<language>\w*)\n(?P<code>.*?)^ *```$", flags=re.DOTALL | re.MULTILINE
)
_INDENTED = re.compile(r"^ {4}(.*\S.*)$", flags=re.MULTILINE)
_INLINE = re.compile(r"`([^`]+)`")
_SEPARATORS = {"&&", "||", "|", ";", "&"}


class Block(NamedTuple):
    """A fenced block."""

    language: str
    code: str
    line: int
    """of its first line of code in the document, from 1"""
    note: str
    """the HTML comment on the line above the fence, or "" """


def blocks_of(text: str) -> list[Block]:
    """Return the fenced blocks of a Markdown text."""
    return [
        Block(
            match["language"],
            textwrap.dedent(match["code"]),
            text.count("\n", 0, match.start("code")) + 1,
            match["note"] or "",
        )
        for match in _BLOCK.finditer(text)
    ]


def python_program(path: Path, text: str) -> str:
    """
    Put the Python blocks of a document into one program, in which each one builds on those before it.

    Tracebacks name the document and its line. A comment above the fence, which readers of the page do not see, can say
    `not run: REASON` or `needs: PACKAGE, PACKAGE` (the block is left out where one of them is not installed).

    Args:
        path, text: of the document.
    """
    programs = []
    for block in blocks_of(text):
        kind, _, rest = block.note.partition(": ")
        missing = kind == "needs" and not all(importlib.util.find_spec(name) for name in rest.split(", "))
        if block.language == "python" and kind != "not run" and not missing:
            programs.append("\n" * (block.line - 1) + block.code)
    return f"for code in {programs!r}: exec(compile(code, {str(path)!r}, 'exec'), globals())"


def commands_of(text: str) -> list[list[str]]:
    """
    Return the commands of a Markdown text as lists of words: those of shell blocks and of indented lines. Pipes and
    `&&` separate commands; comments are left out.
    """
    shell = "".join(block.code for block in blocks_of(text) if block.language in ("bash", "sh", "shell"))
    indented = "\n".join(_INDENTED.findall(_BLOCK.sub("", text)))
    commands = []
    for line in f"{shell}\n{indented}".replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        commands.append([])
        for word in lexer:
            if word in _SEPARATORS:
                commands.append([])
            else:
                commands[-1].append(word)
    return [command for command in commands if command]


def inline_options(text: str) -> set[str]:
    """Return the options, `--name`, that sentences of a Markdown text have as `code`."""
    sentences = _INDENTED.sub("", _BLOCK.sub("", text))
    words = [word for code in _INLINE.findall(sentences) for word in code.split()]
    return {word.split("=")[0] for word in words if re.match(r"--\w", word)}
