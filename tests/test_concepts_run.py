"""Runs of concepts from YAML to official files: predictors, thresholds, ensembles, resuming, and refusals."""

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score
from support import organisers
from support.commands import harness
from support.experiments import EXPERIMENT, messages, write

from harness.config.sections import PhantomConfig
from harness.data import phantom
from harness.data.halves import HELD, TUNE, half
from harness.records.files import read_lists
from harness.tracking.contents import intervals_of, scores_of

CONCEPTS = """
name: found
task: concepts
device: cpu
data:
  root: data/phantom
  skip_bad: true
  phantom: {train: 60, valid: 24, test: 8, seed: 3}
model:
  family: encoder
  vision_checkpoint: tiny
  image_size: 28
  tiny: {patch_size: 14, hidden_size: 32, vision_layers: 1, vision_epochs: 4}
train:
  stages: [{epochs: 2, losses: {concepts: 1}}]
  batch_size: 16
  learning_rate: 3e-3
  warmup_steps: 2
score: {bootstrap: 200}
variants:
  classifier: {}
  knn:
    train: {stages: []}
    concepts: {predictor: knn, knn: {neighbours: 5}}
  counted:
    train: {stages: []}
    concepts: {predictor: knn, knn: {neighbours: 5, rule: votes}}
  mean:
    edition: 2026
    concepts: {own: 0, runs: [found/classifier-s42, {run: found/knn-s42, weight: 3}]}
  voted:
    edition: 2026
    concepts:
      own: 0
      runs: [found/classifier-s42, found/knn-s42, found/counted-s42]
      combine: votes
"""
VARIANTS = ("classifier", "knn", "counted", "mean", "voted")
BROKEN = "phantom_test_000003"


def begin(place: Path) -> Path:
    """A project with data of which one test image can't be read."""
    phantom.ensure(place / "data/phantom", PhantomConfig(train=60, valid=24, test=8, seed=3))
    (image,) = (place / "data/phantom").rglob(f"{BROKEN}.*")
    image.write_bytes(image.read_bytes()[:200])
    (place / "concepts.yaml").write_text(CONCEPTS)
    return place


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    place = begin(tmp_path_factory.mktemp("concepts"))
    done = harness(place, "run", "concepts.yaml")
    (place / "stdout").write_text(done.stdout)
    (place / "stderr").write_text(done.stderr)
    return place


def record(project: Path, variant: str, name: str = "found") -> dict:
    return json.loads((project / "runs" / name / f"{variant}-s42" / "run.json").read_text())


def file(project: Path, variant: str, name: str) -> Path:
    return project / "runs" / record(project, variant)["artifacts"][name]


def lists(project: Path, variant: str, split: str = "valid") -> dict[str, tuple[str, ...]]:
    return read_lists(file(project, variant, f"concepts/{split}.csv"))


def truth(project: Path, split: str = "valid") -> dict[str, set[str]]:
    """The concepts of a split's images, read as plain text."""
    (labels,) = (project / "data/phantom").glob(f"*concept_detection_{split}_labels.csv")
    rows = [line.split("\t") for line in labels.read_text().splitlines()[1:]]
    return {image: set(cuis.split(";")) for image, cuis in rows}


def probabilities(project: Path, variant: str, split: str = "valid") -> tuple[list[str], np.ndarray]:
    with np.load(file(project, variant, f"concepts/{split}_probabilities.npz")) as content:
        return content["labels"].tolist(), content["values"]


def by_sklearn(own: set[str], wanted: set[str]) -> float:
    """F1 of one image as the organisers compute it: binary, over the union of both sets."""
    every = sorted(own | wanted)
    return f1_score([cui in wanted for cui in every], [cui in own for cui in every]) if every else 1.0


@pytest.mark.ci
def test_the_table_ends_with_differences_on_the_half_without_thresholds(project):
    wanted = truth(project)
    held = [image for image in wanted if half(image) == HELD]
    each = {v: {i: by_sklearn(set(lists(project, v)[i]), wanted[i]) for i in held} for v in VARIANTS[:2]}
    one, other = (np.mean(list(found.values())) for found in each.values())
    lines = (project / "stdout").read_text().splitlines()
    (start,) = (n for n, line in enumerate(lines) if line == "  classifier-s42 -> knn-s42")
    assert lines[start + 1].startswith(f"    f1 {other - one:+.4f} [")
    best = max(VARIANTS, key=lambda v: record(project, v)["concepts"]["halves"][HELD]["f1"]["value"])
    (page,) = (line for line in lines if "report.html" in line)
    assert page.endswith(f"runs/found/{best}-s42/report.html")


