"""Every reason for which the organisers would refuse or misread a submission file."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.errors import Problem
from harness.submission.form import (
    MEND,
    Fault,
    Row,
    Rules,
    Task,
    bare,
    content,
    decoded,
    is_header,
    rows_of,
    rules,
)

_BREAKS = re.compile("[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")


def check(path: Path | str, ids: Sequence[str], edition: int, task: Task = "caption") -> list[Problem]:
    """Every reason for which the organisers would refuse the file or misread it; empty when there is none.

    Each problem has its line (and byte offset, where encoding is concerned) and how to mend it. Where the
    organisers' checker lets pass what their evaluator refuses or misreads, this one does not. A zip, or the
    `submission.csv` for it, may be given. Raises `UserError` where the edition's format is not established.
    """
    form = rules(edition, task)
    data, fault = content(Path(path), form)
    if data is None:
        return [Problem(fault, path, hint="Make it: python -m harness submission make")]
    text, faults = decoded(data)
    rows = list(rows_of(text, form, set(ids)))
    body = rows
    if form.header:
        if not rows or rows[0].raw != form.header:
            faults.append((1, f"the first line is not exactly {form.header}", "Put that line first."))
        body = rows[1:] if rows and is_header(rows[0]) else rows
    for row in body:
        faults += [(row.line, *fault) for fault in _row_faults(row, form)]
    faults += _set_faults(body, ids, form)
    faults.sort(key=lambda fault: (fault[0] is None, fault[0] or 0))
    return [Problem(what, path, line, hint=hint) for line, what, hint in faults]


def _row_faults(row: Row, form: Rules) -> Iterator[tuple[str, str]]:
    """What is wrong with one row by itself, and how to mend it."""
    if not row.raw.strip():
        yield "a blank line", "Delete it."
        return
    if breaks := sorted({f"U+{ord(c):04X}" for c in _BREAKS.findall(row.raw)}):
        # The 2026 checker then compares its raw lines with the wrong rows, and refuses a correct neighbour.
        yield f"a line break ({', '.join(breaks)}) inside a row: lines and rows no longer agree", MEND
    if row.broken:
        yield row.broken, 'Quote the whole caption: ID,"caption", with "" for a quote inside.'
    elif len(row.fields) != 2:
        yield columns(row, form)
    if len(row.fields) > 1:
        for what in id_faults(row.fields[0], form):
            yield f"the id {row.fields[0]!r} {what}", "Write the id as it is in the ids file."
    if len(row.fields) == 2 and form.task == "concept":
        yield from concept_faults(row.fields[1], form)


def columns(row: Row, form: Rules) -> tuple[str, str]:
    n = len(row.fields)
    if n < 2:
        return f"has no {form.separator!r}", f"Write ID{form.separator}{form.task}."
    if form.separator == "|":
        return f"has {n - 1} pipes; the loader cuts the {form.task} at the second", MEND
    return f"has {n} columns, not 2", "Quote captions that hold a comma."


def id_faults(key: str, form: Rules) -> Iterator[str]:
    if key.split() != [key]:
        yield "is empty or holds white space"
    if any(c in key for c in '|,"'):
        yield "holds a separator or a quote"
    if form.separator == "|" and "ID" in key:
        yield 'holds "ID"; the loader takes such a row for a header and ignores it'


def concept_faults(value: str, form: Rules) -> Iterator[tuple[str, str]]:
    cuis = value.split(";")
    if not value:
        if form.strict:
            yield "has no CUI; the checker wants C and digits", "Predict at least one concept."
        return
    if wrong := [cui for cui in cuis if not re.fullmatch(r"C[0-9]+", cui)]:
        yield f"got {', '.join(map(repr, wrong[:5]))}; a CUI is C and digits", "Write C0040405;C0817096."
    if len(set(cuis)) < len(cuis):
        yield "a CUI is there twice", MEND
    if form.max_cuis and len(cuis) > form.max_cuis:
        # The 2026 checker lets this pass; the evaluator then refuses the whole file.
        yield f"has {len(cuis)} CUIs; the evaluator takes {form.max_cuis}", "Keep the most probable ones."


def _set_faults(rows: Sequence[Row], ids: Sequence[str], form: Rules) -> list[Fault]:
    """What is wrong with the ids as a whole: unknown, twice, missing, out of order."""
    faults: list[Fault] = []
    known, first = set(ids), {}
    for row in rows:
        key = row.fields[0] if row.fields else _first_field(row, form)
        if key in first:
            faults.append((row.line, f"{key} is there already, on line {first[key]}", "Keep one of the two."))
        elif key in known:
            first[key] = row.line
        elif row.raw.strip():
            hint = (
                "Leave out the ending." if bare(key) in known else "Leave it out, or give the right ids file."
            )
            faults.append((row.line, f"{key[:80]!r} is not among the ids", hint))
    missing = [key for key in ids if key not in first]
    if missing:
        faults.append((None, f"{some(missing)}: missing", "Predict them; nothing is made up."))
    wanted = [key for key in ids if key in first]
    if form.strict and (at := [i for i, (a, b) in enumerate(zip(first, wanted, strict=True)) if a != b]):
        got = list(first)[at[0]]
        faults.append((first[got], f"got {got}; in the order of the ids file it is {wanted[at[0]]}", MEND))
    return faults


def _first_field(row: Row, form: Rules) -> str:
    return row.raw.partition(form.separator)[0].strip('"')


def some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f"{len(keys)} id{'s' * (len(keys) > 1)} ({', '.join(keys[:5])}{more})"
