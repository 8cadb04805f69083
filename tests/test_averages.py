"""`train.ema` and `train.keep_best`: the average against torch's, resuming, and what is kept as the best."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.allocations import small
from support.models import stages
from support.ranks import TRAIN, rows
from support.ranks import train as train_ranks
from support.training import Interrupted, config, run
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from harness.machine import device
from harness.steps.train import _written
from harness.training import memory, train
from harness.training.resume import KEPT, kept
from harness.training.settings import TrainConfig

device.probe("cpu")
DECAY = 0.7


@pytest.fixture(scope="module")
def folder(tiny_folder):
    return tiny_folder


def alternating():
    """Scores of each validation: first the weights', then the average's, which is the better at first."""
    scores = iter([0.1, 0.5, 0.2, 0.4, 0.3, 0.6, 0.7, 0.05])
    return lambda: {"valid_primary": next(scores)}


def averaged_by_torch(monkeypatch):
    """Has torch's own class follow the weights of each stage -> its models, one a stage."""
    found = []

    class Followed(train.Average):
        def __init__(self, model, decay):
            super().__init__(model, decay)
            found.append(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)))
            found[-1].update_parameters(model)  # the first only copies: it starts from these weights
            self.model = model

        def follow(self, trainer):
            super().follow(trainer)
            found[-1].update_parameters(self.model)

    monkeypatch.setattr(train, "Average", Followed)
    return found


def best_of(directory):
    return load_file(directory / train.BEST)


@pytest.mark.ci
def test_the_average_is_that_of_torch_in_each_stage(folder, tmp_path, monkeypatch):
    """The best weights are those of the average after the first epoch of stage 1, then after stage 2."""
    found, copies, scores = averaged_by_torch(monkeypatch), [], alternating()

    def evaluate():
        copies.append({name: weight.clone() for name, weight in found[-1].module.state_dict().items()})
        return scores()

    loaded, written = run(folder, tmp_path / "run", config(ema=DECAY), evaluate=evaluate)
    assert len(found) == 2
    for name, weight in best_of(tmp_path / "run").items():
        torch.testing.assert_close(weight, copies[5][name], atol=1e-7, rtol=0, msg=name)
        assert torch.equal(weight, loaded.model.state_dict()[name]), name
    valid = [row for row in written if "valid_loss" in row]
    assert [row["valid_primary"] for row in valid] == [0.5, 0.4, 0.6]
    assert [row["ema_valid_primary"] for row in valid] == [0.5, 0.4, 0.6]
    assert all(row["ema_valid_loss"] != row["valid_loss"] for row in valid)
    (first,) = kept(tmp_path / "run")
    assert (first["step"], first["average"], first["score"]) == (9, True, 0.6)


@pytest.mark.ci
def test_training_is_the_same_beside_its_average(folder, tmp_path):
    """Losses, and the weights that it ends with, to the bit."""
    falling = iter(range(100, 0, -1))
    _, plain = run(folder, tmp_path / "plain", config(evaluate_every=0))
    _, both = run(
        folder,
        tmp_path / "both",
        config(evaluate_every=0, ema=DECAY),
        evaluate=lambda: {"valid_primary": float(next(falling))},
    )
    assert [row["loss"] for row in plain if "loss" in row] == [row["loss"] for row in both if "loss" in row]
    assert all(torch.equal(best_of(tmp_path / "plain")[n], w) for n, w in best_of(tmp_path / "both").items())
    assert kept(tmp_path / "both")[0]["average"] is False


