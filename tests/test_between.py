"""What an experiment's table says of differences between its runs."""

import json
import shutil
from pathlib import Path

import pytest

from harness.cli import between
from harness.scoring import compare


@pytest.fixture
def records(small_run, tmp_path, monkeypatch) -> list[dict]:
    unneeded = shutil.ignore_patterns("cache", "checkpoints")
    shutil.copytree(small_run / "kept" / "runs", tmp_path / "runs", ignore=unneeded)
    monkeypatch.chdir(tmp_path)
    files = sorted(Path("runs/small").glob("*/run.json"))
    return [json.loads(file.read_text()) for file in files]


def test_each_variant_is_compared_with_the_one_before_it(records):
    lines = list(between.described(records))
    names = [f"{record['variant']}-s{record['seed']}" for record in records]
    assert f"  {names[0]} -> {names[1]}" in lines
    systems = [compare.read_run(Path("runs/small") / name, name) for name in names[:2]]
    found = {one.metric: one for one in compare.compare(systems, ["bertscore", "rouge1"])}
    for metric, one in found.items():
        start = f"    {metric} {one.difference:+.4f} [{one.low:+.4f}, {one.high:+.4f}] "
        assert any(line.startswith(start) for line in lines)
    assert "up to 0.05" in lines[-1]


def test_one_run_has_nothing_to_be_compared_with(records):
    assert list(between.described(records[:1])) == []


def test_the_best_run_is_the_first_to_look_at(records):
    scores = [record["scores"]["valid"]["after"]["bertscore"]["value"] for record in records]
    assert between.best(records)["variant"] == records[scores.index(max(scores))]["variant"]


def test_scores_that_are_gone_are_said(records):
    for file in Path("runs/steps").glob("score-*/arrays.npz"):
        file.unlink()
    assert any("not compared: " in line for line in between.described(records))
