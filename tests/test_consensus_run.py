"""Consensus as a step of a run: own captions, captions of other runs, resuming, and what it refuses."""

import contextlib
import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.commands import harness
from support.experiments import EXPERIMENT

from harness.decoding import consensus
from harness.decoding.consensus import Candidate
from harness.metrics.lexical import rouge1_f
from harness.metrics.settings import ScoreConfig
from harness.records.files import read_candidates, read_captions
from harness.steps import comparing

ALONE = """
  rouge: {consensus: {own: 0, runs: [small/opt-s42, {run: greedy/opt-s42, weight: 2}, odd/opt-s42],
          utility: {rouge1: 1}}}
"""
WITH_OWN = """
  own: {consensus: {own: 1.5, runs: [greedy/opt-s42, odd/opt-s42], utility: {rouge1: 1, bleu1: 1}}}
"""


SAMPLED = """
  sampled: {predict: {num_beams: 2, num_return_sequences: 2, samples: {count: 3}},
            consensus: {runs: [greedy/opt-s42], utility: {rouge1: 1}}}
"""
OF_CANDIDATES = """
  others: {consensus: {own: 0, runs: [{run: both/sampled-s42, weight: 3}, odd/opt-s42],
           utility: {rouge1: 1}}}
"""


def variants(text: str) -> str:
    return EXPERIMENT.partition("variants:")[0].replace("name: small", "name: both") + f"variants:{text}"


@pytest.fixture(scope="module")
def project(small_run, tmp_path_factory) -> Path:
    """The small run, and two runs that caption with its weights in other ways."""
    place = tmp_path_factory.mktemp("project")
    for name in ("data", "runs", "submissions"):
        shutil.copytree(small_run / "kept" / name, place / name)
    shutil.copy(small_run / "kept" / "mlflow.db", place)
    text = EXPERIMENT.replace("  opt_dedup: {postprocess: {deduplicate: true}}\n", "")
    for name, how in (
        ("greedy", "num_beams: 1, max_new_tokens: 16"),
        ("odd", "num_beams: 3, max_new_tokens: 9"),
    ):
        changed = text.replace("name: small", f"name: {name}").replace(
            "num_beams: 2, max_new_tokens: 24", how
        )
        (place / f"{name}.yaml").write_text(changed)
        harness(place, "run", f"{name}.yaml")
    return place


def before(project: Path, run: str, stage: str = "before") -> dict[str, str]:
    record = json.loads((project / "runs" / run / "run.json").read_text())
    return read_captions(project / "runs" / record["artifacts"][f"predictions/valid_{stage}.csv"])


def expected(project: Path, weights: dict[str, float], metrics: dict[str, float]) -> dict[str, str]:
    """The choice from the captions of these runs."""
    captions = {run: before(project, run) for run in weights}
    candidates = {
        image: [Candidate(captions[run][image], weight, source=run) for run, weight in weights.items()]
        for image in before(project, "small/opt-s42")
    }
    utility = consensus.Utility(consensus.mixture(metrics, 2023), ScoreConfig(), 2023)
    return {image: choice.candidate.caption for image, choice in consensus.choose(candidates, utility)}


@pytest.mark.ci
def test_a_consensus_of_runs_has_no_model_and_is_scored_and_submitted(project):
    (project / "alone.yaml").write_text(variants(ALONE))
    shown = harness(project, "run", "alone.yaml", "--dry-run", "--verbose").stdout
    assert "the captions are of other runs" in shown
    assert "train" not in {line.split()[1] for line in shown.splitlines() if line.startswith("#   ")}
    found = harness(project, "run", "alone.yaml")
    assert "12 images, " in found.stderr
    record = json.loads((project / "runs" / "both" / "rouge-s42" / "run.json").read_text())
    assert record["status"] == "FINISHED"
    assert record["standin_model"] is True  # its sources are
    assert not [name for name in record["steps"] if name.startswith(("tiny", "train", "predict"))]
    wanted = expected(project, {"small/opt-s42": 1, "greedy/opt-s42": 2, "odd/opt-s42": 1}, {"rouge1": 1})
    assert before(project, "both/rouge-s42") == wanted
    assert record["scores"]["valid"]["before"]["rouge1"]["n"] == 12
    assert len(record["submissions"]) == 2
    table = project / "runs" / record["artifacts"]["consensus/valid.csv"]
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    assert {row["source"] for row in rows} <= {"small/opt-s42", "greedy/opt-s42", "odd/opt-s42"}
    assert {row["ID"]: row["caption"] for row in rows} == wanted
    again = harness(project, "run", "alone.yaml")
    assert "consensus-valid" not in again.stderr


