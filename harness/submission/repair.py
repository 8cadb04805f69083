"""Repairs a damaged submission file without adding a word."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from harness.data.forms import (
    INVALID,
    NOT_UTF_8,
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
from harness.errors import Flaw, Problem, UserError, grouped
from harness.submission.checks import check, whole


def fix(path: Path | str, out: Path, ids: Sequence[str], edition: int, task: Task = "caption") -> list[str]:
    """Write a repaired copy of a submission file to `out`; returns what was done, in sentences.

    It repairs encoding marks, header, order, quoting, white space, blank lines, pipes in captions, repeated
    CUIs, repeated rows, image endings of ids, and line ends. It adds no word: a row that can't be repaired
    moves to the end unchanged, and a missing row stays missing. `check(out, ...)` then lists what is left to
    do. The list is empty if `out` has the same bytes. Raises `UserError` (exit code 3) if the file can't be
    read.
    """
    form, path = rules(edition, task), Path(path)
    if form.separator == "|" and Path(out).suffix == ".zip":
        raise UserError([Problem("got the name of a zip; this edition takes a text file", out, key="--fix")])
    data, _ = content(path, zipped=form.separator == ",")
    problems = check(path, ids, edition, task) if data is None else [whole(data, form, path)]
    if problems := [problem for problem in problems if problem]:
        raise UserError(problems, exit_code=INVALID)
    text, marks = decoded(data)
    done = [Flaw(mark.line, f"{mark.what}: rewritten as UTF-8") for mark in marks if mark.what != NOT_UTF_8]
    known = set(ids)
    rows = [row for row in rows_of(text, form, known) if row.raw.strip()]
    repaired: dict[str, str] = {}
    left: list[Row] = []
    last = 0
    for row in rows:
        key, value, did = _repaired_row(row, form, known)
        if is_header(row) and key not in known:
            done += [Flaw(row.line, "left out, a header")] if row.line > 1 or not form.header else []
        elif key in repaired and repaired[key] == value:
            done.append(Flaw(row.line, "left out, the same row as before"))
        elif key not in known or key in repaired:
            left.append(row)
        else:
            repaired[key], last = value, row.line
            if row.raw != _written(key, value, form):
                done += [Flaw(row.line, what) for what in did or ["quoted as this format requires"]]
    done += [Flaw(row.line, "can't be repaired, moved to the end") for row in left if row.line < last]
    lines = [
        *lines_of({key: repaired[key] for key in ids if key in repaired}, form),
        *(row.raw for row in left),
    ]
    store_text(Path(out), "".join(f"{line}\n" for line in lines), form)
    return [*map(_sentence, grouped("", done)), *_done_to_file(text, repaired, ids, form)]


def _sentence(done: Problem) -> str:
    return f"line {done.line}: {done.what}"


def _written(key: str, value: str, form: Rules) -> str:
    return list(lines_of({key: value}, form))[-1]


def _repaired_row(row: Row, form: Rules, known: set[str]) -> tuple[str, str, list[str]]:
    """The id ("" if the row can't be repaired), the value, and the repairs that were made."""
    key, separator, value = row.raw.partition(form.separator)
    if not row.broken and len(row.fields) == 2:
        key, value = row.fields
    elif form.separator == ",":
        value = _without_quoting(value.strip())
    clean = key if key in known else bare(key.strip(' "\ufeff'))
    did = [] if clean == key else ["wrote the id as it is in the ids file"]
    if form.task == "concept":
        new = ";".join(dict.fromkeys(cui.strip() for cui in value.split(";") if cui.strip()))
        if re.search(r'[|,"\s]', new):
            return "", "", []
    else:
        new = " ".join(value.split())
    if form.separator == "|" and "|" in new:
        new = new.replace("|", "/")
        did.append("replaced pipes")
    elif new != value:
        did.append("collapsed white space" if form.task == "caption" else "rewrote the CUIs, each once")
    if not separator:
        did.append("had no second column, so it is empty now")
    elif form.separator == "," and (row.broken or len(row.fields) != 2):
        did.append("split into two columns")
    return clean, new, did


def _without_quoting(value: str) -> str:
    inner = value[1:-1]
    if value.startswith('"') and value.endswith('"') and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return value.removeprefix('"') if value.count('"') % 2 else value


def _done_to_file(text: str, repaired: Mapping[str, str], ids: Sequence[str], form: Rules) -> Iterator[str]:
    lines = list(io.StringIO(text, newline=""))
    if form.header and (not lines or lines[0].rstrip("\r\n") != form.header):
        yield f"wrote the header {form.header}"
    if blank := sum(not line.strip() for line in lines):
        yield f"deleted {blank} blank lines"
    if list(repaired) != [key for key in ids if key in repaired]:
        yield "put the rows into the order of the ids file"
    if "\r" in text:
        yield "ended the lines with a line feed alone"
    if lines and lines[-1][-1] not in "\r\n":
        yield "added the final newline"
