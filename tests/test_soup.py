"""Soups: the greedy choice against brute force, averages against torch, a run of one, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import harness
from support.experiments import EXPERIMENT

from harness.data.halves import TUNE, half
from harness.models.loading import load_average, trained_weights
from harness.steps import soup as step
from harness.store import products
from harness.training import soups

ONE = EXPERIMENT.replace("  opt_dedup: {postprocess: {deduplicate: true}}\n", "")
SOUP = ONE.replace("name: small", "name: soup").replace(
    "  opt: {}", "  two: {soup: {runs: [small/opt-s42, seeds/opt-s43]}}"
)
KILLED = """if True:
    import os, signal, sys
    from unittest import mock
    from harness import cli
    from harness.steps import soup
    keep = soup._keep
    soup._keep = lambda *given: (keep(*given), os.kill(os.getpid(), signal.SIGKILL))
    sys.argv = ["harness", "run", "soup.yaml"]
    with mock.patch("harness.tracking.start"):
        cli.main()
"""


# --- The choice ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_greedy_choice_is_that_of_a_plain_loop(seed):
    """Scores of averages of points; rounded, so that there are ties."""
    random = np.random.default_rng(seed)
    points, aim = random.normal(size=(5, 3)), random.normal(size=3)

    def score(members):
        return round(-float(np.abs(points[list(members)].mean(0) - aim).sum()), seed % 3)

    found = soups.greedy(5, score)
    alone = [score([n]) for n in range(5)]
    order = [n for _, n in sorted((-value, n) for n, value in enumerate(alone))]
    chosen, best, ties = order[:1], alone[order[0]], []
    for n in order[1:]:
        value = score([*chosen, n])
        ties.append(value == best)
        if value >= best:
            chosen, best = [*chosen, n], value
    assert found.members == tuple(chosen)
    assert found.alone == alone
    assert [trial.score == trial.best for trial in found.trials] == ties
    assert [trial.members[-1] for trial in found.trials] == order[1:]


def test_the_average_is_that_of_torch(loaded, tmp_path):
    own = {name: weight.clone() for name, weight in trained_weights(loaded.model).items()}
    generator = torch.Generator().manual_seed(0)
    others = [{n: torch.randn(w.shape, generator=generator) for n, w in own.items()} for _ in range(3)]
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for file, weights in zip(files, others, strict=True):
        save_file(weights, file)
    try:
        load_average(loaded.model, files)
        for name, weight in trained_weights(loaded.model).items():
            expected = (others[0][name] + others[1][name] + others[2][name]) / 3
            torch.testing.assert_close(weight, expected, atol=1e-6, rtol=0, msg=name)
        load_average(loaded.model, files[1:2])
        assert all(torch.equal(w, others[1][n]) for n, w in trained_weights(loaded.model).items())
    finally:
        with torch.no_grad():
            for name, weight in trained_weights(loaded.model).items():
                weight.copy_(own[name])
    assert soups.shapes(files[0]) == {name: list(weight.shape) for name, weight in own.items()}


# --- Runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(small_run, tmp_path_factory) -> Path:
    """The small run, and another seed of it that keeps its two best weights."""
    place = tmp_path_factory.mktemp("project")
    for name in ("data", "runs", "submissions"):
        shutil.copytree(small_run / "kept" / name, place / name)
    (place / "seeds.yaml").write_text(ONE.replace("name: small", "name: seeds"))
    harness(place, "run", "seeds.yaml", "--set", "seed=43", "--set", "train.keep_best=2")
    (place / "soup.yaml").write_text(SOUP)
    return place


def record_of(project: Path, run: str) -> dict:
    return json.loads((project / "runs" / run / "run.json").read_text())


@pytest.fixture(scope="module")
def whole(project) -> dict:
    """The record of the soup, after its first attempt was killed when one candidate was scored."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=project, env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (tried,) = project.glob("runs/steps/soup-*/tried.jsonl")
    assert len(tried.read_text().splitlines()) == 1
    done = harness(project, "run", "soup.yaml")
    said = [line for line in done.stderr.splitlines() if "bertscore 0" in line]
    assert len(said) == 4  # of five: three candidates and two averages
    return record_of(project, "soup/two-s42")


def test_a_soup_is_captioned_scored_and_submitted_like_a_training(project, whole):
    assert whole["status"] == "FINISHED"
    assert not {"train"} & set(whole["steps"])
    assert whole["scores"]["valid"]["after"]["rouge1"]["n"] == 12
    assert len(whole["submissions"]) == 2
    assert (project / "runs/soup/two-s42/report.html").exists()
    again = harness(project, "run", "soup.yaml")
    assert "soup" not in again.stderr.replace("runs/soup", "")


