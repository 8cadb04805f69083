"""Damaged files of runs: commands answer with a message, and the run is repaired.

It is seeded; `HARNESS_FUZZ_CASES=2000` tries 2000 cases. A case damages files of a finished run and calls
commands in this process, like a user after a power cut or with a bad disk.
"""

import io
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from support.commands import mirror_by_server
from support.experiments import EXPERIMENT
from support.fuzzing import cases

from harness import cli

READERS = (
    ["report", "runs/small/opt-s42"],
    ["leaderboard", "--format", "json"],
    ["compare", "runs/small/opt-s42", "runs/small/opt_dedup-s42", "--resamples", "99"],
    ["submission", "make", "runs/small/opt-s42", "--out", "made"],
    ["run", "small.yaml", "--dry-run"],
)
RUN = ["run", "small.yaml"]
WEIGHTS = ("tiny-", "standin-", "train-")
"""The beginnings of the folders of steps whose weights a finished run can do without."""
LIMIT = 600  # seconds for one command, on a machine that others use
OTHER_JSON = (b"null", b"[]", b"{}", b"7", b'"text"', b"[[[]]]", b'{"a": NaN}', b"[" * 100_000, b"\xff\xfe{")


@pytest.fixture(scope="module")
def project(small_run, tmp_path_factory) -> Path:
    """A finished run of two variants that share their training."""
    folder = tmp_path_factory.mktemp("small") / "project"
    shutil.copytree(small_run / "kept", folder)
    (folder / "small.yaml").write_text(EXPERIMENT)
    return folder


def files_of(project: Path) -> list[Path]:
    """The files under runs/ that may be damaged, seen from the project."""
    found = sorted(file.relative_to(project) for file in (project / "runs").rglob("*") if file.is_file())
    return [file for file in found if file.suffix not in (".lock", ".log", ".html")]


def flip(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) * 8) if content else 0
    changed = bytearray(content or b"x")
    changed[at // 8] ^= 1 << at % 8
    return bytes(changed)


def other_type(content: bytes, draw: random.Random) -> bytes:
    """JSON with one value, somewhere inside, dropped or of another type; other text as it is, in part."""
    try:
        value = json.loads(content)
    except ValueError:
        return (
            content[: draw.randrange(len(content) + 1)]
            + b"\0,;|\n"
            + content[draw.randrange(len(content) + 1) :]
        )
    place = value
    while isinstance(place, dict | list) and place:
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], dict | list) or not place[key] or draw.random() < 0.4:
            if isinstance(place, dict) and draw.random() < 0.3:
                del place[key]
            else:
                place[key] = draw.choice(
                    [None, True, -1, 1e300, "", "x/../../y", "2026", [], {}, [1], {"a": 1}]
                )
            break
        place = place[key]
    return json.dumps(value).encode()


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "emptied": lambda content, draw: b"",
    "cut short": lambda content, draw: content[: draw.randrange(len(content) + 1)],
    "one bit": flip,
    "zeros": lambda content, draw: bytes(len(content)),
    "noise": lambda content, draw: draw.randbytes(len(content)),
    "longer": lambda content, draw: content + draw.randbytes(9),
    "other JSON": lambda content, draw: draw.choice(OTHER_JSON),
    "another type": other_type,
}


WAYS = (*DAMAGES, "gone", "a folder", "a pipe")


def damage(folder: Path, file: Path, draw: random.Random, how: str) -> str:
    """Damage a file in one of `WAYS` -> what was done."""
    path = folder / file
    content = path.read_bytes()
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how == "a pipe":
        os.mkfifo(path)
    elif how != "gone":
        path.write_bytes(DAMAGES[how](content, draw))
    return f"{file}: {how}"


def say(folder: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process; `TimeoutError` where it hangs."""

    def late(*_):
        raise TimeoutError

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["harness", *arguments])
    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = end.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return code or 0, out.getvalue(), err.getvalue()


@pytest.mark.ci
def test_no_damage_ends_in_a_traceback_and_none_spoils_a_neighbour(project, tmp_path, monkeypatch):
    files = files_of(project)
    for case in range(cases(len(WAYS))):
        draw, folder = random.Random(case), tmp_path / str(case)
        shutil.copytree(project, folder, ignore=shutil.ignore_patterns("mlartifacts", "mlflow.db"))
        ways = [WAYS[case % len(WAYS)], *draw.choices(WAYS, k=draw.choice([0, 0, 0, 2]))]
        hurt_files = draw.sample(files, len(ways))
        done = [damage(folder, file, draw, how) for file, how in zip(hurt_files, ways, strict=True)]
        for command in READERS:
            code, out, err = say(folder, command, monkeypatch)
            assert "Traceback" not in err, (case, done, command, err)
            assert code in (0, 1, 2, 3), (case, done, command, code, err)
            if command[0] == "leaderboard":
                assert code == 0, (case, done, err)
                told = {run["run"] for board in json.loads(out) for run in board["runs"]}
                hurt = {
                    run for run in ("opt-s42", "opt_dedup-s42") if any(f"/{run}/run.json" in d for d in done)
                }
                assert told | hurt == {"opt-s42", "opt_dedup-s42"}, (case, done)
                for run in {"opt-s42", "opt_dedup-s42"} - told:
                    assert f"runs/small/{run}/run.json" in err, (case, done, told, err)
        shutil.rmtree(folder)


def outcome(folder: Path) -> dict[str, object]:
    """What a run is for: the captions, and the scores without the seconds that they took."""
    found: dict[str, object] = {}
    for file in sorted(folder.glob("runs/steps/p*/predictions.csv")):
        found[file.parent.name] = file.read_text()
    for file in sorted(folder.glob("runs/steps/score-*/scores.json")):
        scores = json.loads(file.read_text())["scores"]
        found[file.parent.name] = {name: round(one["value"], 6) for name, one in scores.items()}
    return found


@pytest.mark.ci
def test_the_same_command_makes_whole_what_was_damaged(project, tmp_path, monkeypatch):
    """A rebuilt step gives the same captions and scores, and a line says which file was not what it was."""
    wanted, files = outcome(project), files_of(project)
    files = [file for file in files if "steps" in file.parts or "cache" in file.parts or "data" in file.parts]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project / 'mlflow.db'}")
    mirror_by_server(monkeypatch)
    for case in range(max(1, cases(20) // 10)):
        draw, folder = random.Random(f"run {case}"), tmp_path / str(case)
        shutil.copytree(project, folder, ignore=shutil.ignore_patterns("mlartifacts", "mlflow.db"))
        file = draw.choice(files)
        before = (folder / file).read_bytes()
        done = damage(folder, file, draw, draw.choice(WAYS))
        changed = not (folder / file).is_file() or (folder / file).read_bytes() != before
        code, _, err = say(folder, RUN, monkeypatch)
        assert "Traceback" not in err, (case, done, err)
        assert code == 0, (case, done, err)
        assert outcome(folder) == wanted, (case, done)
        # a finished run does not need weights that are gone
        spared = not (folder / file).is_file() and file.parts[2].startswith(WEIGHTS)
        if changed and "steps" in file.parts and not spared:
            assert f"{file} has changed since the step" in err, (case, done, err)
        shutil.rmtree(folder)
