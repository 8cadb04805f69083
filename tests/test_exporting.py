"""Exported models: plain transformers, in a process that never sees the harness, captions as the run does."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import load_file
from support import language_models, models, vlm_checkpoints

from harness.config.sections import PredictConfig
from harness.data.given import Given
from harness.data.images import Whole, open_pixels
from harness.decoding import predict
from harness.errors import UserError
from harness.models import adapters, family
from harness.models.settings import LoraConfig, ModelConfig
from harness.training.export import export, save_use
from harness.training.settings import TrainConfig

NOTHING = TrainConfig.model_validate({"stages": []})


def script(folder: Path, images: list[Path], away: Path) -> list[str]:
    """What the script in an exported folder prints; the process can't import the harness."""
    (away / "harness").mkdir(exist_ok=True)
    (away / "harness" / "__init__.py").write_text("raise ImportError('not here')")
    command = [sys.executable, folder / "caption.py", *images]
    path = os.pathsep.join(map(str, (away, Path(transformers.__file__).parents[1])))  # the same version
    clean = {key: value for key, value in os.environ.items() if key != "COVERAGE_PROCESS_START"}
    done = subprocess.run(command, cwd=away, env=clean | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n").split("\n")


def test_the_card_has_scores_data_and_the_mark_of_a_stand_in(small_run, tmp_path):
    run, folder = small_run / "kept" / "runs" / "small" / "opt-s42", tmp_path / "out"
    assert export(run, folder, hub_ready=True) == {"checkpoint": folder}
    record = json.loads((run / "run.json").read_text())
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "transformers"
    assert "**STAND-IN**" in text
    score = record["scores"]["valid"]["after"]["rouge1"]
    assert f"| rouge1 | {score['value']:.4f} | [{score['low']:.4f}, {score['high']:.4f}] | 12 |" in text
    assert score["signature"].replace("|", r"\|") in text
    assert record["data"]["fingerprints"]["train"] in text
    assert "*.safetensors filter=lfs" in (folder / ".gitattributes").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Blip2ForConditionalGeneration"]
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in folder.rglob("*") if file.is_file())


@pytest.mark.slow
def test_the_folder_of_a_run_captions_by_transformers_alone(small_run, tmp_path):
    """The captions are those of the run before post-processing."""
    project, folder = small_run / "kept", tmp_path / "out"
    run = project / "runs" / "small" / "opt-s42"
    export(run, folder)
    record = json.loads((run / "run.json").read_text())
    with (project / "runs" / record["artifacts"]["predictions/test_before.csv"]).open(newline="") as file:
        own = {row["ID"]: row["caption"] for row in csv.DictReader(file)}
    images = [project / "data" / "phantom" / "test" / f"{id}.jpg" for id in own]
    assert script(folder, images, tmp_path) == [" ".join(caption.split()) for caption in own.values()]


def test_weights_of_an_unfinished_training_are_not_exported(small_run, tmp_path):
    import shutil

    shutil.copytree(small_run / "kept" / "runs", tmp_path / "runs")
    run = tmp_path / "runs" / "small" / "opt-s42"
    place = tmp_path / "runs" / json.loads((run / "run.json").read_text())["steps"]["train"]
    (place / "DONE").unlink()
    with pytest.raises(UserError, match="no trained weights"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    record = json.loads((run / "run.json").read_text())
    record["config"]["consensus"] = {"own": 0, "runs": [{"run": "a/b-s1", "weight": 1}]}
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="no model of its own: it combines a/b-s1"):
        export(run, tmp_path / "out")


def pictures(folder: Path, count: int = 4) -> list[Given]:
    """Images of different shapes and brightness."""
    rng, found = np.random.default_rng(1), []
    for number, shape in enumerate([(40, 60), (64, 90), (50, 50), (70, 33)][:count]):
        file = folder / f"{number}.png"
        levels = rng.integers(0, 60, (*shape, 3)) + 60 * number
        Image.fromarray(levels.astype(np.uint8)).save(file)
        found.append(Given(str(number), file, file))
    return found


def agree(model: ModelConfig, folder: Path | None, tmp_path: Path, train: TrainConfig = NOTHING) -> Path:
    """Check that an exported model says what the harness says; the folder that was exported."""
    chosen, images, out = family(model), pictures(tmp_path), tmp_path / "out"
    out.mkdir()
    loaded = chosen.load(model, train, folder, torch.float32)
    adapters.merge(loaded.model)
    if hasattr(loaded.model, "language_projection"):  # a new one gives all images nearly the same
        torch.nn.init.normal_(loaded.model.language_projection.weight, std=8.0)
    side = model.image_size
    pixels = Whole(images, side) if chosen.WHOLE_IMAGES else open_pixels(images, side, None)
    how = PredictConfig(num_beams=3, max_new_tokens=12, min_new_tokens=2, no_repeat_ngram_size=3)
    own = predict.captions(loaded, pixels, range(len(images)), how)
    assert len(set(own)) > 1  # the images matter
    chosen.export(loaded, out)
    save_use(chosen.usage(model, loaded), how, loaded, out)
    assert script(out, [one.file for one in images], tmp_path) == own
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["opt", "llama", "qwen2"])
def test_other_language_models_behind_the_qformer_caption_by_transformers(tiny_folder, kind, tmp_path):
    """Their tokenizers have no token of an image; adapters are in the weights."""
    speaks = language_models.build(kind, tiny_folder, tmp_path / "language")
    for file in speaks.glob("*token*.json"):
        file.write_text(file.read_text().replace("<image>", "<other>"))
    settings = {"checkpoint": str(tiny_folder), "language_checkpoint": str(speaks), "image_size": 64}
    model = ModelConfig(**settings, lora=LoraConfig(rank=2), tiny=models.SIZES)
    out = agree(model, tiny_folder, tmp_path)
    assert not any("lora" in name for name in load_file(out / "model.safetensors"))
    image = json.loads((out / "config.json").read_text())["image_token_index"]
    assert json.loads((out / "generation_config.json").read_text())["suppress_tokens"] == [image]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blip", "instructblip", "llava", "llava_next", "paligemma", "gemma3"])
def test_vision_language_models_caption_by_transformers(kind, tmp_path):
    folder = vlm_checkpoints.make(kind, tmp_path / "base")
    model = ModelConfig(family="vlm", checkpoint=str(folder), prompt="describe the image", image_size=64)
    agree(model, folder, tmp_path)
