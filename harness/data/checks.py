"""Finds all problems of a data set before any training: labels first, then every image."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from harness.config.sections import DataConfig
from harness.data import fraction, phantom
from harness.data.files import read as read_file
from harness.data.folders import File
from harness.data.images import DAMAGE, Progress, damage, decode, each
from harness.data.listing import SPLITS, Dataset, Example, Finding, Listing, Row, has_words, together
from harness.data.readers import CUI, fault_of_cuis, read
from harness.errors import Problem, UserError
from harness.store import bytes_of, fingerprint, read_checked, write_checked

QUICK_IMAGES = 1500
"""So many images are decoded in about a second; with more, problems of labels are reported first."""
REPAIR = (
    "Correct them, or give the command run --set data.skip_bad=true: training then leaves these rows out; "
    "validation and test rows are all predicted and submitted, with the constant caption or the most "
    "frequent concept if the image can't be read."
)
_Key = tuple[str, int, int]
_SCAN_FORMAT = 1  # raise it when the pixels from `decode` change


@dataclass(frozen=True)
class Scan:
    """The result of decoding an image: hashes of file and pixels, or what is wrong with it."""

    content: str
    pixels: str
    damage: str


def load(config: DataConfig, work: Path = Path("runs"), progress: Progress | None = None) -> Dataset:
    """Read and check a data set; draws the phantom first, if one is configured and the folder does not exist.

    An existing folder that is not a phantom is real data; nothing is written to it. Images are decoded once;
    the results are kept under `work/data`. Raises `UserError` with all problems, except those that
    `data.skip_bad` allows: it leaves such rows out of training only.
    """
    _ensure(config)
    listing = listed(config)
    findings = listing.findings + list(_label_findings(listing))
    known = _known(config.root, work)
    unknown = _unscanned(listing, known)
    if listing.fatal or (findings and not config.skip_bad and len(unknown) > QUICK_IMAGES):
        raise _error(listing, findings, unknown, config)
    scans = _scan(config.root, listing, work, known, progress)
    findings += _image_findings(listing, scans)
    if findings and not config.skip_bad:
        raise _error(listing, findings, [], config)
    return _dataset(config, listing, findings, scans)


@dataclass(frozen=True)
class Examined:
    """All problems of a data set, and `notes`: rows that are used only for some purposes.

    `rows` are the numbers of rows by split.
    """

    fatal: list[Problem]
    findings: list[Finding]
    notes: list[Finding]
    rows: Mapping[str, int]

    @property
    def problems(self) -> list[Problem]:
        """All problems, one for each faulty row."""
        return self.fatal + [finding.problem for finding in self.findings]

    @property
    def causes(self) -> list[Problem]:
        """The problems; one that many rows share is listed once."""
        return self.fatal + together(self.findings)


def examine(config: DataConfig, work: Path = Path("runs"), progress: Progress | None = None) -> Examined:
    """Check a data set and decode every image, whether or not `data.skip_bad` is set."""
    _ensure(config)
    listing = listed(config)
    findings = listing.findings + list(_label_findings(listing))
    scans = _scan(config.root, listing, work, _known(config.root, work), progress)
    findings += _image_findings(listing, scans)
    splits = {split: tuple(rows) for split, rows in {"test": [], **listing.splits}.items()}
    fatal = listing.fatal or list(_unusable(config, splits))
    notes = [*_notes(listing), *_without_concepts(config.root, listing)]
    return Examined(fatal, findings, notes, {split: len(rows) for split, rows in splits.items() if rows})


def check(config: DataConfig, work: Path = Path("runs"), progress: Progress | None = None) -> list[Problem]:
    """All problems of a data set, with every image decoded, whether or not `data.skip_bad` is set."""
    return examine(config, work, progress).problems


def unchecked(config: DataConfig, work: Path = Path("runs")) -> int:
    """How many images of a data set have not been decoded here yet."""
    _ensure(config)
    return len(_unscanned(listed(config), _known(config.root, work)))


def listed(config: DataConfig) -> Listing:
    """The labels and images that a config uses, without opening an image."""
    return fraction.keep(read(config.root, config.layout), config.fraction)


def _ensure(config: DataConfig) -> None:
    if config.phantom:
        phantom.ensure(config.root, config.phantom)
    if not config.root.is_dir():
        hint = "Put the competition's files there, or try: harness run experiments/quickstart.yaml"
        raise UserError([Problem(f"no such folder: {config.root}", key="data.root", hint=hint)])


def _error(listing: Listing, findings: list[Finding], unknown: list[File], config: DataConfig) -> UserError:
    hints = []
    if findings and not listing.fatal and not config.skip_bad:
        hints.append(REPAIR)
    if unknown:
        hints.append(
            f"{len(unknown)} images were not decoded yet; to check them too: "
            f"harness data check {config.root} --layout {config.layout}"
        )
    return UserError(listing.fatal + together(findings), " ".join(hints) or None)


def _label_findings(listing: Listing) -> Iterator[Finding]:
    ids = {split: {example.id: example for example in rows} for split, rows in listing.splits.items()}
    for split, examples in listing.splits.items():
        for example in examples:
            for what, cause in _label_faults(listing, split, example):
                yield _finding(listing, split, example, what, cause)
            for what, cause in _concept_faults(listing, example):
                file, lines = listing.concepts[split]
                yield Finding(Problem(what, file, lines.get(example.id)), (split, example.id), cause)
            if split == "train" and example.id in ids.get("valid", {}):
                place = _place(listing, "valid", ids["valid"][example.id])
                what = f"leak: id {example.id} is also that of {place}"
                yield _finding(listing, split, example, what, "leak: id")


def _label_faults(listing: Listing, split: str, example: Example) -> Iterator[tuple[str, str]]:
    """What is wrong with a row, each with the cause that other rows may share."""
    row = (split, example.id)
    if row in listing.lacking:
        what = listing.lacking[row]
        # what follows the names tells a folder, a link to itself and no file apart
        yield what, "no image" + re.sub(r".*\.\w+", "", what)
    elif row in listing.files and listing.files[row].size == 0:
        yield f"{example.image} is empty (0 bytes)", "empty image"


def _concept_faults(listing: Listing, example: Example) -> Iterator[tuple[str, str]]:
    """What is wrong with the concepts of a row, each with the cause that other rows may share."""
    names = listing.concept_names
    malformed = [cui for cui in example.cuis if not CUI.fullmatch(cui)]
    if malformed:
        cause = fault_of_cuis(malformed)
        yield f"got the CUI {', '.join(map(repr, malformed))}; {cause}", cause
    if names:  # without names, the file of concept names is the problem
        unknown = [cui for cui in example.cuis if cui not in names and cui not in malformed]
        if unknown:
            cause = "not in the file of concept names"
            yield f"unknown CUI {', '.join(unknown)}: {cause}", cause


WITHOUT_WORDS = "no word in the caption"
_USED_FOR = {
    "train": "training leaves the row out",
    "valid": "the row is captioned, scored and submitted, and left out of the validation loss",
    "test": "the row is captioned and submitted",
}


def _without_words(listing: Listing) -> Iterator[Finding]:
    """Rows whose caption has no words; published sets have such rows, so they are not a mistake."""
    for split, examples in listing.splits.items():
        for example in examples:
            if example.caption is not None and not has_words(example.caption):
                what = f"no word in the caption of {example.id}: {_USED_FOR[split]}"
                yield _finding(listing, split, example, what, WITHOUT_WORDS)


def _without_manual(listing: Listing) -> Iterator[Finding]:
    """Images of valid without manually validated concepts, if other images have some."""
    found = listing.manual.get("valid", {})
    for example in listing.splits.get("valid", []) if found else ():
        if example.id not in found:
            cause = "no manually validated concepts"
            yield _finding(
                listing, "valid", example, f"{cause} of {example.id}: f1_secondary leaves it out", cause
            )


def _notes(listing: Listing) -> list[Finding]:
    return [*_without_words(listing), *_without_manual(listing)]


def _without_concepts(root: Path, listing: Listing) -> Iterator[Finding]:
    """A note on missing files of concepts; a run that uses them reports them as problems."""
    if listing.absent:
        names, looked = ", ".join(listing.absent), ", ".join(listing.absent.values())
        what = f"no files of {names}, looked for {looked}; captions need none of them"
        yield Finding(Problem(what, root), None, "no files of concepts")


def _finding(listing: Listing, split: str, example: Example, what: str, cause: str) -> Finding:
    source = listing.sources[split] or example.image
    return Finding(Problem(what, source, example.line), (split, example.id), cause)


def _place(listing: Listing, split: str, example: Example) -> str:
    return f"{split} {example.id} ({Path(listing.sources[split] or example.image).name}:{example.line})"


def _image_findings(listing: Listing, scans: Mapping[Row, Scan]) -> Iterator[Finding]:
    valid: dict[str, Example] = {}
    for example in listing.splits.get("valid", []):
        scan = scans.get(("valid", example.id))
        if scan and not scan.damage:
            valid.setdefault(scan.pixels, example)
    for split, examples in listing.splits.items():
        for example in examples:
            scan = scans.get((split, example.id))
            if scan is None:
                continue
            if scan.damage and listing.files[split, example.id].size:
                yield _finding(listing, split, example, f"{example.image}: {scan.damage}", "damaged image")
            elif split == "train" and scan.pixels in valid:
                twin = valid[scan.pixels]
                if twin.id == example.id:
                    continue  # one leak, which its id has told
                same_file = scan.content == scans["valid", twin.id].content
                what = _leak(listing, example, twin, same_file)
                yield _finding(listing, split, example, what, "leak: image")


def _leak(listing: Listing, example: Example, twin: Example, same_file: bool) -> str:
    return (
        f"leak: the same {'image file' if same_file else 'pixels'}"
        f"{' and caption' if example.caption == twin.caption else ''} as {_place(listing, 'valid', twin)}; "
        "data.skip_bad leaves out this train row"
    )


def _dataset(
    config: DataConfig, listing: Listing, findings: list[Finding], scans: Mapping[Row, Scan]
) -> Dataset:
    bad = {finding.row for finding in findings}
    splits = {
        split: tuple(_with_damage(split, example, listing, scans) for example in examples)
        for split, examples in {"test": [], **listing.splits}.items()
    }
    splits["train"] = tuple(e for e in splits["train"] if e.trains and ("train", e.id) not in bad)
    if problems := list(_unusable(config, splits)):
        raise UserError([*problems, *together(findings)])
    fingerprints = {
        split: fingerprint([_contents(split, splits[split], scans), listing.concept_names])
        for split in SPLITS
    }
    listed = {("test", e.id) for e in splits["test"]} | {("valid", e.id) for e in splits["valid"]}
    notes = [_kept(finding, splits) for finding in findings if finding.row in listed]
    return Dataset(
        config.root,
        config.layout,
        {split: splits[split] for split in SPLITS},
        listing.concept_names,
        fingerprints,
        left_out=tuple(finding for finding in findings if finding.row not in listed),
        notes=(*_notes(listing), *notes),
        manual=listing.manual,
        absent=listing.absent,
    )


def _with_damage(split: str, example: Example, listing: Listing, scans: Mapping[Row, Scan]) -> Example:
    """The row, with the reason if its image can't be read."""
    row = (split, example.id)
    scan = scans.get(row)
    damage = listing.lacking[row] if scan is None else scan.damage
    return replace(example, damage=damage) if damage else example


