"""Writes the reference: every key, metric, edition, exit code and command as a Markdown page."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from harness.config.editions import EDITIONS, Edition
from harness.config.schema import Config
from harness.config.sections import Section
from harness.config.words import type_of
from harness.metrics import METRICS

COMMAND = "harness reference --output docs/reference.md"
HEAD = f"""# Reference

`{COMMAND}` writes this page from the code. Do not edit it by hand.

A key of a section is written with dots: `train.batch_size` is `batch_size` under `train:` in the file. On the
command line it is `--set train.batch_size=32`. [Experiments](experiments.md) says how files are put together.
"""
EXIT_CODES = {
    0: "done",
    1: "a failed run; nothing to compare; other scores by `score --verify`; a problem found by `doctor`",
    2: "a mistake in the command, the config or the data",
    3: "an invalid submission",
    130: "interrupted by Ctrl-C, SIGTERM or SIGHUP; the same command continues",
}


def page(commands: Mapping[str, str]) -> str:
    """The whole page; `commands` maps the name of each command to what it does."""
    parts = [HEAD, "## Keys", *_sections(Config, ""), "## Metrics", _metrics(), "## Editions", _editions()]
    parts += ["## Exit codes", _table(["code", "meaning"], [[str(c), m] for c, m in EXIT_CODES.items()])]
    parts += ["## Commands", "`--help` after a command shows its options."]
    parts += [_table(["command", "what it does"], [[f"`{name}`", what] for name, what in commands.items()])]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _sections(section: type[Section], path: str, which: str = "") -> Iterator[str]:
    """Heading, docstring and table of a section, then the same for the sections in it.

    `which` tells the sections apart that one key allows.
    """
    hints = get_type_hints(section, include_extras=True)
    yield f"### `{path.rstrip('.')}`{which}" if path else "### The run"
    yield _line(section.__doc__)
    rows = [
        [f"`{path}{name}`", type_of(hints[name]), _default(field), _line(field.description)]
        for name, field in section.model_fields.items()
    ]
    yield _table(["key", "type", "default", "meaning"], rows)
    for name in section.model_fields:
        many = "[]" if get_origin(hints[name]) in (list, tuple) else ""
        inside = _inner(hints[name])
        for inner in inside:
            required = next((key for key, field in inner.model_fields.items() if field.is_required()), None)
            which = f" with `{required}`" if len(inside) > 1 else ""
            yield from _sections(inner, f"{path}{name}{many}.", which)


def _inner(hint: Any) -> list[type[Section]]:
    """The sections that a type contains."""
    if isinstance(hint, type) and issubclass(hint, Section):
        return [hint]
    return [section for part in get_args(hint) for section in _inner(part)]


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, Section):
        return ""
    return f"`{json.dumps(field.default, default=_plain)}`"


def _plain(value: Any) -> Any:
    return value.model_dump(exclude_defaults=True, mode="json") if isinstance(value, Section) else str(value)


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def _table(head: list[str], rows: list[list[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *escaped])


def _metrics() -> str:
    """Each metric with the editions that compute it by default."""
    rows = [
        [f"`{name}`", ", ".join(str(year) for year, edition in EDITIONS.items() if name in edition.metrics)]
        for name in METRICS
    ]
    return _table(["metric", "computed by default in"], rows)


def _editions() -> str:
    """What differs between years."""
    rows = [[label, *map(show, EDITIONS.values())] for label, show in _ROWS.items()]
    return _table(["", *map(str, EDITIONS)], rows)


def _means(edition: Edition) -> str:
    return "; ".join(f"{name} = mean of {', '.join(parts)}" for name, parts in edition.aggregates.items())


def _counts(images: Mapping[str, int]) -> str:
    return " / ".join(f"{count:,}" for count in images.values())


_FORMS = {
    "pipe": "`ID|caption`",
    "csv-zip": "`submission.csv` (`ID,Caption`) in a zip",
    None: "not established",
}
_ROWS = {
    "ranks": lambda edition: edition.ranking,
    "means": _means,
    "caption file": lambda edition: _FORMS[edition.caption_format],
    "most concepts of an image": lambda edition: str(edition.max_cuis or "not established"),
    "images (train, valid, test)": lambda edition: _counts(edition.images) or "not established",
    "subtasks with other images": lambda edition: "; ".join(
        f"{name} ({_counts(images)})" for name, images in edition.subtasks.items()
    ),
    "BLEURT": lambda edition: f"`{edition.weights['bleurt']}`",
    "BERTScore weighs by idf": lambda edition: "yes" if edition.bertscore_idf else "no",
    "tokens of a caption for BERTScore": lambda edition: str(edition.bertscore_tokens or "all"),
    "blank captions": lambda edition: edition.blanks.rule,
}
