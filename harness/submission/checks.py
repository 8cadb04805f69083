"""Every reason why the organisers would refuse or misread a submission file."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.data import filekinds
from harness.data.forms import (
    IS_ZIP,
    MEMBER,
    REPAIR,
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
from harness.errors import Flaw, Problem, grouped

_BREAKS = re.compile("[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
Fault = tuple[str, str, str]
"""What is wrong with a row, how to repair it, and the faulty content."""


def check(path: Path | str, ids: Sequence[str], edition: int, task: Task = "caption") -> list[Problem]:
    """Every reason why the organisers would refuse or misread the file; empty if there is none.

    Each cause is one problem, with the line of its first row, the number of such rows, and the repair. This
    check is stricter than the organisers' checker: it also reports what their evaluator refuses or misreads.
    `path` may be a zip or the `submission.csv` for it. Raises `UserError` if the edition's format is not
    established.
    """
    form, path = rules(edition, task), Path(path)
    data, fault = content(path, zipped=form.separator == ",")
    if data is None:
        return [Problem(fault, path, hint=_another_file(fault, path, form))]
    return faults(data, ids, form, path)


def _another_file(fault: str, path: Path, form: Rules) -> str:
    """What to do about a file that can't be opened."""
    if fault == IS_ZIP:
        return filekinds.conversion(path, form)
    if fault.startswith("the zip holds"):
        return f"Put the file alone into it: zip -j submission.zip {MEMBER}"
    return "Give a whole file, or make one: harness submission make RUN"


def faults(data: bytes, ids: Sequence[str], form: Rules, path: Path) -> list[Problem]:
    """What `check` finds in the bytes of a text; `path` is its name in the problems."""
    if strange := whole(data, form, path):
        return [strange]
    text, flaws = decoded(data)
    rows = body = list(rows_of(text, form, set(ids)))
    if form.header:
        begins = bool(rows) and bare(_first_field(rows[0], form)) in ids  # the first line is a row, no header
        body = rows if begins else rows[1:]
        if rows and rows[0].broken and not begins:
            flaws.append(Flaw(1, *rows[0].broken))
        elif not rows or rows[0].fields != tuple(form.header.split(",")):
            flaws.append(Flaw(1, f"the first line is not {form.header}", "Put that line first."))
    for row in body:
        flaws += [Flaw(row.line, *fault) for fault in _row_faults(row, form)]
    flaws += _set_faults(body, ids, form)
    flaws.sort(key=lambda flaw: (flaw.line is None, flaw.line or 0))
    return grouped(path, flaws)


def whole(data: bytes, form: Rules, path: Path) -> Problem | None:
    """What is wrong with a file as a whole, if anything; its rows are then not checked."""
    if found := filekinds.not_text(data):
        return Problem(found[0], path, hint=found[1] or "Give the submission: a text file or its zip.")
    text, _ = decoded(data)
    if other := filekinds.other_format(text, form):
        what = f"{other}; the edition of {form.edition} has {filekinds.described(form)}"
        return Problem(what, path, hint=filekinds.remedy(text, path, form))
    return None


def _row_faults(row: Row, form: Rules) -> Iterator[Fault]:
    """What is wrong with one row by itself."""
    if not row.raw.strip():
        yield "a blank line", REPAIR, ""
        return
    if form.header is None and is_header(row):
        yield "a header, which files of this edition do not have", REPAIR, ""
        return
    yield from _line_breaks(row, form)
    if row.broken:
        yield (*row.broken, "")
    elif len(row.fields) != 2:
        yield columns(row, form)
    if len(row.fields) > 1:
        for what in id_faults(row.fields[0], form):
            hint = (
                REPAIR if row.fields[0] != row.fields[0].strip() else "Write the id as it is in the ids file."
            )
            yield f"the id {what}", hint, repr(row.fields[0][:80])
    if len(row.fields) == 2 and form.task == "concept":
        yield from concept_faults(row.fields[1], form)


def _line_breaks(row: Row, form: Rules) -> Iterator[Fault]:
    found = ", ".join(sorted({f"U+{ord(c):04X}" for c in _BREAKS.findall(row.raw)}))
    if found and form.strict:
        # The checker then compares raw lines with the wrong rows and refuses a correct row.
        yield "a line break inside a row: the organisers' checker counts lines, not rows", REPAIR, found
    elif "\r" in row.raw:
        yield "a carriage return inside a caption, which the organisers read as a line feed", REPAIR, "U+000D"


