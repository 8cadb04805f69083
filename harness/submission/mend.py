"""What of a damaged submission file can be mended without a new word."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from harness.errors import Problem, UserError
from harness.submission.form import (
    INVALID,
    Row,
    Rules,
    Task,
    bare,
    content,
    decoded,
    is_header,
    lines_of,
    rows_of,
    rules,
    store_text,
)


def fix(path: Path | str, out: Path, ids: Sequence[str], edition: int, task: Task = "caption") -> list[str]:
    """Write to `out` the file with all mended that needs no new word; returns what was done, in sentences.

    Mended are encoding marks, header, order, quoting, white space, blank lines, pipes in captions, CUIs given
    twice, rows given twice alike, image endings of ids, and the final newline. A row that can't be mended is
    kept as it is at the end, and a missing one stays missing, so `check(out, ...)` says what is left to do.
    Raises `UserError` (exit code 3) when the file can't be read at all.
    """
    form = rules(edition, task)
    data, fault = content(Path(path), form)
    if data is None:
        raise UserError([Problem(fault, path)], exit_code=INVALID)
    text, marks = decoded(data)
    done = [
        f"line {line}: {what}: rewritten as UTF-8" for line, what, _ in marks if what.startswith("byte 0: ")
    ]
    known = set(ids)
    mended: dict[str, str] = {}
    left: list[str] = []
    for row in rows_of(text, form, known):
        key, value, did = _mended(row, form, known)
        if mended.get(key) == value:
            done.append(f"line {row.line}: left out, the same row as before")
        elif key in known and mended.setdefault(key, value) == value:
            done += [f"line {row.line}: {what}" for what in did]
        elif key or (row.raw.strip() and not is_header(row)):
            left.append(row.raw)
    done += _done_to_file(text, mended, ids, form)
    lines = [*lines_of({key: mended[key] for key in ids if key in mended}, form), *left]
    store_text(Path(out), "".join(f"{line}\n" for line in lines), form)
    return done


def _mended(row: Row, form: Rules, known: set[str]) -> tuple[str, str, list[str]]:
    """The id ("" for a row that is none), the value, and what was done to them."""
    if not row.raw.strip() or (is_header(row) and row.fields[0] not in known):
        return "", "", []
    key, _, value = row.raw.partition(form.separator)
    if not row.broken and len(row.fields) == 2:
        key, value = row.fields
    elif form.separator == ",":
        value = _without_quoting(value.strip())
    did = []
    clean = bare(key.strip(' "')) if key not in known else key
    if clean != key:
        did.append(f"wrote the id {key!r} as {clean}")
    if form.task == "concept":
        new = ";".join(dict.fromkeys(cui.strip() for cui in value.split(";") if cui.strip()))
    else:
        new = " ".join(value.split())
    if form.separator == "|" and "|" in new:
        new = new.replace("|", "/")
        did.append("replaced pipes")
    elif new != value:
        did.append("collapsed white space" if form.task == "caption" else "rewrote the CUIs, each once")
    if row.broken or len(row.fields) != 2:
        did.append("made two columns of it" if form.separator == "," else "kept what follows the second pipe")
    return clean, new, did


def _without_quoting(value: str) -> str:
    inner = value[1:-1]
    if value.startswith('"') and value.endswith('"') and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return value.removeprefix('"') if value.count('"') % 2 else value


def _done_to_file(text: str, mended: Mapping[str, str], ids: Sequence[str], form: Rules) -> Iterator[str]:
    lines = text.split("\n")
    if form.header and lines[0].removesuffix("\r") != form.header:
        yield f"wrote the header {form.header}"
    if not form.header and lines[0].lower().startswith("id|"):
        yield "took out the header: this format has none"
    if blank := sum(not line.strip() for line in lines[:-1]):
        yield f"deleted {blank} blank lines"
    if list(mended) != [key for key in ids if key in mended]:
        yield "put the rows into the order of the ids file"
    if form.separator == "," and form.task == "caption" and any(_unquoted(line) for line in lines[1:]):
        yield "quoted every caption"
    if lines[-1]:
        yield "added the final newline"


def _unquoted(line: str) -> bool:
    return bool(line.strip()) and not line.rstrip("\r").endswith('"')