@pytest.mark.ci
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_organisers_read_what_was_decided(project, variant):
    run, most = record(project, variant), {"valid": 24, "test": 8}
    assert run["status"] == "FINISHED"
    assert len(run["submissions"]) == 2
    for split, upload in zip(("valid", "test"), run["submissions"], strict=True):
        data = (project / upload).read_bytes()
        if run["edition"] == 2026:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                assert archive.namelist() == ["submission.csv"]
                data = archive.read("submission.csv")
        own = lists(project, variant, split)
        read = organisers.evaluate(data, list(own), run["edition"], "concept")
        assert read == {image: ";".join(cuis) for image, cuis in own.items()}
        assert len(own) == most[split]
        manifest = json.loads((project / upload).with_name("manifest.json").read_text())
        assert (manifest["task"], manifest["n"], manifest["split"]) == ("concept", most[split], split)


@pytest.mark.ci
@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_are_those_of_sklearn_on_all_of_valid_and_on_each_half(project, variant):
    found, own, wanted = record(project, variant)["concepts"], lists(project, variant), truth(project)
    each = {image: by_sklearn(set(own[image]), wanted[image]) for image in wanted}
    assert found["scores"]["valid"]["f1"]["value"] == pytest.approx(np.mean(list(each.values())))
    for part in (TUNE, HELD):
        score = found["halves"][part]["f1"]
        on_half = [value for image, value in each.items() if half(image) == part]
        assert (score["n"], score["value"]) == (len(on_half), pytest.approx(np.mean(on_half)))
        assert score["low"] <= score["value"] <= score["high"]
    secondary = found["scores"]["valid"]["f1_secondary"]
    assert not secondary["official"]  # nobody has validated the concepts of this data
    assert "not validated" in secondary["signature"]


@pytest.mark.ci
def test_baselines_are_counted_on_train_and_scored_on_valid(project):
    found, training, wanted = record(project, "knn")["concepts"], truth(project, "train"), truth(project)
    counts = {cui: sum(cui in own for own in training.values()) for cui in set().union(*training.values())}
    first = min(counts, key=lambda cui: (-counts[cui], cui))
    values = [by_sklearn({first}, one) for one in wanted.values()]
    floor = found["baselines"]["most frequent concept"]
    assert floor["value"] == pytest.approx(np.mean(values))
    own = lists(project, "knn")
    gain = [by_sklearn(set(own[image]), wanted[image]) for image in wanted]
    pair = found["paired"]["most frequent concept"]
    assert pair["difference"] == pytest.approx(np.mean(gain) - np.mean(values))
    on_held = [half(image) == HELD for image in wanted]
    held = np.array(gain)[on_held] - np.array(values)[on_held]
    assert pair["held"]["difference"] == pytest.approx(held.mean())
    assert found["baselines"]["most frequent set"]["held"]["value"] is not None


@pytest.mark.ci
def test_thresholds_are_chosen_on_the_half_tune_only(project):
    about = record(project, "classifier")["concepts"]["thresholds"]
    own, wanted = lists(project, "classifier"), truth(project)
    tune = [image for image in wanted if half(image) == TUNE]
    assert (about["kind"], about["chosen_on"], about["n"]) == ("per_concept", TUNE, len(tune))
    assert about["f1"] == pytest.approx(np.mean([by_sklearn(set(own[i]), wanted[i]) for i in tune]))
    given = json.loads(file(project, "classifier", "concepts/thresholds.json").read_text())["thresholds"]
    labels, values = probabilities(project, "classifier")
    for (image, cuis), row in zip(own.items(), values, strict=True):
        above = {cui for cui, one in zip(labels, row, strict=True) if one > np.float32(given[cui])}
        assert set(cuis) == (above or {labels[row.argmax()]}), image
    assert "thresholds" not in record(project, "counted")["concepts"]  # counts of neighbours decide


