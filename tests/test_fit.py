"""What auto chooses, that it changes no result, and a training that runs out of memory."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.commands import harness
from support.experiments import EXPERIMENT

from harness.cli.terminal import Terminal
from harness.config.experiment import load as load_experiment
from harness.config.schema import Config
from harness.config.sections import DataConfig, PhantomConfig
from harness.data import load
from harness.errors import UserError
from harness.machine import device, ranks
from harness.models.blip2 import sizes
from harness.models.blip2.model import Captioner
from harness.steps import train as train_step
from harness.steps.plan import Plan
from harness.steps.work import Work
from harness.training import fit, forecast, memory
from harness.training.memory import GB, Model, Setup
from harness.training.settings import TrainConfig

device.probe("cpu")
AUTO = {"micro_batch_size": "auto", "gradient_checkpointing": "auto"}
EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def real(kind: str = "cuda", **train) -> Model:
    shape = sizes.of_checkpoint(None, "Salesforce/blip2-opt-2.7b", 364, True)
    return Model(shape, TrainConfig(**AUTO | train), kind, True)


# what is chosen


def test_the_order_of_speed_is_the_measured_one():
    """Images/s on an H200 at 364 pixels; with checkpointing the best of several measurements."""
    measured = {(32, False): 61, (16, False): 53, (16, True): 39}
    found = [(s.micro_batch, s.checkpointing) for s in memory.choices(TrainConfig(**AUTO), 1, "cuda")]
    assert [one for one in found if one in measured] == sorted(measured, key=measured.get, reverse=True)
    times = {one: memory.relative_time(Setup(1, *one, 0, False), "cuda") for one in measured}
    for one in measured:
        ratio = times[32, False] / times[one] * measured[32, False]
        assert ratio == pytest.approx(measured[one], rel=0.02)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("free", [36 * GB, 70 * GB, 140 * GB])
def test_the_fastest_that_fits_is_chosen(devices, free):
    model = real()
    found = memory.chosen(model, devices, free)
    assert memory.needed(model, found) <= free
    assert model.config.batch_size % (found.micro_batch * devices) == 0
    every = [Setup(devices, n, way, 0, False) for n in (1, 2, 4, 8, 16, 32, 64) for way in (True, False)]
    for other in every:
        if model.config.batch_size % (other.micro_batch * devices) == 0 and other != found:
            slower = memory.relative_time(other, "cuda") > memory.relative_time(found, "cuda")
            assert slower or memory.needed(model, other) > free, other


def test_the_choices_on_the_cards_of_the_paper_and_of_facts():
    """8 devices share batches of 128, so each takes 16 at once, as the paper does."""
    assert memory.chosen(real(), 8, 140 * GB) == Setup(8, 16, False, 0, False)
    assert memory.chosen(real(), 1, 140 * GB) == Setup(1, 32, False, 0, False)
    assert memory.chosen(real(), 1, 36 * GB).checkpointing
    least = memory.chosen(real(), 1, 1 * GB)
    assert memory.needed(real(), least) == min(
        memory.needed(real(), setup) for setup in memory.choices(real().config, 1, "cuda")
    )


def test_what_is_written_is_not_chosen():
    written = real(micro_batch_size=8)
    assert {setup.micro_batch for setup in memory.choices(written.config, 1, "cuda")} == {8}
    assert len(memory.choices(real(gradient_checkpointing=True, micro_batch_size=8).config, 1, "cuda")) == 1
    assert all(
        setup.checkpointing for setup in memory.choices(real(gradient_checkpointing=True).config, 1, "npu")
    )


def test_a_processor_takes_no_large_micro_batches():
    assert max(setup.micro_batch for setup in memory.choices(TrainConfig(**AUTO), 1, "cpu")) == 16


def test_unknown_sizes_take_the_least_and_say_so(tmp_path):
    setup, why = fit.pick(TrainConfig(**AUTO), None, "cuda", 2, 80 * GB, tmp_path)
    assert (setup.micro_batch, setup.checkpointing) == (1, True)
    assert "not known" in why


def test_an_interrupted_training_keeps_its_set_up_while_it_fits(tmp_path):
    model = real()
    setup, why = fit.pick(model.config, model, "cuda", 1, 70 * GB, tmp_path)
    fit.record(tmp_path, setup, why)
    assert fit.pick(model.config, model, "cuda", 1, 140 * GB, tmp_path) == (setup, why)
    assert fit.pick(model.config, model, "cuda", 1, 36 * GB, tmp_path)[0].checkpointing
    assert fit.pick(model.config, model, "cuda", 2, 140 * GB, tmp_path)[0] == Setup(2, 32, False, 0, False)
    fit.record(tmp_path, Setup(1, 8, False, 0, False), fit.HALVED)
    assert fit.pick(model.config, model, "cuda", 1, 140 * GB, tmp_path)[0].micro_batch == 8
    written = TrainConfig()
    assert fit.pick(written, None, "cuda", 1, 140 * GB, tmp_path)[0].micro_batch == 8
    for damaged in (
        "",
        "[]",
        '{"devices": 1, "micro_batch_size": "x"}',
        '{"devices": 1, "micro_batch_size": 7}',
    ):
        (tmp_path / fit.FILE).write_text(damaged)
        assert fit.pick(written, None, "cuda", 1, 0, tmp_path) == (
            Setup(1, 16, False, 0, False),
            "as configured",
        )


def test_dry_run_says_what_auto_takes_on_typical_cards(tmp_path):
    for config in load_experiment(EXPERIMENTS / "ablation_364.yaml", [f"data.root={tmp_path}"]):
        lines = forecast.lines(forecast.forecast(config))
        (card,) = (line for line in lines if line.startswith("80 GB: "))
        assert (
            card
            == "80 GB: 1 device, as configured (auto: micro batch 16 without gradient checkpointing, 62.0 GB)"
        )


def test_dry_run_says_what_auto_takes_here_and_why(tmp_path):
    auto = "micro_batch_size: auto\n  gradient_checkpointing: auto"
    (tmp_path / "small.yaml").write_text(EXPERIMENT.replace("micro_batch_size: 8", auto))
    found = "micro batch 16 without gradient checkpointing, the fastest that fits: "
    shown = harness(tmp_path, "run", "small.yaml", "--device", "cpu", "--dry-run").stdout
    (line,) = (line for line in shown.splitlines() if line.startswith("auto: "))
    assert line.startswith(f"auto: on one device here, small/opt-s42 and 1 more take {found}")
    shown = harness(tmp_path, "run", "small.yaml", "--device", "cpu", "--dry-run", "--verbose").stdout
    assert shown.count(f"#   on one device here, auto takes {found}") == 2


# trainings


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    config = DataConfig(root=root / "set", phantom=PhantomConfig(train=12, valid=4, test=2))
    return load(config, root / "runs")


def planned(data, folder: Path, root: Path, **train) -> Plan:
    one_epoch = [{"epochs": 2, "losses": {"caption": 1, "concept": 1}}]
    values = {"stages": one_epoch, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 0}
    values |= {"dropout": 0.0, "language_dropout": 0.0, "evaluate_every": 0, "evaluate_images": 2}
    score = {"bertscore": {"checkpoint": "standin"}, "metrics": ["bertscore"], "bootstrap": 0}
    model = {"checkpoint": str(folder), "image_size": 64}
    config = {"name": "a", "device": "cpu", "data": {"root": data.root}, "model": model, "score": score}
    return Plan(Config.model_validate(config | {"train": values | train}), data, root)


def trained(data, folder: Path, root: Path, **train) -> tuple[dict[str, torch.Tensor], list[float], dict]:
    """Weights, losses and recorded set-up of a training by its step."""
    step = planned(data, folder, root, **train).steps["train"]
    step.directory.mkdir(parents=True)
    Work(planned(data, folder, root, **train).config, Terminal()).build(step, step.directory)
    rows = [json.loads(line) for line in (step.directory / "losses.jsonl").read_text().splitlines()]
    weights = load_file(step.directory / "best.safetensors")
    losses = [row["loss"] for row in rows if "loss" in row]
    return weights, losses, dict(step.found({})["training"])


def short_of_memory(monkeypatch, most: int, after: int = 0) -> None:
    """Training passes of more than `most` images find no memory, after a number of passes."""
    forward, count = Captioner.forward, iter(range(10**9))

    def short(self, pixels, *arguments, **options):
        if torch.is_grad_enabled() and len(pixels) > most and next(count) >= after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return forward(self, pixels, *arguments, **options)

    monkeypatch.setattr(Captioner, "forward", short)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.ci
def test_auto_trains_as_what_it_chooses_and_records_it(data, tiny_folder, tmp_path, capsys):
    weights, losses, found = trained(data, tiny_folder, tmp_path / "auto", **AUTO)
    assert "micro batch 8 without gradient checkpointing, the fastest that fits: " in capsys.readouterr().err
    assert (found["devices"], found["micro_batch_size"], found["gradient_checkpointing"]) == (1, 8, False)
    written = {"micro_batch_size": 8, "gradient_checkpointing": False}
    by_hand, expected, as_written = trained(data, tiny_folder, tmp_path / "written", **written)
    assert same(weights, by_hand)
    assert losses == expected
    assert as_written["why"] == "as configured"
    assert "by rounding and by draws of dropout and augmentation" in found["notes"][-1]
    assert "notes" not in as_written


@pytest.mark.parametrize(
    "zero_stage", [pytest.param(0, marks=pytest.mark.ci), pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_lack_of_memory_halves_the_micro_batch_once(
    data, tiny_folder, tmp_path, monkeypatch, capsys, zero_stage
):
    expected = trained(data, tiny_folder, tmp_path / "small", micro_batch_size=4, zero_stage=zero_stage)
    capsys.readouterr()
    short_of_memory(monkeypatch, most=4)
    found = trained(data, tiny_folder, tmp_path / "halved", micro_batch_size=8, zero_stage=zero_stage)
    said = capsys.readouterr().err
    assert "the cpu has not enough memory for micro batches of 8\n" in said
    assert "micro batch 4 without gradient checkpointing, smaller, because more did not fit" in said
    assert same(found[0], expected[0])
    assert found[1] == expected[1]
    assert (found[2]["micro_batch_size"], found[2]["why"]) == (4, fit.HALVED)
    short_of_memory(monkeypatch, most=2)
    with pytest.raises(UserError, match="the cpu has not enough memory for this step"):
        trained(data, tiny_folder, tmp_path / "twice", micro_batch_size=8, zero_stage=zero_stage)


@pytest.mark.ci
def test_a_lack_of_memory_after_a_checkpoint_goes_on_from_it(data, tiny_folder, tmp_path, monkeypatch):
    expected = trained(data, tiny_folder, tmp_path / "small", micro_batch_size=4)
    short_of_memory(monkeypatch, most=4, after=3)  # in the second epoch
    found = trained(data, tiny_folder, tmp_path / "halved", micro_batch_size=8)
    assert len(found[1]) == len(expected[1]) == 4
    assert found[1] == pytest.approx(expected[1], rel=1e-5)


def test_late_lacks_of_memory_end_the_training(data, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train_step, "FIRST_STEPS", 2)
    short_of_memory(monkeypatch, most=4, after=3)
    with pytest.raises(UserError, match="the cpu has not enough memory for this step"):
        trained(data, tiny_folder, tmp_path, micro_batch_size=8)


def test_one_of_several_ranks_ends_with_the_smaller_setting(data, tiny_folder, tmp_path, monkeypatch):
    """The others wait for it in a collective, and end with it."""
    plan = planned(data, tiny_folder, tmp_path, micro_batch_size=8)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    step, work = plan.steps["train"], Work(plan.config, Terminal())
    with pytest.raises(UserError, match=r"micro batches of 8\n.*--set train.micro_batch_size=4") as told:
        step._halved(work, tmp_path, Setup(2, 8, False, 0, False), RuntimeError("out of memory"))
    assert told.value.exit_code == 1


def test_auto_has_the_fingerprint_of_the_former_recipe(data, tiny_folder, tmp_path):
    """Its trainings from before there was auto differ from those with auto by draws of dropout alone."""
    former = {"micro_batch_size": 16, "gradient_checkpointing": True, "batch_size": 128}
    places = {
        planned(data, tiny_folder, tmp_path, **train).steps["train"].directory
        for train in (former, former | AUTO)
    }
    assert len(places) == 1
    other = planned(data, tiny_folder, tmp_path, **former | {"micro_batch_size": 8}).steps["train"].directory
    assert other not in places


@pytest.mark.slow
def test_two_ranks_choose_the_same(tmp_path):
    text = EXPERIMENT.replace("micro_batch_size: 8", "micro_batch_size: auto").replace("opt_dedup", "#")
    (tmp_path / "small.yaml").write_text(text)
    harness(tmp_path, "run", "small.yaml", "--nproc", "2")
    (file,) = (tmp_path / "runs" / "small").glob("*/run.json")
    found = json.loads(file.read_text())["training"]
    assert (found["devices"], found["micro_batch_size"], found["gradient_checkpointing"]) == (2, 8, False)
