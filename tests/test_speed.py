"""The forecast of time: FLOPs as torch counts them, measured speeds, finished runs, several devices."""

import itertools
import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Blip2Config

from harness import records
from harness.config.schema import Config
from harness.machine import device
from harness.models.base import Work
from harness.models.blip2 import sizes
from harness.training import speed
from harness.training.memory import Model, Setup
from harness.training.settings import TrainConfig

device.probe("cpu")
from support.traces import captioner, without_contents  # noqa: E402

ROOT = Path(__file__).parents[1]
H200 = "cuda (NVIDIA H200)"
COMPETITION = {"train": 60918, "valid": 10437, "test": 10473}


def real(**train) -> Model:
    shape = sizes.of_checkpoint(None, "Salesforce/blip2-opt-2.7b", 364, True)
    return Model(shape, TrainConfig(**train), "cuda", True)


# FLOPs


def counted(config: Blip2Config, language_model: bool, texts: tuple[str, ...], train_vision: bool) -> int:
    """The oracle: torch's counter on the model itself without weights, with plain products for attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with without_contents(False), sdpa_kernel(SDPBackend.MATH):
        model = captioner(config, language_model, False, False)
        model.trained_parts = {"connector", *(["vision"] if train_vision else [])}
        model.freeze(texts)
        model.train()
        side = config.vision_config.image_size
        ids = torch.zeros(3, 11, dtype=torch.long)
        batch = {"ids": ids, "mask": torch.ones_like(ids), "labels": torch.zeros_like(ids)}
        given = [batch if text in texts else None for text in ("caption", "concept")]
        with FlopCounterMode(display=False) as found:
            losses = model(torch.zeros(3, 3, side, side), *given, 0.1)
            sum(loss for loss in losses if loss is not None).backward()
    return found.get_total_flops()


@pytest.mark.parametrize(
    ("language_model", "texts", "train_vision"),
    itertools.product((True, False), (("caption", "concept"), ("caption",), ("concept",)), (True, False)),
)
@pytest.mark.slow
def test_flops_are_those_that_torch_counts(language_model, texts, train_vision):
    """Few layers of the real widths. 1 % is for logits that a model may leave out."""
    text = {**sizes.OPT_2_7B, "num_hidden_layers": 2}
    parts = {"vision_config": {"num_hidden_layers": 2}, "qformer_config": {"num_hidden_layers": 4}}
    config = Blip2Config(**parts, text_config={"model_type": "opt", **text})
    config.vision_config.image_size = 224
    expected = counted(config, language_model, texts, train_vision)
    shape = sizes.of({**parts, "text_config": text}, 224, language_model)
    losses = {"captions": "caption" in texts, "concepts": "concept" in texts}
    found = shape.flops(Work(3, 11, False, False, False, train_vision, **losses))
    assert found == pytest.approx(expected, rel=0.01)


def test_flops_at_the_real_size_are_those_that_were_counted_on_a_gpu():
    """benchmarks/real_size.py on an H200: 5.31 TFLOP an image at 364 pixels with 48 tokens of each text."""
    model = real()
    assert model.flops(speed.stages(model.config)[0]) == pytest.approx(5.31e12, rel=0.01)


# one device


@pytest.mark.parametrize(
    ("micro_batch", "checkpointing", "low", "high"),
    [(32, False, 61, 61), (16, False, 53, 53), (16, True, 30, 39.9)],
)
def test_the_speeds_measured_on_an_h200_are_forecast(tmp_path, micro_batch, checkpointing, low, high):
    model, setup = real(), Setup(1, micro_batch, checkpointing, 0, False)
    guess = speed.training(model, COMPETITION["train"], setup, H200, tmp_path)
    images = 70 * 476 * 128
    first = images * 5 / 7 / (guess.seconds * _share_of_first(model))
    assert low * 0.95 < first < high * 1.05
    assert guess.how == "measured on an H200"


def _share_of_first(model: Model) -> float:
    first, second = (stage.epochs * model.flops(stage) for stage in speed.stages(model.config))
    return first / (first + second)


def test_other_cards_are_scaled_by_their_data_sheets(tmp_path):
    model, setup = real(), Setup(1, 16, False, 0, False)
    here, there = (
        speed.training(model, 1000, setup, name, tmp_path) for name in (H200, "cuda (NVIDIA A100-SXM4-80GB)")
    )
    assert there.seconds / here.seconds == pytest.approx(989 / 312)
    assert "scaled" in there.how
    assert speed.rate("cuda (NVIDIA H100 PCIe)") < speed.rate("cuda (NVIDIA H100 80GB HBM3)")
    assert speed.rate("cuda (NVIDIA RTX A4000)") is None


def test_what_is_not_known_has_no_number(tmp_path):
    model, setup = real(), Setup(1, 16, False, 0, False)
    guess = speed.training(model, 1000, setup, "cuda (Other)", tmp_path)
    assert guess.seconds is None
    assert str(guess).startswith("not known (no training has finished on this device, and the rate")
    small = Model(sizes.of_tiny(TINY.model.tiny, 224, True), TINY.train, "cuda", True)
    assert "smaller" in speed.training(small, 1000, setup, H200, tmp_path).how


TINY = Config.model_validate({"name": "x", "data": {"root": "none"}, "model": {"checkpoint": "tiny"}})


def finished(
    root: Path, config: Config, name: str, images_per_second: float, ranks: int = 1, **record
) -> None:
    """A finished run whose training reached this speed."""
    step, folder = root / "steps" / f"train-{name}", root / "x" / name
    step.mkdir(parents=True)
    folder.mkdir(parents=True)
    rows = [{"step": 1, "stage": 1, "loss": 1.0, "images_per_second": images_per_second / 50}] * 3
    rows += [
        {"step": n, "stage": 1, "loss": 1.0, "images_per_second": images_per_second} for n in range(4, 9)
    ]
    (step / "losses.jsonl").write_text("\n".join(map(json.dumps, rows)))
    setup = {"devices": ranks, "micro_batch_size": 32, "gradient_checkpointing": False}
    (step / "setup.json").write_text(json.dumps(setup))
    made = {"command": "c", "git": {"commit": None, "dirty": None}, "seconds": 1.0, "ranks": ranks}
    made["environment"] = {"device": "cpu (Some)"}
    steps = {"train": f"steps/train-{name}", "predict-valid": f"steps/predict-{name}"}
    values = {
        "name": "x",
        "variant": name,
        "status": "FINISHED",
        "edition": 2023,
        "command": "c",
        "config": json.loads(config.model_dump_json()),
        "steps": steps,
        "made": dict.fromkeys(steps, made),
        "seconds": {"train": 1.0, "predict-valid": 20.0, "score-before": 3.0, "score-after": 1.0},
        "data": {"root": "none", "splits": {"train": 10, "valid": 10}},
    }
    (folder / "run.json").write_text(json.dumps(values | record))


def test_finished_runs_on_this_device_are_learnt_from(tmp_path):
    """The median of three at a known size: then half the FLOPs go twice as fast, and two devices too."""
    for name, images_per_second in (("a", 10.0), ("b", 12.0), ("c", 40.0)):
        finished(tmp_path, TINY, name, images_per_second)
    finished(tmp_path, TINY, "failed", 1.0, status="FAILED")
    model = Model(sizes.of_model(TINY.model), TINY.train, "cpu", False)
    setup = Setup(1, 32, False, 0, False)
    first, second = (model.flops(stage) for stage in speed.stages(model.config))
    seconds = 1280 / 12 * (50 + 20 * second / first)
    guess = speed.training(model, 1280, setup, "cpu (Some)", tmp_path)
    assert guess.seconds == pytest.approx(seconds)
    assert guess.how == "from 3 runs on this device"
    assert speed.training(model, 1280, Setup(2, 32, False, 0, False), "cpu (Some)", tmp_path).seconds * 2 == (
        pytest.approx(seconds)
    )
    assert speed.training(model, 1280, setup, "cpu (Another)", tmp_path).seconds is None
    parts = speed.of_run(TINY, model, setup, {"valid": 30, "test": 20}, "cpu (Some)", tmp_path)
    assert {step: guess.seconds for step, guess in parts["prediction"].items()} == pytest.approx(
        {"predict-valid": 20.0 / 10 * 30, "predict-test": 20.0 / 10 * 20}
    )
    assert speed.together(parts["scoring"].values()).seconds == pytest.approx(4.0 / 10 * 30)
    other = TINY.model_copy(update={"predict": TINY.predict.model_copy(update={"num_beams": 1})})
    unlike = speed.of_run(other, model, setup, {"valid": 30}, "cpu (Some)", tmp_path)
    assert speed.together(unlike["prediction"].values()).seconds is None


def test_a_run_on_two_ranks_counts_for_two(tmp_path):
    finished(tmp_path, TINY, "a", 20.0, ranks=2)
    model = Model(sizes.of_model(TINY.model), TINY.train, "cpu", False)
    one = speed.training(model, 1280, Setup(1, 32, False, 0, False), "cpu (Some)", tmp_path).seconds
    assert one > 1280 / 20 * 50


@pytest.mark.parametrize("file", ["run.json", "losses.jsonl", "setup.json"])
def test_damaged_runs_teach_nothing(tmp_path, file):
    finished(tmp_path, TINY, "a", 20.0)
    (found,) = tmp_path.rglob(file)
    found.write_text('{"config": {"train": {"micro_batch_size": []}}, "step": "x", "devices": {}}')
    model = Model(sizes.of_model(TINY.model), TINY.train, "cpu", False)
    guess = speed.training(model, 1280, Setup(1, 32, False, 0, False), "cpu (Some)", tmp_path)
    assert guess.seconds is None or file == "setup.json"


def test_the_first_steps_correct_the_forecast():
    guess = speed.remaining([1.0, 1.0, 1.0, *[8.0] * 17], 8 * 7200)
    assert str(guess) == "about 2.0 h (8 images/s in the first 20 steps)"
    assert [speed.duration(seconds) for seconds in (3, 130, 86400)] == [
        "about 3 s",
        "about 2.2 min",
        "about 24.0 h",
    ]


# several devices


def test_bytes_sent_are_those_of_rings():
    """A ring all-reduce of N devices sends 2(N-1)/N of a tensor; see the docstring for each stage."""
    model = real()
    numbers = 4 * model.trained
    assert numbers == pytest.approx(4 * 1.175e9, rel=0.01)
    sent = [speed.sent(model, Setup(8, 8, False, stage, False)) for stage in range(4)]
    assert sent[:2] == pytest.approx([0.875 * 2 * numbers, 0.875 * 3 * numbers])
    assert sent[2] == pytest.approx(0.875 * 5 * numbers)  # two micro batches
    assert sent[3] == pytest.approx(0.875 * 2 * (2 * model.weights + numbers))
    assert speed.sent(model, Setup(1, 16, False, 0, False)) == 0


@pytest.mark.slow
def test_bytes_sent_are_those_of_deepspeed_on_two_ranks(tiny_folder):
    """The oracle counts the arguments of torch's collectives. ZeRO-3 gathers a few weights more than once."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "-m", "support.collectives", str(tiny_folder)],
        cwd=ROOT / "tests",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    weights, gradients = found["sizes"]
    parts = SimpleNamespace(trained=gradients / 4, weights=weights, config=SimpleNamespace(batch_size=8))
    sent = [speed.sent(parts, Setup(2, 2, False, stage, False)) for stage in range(4)]
    assert found["sent"][:3] == pytest.approx(sent[:3], rel=1e-3)
    assert found["sent"][3] == pytest.approx(sent[3], rel=0.1)