def _unusable(config: DataConfig, splits: Mapping[str, tuple[Example, ...]]) -> Iterator[Problem]:
    """Splits without a single usable row."""
    for split in ("train", "valid"):
        if not any(example.trains for example in splits[split]):
            share = getattr(config.fraction, split)
            of = f" (data.fraction.{split} is {share:g})" if share < 1 else ""
            yield Problem(f"no good row is left in {split}{of}", config.root)
    if splits["test"] and all(example.damage for example in splits["test"]):
        yield Problem("no image of test can be read", config.root)


def _kept(finding: Finding, splits: Mapping[str, tuple[Example, ...]]) -> Finding:
    """The finding, with what happens to its row, which is predicted and submitted despite the problem."""
    split, id = finding.row
    example = next(example for example in splits[split] if example.id == id)
    if example.damage:
        becomes = "it gets the constant caption, or the most frequent concept"
    elif split == "valid" and example.caption is None:
        becomes = "the row is captioned and submitted, and its caption is not scored"
    else:
        becomes = "the row is used nevertheless"
    problem = replace(finding.problem, what=f"{finding.problem.what}; {becomes}")
    return finding._replace(problem=problem)


def _contents(split: str, examples: tuple[Example, ...], scans: Mapping[Row, Scan]) -> list[list]:
    return [[e.id, e.caption, e.cuis, "" if e.damage else scans[split, e.id].content] for e in examples]