@pytest.mark.ci
def test_own_captions_are_candidates_too(project):
    (project / "own.yaml").write_text(variants(WITH_OWN))
    harness(project, "run", "own.yaml")
    record = json.loads((project / "runs" / "both" / "own-s42" / "run.json").read_text())
    assert "train" in record["steps"]
    weights = {"small/opt-s42": 1.5, "greedy/opt-s42": 1, "odd/opt-s42": 1}
    assert before(project, "both/own-s42") == expected(project, weights, {"rouge1": 1, "bleu1": 1})


def by_hand(sources: list[tuple[str, float, dict]]) -> dict[str, tuple[str, str]]:
    """Source and caption that a plain loop over all pairs chooses for each image."""
    found = {}
    for image in sources[0][2]:
        given = [
            (weight / len(every[image]), f"{name}/{one.source}".rstrip("/"), one.log_probability, one.caption)
            for name, weight, every in sources
            for one in every[image]
        ]
        means = [sum(w * rouge1_f(caption, other) for w, _, _, other in given) for *_, caption in given]
        tied = [n for n, mean in enumerate(means) if mean >= max(means) - 1e-6 * sum(one[0] for one in given)]
        best = given[max(tied, key=lambda n: (given[n][2], -n))]
        found[image] = best[1], best[3]
    return found


@pytest.mark.ci
def test_samples_and_beams_are_candidates_of_their_run_and_of_others(project):
    (project / "sampled.yaml").write_text(variants(SAMPLED))
    harness(project, "run", "sampled.yaml")
    record = json.loads((project / "runs" / "both" / "sampled-s42" / "run.json").read_text())
    own = read_candidates(project / "runs" / record["artifacts"]["predictions/valid_candidates.csv"])
    sources = ["beam1", "beam2", "sample1", "sample2", "sample3"]
    assert all([one.source for one in given] == sources for given in own.values())
    greedy = {image: [Candidate(caption)] for image, caption in before(project, "greedy/opt-s42").items()}
    expected = by_hand([("own", 1.0, own), ("greedy/opt-s42", 1.0, greedy)])
    assert table(project, record) == expected
    assert before(project, "both/sampled-s42") == {image: one[1] for image, one in expected.items()}
    # another run takes all of them and not what this one chose
    (project / "others.yaml").write_text(variants(OF_CANDIDATES))
    harness(project, "run", "others.yaml")
    other = json.loads((project / "runs" / "both" / "others-s42" / "run.json").read_text())
    odd = {image: [Candidate(caption)] for image, caption in before(project, "odd/opt-s42").items()}
    assert table(project, other) == by_hand([("both/sampled-s42", 3.0, own), ("odd/opt-s42", 1.0, odd)])
    # the command agrees; of a run without candidates it takes the captions after post-processing
    odd = {image: [Candidate(text)] for image, text in before(project, "odd/opt-s42", "after").items()}
    runs, how = ("runs/both/sampled-s42", "runs/odd/opt-s42"), ("--utility", "rouge1", "--weights", "3,1")
    said = harness(project, "consensus", *runs, *how, "--out", "all.csv", "--per-image", "why.csv")
    assert "candidates.csv: 60 captions of 12 images, candidates of a run" in said.stderr
    rows = csv.DictReader((project / "why.csv").read_text(encoding="utf-8").splitlines())
    chosen = {row["ID"]: (row["source"], row["caption"]) for row in rows}
    assert chosen == by_hand([(runs[0], 3.0, own), (runs[1], 1.0, odd)])
    counts = [int(line.split()[0]) for line in said.stdout.splitlines() if line.endswith(runs)]
    assert sum(counts) == 12


def table(project: Path, record: dict) -> dict[str, tuple[str, str]]:
    """Source and caption of each image, as a consensus step says."""
    file = project / "runs" / record["artifacts"]["consensus/valid.csv"]
    rows = csv.DictReader(file.read_text(encoding="utf-8").splitlines())
    return {row["ID"]: (row["source"], row["caption"]) for row in rows}


@pytest.mark.slow
def test_further_images_are_captioned_with_consensus_and_ensembles_as_in_the_runs(project):
    for name, text in (("sampled", SAMPLED), ("others", OF_CANDIDATES)):
        (project / f"{name}.yaml").write_text(variants(text))
        harness(project, "run", f"{name}.yaml")
        run = project / "runs" / "both" / f"{name}-s42"
        harness(project, "caption", run, "data/phantom/test", "--out", f"{name}.csv")
        record = json.loads((run / "run.json").read_text())
        own = read_captions(project / "runs" / record["artifacts"]["predictions/test_after.csv"])
        assert read_captions(project / f"{name}.csv") == own, name


