"""Official submission files, for captions and for concepts: written, checked, mended and read."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import store
from harness.errors import Problem, UserError
from harness.submission import inputs
from harness.submission.checks import check, concept_faults, id_faults, some
from harness.submission.form import INVALID, MEMBER, Rules, Task, lines_of, rules, store_text
from harness.submission.mend import fix

__all__ = ["Task", "as_written", "check", "fix", "make", "read", "rules", "write_captions", "write_concepts"]

_NAMES = {"caption": "caption_prediction", "concept": "concept_detection"}


def as_written(caption: str, edition: int) -> str:
    """The caption as it reads back from a submission of that edition.

    White space of any kind, line breaks too, is one space. A pipe in the pipe format is "/": the evaluator
    deletes both, but its loader cuts a caption at a pipe. Half a surrogate pair is U+FFFD: no file holds it.
    """
    text = re.sub("[\ud800-\udfff]", "\ufffd", " ".join(caption.split()))
    return text.replace("|", "/") if rules(edition).separator == "|" else text


def write_captions(path: Path, captions: Mapping[str, str], ids: Sequence[str], edition: int) -> Path:
    """Write captions in the order of `ids`; a path that ends in .zip becomes a zip of `submission.csv` alone.

    2022 and 2023: `ID|caption`, no header, no quoting. 2025 and 2026: `ID,Caption`, every caption quoted.
    Raises `UserError` (exit code 3) for missing or superfluous captions and for ids that can't be submitted.
    """
    form = rules(edition, "caption")
    refuse(_coverage(captions, ids, form))
    return _store(path, {i: as_written(captions[i], edition) for i in ids}, form)


def write_concepts(
    path: Path, concepts: Mapping[str, Sequence[str]], ids: Sequence[str], edition: int
) -> Path:
    """Write concepts as `C1;C2` in the order of `ids`, each CUI once per image; formats as for captions.

    Raises `UserError` (exit code 3) also for what is no CUI, and for more CUIs than the evaluator takes.
    """
    form = rules(edition, "concept")
    values = {key: ";".join(dict.fromkeys(cuis)) for key, cuis in concepts.items()}
    problems = _coverage(concepts, ids, form)
    problems += [
        Problem(what, key=key, hint=hint)
        for key, value in values.items()
        for what, hint in concept_faults(value, form)
    ]
    refuse(problems)
    return _store(path, {i: values[i] for i in ids}, form)


def refuse(problems: Sequence[Problem]) -> None:
    if problems:
        raise UserError(problems, exit_code=INVALID)


def _coverage(values: Mapping[str, Any], ids: Sequence[str], form: Rules) -> list[Problem]:
    problems = [
        Problem(f"the id {key!r} {what}", hint="Such an id can't be submitted.")
        for key in ids
        for what in id_faults(key, form)
    ]
    known = set(ids)
    twice = [key for key, n in Counter(ids).items() if n > 1]
    missing = [key for key in ids if key not in values]
    superfluous = [key for key in values if key not in known]
    for what, keys, hint in (
        ("twice in the ids", twice, "Give each id once."),
        (f"without a {form.task}", missing, "Predict the whole split; nothing is made up."),
        ("not among the ids", superfluous, "Give the ids file of the split that was predicted."),
    ):
        if keys:
            problems.append(Problem(f"{some(keys)}: {what}", hint=hint))
    return problems


def _store(path: Path, values: Mapping[str, str], form: Rules) -> Path:
    text = "".join(f"{line}\n" for line in lines_of(values, form))
    return store_text(path, text, form)


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

    Beside it lies `manifest.json`: edition, task, split, number of rows, hashes of the file and of the ids,
    and what `manifest` adds (run, config, commit, command). It is written last: where it is, the file is
    whole and checked. Raises `UserError` (exit code 3) when the file can't be made or fails the check.
    """
    form = rules(edition, task)
    folder = directory / f"{task}-{split}"
    upload = folder / (f"{_NAMES[task]}_{split}.csv" if form.separator == "|" else "submission.zip")
    (folder / "manifest.json").unlink(missing_ok=True)
    write_one = write_captions if task == "caption" else write_concepts
    for path in [upload, *([folder / MEMBER] if form.separator == "," else [])]:
        write_one(path, values, ids, edition)
    refuse(check(upload, ids, edition, task))
    described = {
        "file": upload.name,
        "sha256": hashlib.sha256(upload.read_bytes()).hexdigest(),
        "edition": edition,
        "task": task,
        "split": split,
        "n": len(ids),
        "ids_sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
    }
    store.write_json(folder / "manifest.json", {**manifest, **described})
    return upload


def read(path: Path | str) -> dict[str, str]:
    """Captions (or `C1;C2`) by id, from a submission of any edition: pipe file, `submission.csv` or its zip.

    Raises `UserError` with all rows that can't be read.
    """
    return dict(inputs.read(Path(path)).values)