@pytest.mark.ci
def test_the_mean_is_that_of_the_probabilities_of_the_runs(project):
    members = [
        dict(zip(labels, values.T, strict=True))
        for labels, values in (probabilities(project, variant) for variant in ("classifier", "knn"))
    ]
    labels, values = probabilities(project, "mean")
    for cui, column in zip(labels, values.T, strict=True):
        np.testing.assert_allclose(column, (members[0][cui] + 3 * members[1][cui]) / 4, atol=1e-6)
    assert record(project, "mean")["standin_model"] is True  # its sources are
    assert not [name for name in record(project, "mean")["steps"] if name.startswith(("tiny", "train"))]


@pytest.mark.ci
def test_votes_give_what_most_runs_give(project):
    members = [lists(project, variant) for variant in ("classifier", "knn", "counted")]
    for image, cuis in lists(project, "voted").items():
        votes = {
            cui: sum(cui in own[image] for own in members)
            for cui in set().union(*(m[image] for m in members))
        }
        assert set(cuis) == {cui for cui, count in votes.items() if count >= 2} or (
            len(cuis) == 1 and max(votes.values()) < 2
        )


@pytest.mark.ci
def test_an_unreadable_image_gets_the_most_frequent_concept_and_readers_are_told(project):
    training = truth(project, "train")
    counts = {cui: sum(cui in own for own in training.values()) for cui in set().union(*training.values())}
    first = min(counts, key=lambda cui: (-counts[cui], cui))
    for variant in VARIANTS:
        run = record(project, variant)
        assert lists(project, variant, "test")[BROKEN] == (first,)
        assert run["fallback"] == {"test": {"concepts": [first], "ids": [BROKEN]}}
        assert any(BROKEN in note and first in note for note in run["data"]["notes"])
        manifest = json.loads((project / run["submissions"][1]).with_name("manifest.json").read_text())
        assert manifest["fallback"] == run["fallback"]["test"]


@pytest.mark.ci
def test_the_table_has_runs_baselines_and_how_thresholds_were_chosen(project):
    shown = (project / "stdout").read_text()
    for wanted in (*(f"{v}-s42" for v in VARIANTS), "f1 (held)", "f1_secondary", "most frequent concept"):
        assert wanted in shown
    score = record(project, "knn")["concepts"]["halves"]["held"]["f1"]
    assert f"{score['value']:.4f} [{score['low']:.4f}, {score['high']:.4f}]" in shown
    assert "chosen on the half tune" in shown
    assert "rouge1" not in shown


@pytest.mark.ci
def test_mlflow_has_the_scores_under_names_of_their_own(project):
    run = record(project, "classifier")
    values, scores = scores_of(run), run["concepts"]["scores"]["valid"]
    assert values["valid/concept_f1"] == scores["f1"]["value"]
    assert values["held/concept_f1"] == run["concepts"]["halves"]["held"]["f1"]["value"]
    beside = intervals_of(run)
    assert beside["interval/valid/concept_f1"] == f"[{scores['f1']['low']:.4f}, {scores['f1']['high']:.4f}]"
    assert "baseline/concept_f1/most frequent set" in beside


@pytest.mark.ci
def test_concepts_are_compared_scored_and_written_for_another_edition(project):
    runs = [f"runs/found/{variant}-s42" for variant in ("classifier", "knn")]
    found = json.loads(harness(project, "compare", *runs, "--format", "json").stdout)
    one = next(one for one in found["differences"] if one["metric"] == "f1")
    a, b = (
        record(project, variant)["concepts"]["scores"]["valid"]["f1"]["value"]
        for variant in ("classifier", "knn")
    )
    assert one["difference"] == pytest.approx(b - a)
    scored = json.loads(harness(project, "score", runs[0], "--format", "json").stdout)
    assert scored["scores"]["f1"]["value"] == pytest.approx(a)
    upload = harness(project, "submission", "make", runs[0], "--edition", "2026").stdout.strip()
    with zipfile.ZipFile(project / upload) as archive:
        data = archive.read("submission.csv")
    own = lists(project, "classifier", "test")
    assert organisers.evaluate(data, list(own), 2026, "concept").keys() == own.keys()
    refused = harness(project, "best", "concepts.yaml", code=1)
    assert "best chooses among captions" in refused.stderr