def script():
    return runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"))


def test_the_page_has_the_figures_of_the_function():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for table in script()["tables"]().strip().split("\n\n"):
        assert table in page, "docs/scaling.md is stale; run: python benchmarks/scaling.py"


@pytest.mark.slow
def test_two_ranks_reduce_in_about_the_forecast_time():
    """The machine may be busy: this finds a wrong unit or a tensor that is sent too often."""
    for said, found in script()["measured"]().values():
        assert 0.1 < found / said < 10


def test_the_slowest_link_decides():
    assert speed.bandwidth(450e9) == 0.8 * 450e9
    assert speed.bandwidth(450e9, 25e9) == 0.8 * 25e9
    assert speed.bandwidth(30e9, 8 * 25e9) == 0.8 * 30e9


# self-critical stages

REWARD = {"metrics": {"rouge1": 1}, "samples": 5, "max_new_tokens": 40}
SAMPLING = [
    {"epochs": 1, "losses": {"caption": 1}},
    {"epochs": 2, "losses": {"reward": 1}, "reward": REWARD},
]


def test_time_beyond_the_updates_is_that_of_samples(tmp_path):
    """Steps take 3 s more than their updates: half the tokens take half of that. The pace is of stage 1."""
    sampling = TINY.model_copy(update={"train": TrainConfig(stages=SAMPLING)})
    model, setup = (
        Model(sizes.of_model(TINY.model), sampling.train, "cpu", False),
        Setup(1, 32, False, 0, False),
    )
    finished(tmp_path, sampling, "a", 10.0)
    first, second = (model.flops(stage) for stage in speed.stages(model.config))
    update = 128 / 10 * second / first
    rows = [
        {"step": n, "stage": 2, "loss": 1.0, "images_per_second": 128 / (update + 3)} for n in range(9, 19)
    ]
    with (tmp_path / "steps/train-a/losses.jsonl").open("a") as file:
        file.write("\n" + "\n".join(map(json.dumps, rows)))
    parts = speed.of_run(sampling, model, setup, {"train": 1280}, "cpu (Some)", tmp_path)
    assert parts["training"]["train"].seconds == pytest.approx(10 * (128 / 10 + 2 * update))
    assert parts["sampling and rewards"]["train"].seconds == pytest.approx(2 * 10 * 3)
    half = [SAMPLING[0], SAMPLING[1] | {"reward": REWARD | {"max_new_tokens": 20}}]
    model = replace(model, config=TrainConfig(stages=half))
    guess = speed.sampling(TINY.model, model, 1280, setup, "cpu (Some)", tmp_path)
    assert guess.seconds == pytest.approx(10 * 3)
    half[1]["reward"]["metrics"] = {"bertscore": 1}
    other = replace(model, config=TrainConfig(stages=half))
    assert speed.sampling(TINY.model, other, 1280, setup, "cpu (Some)", tmp_path).seconds is None