def _scan(
    root: Path, listing: Listing, work: Path, known: dict[_Key, Scan], progress: Progress | None
) -> dict[Row, Scan]:
    """Decode the listed images that no earlier scan has; an interrupted scan keeps its results."""
    if _unscanned(listing, known):
        file = _scan_file(root, work)
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            known = _known(root, work)
            unknown = _unscanned(listing, known)
            try:
                for image, scan in zip(unknown, each(_look, unknown, progress=progress), strict=True):
                    known[_key(image)] = scan
            finally:
                whole = [[*key, *astuple(scan)] for key, scan in known.items() if not scan.damage]
                write_checked(file, whole)
    return {row: known[_key(file)] for row, file in listing.files.items()}


def _look(file: File) -> Scan:
    try:
        content = read_file(file.path)
        image = decode(content)
    except DAMAGE as error:
        return Scan("", "", damage(error))
    pixels = hashlib.sha256(str(image.size).encode() + image.tobytes())
    return Scan(hashlib.sha256(content).hexdigest()[:32], pixels.hexdigest()[:32], "")


def _key(file: File) -> _Key:
    return file.name, file.size, file.mtime_ns


def _scan_file(root: Path, work: Path) -> Path:
    return work / "data" / f"images-{fingerprint([_SCAN_FORMAT, str(root.resolve())])}.json"


def _known(root: Path, work: Path) -> dict[_Key, Scan]:
    """The results of earlier scans; empty if the file is damaged, so that all images are decoded again."""
    file = _scan_file(root, work)
    rows = read_checked(file)
    if rows is None:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            rows = json.loads(bytes_of(file))  # an earlier version wrote no checksum
    if not isinstance(rows, list) or not all(map(_is_scan, rows)):
        return {}
    return {(path, size, mtime): Scan(*scan) for path, size, mtime, *scan in rows}


def _is_scan(row: Any) -> bool:
    kinds = (str, int, int, str, str, str)
    return isinstance(row, list) and list(map(type, row)) == list(kinds)


def _unscanned(listing: Listing, known: Mapping[_Key, Scan]) -> list[File]:
    return [file for file in listing.files.values() if _key(file) not in known]
