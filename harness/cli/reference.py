"""`harness reference`: the page docs/reference.md."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer


def reference(
    context: typer.Context,
    output: Annotated[Path | None, typer.Option(help="Write the page to this file.")] = None,
) -> None:
    """Print every key of an experiment file with its type, default and meaning, as Markdown.

    Example: harness reference --output docs/reference.md
    """
    from harness.config.reference import page

    text = page(dict(_commands(context.find_root().command)))
    if output is None:
        print(text, end="")
    else:
        output.write_text(text, encoding="utf-8")


def _commands(group: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Each command of a group and its subgroups, with the first paragraph of its help."""
    for name in group.list_commands(None):
        command = group.commands[name]
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path}{name} ")
        else:
            # not its help, which names commands as they work on this machine
            yield f"{path}{name}", (inspect.getdoc(command.callback) or "").split("\n\n")[0]
