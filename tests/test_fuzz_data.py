"""Data sets with random damage: a report or a data set, never a traceback, never a hang.

HARNESS_FUZZ_CASES=2000 python -m pytest tests/test_fuzz_data.py
"""

import contextlib
import csv
import io
import os
import random
import shutil
import signal
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from support.fuzzing import cases
from support.small_sets import write_2023, write_comma

from harness import data
from harness.config.sections import DataConfig
from harness.data.images import DAMAGE, damage, decode
from harness.errors import UserError

SECONDS = 20
ROWS = [(f"An axial CT image, number {n}.", ["C0000001"][: n % 2]) for n in range(4)]
Damage = Callable[[random.Random, Path], None]


def labels(rng: random.Random, root: Path) -> Path:
    return rng.choice(sorted(path for path in root.glob("*.csv") if path.is_file() and not path.is_symlink()))


def picture(rng: random.Random, root: Path) -> Path:
    return rng.choice(sorted(path for path in root.glob("*/*") if path.parent.name in data_splits(root)))


def data_splits(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if path.is_dir() and not path.is_symlink()}


def some_bytes(rng: random.Random, root: Path) -> None:
    """Change, cut or add bytes of a label file."""
    path = labels(rng, root)
    content = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(content) + 1)
        junk = rng.choice([b"", b"\0", b"\t", b'"', b"\r", b"\n", b"\n\n", b"\xff", b"\xe2\x80\xaf", b","])
        content[at : at + rng.choice([0, 0, 1, 1, 9])] = junk
    path.write_bytes(content)


def some_lines(rng: random.Random, root: Path) -> None:
    """Drop, double, swap or replace lines of a label file."""
    path = labels(rng, root)
    lines = path.read_bytes().splitlines(keepends=True)
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    huge = lines[at].rstrip() + b"x" * 200_000 + b"\n"
    blank = lines[at].partition(b"\t")[0] + b"\t \xe2\x80\xaf\n"
    news = [[], [lines[at]] * 2, [lines[other]], [huge], [blank], [b"\n"], [b'x,"y\n'], [b"a\tb\tc\n"]]
    lines[at : at + 1] = rng.choice(news)
    path.write_bytes(b"".join(lines))


def another_encoding(rng: random.Random, root: Path) -> None:
    path = labels(rng, root)
    text = path.read_text(encoding="utf-8", errors="replace")
    how = rng.choice(["utf-8-sig", "utf-16", "utf-32", "cp500"])
    path.write_bytes(text.encode(how, errors="replace"))


def another_separator(rng: random.Random, root: Path) -> None:
    path = labels(rng, root)
    old, new = rng.choice([(b"\t", b","), (b",", b"\t"), (b"\n", b"\r"), (b"\r\n", b"\n"), (b"\t", b"|")])
    path.write_bytes(path.read_bytes().replace(old, new))


def replaced(rng: random.Random, path: Path) -> None:
    """Something else in the place of a file."""
    path.unlink()
    kind = rng.randrange(8)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to(path.name)
    elif kind == 2:
        path.symlink_to("nowhere")
    elif kind == 3:
        path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/dev/tty", "/proc/self/mem"]))
    elif kind == 4:
        path.mkdir()
    elif kind == 5:
        with socket.socket(socket.AF_UNIX) as server:
            here = Path.cwd()
            os.chdir(path.parent)  # the address of a socket is short
            try:
                server.bind(path.name)
            finally:
                os.chdir(here)
    elif kind == 6:
        path.write_bytes(b"")
    # else it is gone


def another_kind_of_labels(rng: random.Random, root: Path) -> None:
    replaced(rng, labels(rng, root))


def another_kind_of_image(rng: random.Random, root: Path) -> None:
    replaced(rng, picture(rng, root))


def noise(rng: random.Random) -> bytes:
    """A small image file of any format, with a few other bytes or an early end."""
    form = rng.choice(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "EPS", "ICO"])
    buffer = io.BytesIO()
    size = (rng.randint(1, 40), rng.randint(1, 40))
    mode = rng.choice(["L", "RGB", "RGBA", "P", "I;16"] if form in ("PNG", "TIFF") else ["L", "RGB"])
    Image.effect_noise(size, 50).convert(mode).save(buffer, form)
    content = bytearray(buffer.getvalue())
    for _ in range(rng.randint(0, 6)):
        at = rng.randrange(min(len(content), rng.choice([40, 200, len(content)])))
        content[at] = rng.randrange(256)
    if (
        form == "TIFF"
        and (at := content.find(struct.pack("<H", rng.choice([256, 258, 259, 273, 279])), 8)) > 0
    ):
        content[at + 2] = rng.randrange(14)  # the type of a tag
    if rng.random() < 0.3:
        del content[rng.randrange(len(content)) :]
    return bytes(content)


def damaged_image(rng: random.Random, root: Path) -> None:
    path = picture(rng, root)
    if path.is_file() and not path.is_symlink():
        path.write_bytes(noise(rng))