@pytest.mark.parametrize(
    "at",
    [pytest.param(5, marks=pytest.mark.ci), *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 8))],
)
def test_an_interrupted_average_goes_on_to_the_same_bits(folder, tmp_path, at):
    settings = config(ema=DECAY, checkpoint_every_steps=2, evaluate_every=0)

    def stop(row):
        if row["step"] == at and "loss" in row:
            raise Interrupted

    def evaluate():
        scores = iter([0.1, 0.5])
        return lambda: {"valid_primary": next(scores)}

    run(folder, tmp_path / "whole", settings, dropout=0.1, evaluate=evaluate())
    with pytest.raises(Interrupted):
        run(folder, tmp_path / "parts", settings, dropout=0.1, log=stop, evaluate=evaluate())
    run(folder, tmp_path / "parts", settings, dropout=0.1, evaluate=evaluate())
    whole, parts = (best_of(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_step_that_fp16_skips_leaves_the_average_alone(folder, tmp_path):
    from support.models import load_tiny
    from support.training import splits

    from harness.training.averages import Average
    from harness.training.engine import engine, place, release

    settings = config(precision="fp16", zero_stage=1, micro_batch_size=8)
    loaded = load_tiny(folder)
    place(loaded.model, settings, "cpu")
    loaded.model.freeze(["caption"])
    trainer = engine(loaded.model, settings, "cpu", tmp_path)
    trainer.optimizer.loss_scaler.cur_scale = 2.0**10
    average, split, applied = Average(loaded.model, DECAY), splits(loaded)["train"], []
    expected = loaded.model.query_tokens.detach().clone()
    captions = loaded.caption.collate(split.captions[:8])
    images = loaded.normalise(torch.from_numpy(split.pixels[:8]))
    for step in range(4):
        if step == 2:
            trainer.optimizer.loss_scaler.cur_scale = 2.0**60  # overflows
        trainer.backward(trainer(images, captions).caption / 50)
        trainer.step()
        average.follow(trainer)
        applied.append(trainer.was_step_applied())
        if applied[-1]:
            expected = DECAY * expected + (1 - DECAY) * loaded.model.query_tokens.detach()
    with average.instead(loaded.model):
        torch.testing.assert_close(loaded.model.query_tokens.detach(), expected, atol=1e-6, rtol=0)
    release(trainer)
    assert applied == [True, True, False, False]


@pytest.mark.ci
def test_the_best_weights_are_kept_by_rank(folder, tmp_path):
    """Of 3 validations x 2, the three best, also after an interruption; a tie goes to the earlier."""
    values = [0.5, 0.1, 0.4, 0.6, 0.5, 0.2]

    def evaluate(begun=0):
        scores, weights = iter(values[begun:]), []
        return (lambda: {"valid_primary": next(scores)}), weights

    settings, seen = config(ema=DECAY, keep_best=3), []

    def stop(row):
        seen.append(row["step"])
        if row["step"] == 8:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(folder, tmp_path / "run", settings, log=stop, evaluate=evaluate()[0])
    assert (tmp_path / "run" / train.BEST).exists()
    run(folder, tmp_path / "run", settings, evaluate=evaluate(4)[0])
    found = kept(tmp_path / "run")
    assert [(one["file"], one["step"], one["average"], one["score"]) for one in found] == [
        ("best.safetensors", 6, True, 0.6),
        ("best-2.safetensors", 3, False, 0.5),
        ("best-3.safetensors", 9, False, 0.5),
    ]
    assert not (tmp_path / "run" / "checkpoints").exists()
    weights = [load_file(tmp_path / "run" / one["file"])["query_tokens"] for one in found]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    run(folder, tmp_path / "alone", config(evaluate_every=1))
    start = load_file(tmp_path / "alone" / train.BEST)  # of step 3: all scores of this one are the same
    assert torch.equal(weights[1], start["query_tokens"])


@pytest.mark.ci
def test_a_list_or_file_of_the_best_that_is_gone_is_made_again(folder, tmp_path):
    settings = config(keep_best=2)
    run(folder, tmp_path / "run", settings)
    second = (tmp_path / "run" / "best-2.safetensors").read_bytes()
    for name in ("best-2.safetensors", KEPT):
        (tmp_path / "run" / name).unlink()
        run(folder, tmp_path / "run", settings)
        assert (tmp_path / "run" / "best-2.safetensors").read_bytes() == second
        assert len(json.loads((tmp_path / "run" / KEPT).read_text())["value"]) == 2


def test_the_forecast_counts_four_bytes_for_each_trained_weight():
    """On each device; at ZeRO-3 they are shared, but validation has a whole copy."""
    _, shape = small()
    plain, averaged = (
        memory.Model(shape, TrainConfig(batch_size=4, micro_batch_size=2, **given), "cuda", False)
        for given in ({}, {"ema": DECAY})
    )
    for stage, parts in ((0, 1), (2, 1), (3, 2)):
        setup = memory.Setup(2, 2, False, stage, False)
        more = memory.usage(averaged, setup).weights - memory.usage(plain, setup).weights
        assert more == 4 * plain.trained // parts


def test_keys_at_their_defaults_leave_the_fingerprint_of_a_training_as_it_was():
    assert not {"ema", "keep_best"} & _written(TrainConfig()).keys()
    assert {"ema", "keep_best"} <= _written(TrainConfig(ema=DECAY, keep_best=2)).keys()


RANKED = TRAIN | {"stages": stages(2, 1), "ema": DECAY, "checkpoint_every_steps": 2}


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """The average after a training on one rank; the last weights that are validated are the best."""
    place = tmp_path_factory.mktemp("alone") / "run"
    train_ranks(folder, place, 1, train=RANKED)
    assert kept(place)[0]["average"] is True
    return load_file(place / "final.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero_stage", "ranks", "at"),
    [(0, (2, 2), 5), (1, (2, 2), 8), (2, (2, 1), 4), (3, (2, 2), 8), (3, (2, 1), 5), (3, (1, 2), 5)],
)
def test_the_average_of_ranks_that_were_killed_is_that_of_one(folder, alone, tmp_path, zero_stage, ranks, at):
    """At every ZeRO stage, also where another number of ranks goes on; not where Adam divides rounding."""
    settings = RANKED | {"zero_stage": zero_stage}
    assert train_ranks(folder, tmp_path / "run", ranks[0], check=False, train=settings, kill_at=at) != 0
    train_ranks(folder, tmp_path / "run", ranks[1], train=settings)
    assert kept(tmp_path / "run")[0]["average"] is True
    found = load_file(tmp_path / "run" / "final.safetensors")
    differences = torch.cat([(found[name] - alone[name]).abs().flatten() for name in sorted(alone)])
    assert (differences > 1e-5).double().mean() < 1e-4
    assert differences.max() < TRAIN["learning_rate"]


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_killed_ranks_go_on_to_the_same_average_to_the_bit(folder, tmp_path, zero_stage):
    settings = RANKED | {"zero_stage": zero_stage}
    train_ranks(folder, tmp_path / "whole", train=settings, dropout=0.1)
    assert train_ranks(folder, tmp_path / "parts", check=False, train=settings, dropout=0.1, kill_at=5) != 0
    train_ranks(folder, tmp_path / "parts", train=settings, dropout=0.1)
    whole, parts = (load_file(tmp_path / name / "final.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
