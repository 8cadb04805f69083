"""Every command and every option that a message names exists."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from harness.cli import app
from harness.output.program import _COMMANDS

ROOT = Path(__file__).parents[1]
SLOT = "X"
"""Stands for a value in an f-string."""


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """Each string of a file with its line; values of f-strings are `SLOT`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else SLOT for p in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.lineno, node.value


MESSAGES = [
    (f"{file.relative_to(ROOT)}:{line}", text)
    for file in sorted((ROOT / "harness").rglob("*.py"))
    for line, text in texts(file)
]
COMMANDS = [
    (place, found)
    for place, text in MESSAGES
    for found in re.findall(rf"(?<![\w.`/-])harness((?= (?:{_COMMANDS})\b)[^\n`]*)", text)
]
MAIN = typer.main.get_command(app)


def words_of(command: str) -> list[str]:
    """The words of a command in a sentence, up to the sentence's next part."""
    command = re.split(r"[;]|\. |, | \(| && | # |   ", command + " ")[0].strip().rstrip(".:)")
    try:
        return shlex.split(command)
    except ValueError:
        return command.replace("'", "").split()


def command_of(words: list[str]):
    """The command that the first words name, and the other words."""
    command, rest = MAIN, list(words)
    while hasattr(command, "commands"):
        assert rest, "no subcommand"
        if command.name == "study" and rest[0] not in command.commands:
            return command.commands["run"], rest
        assert rest[0] in command.commands, f"no command {rest[0]}"
        command = command.commands[rest.pop(0)]
    return command, rest


def test_there_are_many_hints_with_commands():
    assert len(COMMANDS) > 50


@pytest.mark.parametrize(("place", "found"), COMMANDS, ids=[place for place, _ in COMMANDS])
def test_a_command_in_a_message_can_be_given(place, found):
    words = words_of(found)
    if words == [SLOT]:  # a whole command from a record
        return
    command, rest = command_of(words)
    options = {name: option for option in command.params for name in (*option.opts, *option.secondary_opts)}
    given = [word.partition("=")[0] for word in rest if word.startswith("--")]
    assert [name for name in given if name not in {*options, "--help", "-h"}] == []
    values = 0
    for word, after in zip(rest, [*rest, None][1:], strict=True):
        takes = word.startswith("--") and "=" not in word and not getattr(options.get(word), "is_flag", True)
        values += bool(takes and after is not None)
    positional = len([word for word in rest if not word.startswith("--")]) - values
    needed = [param for param in command.params if param.param_type_name == "argument" and param.required]
    if "--help" not in rest:
        assert positional >= len(needed), f"{command.name} needs {[param.name for param in needed]}"


def every_option(command) -> Iterator[str]:
    for option in command.params:
        yield from (*option.opts, *option.secondary_opts)
    for inner in getattr(command, "commands", {}).values():
        yield from every_option(inner)


def test_every_option_that_a_message_names_exists():
    known = {*every_option(MAIN), "--help"}
    others = r"pip install|srun|torchrun|optuna|deepspeed|mlflow|git |hf download"
    named = [
        (place, option)
        for place, text in MESSAGES
        if " " in text.strip() and not re.search(others, text)
        for option in re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", text)
    ]
    assert len(named) > 50
    assert [(place, option) for place, option in named if option not in known] == []
