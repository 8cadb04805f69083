"""`harness init`: an experiment for a folder of data, checked before it is written."""

import shutil
from pathlib import Path

import pytest
from support import small_sets
from support.small_sets import CAPTIONS, CONCEPTS, PREFIX, edit
from typer.testing import CliRunner

from harness.cli import app
from harness.cli.beginning import candidates, look, write
from harness.config.experiment import load
from harness.errors import UserError
from harness.steps.plan import dry

whole, root = small_sets.whole, small_sets.root  # fixtures


def init(*arguments: object) -> str:
    """What the command prints; errors are raised."""
    done = CliRunner().invoke(
        app, ["init", *map(str, arguments)], catch_exceptions=False, standalone_mode=False
    )
    if done.exception:
        raise done.exception
    return done.stdout


def in_commas(root: Path) -> None:
    """Change a set in the layout of 2023 into that of 2024."""
    for split in ("train", "valid"):
        for old, new, header in ((CAPTIONS, "captions", "ID,Caption"), (CONCEPTS, "concepts", "ID,CUIs")):
            file = root / old.format(split)
            rows = [line.split("\t") for line in file.read_text().splitlines()[1:]]
            lines = [header, *(f'{id},"{value}"' for id, value in rows)]
            (root / f"{split}_{new}.csv").write_text("\n".join(lines) + "\n")
            file.unlink()


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no-weights"))


def test_it_writes_an_experiment_that_the_dry_run_accepts(root, tmp_path):
    shown = init(root, "--out", "mine.yaml")
    assert "layout    imageclef2023" in shown
    assert "12 train, 6 valid, 4 test" in shown
    assert "STAND-IN" in shown
    assert shown.endswith("wrote mine.yaml; next: harness run mine.yaml\n")
    (config,) = load(tmp_path / "mine.yaml", [])
    assert (config.name, config.edition, config.data.root) == ("mine", 2023, root)
    assert config.train.stages[0].losses.concept == 1
    assert "to do" in dry(config)["train"]
    text = (tmp_path / "mine.yaml").read_text()
    assert "# Question" in text
    assert "# Command   harness run mine.yaml" in text


def test_nothing_is_overwritten(root, tmp_path):
    (tmp_path / "experiments").mkdir()
    file = tmp_path / "experiments" / "set.yaml"
    file.write_text("mine")
    with pytest.raises(UserError, match="is not overwritten"):
        init(root)
    assert file.read_text() == "mine"


def test_without_files_of_concepts_no_key_uses_them(root, tmp_path):
    for file in (CONCEPTS.format("train"), CONCEPTS.format("valid"), f"{PREFIX}cui_mapping.csv"):
        (root / file).unlink()
    assert "concepts  no files of concept names, train concepts, valid concepts" in init(
        root, "--out", "e.yaml"
    )
    (config,) = load(tmp_path / "e.yaml", [])
    assert all(not stage.losses.concept for stage in config.train.stages)
    assert config.model.tiny.vision_epochs == 0


def test_the_layout_is_found(root, tmp_path):
    in_commas(root)
    assert "layout    imageclef2024" in init(root, "--out", "e.yaml")
    assert load(tmp_path / "e.yaml", [])[0].edition == 2025
    shutil.copy(root / "valid_concepts.csv", root / "valid_concepts_manual.csv")
    assert "layout    rocov2" in init(root, "--out", "f.yaml")


def test_rows_with_problems_are_left_out_and_that_is_said(root, tmp_path):
    edit(root / CAPTIONS.format("train"), lambda lines: lines.insert(2, "x y\tnonsense"))
    shown = init(root, "--out", "e.yaml")
    assert "1 in label files" in shown
    assert "Some rows have problems" in shown
    assert load(tmp_path / "e.yaml", [])[0].data.skip_bad


def test_a_folder_of_no_layout_says_what_it_has(root, tmp_path):
    (root / CAPTIONS.format("valid")).unlink()
    with pytest.raises(UserError) as caught:
        look(root)
    text = str(caught.value)
    assert "no layout fits; imageclef2023 is the nearest" in text
    assert "no file of valid captions" in text
    assert "withheld/" in text  # what is there
    with pytest.raises(UserError, match="no such folder"):
        init(tmp_path / "nowhere")


def test_without_a_folder_it_takes_the_only_one_and_asks_nothing(root, tmp_path):
    shutil.move(root, tmp_path / "data" / "one" / "deep")
    with pytest.raises(UserError, match="no data set in this folder or in data/"):
        init()
    shutil.move(tmp_path / "data" / "one" / "deep", tmp_path / "data" / "set")
    (tmp_path / "data" / "one").rmdir()
    (tmp_path / "data" / "set").rename(tmp_path / "data" / "one")
    assert "wrote one.yaml" in init()
    shutil.copytree(tmp_path / "data" / "one", tmp_path / "data" / "two")
    assert candidates(Path()) == [Path("data/one"), Path("data/two")]
    with pytest.raises(UserError, match="several data sets: data/one, data/two"):
        init()


def test_with_weights_and_an_accelerator_it_is_the_papers_model(root, tmp_path, monkeypatch):
    """The text alone is looked at: weights of that size are not here."""
    from dataclasses import replace

    from harness.cli import beginning

    sight = replace(look(root), real=True, why="as the paper")
    monkeypatch.setattr(beginning, "problems", lambda config: [])
    monkeypatch.setattr(beginning, "dry", lambda config: {})
    config, _ = write(sight, tmp_path / "paper.yaml", "paper")
    assert config.model.checkpoint == "Salesforce/blip2-opt-2.7b-coco"
    assert config.train.stages[0].losses.concept == 1
    assert config.train.gradient_checkpointing == "auto"
