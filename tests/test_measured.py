"""Memory and FLOPs of models that run without contents, against real tensors and against counts by hand."""

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from harness.machine import device
from harness.models import contentless, family, measured, parts
from harness.models.base import Work
from harness.models.blip2 import by_running, sizes
from harness.models.settings import ModelConfig
from harness.training import forecast
from harness.training.settings import TrainConfig

device.probe("cpu")
TINY = {"hidden_size": 64, "vision_layers": 2, "qformer_layers": 2, "text_hidden_size": 96, "vocab_size": 600}
SMALL = {"checkpoint": "tiny", "image_size": 112, "tiny": TINY}
GROUPED = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 600,
}
SPEAKERS = {
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 600},
    "llama": {"model_type": "llama", **GROUPED},
    "qwen2": {"model_type": "qwen2", **GROUPED},
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """The current folder, with a `config.json` of each language model."""
    monkeypatch.chdir(tmp_path)
    for name, config in SPEAKERS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path


def run(model: ModelConfig, train: TrainConfig) -> measured.Shape:
    return by_running(model, train, sizes.values_of(model), None)


@pytest.mark.parametrize(
    "accelerator", [pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.ci)]
)
def test_parameters_and_flops_are_those_that_are_counted_by_hand(accelerator):
    model, train = ModelConfig(**SMALL), TrainConfig()
    counted, found = family(model).shape(model, train), run(model, train)
    work = Work(3, 20, accelerator, accelerator, accelerator, train_vision=not accelerator)
    assert found.trained(work.train_vision) == counted.trained(work.train_vision)
    assert found.frozen(work.train_vision, False) == pytest.approx(
        counted.frozen(work.train_vision, False), rel=0.01
    )
    assert found.flops(work) == pytest.approx(counted.flops(work), rel=0.01)


def allocated(shape: measured.Shape, train: TrainConfig, batch: int, tokens: int, checkpointing: bool) -> int:
    """The oracle: the most bytes that torch's allocator gave at once in a step with real tensors."""
    model = shape.build(train)
    model.use_plain_attention()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.freeze(["caption"])
    model.train()
    for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    ids = torch.ones(batch, tokens, dtype=torch.long)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        model(
            shape.pixels(batch), {"ids": ids, "mask": ids.clone(), "labels": ids.clone()}
        ).caption.backward()
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


@pytest.mark.ci
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_that_of_the_allocator(checkpointing):
    model = ModelConfig(**SMALL, language_checkpoint="llama", lora={"rank": 4})
    train = TrainConfig()
    shape = family(model).shape(model, train)
    work = Work(6, 30, False, False, False, concepts=False)
    found = contentless.step(lambda: shape.build(train), shape.pixels, work, 1, checkpointing)
    # torch's own kernels also take some memory, which no tensor has
    assert found["peak"] == pytest.approx(allocated(shape, train, 6, 30, checkpointing), rel=0.1)


@pytest.mark.parametrize("name", SPEAKERS)
def test_adapters_are_what_is_trained_of_a_language_model(name):
    model, train = ModelConfig(**SMALL, language_checkpoint=name, lora={"rank": 4}), TrainConfig()
    shape = family(model).shape(model, train)
    real = shape.build(train)
    own = {key: weight for key, weight in real.named_parameters() if parts.changes(real, key)}
    assert any(map(parts.is_adapter, own))
    assert shape.trained(True) == sum(weight.numel() for weight in own.values())
    others = [weight for key, weight in real.named_parameters() if key not in own] + list(real.buffers())
    assert shape.frozen(True, False) == sum(weight.nbytes for weight in others)


@pytest.mark.ci
def test_results_are_kept_for_other_processes(monkeypatch):
    model, train = ModelConfig(**SMALL, language_checkpoint="gpt2"), TrainConfig()
    work = Work(1, 8, False, False, False, concepts=False)
    first = family(model).shape(model, train).flops(work)
    monkeypatch.setattr(contentless, "step", None)
    assert family(model).shape(model, train).flops(work) == first
    larger = ModelConfig(**SMALL | {"image_size": 140}, language_checkpoint="gpt2")
    with pytest.raises(measured.Unmeasured, match="TypeError"):
        family(larger).shape(larger, train).flops(work)


def test_code_that_reads_integers_runs_and_floats_have_no_memory():
    with contentless.without_contents(accelerator=False) as mode:
        weight = torch.nn.Linear(8, 8)
        mode.building = False
        ids = torch.tensor([[1, 2, 7, 7]])
        grid = torch.arange(3) + 1
        assert grid.tolist() == [1, 2, 3]
        hidden = weight(torch.zeros(1, 2**40, 8))[:, :4]
        chosen = hidden[ids == 7]
        assert chosen.shape == (2, 8)
        with pytest.raises(DataDependentOutputException):
            chosen.sum().item()


def test_a_model_that_cannot_be_run_has_no_forecast_but_a_reason(monkeypatch):
    from harness.config.schema import Config

    def fails(*_):
        raise ValueError("grids differ")

    monkeypatch.setattr(contentless, "sizes", fails)
    model = SMALL | {"language_checkpoint": "gpt2"}
    config = Config.model_validate({"name": "x", "data": {"root": "none"}, "model": model})
    found = forecast.forecast(config)
    assert found["memory"] is None
    assert any("grids differ" in line for line in forecast.lines(found))
