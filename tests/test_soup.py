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

from harness.config.experiment import load
from harness.data import load as load_data
from harness.data.halves import TUNE, half
from harness.errors import UserError
from harness.models.loading import load_average, trained_weights
from harness.steps import soup as step
from harness.steps.plan import Plan
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
    """The record of the soup."""
    harness(project, "run", "soup.yaml")
    return record_of(project, "soup/two-s42")


@pytest.mark.slow
def test_a_soup_that_was_killed_goes_on_after_the_trials_that_it_has(project, whole, tmp_path):
    """SIGKILL when one of three candidates is scored; two averages follow."""
    place = shutil.copytree(project, tmp_path / "project")
    for found in place.glob("runs/steps/soup-*/"):
        shutil.rmtree(found)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=place, env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (tried,) = place.glob("runs/steps/soup-*/tried.jsonl")
    assert len(tried.read_text().splitlines()) == 1
    done = harness(place, "run", "soup.yaml")
    assert len([line for line in done.stderr.splitlines() if "bertscore 0" in line]) == 4
    assert record_of(place, "soup/two-s42")["soup"] == whole["soup"]


@pytest.mark.ci
def test_a_soup_is_captioned_scored_and_submitted_like_a_training(project, whole):
    assert whole["status"] == "FINISHED"
    assert not {"train"} & set(whole["steps"])
    assert whole["scores"]["valid"]["after"]["rouge1"]["n"] == 12
    assert len(whole["submissions"]) == 2
    assert (project / "runs/soup/two-s42/report.html").exists()
    again = harness(project, "run", "soup.yaml")
    assert "soup" not in again.stderr.replace("runs/soup", "")


@pytest.mark.ci
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


@pytest.mark.ci
def test_the_held_half_chooses_nothing(project, whole, monkeypatch):
    monkeypatch.chdir(project)
    for value, halves in (("true", {"tune"}), ("false", {"tune", "held"})):
        (config,) = load(Path("soup.yaml"), [f"soup.half={value}"])
        planned = Plan(config, load_data(config.data, Path("runs"))).steps["soup"]
        assert planned.is_done() == (value == "true")
        examples = planned.inputs.data.readable("valid")
        assert {half(examples[place].id) for place in planned._chosen()} == halves
    (config,) = load(Path("soup.yaml"), ["soup.images=3"])
    assert len(Plan(config, load_data(config.data, Path("runs"))).steps["soup"]._chosen()) == 3


@pytest.mark.slow
def test_the_command_writes_an_experiment_and_compares_with_the_best_member(project):
    done = harness(project, "soup", "small/opt-s42", "runs/seeds/opt-s43", "--out", "mine.yaml")
    assert "-s42 - " in done.stdout or "opt-s4" in done.stdout
    record = record_of(project, "soup/small.opt-s42_seeds.opt-s43-s42")
    assert record["status"] == "FINISHED"
    assert "harness run mine.yaml" in (project / "mine.yaml").read_text()
    assert "rouge1" in done.stdout
    (project / "other.yaml").write_text("name: other\n")
    refused = harness(project, "soup", "small/opt-s42", "seeds/opt-s43", "--out", "other.yaml", code=2)
    assert "exists and is another experiment" in refused.stderr


@pytest.mark.ci
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
    assert "runs/none/x-s1: soup.runs: not a run" in said("small/opt-s42, none/x-s1")
    assert "small/opt-s42 has only its best weights" in said("small/opt-s42")
    assert "is named twice" in said("small/opt-s42, small/opt-s42")
    assert "share one training" in said("small/opt-s42, small/opt_dedup-s42")
    assert "soup/two-s42 has no training of its own" in said("soup/two-s42, small/opt-s42")
    assert "starts from other weights: it has another model.prompt" in said(both, ", model: {prompt: x}")
    assert "tiny.config.model.tiny.seed" in said(both, ", model: {tiny: {seed: 5}}")
    file = project / "runs/seeds/opt-s43/run.json"
    text = file.read_text()
    learned = json.loads(text)
    learned["config"]["data"]["fit_on"] = ["train", "valid"]
    file.write_text(json.dumps(learned))
    assert "seeds/opt-s43 has learned from the validation images" in said(both)
    file.write_text(text)
    assert "soup gives this run a model, but own is 0" in said(
        both, f", consensus: {{own: 0, runs: [{both}]}}"
    )


@pytest.mark.ci
def test_weights_of_another_shape_are_refused_with_their_names(project, whole, monkeypatch):
    """A family whose weights depend on more than `model`; here the header says so."""
    monkeypatch.chdir(project)
    read = soups.shapes

    def shapes(file):
        return read(file) | ({"more": [2]} if file.name == "best-2.safetensors" else {})

    monkeypatch.setattr(soups, "shapes", shapes)
    (config,) = load(Path("soup.yaml"))
    with pytest.raises(UserError, match=r"seeds/opt-s43 has weights of other names or shapes .*: more"):
        _ = Plan(config, load_data(config.data, Path("runs"))).steps
    own = read(next(Path("runs/steps").glob("soup-*/best.safetensors")))
    assert soups.differing(own, own | {"query_tokens": [1]}) == ["query_tokens"]


def test_trials_of_an_interrupted_soup_are_kept_and_damaged_ones_are_not(tmp_path):
    file = tmp_path / "tried.jsonl"
    for number in range(3):
        step._keep(file, (number,), 0.25, True)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1].replace("0.25", "0.75"), lines[2][:-9]]))
    assert step._read(file) == {(0,): (0.25, True)}
