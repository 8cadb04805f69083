"""Predicted memory against what torch saves and DeepSpeed allocates, and what fits."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import Blip2Config

from harness.config.schema import Config
from harness.machine import device
from harness.models.base import Work
from harness.models.blip2 import activations, sizes
from harness.training import engine, forecast, memory
from harness.training.memory import GB, Model, Setup
from harness.training.settings import TrainConfig

device.probe("cpu")
from support.allocations import allocated, settings, small  # noqa: E402
from support.models import stages  # noqa: E402
from support.traces import captioner, kept, without_contents  # noqa: E402

PUBLISHED = "Salesforce/blip2-opt-2.7b"


def published(image_size: int, language_model: bool) -> tuple[Blip2Config, sizes.Shape]:
    config = Blip2Config(text_config={"model_type": "opt", **sizes.OPT_2_7B})
    config.vision_config.image_size = image_size
    return config, sizes.of_checkpoint(None, PUBLISHED, image_size, language_model)


def shallow() -> tuple[Blip2Config, sizes.Shape]:
    """The published model at 224 px with few of its layers, which are all alike."""
    text = {**sizes.OPT_2_7B, "num_hidden_layers": 3}
    parts = {"vision_config": {"num_hidden_layers": 3}, "qformer_config": {"num_hidden_layers": 4}}
    config = Blip2Config(**parts, text_config={"model_type": "opt", **text})
    config.vision_config.image_size = 224
    return config, sizes.of({**parts, "text_config": text}, 224, True)


@pytest.mark.parametrize(
    ("accelerator", "half", "language_model", "concepts"),
    [
        (True, True, True, True),
        pytest.param(False, True, True, False, marks=pytest.mark.ci),
        (False, False, False, True),
    ],
)
@pytest.mark.slow
def test_activations_of_the_real_model_are_those_that_autograd_keeps(
    accelerator, half, language_model, concepts
):
    config, shape = published(364, language_model)
    found = activations.of(shape, Work(3, 100, half, half, accelerator, concepts=concepts))
    with without_contents(accelerator):
        model = captioner(config, language_model, half, accelerator)
        plain, casts = kept(model, 3, 100, concepts)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        checkpointed, _ = kept(model, 3, 100, concepts)
    assert found.kept == pytest.approx(plain, rel=1e-3)
    assert found.casts == pytest.approx(casts, rel=1e-3)
    assert found.kept_checkpointed == pytest.approx(checkpointed, rel=1e-3)


@pytest.mark.ci
@pytest.mark.parametrize("train_vision", [True, False])
@pytest.mark.parametrize("dropout", [None, 0.0])
def test_activations_follow_batch_text_image_dropout_and_a_frozen_vit(train_vision, dropout):
    config, shape = shallow()
    if dropout is not None:
        config.qformer_config.hidden_dropout_prob = dropout
        config.qformer_config.attention_probs_dropout_prob = dropout
    work = Work(5, 37, True, True, True, train_vision, dropout=dropout)
    with without_contents(True):
        plain, _ = kept(captioner(config, True, True, True), 5, 37, True, train_vision)
    assert activations.of(shape, work).kept == pytest.approx(plain, rel=2e-3)


def test_activations_on_real_tensors():
    config, shape = small()
    plain, _ = kept(captioner(config, True, False, False), 3, 11, True)
    found = activations.of(shape, Work(3, 11, False, False, False))
    assert found.kept == pytest.approx(plain, rel=2e-3)


@pytest.mark.ci
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_weights_gradients_and_optimiser_are_those_that_deepspeed_allocates(tmp_path, stage):
    weights, gradients, optimiser = allocated(stage, tmp_path)
    model = Model(small()[1], TrainConfig(**settings(stage)), "cpu", False)
    found = memory.usage(model, memory.configured(model.config, 1))
    assert found.weights == pytest.approx(weights, rel=0.01)
    assert found.optimiser == pytest.approx(optimiser, rel=0.01)
    if stage == 0:  # with ZeRO they are in its own buffers by now
        assert found.gradients == pytest.approx(gradients, rel=0.01)


def real(kind: str = "cuda", **train) -> Model:
    return Model(published(364, True)[1], TrainConfig(**train), kind, True)


def test_each_means_helps_and_none_is_counted_where_it_does_not_reach():
    model = real()
    base = memory.usage(model, Setup(8, 16, False, 0, False))
    for better in (Setup(8, 16, True, 0, False), Setup(8, 4, False, 0, False), Setup(8, 16, False, 1, False)):
        assert memory.usage(model, better).total < base.total
    assert memory.usage(model, Setup(1, 16, False, 0, False)).weights == base.weights
    sharded, offloaded = (memory.usage(model, Setup(8, 16, False, 3, offload)) for offload in (False, True))
    assert sharded.weights * 8 == pytest.approx(base.weights, rel=1e-6)
    assert offloaded.total < sharded.total
    assert offloaded.host > 0 == sharded.host


def test_large_models_on_a_cpu_give_freed_memory_back_and_need_less(monkeypatch):
    def needed(kind):
        return memory.needed(real(kind), Setup(1, 4, False, 0, False))

    assert real("cpu").frees
    assert not real("cuda").frees
    assert not Model(small()[1], TrainConfig(), "cpu", False).frees
    freed, on_cuda = needed("cpu"), needed("cuda")
    monkeypatch.setattr(device, "can_free_memory", lambda: False)  # as without glibc
    assert freed < 0.9 * needed("cpu")
    assert needed("cuda") == on_cuda


@pytest.mark.skipif(not device.can_free_memory(), reason="without glibc")
def test_freed_memory_goes_back_to_the_system_after_each_backward_pass():
    """Small blocks lie between blocks in use, so the heap can't shrink by itself."""
    code = (
        "import psutil, torch; from types import SimpleNamespace as Made;"
        "from harness.training import engine;"
        "held = lambda: psutil.Process().memory_info().rss;"
        "blocks = [torch.ones(16_000) for _ in range(4000)];"
        "made = lambda frees: Made(frees_memory=frees, backward=lambda loss: None);"
        "full = held(); blocks = blocks[::50]; engine.backward(made(False), None); kept = held();"
        "engine.backward(made(True), None); print((full - kept) / 256e6, (full - held()) / 256e6)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    before, after = map(float, done.stdout.split())
    assert before < 0.1, done.stderr
    assert after > 0.8


@pytest.mark.parametrize("stage", [0, 3])
def test_an_engine_knows_whether_its_model_is_large(tmp_path, monkeypatch, stage):
    def frees():
        model = captioner(small()[0], True, False, False)
        model.freeze(["caption", "concept"])
        deep = engine.engine(model, TrainConfig(**settings(stage)), "cpu", tmp_path)
        engine.release(deep)
        return deep.frees_memory

    assert not frees()
    own = Model(small()[1], TrainConfig(), "cpu", False).weights
    monkeypatch.setattr(memory, "LARGE", own * 9 // 10)  # the forecast is within 1 %
    assert frees() is device.can_free_memory()
    monkeypatch.setattr(memory, "LARGE", own * 11 // 10)
    assert not frees()


def test_the_smallest_set_up_fits_and_whatever_is_simpler_does_not():
    model = real()
    for size, setup in memory.cards(model).items():
        assert setup is not None
        assert memory.needed(model, setup) <= size * GB
        for devices in memory.DEVICES[: memory.DEVICES.index(setup.devices)]:
            assert all(memory.needed(model, s) > size * GB for s in memory.means(model.config, devices))
        simpler = list(memory.means(model.config, setup.devices))
        for other in simpler[: simpler.index(setup)]:
            assert memory.needed(model, other) > size * GB
    assert memory.smallest(model, 1 * GB) is None


def test_options_of_a_set_up_turn_the_config_into_it():
    config = TrainConfig()
    setup = Setup(4, 8, True, 2, True)
    words = dict(word.removeprefix("train.").split("=") for word in setup.options(config).split()[1::2])
    changed = TrainConfig(**config.model_dump() | {key: json.loads(value) for key, value in words.items()})
    assert memory.configured(changed, 4) == setup
    assert setup.options(changed) == ""


def test_steps_are_those_of_the_schedule(tmp_path):
    from harness.training.schedule import epoch_batches, total_steps

    config = TrainConfig(batch_size=32, micro_batch_size=8, stages=stages(3, 2))
    rows = forecast.steps(config, 101)
    assert [row["optimiser_steps"] for row in rows] == [3 * len(epoch_batches(np.zeros(101), 32, 0, 1, 0)), 8]
    assert sum(row["optimiser_steps"] for row in rows) == total_steps(config, 101)
    assert rows[0]["micro_batches"] == 4 * rows[0]["optimiser_steps"]
    assert forecast.accumulation(config) == {1: 4, 2: 2, 4: 1}
    unknown = Config.model_validate(
        {"name": "x", "data": {"root": tmp_path / "none"}, "model": {"checkpoint": "some/model"}}
    )
    found = forecast.forecast(unknown)
    assert (found["steps"], found["memory"], len(found["unknown"])) == (None, None, 2)
    assert all(any(why in line for line in forecast.lines(found)) for why in found["unknown"])


def test_the_forecast_needs_no_torch():
    code = (
        "import sys; from pathlib import Path; from harness.training import forecast; "
        "from harness.config.experiment import load;"
        "[forecast.lines(forecast.forecast(c)) for c in load(Path('experiments/table3.yaml'), [])];"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True)
    assert done.returncode == 0, done.stderr


def test_any_number_of_stages_is_forecast_each_by_its_own_number():
    rows = forecast.steps(TrainConfig(stages=stages(3, 0, 2)), 1000)
    assert [(row["stage"], row["epochs"], row["optimiser_steps"]) for row in rows] == [(1, 3, 24), (3, 2, 16)]


LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FAULTS = """
import resource
from harness.machine import device
device.probe("cpu")
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.ci
@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[never]" in LARGE_PAGES.read_text(), reason="this kernel has no large pages"
)
def test_a_large_tensor_is_not_given_its_memory_4_kb_at_a_time():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**26 / 4096 / 4