def columns(row: Row, form: Rules) -> Fault:
    n = len(row.fields)
    if n < 2:
        return f"has no {form.separator!r}", f"Write ID{form.separator}{form.task}.", ""
    joined = "Join the concepts by ;" if form.task == "concept" else None
    if form.separator == "|":
        cut = f"has more than one pipe; the loader cuts the {form.task} at the second"
        return cut, joined or REPAIR, f"{n - 1} pipes"
    return "has more columns than 2", joined or "Quote captions that hold a comma.", f"{n} columns"


def id_faults(key: str, form: Rules) -> Iterator[str]:
    if key.split() != [key]:
        yield "is empty or holds white space"
    if any(c in key for c in '|,"'):
        yield "holds a separator or a quote"
    if form.skips_ids and "ID" in key:
        yield 'holds "ID"; the organisers\' loader takes such a row for a header and ignores it'


def concept_faults(value: str, form: Rules) -> Iterator[Fault]:
    """What is wrong with a list of CUIs; an empty one is right."""
    if not value:
        return
    cuis = value.split(";")
    if form.strict:  # its checker allows white space next to semicolons, but not around the list
        cuis = [cui.strip() for cui in cuis]
        if value != value.strip():
            yield "has white space before or after its concepts", REPAIR, repr(value[:80])
            if not value.strip():
                return
    if wrong := [cui for cui in cuis if not re.fullmatch(r"C\d+", cui)]:
        named = ", ".join(repr(cui[:40]) for cui in wrong[:5])
        blanks = all(re.fullmatch(r"(C\d+)?", cui.strip()) for cui in wrong)  # `--fix` drops empty ones
        hint = REPAIR if blanks else "Write C0040405;C0817096."
        yield "holds something that is not a CUI (C and digits)", hint, named
    right = [cui for cui in cuis if cui not in wrong]
    if twice := len(right) - len(set(right)):
        yield "holds a CUI twice", REPAIR, f"{twice} of {len(right)}"
    if form.max_cuis and len(cuis) > form.max_cuis:
        # The 2026 checker accepts this, but the evaluator then refuses the whole file.
        what = f"holds more than {form.max_cuis} CUIs, which the evaluator refuses"
        yield what, "Keep the most probable ones.", f"{len(cuis)} CUIs"


def _set_faults(rows: Sequence[Row], ids: Sequence[str], form: Rules) -> list[Flaw]:
    """What is wrong with the ids as a whole: unknown, twice, missing, out of order."""
    flaws: list[Flaw] = []
    known, first, misspelt = set(ids), {}, set()
    for row in rows:
        key = _first_field(row, form)
        if (name := bare(key)) in known and key not in known:
            misspelt.add(name)
            if name != key.strip():  # else it is white space, which `_row_faults` reports
                flaws.append(Flaw(row.line, "an id with the ending of an image", REPAIR, repr(key[:80])))
        elif key in first:
            where = f"{key}, as on line {first[key]}"
            flaws.append(Flaw(row.line, "a repeated id", "Keep one of the two.", where))
        elif key in known:
            first[key] = row.line
        elif row.raw.strip() and not (form.header is None and is_header(row)):
            hint = "Leave it out, or give the right ids file."
            flaws.append(Flaw(row.line, "an id that is not among the ids", hint, repr(key[:80])))
    missing = [key for key in ids if key not in first and key not in misspelt]
    if missing:
        flaws.append(Flaw(None, f"{some(missing)}: missing", "Predict them; missing rows are not filled in."))
    wanted = [key for key in ids if key in first]
    if form.strict and (at := [i for i, (a, b) in enumerate(zip(first, wanted, strict=True)) if a != b]):
        got = list(first)[at[0]]
        order = f"not in the order of the ids file: got {got} instead of {wanted[at[0]]}"
        flaws.append(Flaw(first[got], order, REPAIR))
    return flaws


def _first_field(row: Row, form: Rules) -> str:
    return row.fields[0] if row.fields else row.raw.partition(form.separator)[0].strip('"')


def some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - 5:,} more" if len(keys) > 5 else ""
    return f"{len(keys):,} id{'s' * (len(keys) > 1)} ({', '.join(key[:80] for key in keys[:5])}{more})"