def another_name(rng: random.Random, root: Path) -> None:
    """A second image of an id, a case, a suffix, a blank, another Unicode form."""
    path = picture(rng, root)
    stem, suffix = path.stem, path.suffix
    name = rng.choice(
        [
            f"{stem}.png",
            f"{stem}.JPG",
            f"{stem}.jpeg",
            f"{stem}.tif",
            f"{stem} .jpg",
            f"{stem.upper()}{suffix}",
            f"{stem}\u0301.jpg",
            f"._{path.name}",
            f"{stem}{suffix}.part",
            ".jpg",
        ]
    )
    if path.is_file() and rng.random() < 0.5:
        shutil.copy(path, path.with_name(name))
    elif not path.with_name(name).exists():
        path.rename(path.with_name(name))


def another_folder(rng: random.Random, root: Path) -> None:
    split = rng.choice(sorted(data_splits(root)))
    target = root / rng.choice([f"{split}_images", f"{split}/{split}", f"images/{split}"])
    if target.exists():
        return
    if rng.random() < 0.3:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(root / split)
    else:
        target.mkdir(parents=True)
        for path in (root / split).iterdir():
            if path.is_file() and path.stat().st_size and rng.random() < 0.9:
                shutil.copy(path, target / path.name, follow_symlinks=False)


DAMAGES: tuple[Damage, ...] = (
    some_bytes,
    some_lines,
    another_encoding,
    another_separator,
    another_kind_of_labels,
    another_kind_of_image,
    damaged_image,
    another_name,
    another_folder,
)


def draw(rng: random.Random, root: Path) -> str:
    """A small whole set in one of the layouts, with a test split or without; returns the layout."""
    root.mkdir()
    layout = rng.choice(["imageclef2023", "imageclef2024", "rocov2"])
    if layout == "imageclef2023":
        write_2023(root, ROWS, rng.choice(["\n", "\r\n"]))
    else:
        write_comma(root, ROWS, ("train", "valid", "test")[: rng.choice([2, 3])])
    if not (root / "test").exists() and rng.random() < 0.8:
        (root / "test").mkdir()
        for n in range(3):
            (root / "test" / f"test_{n}.jpg").touch()
        if rng.random() < 0.5:
            (root / "test_ids.csv").write_text("ID\ntest_0\ntest_1\ntest_2\n")
    for number, path in enumerate(sorted(root.glob("*/*.jpg"))):
        Image.new("L", (8, 8), number * 10).save(path)
    return layout


@pytest.fixture
def alarm():
    """A case that takes too long fails where it waits."""

    def late(*_):
        raise AssertionError(f"waits for more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    yield lambda: signal.alarm(SECONDS)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def listed(root: Path, split: str) -> set[str]:
    """The ids that stand first on the lines of a split's captions, or ids, as plain text tells them."""
    for name in (f"*caption*{split}_labels.csv", f"{split}_captions.csv", f"{split}_ids.csv"):
        for path in root.glob(name):
            text = path.read_text(encoding="utf-8-sig")
            if "labels" in path.name:
                rows = [line.removesuffix("\r").split("\t") for line in text.split("\n")]
            else:
                before = csv.field_size_limit(1 << 30)  # a caption may be as long as it likes
                rows = list(csv.reader(io.StringIO(text, newline="")))
                csv.field_size_limit(before)
            return {row[0].strip() for row in rows if row} - {"", "ID"}
    return set()


def loaded(config: DataConfig, work: Path) -> data.Dataset | None:
    try:
        return data.load(config, work)
    except UserError:
        return None


@pytest.mark.ci
def test_any_damage_ends_in_a_report_or_a_whole_split(tmp_path, alarm):
    """With `skip_bad` no id of validation and test is lost that has an image and a caption row."""
    passed = refused = 0
    for seed in range(cases(60)):
        rng = random.Random(seed)
        root = tmp_path / f"{seed}"
        alarm()
        layout = draw(rng, root)
        whole = {path.stem for split in ("valid", "test") for path in root.glob(f"{split}/*.jpg")}
        for spoil in rng.choices(DAMAGES, k=rng.randint(1, 3)):
            with contextlib.suppress(
                IndexError, ValueError, OSError
            ):  # nothing is left that could be damaged so
                spoil(rng, root)
        for skip in (False, True):
            config = DataConfig(root=root, layout=layout, skip_bad=skip)
            problems = data.check(config, tmp_path / "runs")
            assert all(problem.what and "Traceback" not in problem.what for problem in problems)
            found = loaded(config, tmp_path / "runs")
            if found is None:
                refused += 1
                assert problems, seed
                continue
            passed += 1
            assert skip or not problems, seed
            assert all(example.trains for example in found.splits["train"]), seed
            for split in ("valid", "test"):
                ids = [example.id for example in found.splits[split]]
                assert len(set(ids)) == len(ids), seed
                assert listed(root, split) & whole <= set(ids), seed
        signal.alarm(0)
        shutil.rmtree(root)
    assert passed > refused / 20


def words(content: bytes) -> str:
    try:
        decode(content)
    except DAMAGE as error:
        return damage(error)
    return "whole"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_bytes_are_an_image_or_told_in_words(alarm):
    found = []
    for seed in range(cases(300)):
        alarm()
        found.append(words(noise(random.Random(seed))))
    assert "whole" in found
    assert all(text.startswith(("whole", "not a whole image: ", "too large: ")) for text in found)
