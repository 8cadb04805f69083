"""Small data sets for the tests, written without our readers, and ways to change them."""

import csv
import shutil
from pathlib import Path

import pytest

from harness import data
from harness.config.sections import DataConfig, PhantomConfig
from harness.data import phantom

PREFIX = "ImageCLEFmedical_Caption_2023_"
CAPTIONS = PREFIX + "caption_prediction_{}_labels.csv"
CONCEPTS = PREFIX + "concept_detection_{}_labels.csv"
SMALL = PhantomConfig(train=12, valid=6, test=4)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A drawn set of 12, 6 and 4 images, which nobody changes."""
    root = tmp_path_factory.mktemp("whole") / "set"
    phantom.draw(root, SMALL)
    return root


@pytest.fixture
def root(whole, tmp_path):
    """A copy of that set for one test."""
    return Path(shutil.copytree(whole, tmp_path / "set"))


def edit(path: Path, change) -> None:
    """Change the lines of a label file (line n of the file is lines[n - 1])."""
    lines = path.read_bytes().decode().split("\r\n")
    change(lines)
    path.write_bytes("\r\n".join(lines).encode())


def config(root: Path, **changes) -> DataConfig:
    """The section `data` for a set."""
    return DataConfig(root=root, **changes)


def problems(root: Path, tmp_path: Path, **changes) -> list[tuple[str, int | None, str]]:
    """File name, line and text of each problem that a check finds."""
    found = data.check(config(root, **changes), tmp_path / "runs")
    return [(Path(p.file).name if p.file else "", p.line, p.what) for p in found]


def one(root: Path, tmp_path: Path, **changes) -> tuple[str, int | None, str]:
    """The only problem that a check finds."""
    found = problems(root, tmp_path, **changes)
    assert len(found) == 1, found
    return found[0]


def images(root: Path, split: str, ids) -> None:
    """Empty image files, one for each id."""
    (root / split).mkdir(parents=True, exist_ok=True)
    for id in ids:
        (root / split / f"{id}.jpg").write_bytes(b"")


def write_2023(root: Path, rows: list[tuple[str, list[str]]], end: str) -> None:
    """A set in the layout of 2023: of each row the caption and its concepts; lines end with `end`."""
    for split in ("train", "valid"):
        ids = [f"{split}_{n}" for n in range(len(rows))]
        images(root, split, ids)
        captions = ["ID\tcaption", *(f"{id}\t{caption}" for id, (caption, _) in zip(ids, rows, strict=True))]
        concepts = ["ID\tcuis", *(f"{id}\t{';'.join(cuis)}" for id, (_, cuis) in zip(ids, rows, strict=True))]
        for name, lines in ((CAPTIONS, captions), (CONCEPTS, concepts)):
            (root / name.format(split)).write_bytes("".join(f"{line}{end}" for line in lines).encode())
    (root / f"{PREFIX}cui_mapping.csv").write_text("C0000001\tone\n")


def write_comma(
    root: Path, rows: list[tuple[str, list[str]]], splits=("train", "valid"), folder="{}"
) -> None:
    """A set in the layout since 2024, comma-separated; `folder` names the folder of a split's images."""
    for split in splits:
        ids = [f"{split}_{n}" for n in range(len(rows))]
        images(root, folder.format(split), ids)
        for name, header, column in (("captions", "Caption", 0), ("concepts", "CUIs", 1)):
            with (root / f"{split}_{name}.csv").open("w", encoding="utf-8", newline="") as file:
                table = csv.writer(file)
                table.writerow(["ID", header])
                values = [row[column] if column == 0 else ";".join(row[1]) for row in rows]
                table.writerows(zip(ids, values, strict=True))
    (root / "cui_mapping.csv").write_text('CUI,Canonical name\nC0000001,"one, or first"\n')
