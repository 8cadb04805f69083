"""No table cuts a number, on a terminal of any width; where nobody watches, no row is folded."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len
from support.reports import captions, record, score, write_run

from harness.cli import compare, concepts, leaderboard, tables
from harness.cli.widths import Column, Row, Sheet
from harness.metrics import Score
from harness.output.visible import console
from harness.scoring.compare import Difference, System

ROOT = Path(__file__).parents[1]
WIDTHS = (60, 80, 120)
METRICS = ("bertscore", "rouge1", "bleurt", "bleu1", "meteor", "cider", "cider_ptb", "clipscore")
NUMBER = re.compile(r"[+-]?\d+\.\d{4}")
GAP = {"rouge1": {"gap": 0.3130, "low": 0.2752, "high": 0.3520}}


@pytest.fixture(params=WIDTHS)
def width(request, monkeypatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


def runs(count: int = 4) -> list[dict]:
    names = ("qformer_224", "opt_224", "opt_364", "opt_364_dedup")
    after = {name: score(0.1234 + place / 10, official=False) for place, name in enumerate(METRICS)}
    found = [record(name, scores={"valid": {"after": after}}, image_gap=GAP) for name in names[:count]]
    return [one | {"baseline": None, "warnings": []} for one in found]


def numbers(text: str) -> list[str]:
    return sorted(NUMBER.findall(text))


def fits(text: str, width: int) -> None:
    """Nothing is cut, and the rows of tables are no wider than the terminal."""
    assert "…" not in text
    assert not re.search(r"\d\.\d*\.\.\.", text)
    for line in text.splitlines():
        if line[:1] in "┏┃┡│├└" or line.startswith("  b"):
            assert cell_len(line) <= width, line


def test_a_name_is_folded_after_a_sign_and_an_empty_column_is_left_out(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "55")
    columns = [Column("run"), Column("differs by", 0, text=True), Column("why", 1, text=True)]
    row = Row(["quickstart/qformer_224-s42", "model.language_model=false, seed=1", ""])
    Sheet("t", columns, [row]).show(console())
    text = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line[0] == "│"]
    first, second = ([cell for cell in column if cell] for column in zip(*cells, strict=True))
    assert [*first] == ["quickstart/qformer_224-", "s42"]
    assert "".join(second).replace(" ", "") == "model.language_model=false,seed=1"
    assert all(part[-1] in "=,._" for part in second[:-1])
    assert "why" not in text


def test_the_scores_of_runs_are_all_there(width, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tables.show(runs())
    text = capsys.readouterr().out
    fits(text, width)
    every = [f"{0.1234 + place / 10:.4f}" for place in range(len(METRICS))]
    every += ["+0.3130", "+0.2752", "+0.3520"]
    assert numbers(text.partition("\n*")[0]) == sorted(every * 4)
    table = text[: text.index("└")]
    assert all(f"{0.1234 + place / 10:.4f}*" in table for place in (0, 1))  # primary and second
    assert ("[+0.2752, +0.3520]" in table) == (width >= 80)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({}, "it predicts test alone"),
        ({"unscored": {"valid": "trained on validation images"}}, "trained on validation images"),
    ],
)
def test_a_run_without_scores_on_validation_has_no_table(capsys, tmp_path, monkeypatch, more, why):
    monkeypatch.chdir(tmp_path)
    (run,) = runs(1)
    config = run["config"] | {"predict": {"splits": ["test"]}}
    tables.show([run | {"scores": {}, "image_gap": None, "config": config} | more])
    text = capsys.readouterr().out
    assert f"{run['name']}: no scores on validation: {why}" in text
    assert "validation scores" not in text
    assert "Ranking" not in text


def test_a_comparison_is_all_there(width, capsys):
    labels = ("qformer_224-s42", "opt_224-s42", "opt_364_dedup-s42")
    scores = {m: Score(m, 0.5, 0.4, 0.6, 100, "a|b", True, 0.0) for m in METRICS[:3]}
    systems = [System(label, ["1"] * 100, "x", scores) for label in labels]
    found = [
        Difference(m, a, b, 0.1234, 0.0567, 0.1891, 0.0002, 0.0004, True)
        for m in METRICS[:3]
        for a, b in ((labels[0], labels[1]), (labels[0], labels[2]), (labels[1], labels[2]))
    ]
    compare._print(systems, found, 9_999, None)
    text = capsys.readouterr().out
    fits(text, width)
    head = text.partition("\nhigher, lower:")[0]
    own, gaps = ["0.5000", "0.4000", "0.6000"], ["+0.1234", "+0.0567", "+0.1891"]
    assert numbers(head) == sorted([*own, *gaps, "0.0002", "0.0004"] * 9)
    assert " ".join(head.split()).count("higher") == 9


def test_the_standings_are_all_there(width, capsys, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "leaderboard", tmp_path / "leaderboard")
    monkeypatch.chdir(tmp_path)
    for one in runs():
        write_run(tmp_path, one, captions(3))
    monkeypatch.setenv("COLUMNS", "500")
    leaderboard.leaderboard(edition=2023)
    whole = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", str(width))
    leaderboard.leaderboard(edition=2023)
    text = capsys.readouterr().out
    fits(text, width)
    assert numbers(text) == numbers(whole)
    assert len(numbers(whole)) > 60


def test_concepts_are_all_there(width, capsys):
    found = {"f1": score(0.5, official=True), "f1_secondary": score(0.6)}
    held = {"f1": score(0.4)}
    paired = {"most frequent": {"held": {"difference": 0.3, "low": 0.2, "high": 0.4}}}
    base = {"most frequent": score(0.1) | {"held": score(0.1)}}
    described = {"scores": {"valid": found}, "halves": {"held": held}, "paired": paired, "baselines": base}
    concepts.table([record() | {"concepts": described}]).show(console())
    text = capsys.readouterr().out
    fits(text, width)
    assert len(numbers(text)) == 18


def test_nothing_is_folded_where_nobody_watches(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    columns = [Column("run"), *(Column(f"metric{n}") for n in range(40))]
    Sheet("title", columns, [Row(["a run", *["0.1234*"] * 40])]).show(console())
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "a run" in line]
    assert row.count("0.1234*") == 40


def test_names_fold_before_numbers_go(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    rows = [Row(["x" * 90, "+0.1234 [+0.1111, +0.2222]", "long words of a note"])]
    Sheet("t", [Column("run"), Column("score", 0), Column("note", 1, text=True)], rows).show(console())
    text = capsys.readouterr().out
    fits(text, 60)
    assert text.partition("└")[0].count("x") == 90
    assert "[+0.1111, +0.2222]" in text


def test_a_column_that_never_fits_is_in_a_block(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "30")
    rows = [Row(["run", "+0.1234 [+0.1111, +0.2222] and more"]), Row(["none", "-"])]
    Sheet("t", [Column("run"), Column("score", 0)], rows).show(console())
    text = capsys.readouterr().out
    assert numbers(text) == ["+0.1111", "+0.1234", "+0.2222"]
    assert all(len(line) <= 30 for line in text.splitlines())


@pytest.mark.slow
def test_a_real_terminal_gives_its_own_width(tmp_path):
    code = (
        "import fcntl, os, pty, struct, sys, termios\n"
        "pid, out = pty.fork()\n"
        "if pid == 0:\n"
        f"    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])\n"
        "fcntl.ioctl(out, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 60, 0, 0))\n"
        "text = b''\n"
        "while True:\n"
        "    try:\n"
        "        part = os.read(out, 4096)\n"
        "    except OSError:\n"
        "        break\n"
        "    if not part: break\n"
        "    text += part\n"
        "sys.stdout.buffer.write(text)\n"
    )
    shutil.copytree(ROOT / "leaderboard", tmp_path / "leaderboard")
    plain = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    environment = plain | {"TERM": "xterm", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, "-m", "harness", "leaderboard", "--edition", "2023"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        timeout=120,
    )
    text = re.sub(r"\x1b\[[0-9;]*m|\r", "", done.stdout.decode())
    fits(text, 60)
    assert "0.6425" in text
    assert "0.7978" not in text.partition("└")[0]
