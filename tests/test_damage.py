"""Altered files under runs/ are noticed, named and made again; undamaged ones are kept."""

import hashlib
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness import records
from harness.data.images import open_pixels, resize, unbuilt
from harness.data.listing import Example
from harness.errors import UserError
from harness.models import checkpoints
from harness.records.files import Candidate
from harness.store import (
    DONE,
    damage,
    damage_of,
    fingerprint,
    is_done,
    once,
    products,
    read_checked,
    seal,
    step_directory,
    write_checked,
)
from harness.training.resume import BEST, FINISHED, LOSSES, Checkpoints, State, rows_of

NOTES = ["inputs.json", "read.json"]


def flip(file: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


class Built:
    """A step that writes two files, and how often it was built, with what it found."""

    def __init__(self, root: Path, text: str = "captions") -> None:
        self.root, self.text, self.found = root, text, []

    def __call__(self, made_from: dict[str, str] | None = None) -> Path:
        directory = step_directory(self.root, "predict", {"a": 1})
        once(directory, {"a": 1}, self._build, made_from)
        return directory

    def _build(self, directory: Path) -> bool:
        self.found.append(sorted(path.name for path in directory.iterdir()))
        (directory / "predictions.csv").write_text(self.text)
        (directory / "made.json").write_text("{}")
        return True


@pytest.mark.parametrize("how", ["bit", "short", "gone", "folder", "pipe"])
def test_a_damaged_step_is_built_again_from_what_is_whole(tmp_path, how):
    build = Built(tmp_path)
    file = build() / "predictions.csv"
    content = file.read_bytes()
    if how == "bit":
        flip(file)
    elif how == "short":
        file.write_bytes(content[:-1])
    else:
        file.unlink()
        _ = {"folder": file.mkdir, "pipe": lambda: os.mkfifo(file), "gone": lambda: None}[how]()
    assert list(damage(file.parent)) == ["predictions.csv"]
    assert is_done(file.parent) == (how == "bit")  # sizes alone are looked at
    build()
    assert file.read_bytes() == content
    assert build.found == [NOTES, sorted([*NOTES, "made.json"])]
    assert damage(file.parent) == {}


def test_files_besides_and_a_second_call_change_nothing(tmp_path):
    build = Built(tmp_path)
    (build() / "notes.txt").write_text("mine")
    build()
    assert len(build.found) == 1


@pytest.mark.parametrize("how", ["bit", "emptied", "a folder"])
def test_a_step_whose_seal_is_damaged_is_built_again(tmp_path, how):
    build = Built(tmp_path)
    directory = build()
    if how == "bit":
        flip(directory / DONE)
    elif how == "emptied":
        (directory / DONE).write_text("")
    else:
        (directory / DONE).unlink()
        (directory / DONE).mkdir()
    assert not is_done(directory)
    assert list(damage(directory)) == [DONE]
    assert "DONE beside it" in damage_of(directory / "predictions.csv")
    build()
    assert is_done(directory)
    assert build.found == [NOTES, NOTES]  # nothing vouches for the files that were there


def test_an_interrupted_step_goes_on_only_from_what_was_made_of_the_same_files(tmp_path):
    found = []

    def interrupted(directory: Path) -> bool:
        found.append(sorted(path.name for path in directory.glob("partial-*")))
        (directory / f"partial-{len(found)}.jsonl").write_text("captions")
        return False

    directory = step_directory(tmp_path, "predict", {"a": 1})
    for weights in ("1", "1", "2"):
        once(directory, {"a": 1}, interrupted, {"train-1/best.safetensors": weights * 64})
    assert found == [[], ["partial-1.jsonl"], []]


def test_a_step_that_read_other_files_is_built_from_nothing(tmp_path):
    build = Built(tmp_path)
    before = {"train-1/best.safetensors": "1" * 64}
    directory = build(before)
    assert is_done(directory, before)
    assert is_done(directory, {})  # what an earlier version made is not known
    after = {"train-1/best.safetensors": "2" * 64}
    assert not is_done(directory, after)
    build(after)
    assert build.found == [NOTES, NOTES]
    assert products(directory, ["predictions.csv"]).keys() == {f"{directory.name}/predictions.csv"}


def test_captions_of_an_interrupted_step_are_kept_only_as_they_were_written(tmp_path):
    from harness.decoding import predict

    def row(image, caption, digest=None):
        found = [["beam1", -1.5, caption]]
        return json.dumps([image, found, digest or fingerprint([image, found])]).encode()

    altered = row("b", "large mass", fingerprint(["b", [["beam1", -1.5, "large masr"]]]))
    odd = [b"5", b"null", b'"abc"', b'["a", "an older version"]', b'{"a": 1, "b": 2, "c": 3}', b"[" * 99_999]
    lines = [row("a", "mass"), altered, *odd, row("c", "no mass")[:-9], row("d", "é").replace(b"d", b"\xff")]
    (tmp_path / "partial-0.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "partial-1.jsonl").mkdir()
    os.mkfifo(tmp_path / "partial-2.jsonl")
    assert predict._read_partials(tmp_path) == {"a": ([Candidate("mass", 1.0, -1.5, "beam1")], None)}


def test_large_files_are_read_only_when_asked(tmp_path, monkeypatch):
    build = Built(tmp_path)
    flip(build() / "predictions.csv")
    monkeypatch.setattr("harness.store.LARGE", 3)
    directory = next((tmp_path / "steps").glob("predict-*[!k]"))
    assert damage(directory, thorough=False) == {}
    assert list(damage(directory)) == ["predictions.csv"]


@pytest.mark.parametrize("content", ["", "{", "null", "[1]", '{"checksum": "x", "value": 1}', "[" * 99_999])
def test_a_value_with_another_checksum_is_none(tmp_path, content):
    file = write_checked(tmp_path / "a.json", {"a": [1, "ü"]})
    assert read_checked(file) == {"a": [1, "ü"]}
    file.write_text(content)
    assert read_checked(file) is None


def test_a_training_whose_weights_or_losses_are_gone_starts_anew(tmp_path):
    checkpoints_, state = Checkpoints(tmp_path, 2), State(stage=3, done=4, step=9)
    (tmp_path / BEST).write_bytes(b"x")
    (tmp_path / LOSSES).write_text("")
    assert checkpoints_.newest() == State()
    (tmp_path / FINISHED).write_text(json.dumps(vars(state)))
    assert checkpoints_.newest() == state
    (tmp_path / LOSSES).unlink()
    assert checkpoints_.newest() == State()
    for content in ("", "[]", '{"stage": "3"}', '{"stage": 3, "other": 1}', "\xff"):
        (tmp_path / LOSSES).write_text("")
        (tmp_path / FINISHED).write_text(content)
        assert checkpoints_.newest() == State()


def test_lines_of_losses_that_can_not_be_read_are_left_out(tmp_path):
    file = tmp_path / LOSSES
    file.write_bytes(b'{"step": 1, "loss": 2}\n\xff\xfe\n[]\n{"step": "2"}\n{"loss": 1}\n{"step": 3, "lo')
    assert list(rows_of(file)) == [{"step": 1, "loss": 2}]


GOOD = {
    "name": "a/b",
    "status": "FINISHED",
    "edition": 2023,
    "command": "harness run x.yaml",
    "config": {},
    "artifacts": {"predictions/test_after.csv": "steps/x/predictions.csv"},
}
BAD = {
    "no mapping": [],
    "name": {"name": "../x"},
    "status": {"status": "DONE"},
    "edition": {"edition": 1999},
    "steps": {"steps": None},
    "a step elsewhere": {"steps": {"train": "/etc"}},
    "scores": {"scores": []},
    "a score": {"scores": {"valid": {"after": {"rouge1": {"value": "x"}}}}},
    "NaN": {"scores": {"valid": {"after": {"rouge1": {"value": float("nan")}}}}},
    "when": {"started": "yesterday"},
    "the best weights": {"training": {"best": "zzz"}},
    "notes of a training": {"training": {"notes": "zzz"}},
    "quick looks": {"looks": ["zzz"]},
    "an artifact elsewhere": {"artifacts": {"x": "../../../etc/passwd"}},
    "half a pair": {"command": "\ud800"},
    "key missing": {"command": ...},
}


@pytest.mark.parametrize("case", BAD)
def test_a_record_that_can_not_be_read_is_named_and_spoils_no_other(tmp_path, case):
    change = BAD[case]
    record = (
        {k: v for k, v in (GOOD | change).items() if v is not ...} if isinstance(change, dict) else change
    )
    for name, content in (("bad-s1", record), ("good-s1", GOOD)):
        (tmp_path / "a" / "b" / name).mkdir(parents=True)
        (tmp_path / "a" / "b" / name / "run.json").write_text(json.dumps(content))
    found, left_out = records.read_all(sorted(tmp_path.rglob("run.json")))
    assert [folder.name for folder, _ in found] == ["good-s1"]
    assert [problem.file.parent.name for problem in left_out] == ["bad-s1"]
    with pytest.raises(UserError, match=r"bad-s1/run\.json: is not what a run writes"):
        records.read(tmp_path / "a" / "b" / "bad-s1")
    assert "_Run" not in str(left_out[0])  # a name of our code


def test_a_file_of_a_run_is_given_only_as_the_step_left_it(tmp_path):
    folder = tmp_path / "a" / "b" / "x-s1"
    file = tmp_path / "steps" / "x" / "predictions.csv"
    file.parent.mkdir(parents=True)
    file.write_text("ID,caption\r\na,b\r\n")
    seal(file.parent, {})
    name = "predictions/test_after.csv"
    assert records.captions(records.artifact(folder, GOOD, name), GOOD) == {"a": "b"}
    flip(file)
    with pytest.raises(UserError, match="not what the step left: its SHA-256 differs") as error:
        records.artifact(folder, GOOD, name)
    assert GOOD["command"] in str(error.value)


@pytest.fixture
def examples(tmp_path) -> list[Example]:
    found = []
    for n in range(5):
        path = tmp_path / f"{n}.png"
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
        found.append(Example(f"{n}", path, None, (), n))
    return found


def truth(examples: list[Example]) -> np.ndarray:
    return np.stack([resize(Image.open(example.image), 16) for example in examples])


@pytest.mark.parametrize("keep", [0, 1, 100, 2_000, -4])
def test_a_pixel_cache_that_is_cut_short_is_built_anew(examples, tmp_path, keep):
    open_pixels(examples, 16, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.npy")
    file.write_bytes(file.read_bytes()[:keep])
    assert unbuilt(examples, 16, tmp_path / "cache") == 5 * 16 * 16 * 3
    assert np.array_equal(open_pixels(examples, 16, tmp_path / "cache")[np.arange(5)], truth(examples))


def test_a_changed_bit_of_a_pixel_cache_costs_one_image(examples, tmp_path):
    open_pixels(examples, 16, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.npy")
    whole = file.read_bytes()
    for place in (-20 - 700, -3):  # in a pixel, and in a checksum
        content = bytearray(whole)
        content[place] ^= 1
        file.write_bytes(content)
        pixels = open_pixels(examples, 16, tmp_path / "cache")
        assert np.array_equal(pixels[[4, 0, 4]], truth(examples)[[4, 0, 4]])
        assert np.array_equal(pixels[4], truth(examples)[4])
        assert np.array_equal(pixels[1:4], truth(examples)[1:4])
        assert file.read_bytes() == whole


def test_a_damaged_pixel_cache_that_can_not_be_written_gives_the_right_pixels(
    examples, tmp_path, monkeypatch
):
    pixels = open_pixels(examples, 16, tmp_path / "cache")
    pixels.sums = pixels.sums + np.uint32(1)
    pixels.file = tmp_path / "nowhere" / "x.npy"
    assert np.array_equal(pixels[[3, 1]], truth(examples)[[3, 1]])
    assert np.array_equal(pixels[2], truth(examples)[2])


def test_a_pixel_cache_of_an_earlier_version_gets_its_checksums(examples, tmp_path):
    open_pixels(examples, 16, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.npy")
    whole, begun = file.read_bytes(), file.stat().st_ino
    file.write_bytes(whole[: -4 * 5])
    assert np.array_equal(np.load(file), truth(examples))
    assert unbuilt(examples, 16, tmp_path / "cache") == 0
    open_pixels(examples, 16, tmp_path / "cache")
    assert file.read_bytes() == whole
    assert file.stat().st_ino == begun
    assert zlib.crc32(truth(examples)[0]) == int.from_bytes(whole[-20:-16], "little")


def test_known_hashes_of_weights_that_are_damaged_are_made_again(tmp_path, monkeypatch):
    weights = tmp_path / "a.safetensors"
    weights.write_bytes(b"weights")
    os.utime(weights, (1, 1))
    told = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(checkpoints, "_SETTLED", 0)  # else so new a file is not remembered
    assert checkpoints.sha256(weights, tmp_path) == told
    kept = tmp_path / "weights.json"
    for content in (kept.read_text().replace(told, told[::-1]), "{", "[]", '{"a": 1}'):
        kept.write_text(content)
        checkpoints._hashed.clear()
        assert checkpoints.sha256(weights, tmp_path) == told


ENDS = """
import sys
from harness import cli
@cli.app.command()
def ends():
    raise {error}
sys.argv = ["harness", "ends"]
cli.main()
"""


@pytest.mark.parametrize(
    ("error", "code"),
    [("EOFError('no data left in file')", 1), ("KeyboardInterrupt", 130), ("StopIteration", 1)],
)
def test_only_an_interruption_is_one(error, code):
    done = subprocess.run([sys.executable, "-c", ENDS.format(error=error)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("interrupted" in done.stderr) == (code == 130)
    assert error.partition("(")[0] in done.stderr or code == 130


@pytest.mark.parametrize("name", ["mlflow.json", "study.json"])
def test_a_pipe_in_place_of_bookkeeping_is_not_waited_for(tmp_path, name):
    from harness.tracking.bookkeeping import mirrored_as
    from harness.tracking.server import read_study

    os.mkfifo(tmp_path / name)
    assert mirrored_as(tmp_path / "x-s1") == {}
    assert read_study(tmp_path) is None
