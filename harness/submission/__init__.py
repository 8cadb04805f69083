"""Official submission files, for captions and for concepts: written, checked, repaired and read."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.data import captionfiles
from harness.data.forms import (
    INVALID,
    MEMBER,
    Rules,
    Task,
    bare,
    lines_of,
    plural,
    rules,
    store_text,
    zipped,
)
from harness.errors import Flaw, Problem, UserError, grouped
from harness.records.files import sameness
from harness.store import bytes_of
from harness.submission import folder as folders
from harness.submission.checks import check, concept_faults, faults, id_faults, some
from harness.submission.repair import fix

__all__ = ["Task", "as_written", "check", "fix", "make", "read", "rules", "write_captions", "write_concepts"]

_NAMES = {"caption": "caption_prediction", "concept": "concept_detection"}
ZIP, MANIFEST = "submission.zip", "manifest.json"


def as_written(caption: str, edition: int) -> str:
    """The caption as a submission of that edition stores it.

    Any run of white space, line breaks included, becomes one space. In the pipe format a pipe becomes "/":
    the evaluator deletes both, but its loader cuts a caption at a pipe. Half a surrogate pair becomes U+FFFD,
    since UTF-8 can't store it.
    """
    text = re.sub("[\ud800-\udfff]", "\ufffd", " ".join(caption.split()))
    return text.replace("|", "/") if rules(edition).separator == "|" else text


def write_captions(path: Path, captions: Mapping[str, str], ids: Sequence[str], edition: int) -> Path:
    """Write captions in the order of `ids`, as text or zip.

    The pipe format has neither header nor quotes. The comma format has a header and quotes every caption; if
    the path ends in .zip, the file is a zip of `submission.csv` alone. Raises `UserError` (exit code 3) for
    missing or superfluous captions and for ids that can't be submitted.
    """
    form = rules(edition, "caption")
    return store_text(path, _text(captions, ids, form), form)


def write_concepts(
    path: Path, concepts: Mapping[str, Sequence[str]], ids: Sequence[str], edition: int
) -> Path:
    """Write concepts as `C1;C2` in the order of `ids`, each CUI once per image; formats as for captions.

    Raises `UserError` (exit code 3) also for anything that is not a CUI, and for more CUIs than the evaluator
    allows.
    """
    form = rules(edition, "concept")
    return store_text(path, _text(concepts, ids, form), form)


def refuse(problems: Sequence[Problem]) -> None:
    if problems:
        raise UserError(problems, exit_code=INVALID)


def _text(values: Mapping[str, Any], ids: Sequence[str], form: Rules) -> str:
    """The text of the file. Raises `UserError` (exit code 3) for ids and concepts that can't be submitted."""
    problems = _coverage(values, ids, form)
    if form.task == "concept":
        lists = {key: ";".join(dict.fromkeys(cuis)) for key, cuis in values.items()}
        flaws = [
            Flaw(None, what, hint, f"{key}, {subject}")
            for key, value in lists.items()
            for what, hint, subject in concept_faults(value, form)
        ]
        problems += grouped("", flaws)
    refuse(problems)
    written = {key: as_written(values[key], form.edition) for key in ids} if form.task == "caption" else lists
    return "".join(f"{line}\n" for line in lines_of({key: written[key] for key in ids}, form))


def _coverage(values: Mapping[str, Any], ids: Sequence[str], form: Rules) -> list[Problem]:
    flaws = [
        Flaw(None, f"the id {what}", "Such an id can't be submitted.", repr(key))
        for key in ids
        for what in id_faults(key, form)
    ]
    problems = grouped("", flaws)
    known = set(ids)
    twice = [key for key, n in Counter(ids).items() if n > 1]
    missing = [key for key in ids if key not in values]
    superfluous = [key for key in values if key not in known]
    other = "Give the ids file of the split that was predicted."
    if superfluous and bare(superfluous[0]) in known:
        other = "Leave out the endings of the ids, such as .jpg."
    for what, keys, hint in (
        ("twice in the ids", twice, "Give each id once."),
        (f"without a {form.task}", missing, "Predict the whole split; missing rows are not filled in."),
        ("not among the ids", superfluous, other),
    ):
        if keys:
            problems.append(Problem(f"{some(keys)}: {what}", hint=hint))
    return problems


def make(
    values: Mapping[str, str] | Mapping[str, Sequence[str]],
    ids: Sequence[str],
    edition: int,
    directory: Path,
    manifest: Mapping[str, Any],
    split: str = "test",
    task: Task = "caption",
) -> Path:
    """Write, check and describe a submission in `directory/<task>-<split>/`; returns the file to upload.

    The same folder gets `manifest.json`: edition, task, split, number of rows, hashes of the file and of the
    ids, and what `manifest` adds (run, config, commit, command). All files of an earlier submission are
    replaced together, after the new ones are checked. Raises `UserError` (exit code 3) and writes nothing if
    the file can't be made or fails the check.
    """
    form = rules(edition, task)
    folder = directory / f"{task}-{split}"
    text = _text(values, ids, form).encode("utf-8", "surrogateescape")
    pipes = f"{_NAMES[task]}_{split}.csv"
    upload = pipes if form.separator == "|" else ZIP
    refuse(faults(text, ids, form, folder / upload))
    files = {pipes: text} if form.separator == "|" else {ZIP: zipped(text), MEMBER: text}
    described = {
        "file": upload,
        "sha256": hashlib.sha256(files[upload]).hexdigest(),
        "edition": edition,
        "task": task,
        "split": split,
        "n": len(ids),
        "ids_sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
    }
    if same := sameness(map(joined, values.values()), plural(task)):
        described["warnings"] = [same]
    about = json.dumps({**manifest, **described}, indent=1, ensure_ascii=False, default=str, allow_nan=False)
    folders.replace(folder, {**files, MANIFEST: f"{about}\n"}, (pipes, ZIP, MEMBER, MANIFEST))
    return folder / upload


def is_intact(upload: Path) -> bool:
    """Whether the file of a submission is the one that its manifest describes."""
    try:
        described = json.loads(bytes_of(upload.with_name(MANIFEST)))
        return described["sha256"] == hashlib.sha256(bytes_of(upload)).hexdigest()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def joined(value: str | Sequence[str]) -> str:
    """A caption, or the concepts of an image, as one text."""
    return value if isinstance(value, str) else ";".join(value)


def read(path: Path | str) -> dict[str, str]:
    """Captions (or `C1;C2`) by id, from a submission of any edition: pipe file, `submission.csv` or its zip.

    Raises `UserError` with all rows that can't be read.
    """
    return dict(captionfiles.read(Path(path)).values)
