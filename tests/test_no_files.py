"""Things in place of a file, such as a FIFO: they are reported, and nothing hangs."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import small_sets
from support.commands import harness
from support.small_sets import CAPTIONS, CONCEPTS, config, one, problems

from harness import data, scoring
from harness.data.captionfiles import read_ids, read_predictions
from harness.data.images import DAMAGE, damage, decode
from harness.errors import UserError
from harness.submission import check

whole, root = small_sets.whole, small_sets.root  # fixtures


def fifo(path: Path) -> str:
    os.mkfifo(path)
    return "a FIFO"


def device(path: Path) -> str:
    path.symlink_to("/dev/zero")
    return "a device"


def loop(path: Path) -> str:
    path.symlink_to(path.name)
    return "a link that leads back to itself"


def nowhere(path: Path) -> str:
    path.symlink_to("nowhere")
    return "a link to nothing"


def directory(path: Path) -> str:
    path.mkdir()
    return "a folder"


def listener(path: Path) -> str:
    before = Path.cwd()
    os.chdir(path.parent)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(before)
    return "a socket"


KINDS = [fifo, device, loop, nowhere, directory, listener]


@pytest.fixture
def alarm():
    def late(*_):
        raise AssertionError("waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("make", KINDS)
def test_an_image_that_is_no_file_is_told_and_nothing_waits(root, tmp_path, alarm, make):
    image = root / "test" / "phantom_test_000002.jpg"
    image.unlink()
    what = make(image)
    assert what in one(root, tmp_path)[2]
    found = data.load(config(root, skip_bad=True), tmp_path / "runs")
    assert [e.id for e in found.unreadable("test")] == [image.stem]
    with pytest.raises(DAMAGE) as caught:
        decode(image)
    assert what in damage(caught.value)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("name", [CAPTIONS.format("valid"), CONCEPTS.format("train"), "test_ids.csv"])
def test_a_label_file_that_is_no_file_is_told_and_nothing_waits(root, tmp_path, alarm, make, name):
    (root / name).unlink()
    what = make(root / name)
    assert (name, None, f"can't be read: it is {what}") in [
        (file, line, text.removesuffix(", not a file")) for file, line, text in problems(root, tmp_path)
    ]


@pytest.mark.parametrize("make", KINDS)
def test_nor_does_scoring_or_a_submission_wait(tmp_path, alarm, make):
    what = make(tmp_path / "odd.csv")
    (tmp_path / "r.csv").write_text("ID\tcaption\na\tx\n")
    if make is not directory:  # which is taken for a run's
        with pytest.raises(UserError, match=what):
            scoring.rows(tmp_path / "odd.csv", tmp_path / "r.csv")
        with pytest.raises(UserError, match=what):
            read_predictions(tmp_path / "odd.csv")
    with pytest.raises(UserError, match=what):
        scoring.rows(tmp_path / "r.csv", tmp_path / "odd.csv")
    with pytest.raises(UserError, match=what):
        read_ids(tmp_path / "odd.csv")
    (problem,) = check(tmp_path / "odd.csv", ["a"], 2023)
    assert what in problem.what
    (tmp_path / "images").mkdir()
    make(tmp_path / "images" / "a.jpg")
    with pytest.raises(UserError, match=what):
        scoring.rows(tmp_path / "r.csv", tmp_path / "r.csv", tmp_path / "images")


@pytest.mark.ci
def test_a_pipe_that_something_writes_to_is_read(tmp_path):
    (tmp_path / "p.csv").write_text("".join(f"b{n}|{'z' * 50}\n" for n in range(5_000)))
    inputs = "<(sleep 0.2; cat p.csv) --references <(cat p.csv)"
    command = f"{sys.executable} -m harness score {inputs} --metrics rouge1"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "n=5000" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["score", "r.csv", "--references", "r.csv", "--metrics", "rouge1", "--per-image", "circle"],
        ["submission", "make", "r.csv", "--ids", "r.csv", "--edition", "2026", "--out", "circle"],
        ["compare", "circle", "r.csv", "--references", "r.csv"],
        ["init", "circle"],
    ],
)
def test_a_link_that_leads_back_to_itself_is_one_line_wherever_it_stands(tmp_path, command):
    """pathlib before Python 3.13 raises a RuntimeError for it."""
    (tmp_path / "r.csv").write_text("ID,Caption\na,x\nb,y\n")
    loop(tmp_path / "circle")
    said = harness(tmp_path, *command, code=2 if "make" in command else 1).stderr
    assert "error: " in said
    assert "Too many levels of symbolic links" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("place", ["/proc/made", "/sys/made", "captions.csv/made", "LOOP", "x" * 300])
def test_a_folder_that_cannot_be_made_is_said_before_the_work(place, tmp_path):
    (tmp_path / "captions.csv").write_text("a|x\n")
    (tmp_path / "ids.txt").write_text("a\n")
    (tmp_path / "LOOP").symlink_to("LOOP")
    files = ("captions.csv", "--edition", "2023", "--ids", "ids.txt")
    make = harness(tmp_path, "submission", "make", *files, "--out", f"{place}/new", code=2)
    draw = harness(tmp_path, "data", "phantom", f"{place}/new", code=2)
    assert "--out: can't be written: " in make.stderr
    assert "FOLDER: can't be written: " in draw.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"captions.csv", "ids.txt", "LOOP"}