def test_samples_on_a_card_take_what_decoding_took_on_an_h200(tmp_path):
    """16 captions of 64 tokens in 64 x 4.6 ms; BERTScore at the speed of 8,180 pairs in 18.9 s."""
    reward = {
        "metrics": {"bertscore": 1, "bleurt": 1},
        "samples": 2,
        "max_new_tokens": 64,
        "baseline": "greedy",
    }
    stages = [{"epochs": 1, "losses": {"reward": 1}, "reward": reward}]
    model, setup = real(stages=stages, batch_size=8, micro_batch_size=8), Setup(1, 8, False, 0, False)
    config = Config.model_validate({"name": "x", "data": {"root": "none"}})
    guess = speed.sampling(config.model, model, 800, setup, H200, tmp_path)
    assert guess.seconds == pytest.approx(100 * (2 * 64 * 4.64e-3 + 16 * 18.9 / 8180), rel=0.01)
    assert guess.how == "from an H200; without bleurt"


def test_records_are_read_once_for_many_forecasts_and_again_when_one_changes(tmp_path, monkeypatch):
    finished(tmp_path, TINY, "a", 10.0)
    read, count = records.read_all, []
    monkeypatch.setattr(records, "read_all", lambda *given: count.append(1) or read(*given))
    model = Model(sizes.of_model(TINY.model), TINY.train, "cpu", False)
    for _ in range(3):
        assert speed.pace("cpu (Some)", model, tmp_path).how == "from 1 run on this device"
    assert len(count) == 1
    finished(tmp_path, TINY, "b", 12.0)
    (tmp_path / "x" / "gone").mkdir()
    (tmp_path / "x" / "gone" / "config.yaml").write_text("name: x")  # its record is missing
    assert speed.pace("cpu (Some)", model, tmp_path).how == "from 2 runs on this device"
    assert len(count) == 2