def test_an_interrupted_consensus_compares_only_what_is_left(tmp_path, monkeypatch):
    """The choices of both calls are those of one, with samples among the candidates."""
    random, compared = np.random.default_rng(0), []
    candidates = {
        f"image_{n}": [
            Candidate(f"{word}", 0.2, -float(random.integers(3)), f"own/sample{place}")
            for place, word in enumerate(random.integers(0, 3, 5))
        ]
        for n in range(20)
    }

    def same(ours, theirs, images=None):
        compared.append(len(ours))
        return np.array([float(a == b) for a, b in zip(ours, theirs, strict=True)])

    def work(until: int) -> SimpleNamespace:
        def advance(done, total):
            if done == until:
                raise KeyboardInterrupt

        reporter = SimpleNamespace(progress=lambda label: contextlib.nullcontext(advance))
        return SimpleNamespace(drop_model=lambda: None, say=lambda text: None, reporter=reporter)

    step = SimpleNamespace(part="valid", inputs=SimpleNamespace(data=SimpleNamespace(readable=lambda _: [])))
    monkeypatch.setattr(comparing, "_utility", lambda inputs, work: same)
    monkeypatch.setattr(consensus.choose, "__defaults__", (None, 1))
    (tmp_path / "whole").mkdir()
    whole = comparing.choose(step, work(0), candidates, tmp_path / "whole")
    each = list(compared)
    compared.clear()
    with pytest.raises(KeyboardInterrupt):
        comparing.choose(step, work(8), candidates, tmp_path)
    assert comparing.choose(step, work(0), candidates, tmp_path) == whole
    assert compared == each
    assert len(each) == 20


@pytest.mark.ci
def test_other_captions_of_a_source_give_another_step(project, tmp_path):
    place = shutil.copytree(project, tmp_path / "project")
    (place / "alone.yaml").write_text(variants(ALONE))

    def names() -> list[str]:
        shown = harness(place, "run", "alone.yaml", "--dry-run", "--verbose").stdout
        return [line.split()[-1] for line in shown.splitlines() if "consensus-" in line]

    first = names()
    text = (place / "greedy.yaml").read_text().replace("max_new_tokens: 16", "max_new_tokens: 5")
    (place / "greedy.yaml").write_text(text)
    harness(place, "run", "greedy.yaml", "--replace")
    assert not set(first) & set(names())


@pytest.mark.ci
def test_what_a_consensus_lacks_is_said_before_anything_runs(project, tmp_path):
    def said(text: str) -> str:
        (project / "bad.yaml").write_text(variants(text))
        found = harness(project, "run", "bad.yaml", code=2)
        assert "Traceback" not in found.stderr
        return found.stderr

    run = "{own: 0, runs: [small/none-s42]}"
    assert "runs/small/none-s42: consensus.runs: not a run" in said(f"\n  a: {{consensus: {run}}}\n")
    assert "there are no candidates" in said("\n  a: {consensus: {own: 0}}\n")
    beams = "{num_beams: 2, num_return_sequences: 3}"
    assert "num_return_sequences is 3, but there are only 2 beams" in said(f"\n  a: {{predict: {beams}}}\n")
    both = "\n  a: {predict: {samples: {count: 2}}, retrieval: {}}\n"
    assert "so predict.samples has no effect" in said(both)
    assert "is named twice" in said("\n  a: {consensus: {runs: [a/b-s1, {run: a/b-s1, weight: 2}]}}\n")
    assert "overall is no score of 2023" in said("\n  a: {consensus: {utility: {overall: 1}}}\n")
    assert "weights are not on this machine" in said("\n  a: {consensus: {utility: {bleurt: 1}}}\n")
    assert "no weights are named" in said("\n  a: {consensus: {utility: {medcat: 1}}}\n")
    standin = "{consensus: {utility: {clipscore: 1}}, score: {clipscore: {checkpoint: standin}}}"
    assert "its stand-in is not trained" in said(f"\n  a: {standin}\n")
    both = "{consensus: {own: 0, runs: [small/opt-s42]}, retrieval: {}}"
    assert "retrieval needs this run's model" in said(f"\n  a: {both}\n")
    other = "{consensus: {own: 0, runs: [small/opt-s42]}, data: {root: data/other, phantom: {valid: 5}}}"
    assert "among the 5 here" in said(f"\n  a: {other}\n")


def test_choices_of_an_interrupted_step_are_kept_and_damaged_ones_are_not(tmp_path):
    file = tmp_path / "partial.jsonl"
    candidates = {image: [Candidate("a"), Candidate("b")] for image in "xyz"}
    for image in "xyz":
        comparing._keep(file, image, 1, consensus.Choice(candidates[image][1], 0.25, 2))
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1].replace("0.25", "0.75"), lines[2][:-9]]))
    assert list(comparing._read(file, candidates)) == ["x"]
    assert comparing._read(file, candidates)["x"].candidate.caption == "b"