def test_the_record_of_a_soup_is_true(project, whole):
    """Its weights are the mean of its members, chosen by trials in the order of the scores alone."""
    found = whole["soup"]
    images = [line.split(",")[0] for line in captions_of(project, whole) if half(line.split(",")[0]) == TUNE]
    assert (found["half"], found["n"], found["metric"]) == ("tune", len(images), "bertscore")
    names = [one["name"] for one in found["candidates"]]
    assert names == ["small/opt-s42", "seeds/opt-s43", "seeds/opt-s43:best-2.safetensors"]
    scores = {one["name"]: one["score"] for one in found["candidates"]}
    members = [max(names, key=scores.get)]
    for trial in found["trials"]:
        assert trial["to"] == members
        assert trial["kept"] == (trial["score"] >= trial["before"])
        members += [trial["added"]] if trial["kept"] else []
    assert found["members"] == members
    files = []
    for name in members:
        run, _, file = name.partition(":")
        training = project / "runs" / record_of(project, run)["steps"]["train"]
        files.append(load_file(training / (file or "best.safetensors")))
    soup = load_file(project / "runs" / whole["steps"]["soup"] / "best.safetensors")
    for name, weight in soup.items():
        expected = torch.stack([weights[name] for weights in files]).mean(0)
        torch.testing.assert_close(weight, expected, atol=1e-7, rtol=0, msg=name)


def captions_of(project: Path, record: dict) -> list[str]:
    file = project / "runs" / record["artifacts"]["predictions/valid_before.csv"]
    return file.read_text().splitlines()[1:]


def test_the_held_half_chooses_nothing(project, whole, monkeypatch):
    """With other captions in that half, each image is still the same for the choice."""
    text = SOUP.replace("seeds/opt-s43]", "seeds/opt-s43], half: false").replace("name: soup", "name: all")
    (project / "all.yaml").write_text(text)
    shown = [harness(project, "run", name, "--dry-run").stdout for name in ("soup.yaml", "all.yaml")]
    steps = [next(line for line in one.splitlines() if "/soup-" in line) for one in shown]
    assert "done" in steps[0]
    assert "to do" in steps[1]
    assert "the weights are an average of other runs'" in shown[0]


def test_the_command_writes_an_experiment_and_compares_with_the_best_member(project):
    done = harness(project, "soup", "small/opt-s42", "runs/seeds/opt-s43", "--out", "mine.yaml")
    assert "-s42 - " in done.stdout or "opt-s4" in done.stdout
    record = record_of(project, "soup/small.opt-s42_seeds.opt-s43-s42")
    assert record["status"] == "FINISHED"
    assert "python -m harness run mine.yaml" in (project / "mine.yaml").read_text()
    assert "rouge1" in done.stdout
    (project / "other.yaml").write_text("name: other\n")
    refused = harness(project, "soup", "small/opt-s42", "seeds/opt-s43", "--out", "other.yaml", code=2)
    assert "exists and is another experiment" in refused.stderr


def test_what_can_not_be_averaged_is_said_before_anything_runs(project, whole):
    def said(runs: str, rest: str = "") -> str:
        text = f"  bad: {{soup: {{runs: [{runs}]}}{rest}}}"
        (project / "bad.yaml").write_text(
            SOUP.replace("  two: {soup: {runs: [small/opt-s42, seeds/opt-s43]}}", text)
        )
        found = harness(project, "run", "bad.yaml", code=2)
        assert "Traceback" not in found.stderr
        return found.stderr

    both = "small/opt-s42, seeds/opt-s43"
    assert "runs/none/x-s1: not a run" in said("small/opt-s42, none/x-s1")
    assert "small/opt-s42 has only its best weights" in said("small/opt-s42")
    assert "is named twice" in said("small/opt-s42, small/opt-s42")
    assert "share one training" in said("small/opt-s42, small/opt_dedup-s42")
    assert "soup/two-s42 has no training of its own" in said("soup/two-s42, small/opt-s42")
    assert "small/opt-s42 starts from other weights: model.prompt" in said(both, ", model: {prompt: x}")
    assert "tiny.config.model.tiny.seed" in said(both, ", model: {tiny: {seed: 5}}")
    assert "soup gives this run a model, but own is 0" in said(
        both, f", consensus: {{own: 0, runs: [{both}]}}"
    )


def test_weights_of_another_shape_are_refused_with_their_names(project, whole, monkeypatch):
    candidates = json.loads((project / "runs" / whole["steps"]["soup"] / "inputs.json").read_text())
    given = candidates["facts"]["candidates"]
    assert [one["sha256"] for one in given[:1]] == list(
        products(project / "runs" / given[0]["step"], [given[0]["file"]]).values()
    )
    own = soups.shapes(project / "runs" / given[0]["step"] / given[0]["file"])
    name = next(iter(own))
    assert soups.differing(own, own | {name: [1], "more": [2]}) == sorted([name, "more"])


def test_trials_of_an_interrupted_soup_are_kept_and_damaged_ones_are_not(tmp_path):
    file = tmp_path / "tried.jsonl"
    for number in range(3):
        step._keep(file, (number,), 0.25, True)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1].replace("0.25", "0.75"), lines[2][:-9]]))
    assert step._read(file) == {(0,): (0.25, True)}