@pytest.mark.ci
def test_the_same_command_repeats_nothing(project):
    again = harness(project, "run", "concepts.yaml", "--dry-run", "--verbose")
    states = [line.split()[2] for line in again.stdout.splitlines() if " runs/steps/" in line]
    assert len(states) > 30
    assert set(states) == {"done"}


@pytest.mark.ci
def test_the_steps_of_concepts_are_planned_without_torch(project):
    code = """if True:
        import sys
        sys.modules["torch"] = None
        from harness.config.experiment import load
        from harness.steps.plan import dry, problems
        for config in load("concepts.yaml", ["train.batch_size=32"]):
            assert not problems(config)
            print(*dry(config))
    """
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["score-concepts"] * len(VARIANTS)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_concepts(project, tmp_path):
    begin(tmp_path)
    code = """if True:
        import os, signal
        from harness.steps.concepts import Decide
        Decide.build = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        from harness import cli
        cli.main()
    """
    command = [sys.executable, "-c", code, "run", "concepts.yaml"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    killed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    begun = json.loads((tmp_path / "runs/found/classifier-s42/run.json").read_text())
    assert (begun["status"], begun["at"]) == ("RUNNING", "concepts-valid")
    harness(tmp_path, "run", "concepts.yaml")
    resumed = record(tmp_path, "classifier")
    assert not {"train", "detect-valid", "thresholds"} & resumed["seconds"].keys()
    for variant in VARIANTS:
        for name in ("concepts/valid.csv", "concepts/test.csv"):
            assert file(tmp_path, variant, name).read_bytes() == file(project, variant, name).read_bytes()


@pytest.mark.ci
def test_a_last_fit_takes_its_thresholds_from_the_run_that_found_its_epochs(project):
    text = (
        CONCEPTS.partition("variants:")[0].replace("name: found", "name: last")
        + """
variants:
  full: {data: {fit_on: [train, valid]}, train: {epochs_of: found/classifier-s42}}
  started: {data: {fit_on: [train, valid]}}
"""
    )
    (project / "last.yaml").write_text(text)
    harness(project, "run", "last.yaml")
    full, started = (record(project, variant, "last") for variant in ("full", "started"))
    ours, theirs = (
        json.loads((project / "runs" / run["artifacts"]["concepts/thresholds.json"]).read_text())[
            "thresholds"
        ]
        for run in (full, record(project, "classifier"))
    )
    assert ours == theirs
    assert full["concepts"]["thresholds"]["chosen_on"] == "found/classifier-s42"
    assert started["concepts"]["thresholds"]["chosen_on"] is None
    for run in (full, started):
        assert "scores" not in run["concepts"]
        assert [Path(path).parent.name for path in run["submissions"]] == ["concept-test"]


@pytest.mark.ci
def test_captions_and_their_steps_stay_the_same_beside_concepts(small_run, tmp_path):
    for name in ("data", "runs"):
        shutil.copytree(small_run / "kept" / name, tmp_path / name)
    before = record(tmp_path, "opt", "small")
    text = EXPERIMENT.partition("variants:")[0]
    (tmp_path / "beside.yaml").write_text(text + "variants: {opt: {concepts: {predictor: from_captions}}}\n")
    done = harness(tmp_path, "run", "beside.yaml")
    after = record(tmp_path, "opt", "small")
    assert before["steps"].items() <= after["steps"].items()  # the fingerprints of a run without concepts
    assert {name.partition("-")[0] for name in after["seconds"]} == {
        "detect",
        "thresholds",
        "concepts",
        "score",
    }
    assert before["scores"] == after["scores"]
    kinds = [Path(path).parent.name for path in after["submissions"]]
    assert kinds == ["caption-valid", "caption-test", "concept-valid", "concept-test"]
    assert "constant caption" in done.stdout
    assert "most frequent set" in done.stdout


@pytest.mark.ci
def test_lists_that_are_all_the_same_get_a_warning(project):
    text = CONCEPTS.partition("variants:")[0].replace("name: found", "name: same")
    of_all = "concepts: {predictor: knn, knn: {neighbours: 60, rule: votes}}\n"
    (project / "same.yaml").write_text(text.replace("{epochs: 2, losses: {concepts: 1}}", "") + of_all)
    done = harness(project, "run", "same.yaml")
    (first,) = record(project, "base", "same")[
        "warnings"
    ]  # of test one list differs, that of the broken image
    assert first.startswith("valid: all 24 lists of concepts are the same: ")
    assert f"warning: base-s42: {first}" in done.stderr
    checks = json.loads(harness(project, "doctor", "same.yaml", "--format", "json").stdout)
    assert not [one for one in checks if one["name"].startswith("score.")]  # no metric of captions is needed


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(project, tmp_path):
    begin(tmp_path)
    harness(tmp_path, "run", "concepts.yaml", "--nproc", "2", "--set", "train.micro_batch_size=8")
    labels, values = probabilities(tmp_path, "classifier")
    ours, wanted = probabilities(project, "classifier")
    assert labels == ours
    np.testing.assert_allclose(values, wanted, atol=1e-4)
    assert lists(tmp_path, "knn") == lists(project, "knn")


MISTAKES = {
    "consensus: {runs: [a/b-s1]}": "consensus: chooses among captions, but task is concepts",
    "retrieval: {}": "retrieval: takes captions of training images, but task is concepts",
    "postprocess: {deduplicate: true}": "postprocess: changes captions, but task is concepts",
    "soup: {runs: [a/b-s1, a/c-s1]}": "soup: averages weights by scores of captions",
    "concepts: {predictor: from_captions}": "from_captions reads the captions of this run",
    "concepts: {own: 0}": "own is 0 and runs is empty",
    "concepts: {predictor: classifier}": "the classifier needs a stage with the loss concepts",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_go_together_is_refused_with_its_key(tmp_path, mistake):
    text = "name: e\ntask: concepts\ndata: {root: .}\ntrain: {stages: []}\n"
    (found,) = messages(write(tmp_path, text + mistake))
    assert MISTAKES[mistake] in found
    assert "e.yaml:5" in found or "e.yaml:4" in found


def test_the_loss_needs_the_section_and_thresholds_need_captions_of_valid(tmp_path):
    text = "name: e\ndata: {root: .}\n"
    stage = "train: {stages: [{epochs: 1, losses: {caption: 1, concepts: 0.1}}]}\n"
    assert "needs the section concepts" in messages(write(tmp_path, text + stage))[0]
    beside = "concepts: {predictor: from_captions}\npredict: {splits: [test]}\n"
    assert "thresholds are chosen on valid" in messages(write(tmp_path, text + beside))[0]


@pytest.mark.ci
def test_an_ensemble_names_every_run_that_it_can_not_use(project, tmp_path):
    text = CONCEPTS.partition("variants:")[0].replace("name: found", "name: wrong")
    runs = "concepts: {own: 0, runs: [found/voted-s42, found/gone-s42]}\n"
    (project / "wrong.yaml").write_text(text + runs)
    refused = harness(project, "run", "wrong.yaml", code=2).stderr
    assert "has no concepts/valid_probabilities.npz" in refused
    assert "runs/found/gone-s42: concepts.runs: not a run" in refused


@pytest.mark.ci
def test_the_objective_of_a_study_of_concepts_is_their_f1(project):
    (project / "study.yaml").write_text(
        "base: concepts.yaml\nvariant: knn\ntrials: 2\nspace: {concepts.knn.neighbours: {choices: [3, 5]}}\n"
    )
    harness(project, "study", "study.yaml")
    found = json.loads((project / "runs/found/study/study.json").read_text())
    assert found["objective"] == ["concept_f1"]
    base = record(project, "knn")["concepts"]["scores"]["valid"]["f1"]["value"]
    assert found["best"][0]["values"]["concept_f1"] >= base
    (project / "study.yaml").write_text(
        "base: concepts.yaml\nvariant: knn\nobjective: rouge1\n"
        "space: {concepts.knn.neighbours: {choices: [5]}}\n"
    )
    assert "the base scores concept_f1" in harness(project, "study", "study.yaml", code=2).stderr
