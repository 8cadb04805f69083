"""Everything that can be wrong with a data set, found before any training: labels first, then every image."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from harness.config import DataConfig
from harness.data import phantom
from harness.data.images import DAMAGE, Progress, decode, each
from harness.data.readers import Dataset, Example, File, Finding, Listing, Row, read
from harness.errors import Problem, UserError
from harness.store import bytes_of, fingerprint, read_checked, write_checked

CUI = re.compile(r"C\d{7}")
QUICK_IMAGES = 1500
"""As many are decoded within about a second; with more, the labels' problems are reported without waiting."""
_Key = tuple[str, int, int]
_SCAN_FORMAT = 1  # raise it when `decode` gives other pixels


@dataclass(frozen=True)
class Scan:
    """What decoding an image told: hashes of file and pixels, or what is wrong with it."""

    content: str
    pixels: str
    damage: str


def load(config: DataConfig, work: Path = Path("runs"), progress: Progress | None = None) -> Dataset:
    """Read and check a data set; draws the phantom first, if one is configured and nothing is there.

    A folder that exists and is no phantom is real data and is never written to. Images are decoded once; what
    that told is kept under `work/data`. Raises `UserError` with all problems, but for rows that
    `data.skip_bad` leaves out.
    """
    _ensure(config)
    listing = read(config.root, config.layout)
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


def check(config: DataConfig, work: Path = Path("runs"), progress: Progress | None = None) -> list[Problem]:
    """All problems of a data set, every image decoded, whether or not `data.skip_bad` would mend them."""
    _ensure(config)
    listing = read(config.root, config.layout)
    findings = listing.findings + list(_label_findings(listing))
    scans = _scan(config.root, listing, work, _known(config.root, work), progress)
    findings += _image_findings(listing, scans)
    return listing.fatal + [finding.problem for finding in findings]


def unchecked(config: DataConfig, work: Path = Path("runs")) -> int:
    """How many images of a data set were never decoded here."""
    _ensure(config)
    return len(_unscanned(read(config.root, config.layout), _known(config.root, work)))


def _ensure(config: DataConfig) -> None:
    if config.phantom:
        phantom.ensure(config.root, config.phantom)
    if not config.root.is_dir():
        hint = "Put the competition's files there, or try: python -m harness run experiments/quickstart.yaml"
        raise UserError([Problem(f"no such folder: {config.root}", key="data.root", hint=hint)])


def _error(listing: Listing, findings: list[Finding], unknown: list[File], config: DataConfig) -> UserError:
    hints = []
    if findings and not listing.fatal and not config.skip_bad:
        hints.append("Mend them, or leave these rows out: --set data.skip_bad=true")
    if unknown:
        hints.append(
            f"{len(unknown)} images were not decoded yet; to check them too: python -m harness data check"
        )
    return UserError(listing.fatal + [finding.problem for finding in findings], " ".join(hints) or None)


def _label_findings(listing: Listing) -> Iterator[Finding]:
    ids = {split: {example.id: example for example in rows} for split, rows in listing.splits.items()}
    for split, examples in listing.splits.items():
        for example in examples:
            for what in _label_faults(example, listing.files.get((split, example.id)), listing.concept_names):
                yield _finding(listing, split, example, what)
            if split == "train" and example.id in ids.get("valid", {}):
                place = _place(listing, "valid", ids["valid"][example.id])
                yield _finding(listing, split, example, f"leak: id {example.id} is also that of {place}")


def _label_faults(example: Example, file: File | None, names: Mapping[str, str]) -> Iterator[str]:
    if example.caption is not None and not example.caption.strip():
        yield f"empty caption of {example.id}"
    malformed = [cui for cui in example.cuis if not CUI.fullmatch(cui)]
    if malformed:
        yield f"got the CUI {', '.join(map(repr, malformed))}; C and seven digits are allowed"
    if names:  # without them, that file is the problem
        unknown = [cui for cui in example.cuis if cui not in names and cui not in malformed]
        if unknown:
            yield f"unknown CUI {', '.join(unknown)}: not in the file of concept names"
    if file is None:
        yield f"no image {example.image}"
    elif file.size == 0:
        yield f"{example.image} is empty (0 bytes)"


def _finding(listing: Listing, split: str, example: Example, what: str) -> Finding:
    source = listing.sources[split] or example.image
    return Finding(Problem(what, source, example.line), (split, example.id))


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
                yield _finding(listing, split, example, f"{example.image}: {scan.damage}")
            elif split == "train" and scan.pixels in valid:
                twin = valid[scan.pixels]
                same_file = scan.content == scans["valid", twin.id].content
                yield _finding(listing, split, example, _leak(listing, example, twin, same_file))


def _leak(listing: Listing, example: Example, twin: Example, same_file: bool) -> str:
    return (
        f"leak: the same {'image file' if same_file else 'pixels'}"
        f"{' and caption' if example.caption == twin.caption else ''} as {_place(listing, 'valid', twin)}; "
        "data.skip_bad leaves out this train row"
    )


def _dataset(
    config: DataConfig, listing: Listing, findings: list[Finding], scans: Mapping[Row, Scan]
) -> Dataset:
    bad: set[Row | None] = {finding.row for finding in findings}
    splits = {
        split: tuple(example for example in examples if (split, example.id) not in bad)
        for split, examples in listing.splits.items()
    }
    empty = [split for split in ("train", "valid") if not splits[split]]
    if empty:
        problems = [Problem(f"no good row is left in {split}", config.root) for split in empty]
        raise UserError([*problems, *(finding.problem for finding in findings)])
    splits.setdefault("test", ())
    fingerprints = {
        split: fingerprint([_contents(split, examples, scans), listing.concept_names])
        for split, examples in splits.items()
    }
    left_out = tuple(finding.problem for finding in findings)
    return Dataset(config.root, config.layout, splits, listing.concept_names, fingerprints, left_out)


def _contents(split: str, examples: tuple[Example, ...], scans: Mapping[Row, Scan]) -> list[list]:
    return [[e.id, e.caption, e.cuis, scans[split, e.id].content] for e in examples]


def _scan(
    root: Path, listing: Listing, work: Path, known: dict[_Key, Scan], progress: Progress | None
) -> dict[Row, Scan]:
    """Decode the listed images that no earlier scan knows; an interrupted scan keeps what it has done."""
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
        content = file.path.read_bytes()
        image = decode(content)
    except DAMAGE as error:
        return Scan("", "", f"not a whole image: {str(error).partition(' <')[0]}")
    pixels = hashlib.sha256(str(image.size).encode() + image.tobytes())
    return Scan(hashlib.sha256(content).hexdigest()[:32], pixels.hexdigest()[:32], "")


def _key(file: File) -> _Key:
    return file.name, file.size, file.mtime_ns


def _scan_file(root: Path, work: Path) -> Path:
    return work / "data" / f"images-{fingerprint([_SCAN_FORMAT, str(root.resolve())])}.json"


def _known(root: Path, work: Path) -> dict[_Key, Scan]:
    """What earlier scans told; nothing where the file is damaged, so that all images are decoded again."""
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
