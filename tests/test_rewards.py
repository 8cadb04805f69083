"""The self-critical gradient against closed forms; its samples, rewards and training."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import toy_family
from support.models import load_tiny
from support.training import Interrupted, config, measure, run, said, splits

from harness.cli.terminal import Terminal
from harness.config.schema import Config
from harness.config.sections import DataConfig, PhantomConfig, Truncation
from harness.data import load
from harness.decoding.search import truncated
from harness.machine import device
from harness.metrics import METRICS, base
from harness.models.base import PARTS
from harness.models.blip2 import sizes
from harness.models.loading import Loaded
from harness.models.settings import ModelConfig
from harness.models.text import IGNORE
from harness.steps.plan import Plan, problems
from harness.steps.train import _written
from harness.steps.work import Work
from harness.training import memory, patience, resume, rewards, schedule
from harness.training.selfcritical import SelfCritical, without_dropout

device.probe("cpu")
WORDS, LENGTH = 4, 2


def sampled_gradients(scores, reward, settings, images, count):
    """Gradients (images, LENGTH, WORDS) of the loss for scores (LENGTH, WORDS) of independent tokens."""
    generator = torch.Generator().manual_seed(0)
    chances = truncated(scores, settings).exp()
    drawn = [torch.multinomial(one.expand(images * count, -1), 1, generator=generator) for one in chances]
    tokens = torch.cat(drawn, 1)
    own = reward[tuple(tokens.T)].view(images, count).numpy()
    advantages = torch.tensor(own - rewards.baseline(own)).flatten()
    labels = torch.cat([torch.full((len(tokens), 1), IGNORE), tokens], 1)
    logits = scores.detach().expand(len(tokens), -1, -1).clone().requires_grad_()
    padded = torch.cat([logits, torch.zeros(len(tokens), 1, WORDS)], 1)
    rewards.loss(padded, labels, advantages, settings).backward()
    return logits.grad.view(images, count, LENGTH, WORDS).mean(1)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8, "temperature": 2}]
)
def test_the_mean_of_the_estimator_is_the_gradient_of_the_expected_reward(settings):
    """Expected reward and its gradient from all 16 captions of two tokens."""
    settings = Truncation(**settings)
    draw = torch.Generator().manual_seed(1)
    scores = torch.randn(LENGTH, WORDS, generator=draw).double().requires_grad_()
    reward = torch.rand(WORDS, WORDS, generator=draw).double()
    chances = (scores / settings.temperature).softmax(-1)
    kept = truncated(scores.detach(), settings) > -torch.inf
    chances = chances * kept / (chances * kept).sum(-1, keepdim=True)
    expected = sum(
        reward[one, two] * chances[0, one] * chances[1, two]
        for one, two in itertools.product(range(WORDS), repeat=2)
    )
    wanted = -torch.autograd.grad(expected, scores)[0]
    found = sampled_gradients(scores, reward, settings, 20_000, 5).double()
    error = found.std(0) / len(found) ** 0.5
    assert wanted.abs().max() > 10 * error.max()
    assert ((found.mean(0) - wanted).abs() <= 4 * error + 1e-12).all()
    assert not ((found.mean(0) + wanted).abs() <= 4 * error + 1e-12).all()  # the sign reversed


def test_equal_samples_have_no_gradient():
    own = np.full((3, 5), 0.1 + 0.2)
    assert (own - rewards.baseline(own) == 0).all()
    np.testing.assert_allclose(rewards.baseline(np.array([[1.0, 2.0, 6.0]])), [[4.0, 3.5, 1.5]])


def test_a_sampled_token_that_rounding_cuts_keeps_a_probability_and_its_gradient():
    """Top-k of 2, and a third token: as if it were one of those that are kept."""
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]], requires_grad=True)
    found = rewards.log_probabilities(logits, torch.tensor([2]), Truncation(top_k=2, temperature=0.5))
    expected = torch.log_softmax(torch.tensor([2.0, 1.0, 0.5]) / 0.5, 0)[2]
    torch.testing.assert_close(found[0], expected)
    found.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 2] > 0
    assert logits.grad[0, 3] == 0


def test_metrics_are_mixed_and_standardised_over_samples_only():
    values = {"a": np.array([1.0, 3.0, 100.0]), "b": np.array([5.0, 5.0, 9.0])}
    np.testing.assert_allclose(rewards.mixed(values, {"a": 0.5, "b": 0.5}), [3.0, 4.0, 54.5])
    found = rewards.mixed(values, {"a": 1.0, "b": 1.0}, np.array([0, 1]))
    np.testing.assert_allclose(found, [-1.0, 1.0, 98.0])


REWARD = {"metrics": {"rouge1": 1.0}, "samples": 4, "max_new_tokens": 8}


def stage(epochs=1, losses=None, **reward):
    """A self-critical stage that rewards the share of a letter."""
    losses = losses or {"reward": 1}
    return {"epochs": epochs, "losses": losses, "reward": REWARD | reward, "schedule": "constant"}


def critic(loaded, settings):
    """The sampler of the first stage, with the images of two micro-batches and their pixels."""
    split = splits(loaded)["train"]
    first = schedule.stages(settings)[0]
    made = SelfCritical(first, loaded, split.ids, split.captions, measure, seed=1, multiple=1)
    images = [np.array([3, 1, 8, 5]), np.array([2, 9, 0, 7])]
    return made, images, [loaded.normalise(torch.from_numpy(split.pixels[part])) for part in images]


def toy(folder):
    """A model of another family, without dropout."""
    caption, concept = toy_family.codecs(None, folder, 32)
    torch.manual_seed(0)
    made = toy_family.Toy(len(caption.tokenizer))
    made.trained_parts = frozenset(PARTS)
    return Loaded(made, caption, concept, (0.5,) * 3, (0.5,) * 3)


FAMILIES = {
    "blip2": lambda folder: load_tiny(folder, dropout=0.3),
    "blip2_without_language_model": lambda folder: load_tiny(folder, language_model=False, dropout=0.3),
    "toy": toy,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cut", [{}, {"top_k": 5, "temperature": 1.3}])
def test_one_pass_with_gradient_gives_the_probabilities_of_the_samples(tiny_folder, family, cut):
    """Start token, prompt and positions: the loss with advantages of 1 is minus the sampler's scores."""
    loaded = FAMILIES[family](tiny_folder)
    made, images, seen = critic(loaded, config(stages=[stage(**cut)]))
    found = made._sampled(0, images, seen)
    loaded.model.freeze(["reward"])
    loaded.model.train()
    for part, pixels, samples in zip(images, seen, found, strict=True):
        given = made._collated(part, samples, np.ones((4, 4)))
        with without_dropout(loaded.model):
            computed = loaded.model(pixels, samples=given)
        assert computed.reward.item() == pytest.approx(-sum(sum(one.chances) for one in samples), rel=1e-5)
        assert (computed.caption, computed.concept) == (None, None)
    computed.reward.backward()
    own = [weight.grad for weight in loaded.model.parameters() if weight.requires_grad]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in own)
    if family != "toy":  # with dropout p is another one; one draw may be close by chance
        again = [loaded.model(pixels, samples=given).reward.item() for _ in range(5)]
        assert max(abs(one - computed.reward.item()) for one in again) > 1e-4 * computed.reward.item()


def test_draws_depend_on_stage_step_image_and_number_alone(tiny_folder):
    loaded = load_tiny(tiny_folder)
    made, images, seen = critic(loaded, config(stages=[stage()]))
    first, second = made._sampled(3, images, seen)
    alone = made._sampled(3, [images[1][[2]]], [seen[1][[2]]])
    assert alone[0][0].ids == second[2].ids
    assert made._sampled(4, images, seen)[0] != first
    fewer, *_ = critic(loaded, config(stages=[stage(samples=2)]))
    assert [one.ids for one in fewer._sampled(3, images, seen)[0]] == [one.ids[:2] for one in first]


@pytest.mark.parametrize("baseline", ["leave_one_out", "greedy"])
@pytest.mark.parametrize("standardise", [False, True])
def test_advantages_by_hand(tiny_folder, baseline, standardise):
    metrics = {"rouge1": 0.25, "bleu1": 0.75}
    how = {"baseline": baseline, "standardise": standardise, "metrics": metrics}
    made, images, seen = critic(load_tiny(tiny_folder), config(stages=[stage(**how)]))
    samples, row = made(0, images, seen)
    found = [one for part in made._sampled(0, images, seen) for one in part]
    every = list(zip(np.concatenate(images), found, strict=True))
    flat = [(image, text) for image, one in every for text in one.texts]
    own = {name: value.reshape(8, 4) for name, value in said(flat).items()}
    base = {name: (value.sum(1, keepdims=True) - value) / 3 for name, value in own.items()}
    if baseline == "greedy":
        greedy = [(image, one.greedy) for image, one in every]
        base = {name: value[:, None] for name, value in said(greedy).items()}
    scale = {name: value.std() if standardise else 1 for name, value in own.items()}
    expected = sum(weight * (own[name] - base[name]) / scale[name] for name, weight in metrics.items())
    given = torch.cat([one.loss.keywords["advantages"] for one in samples]).view(8, 4)
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-7)
    assert row["reward"] == pytest.approx(sum(weight * own[name].mean() for name, weight in metrics.items()))
    assert row["distinct_samples"] == np.mean([len(set(one.texts)) / 4 for one in found])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.slow
def test_a_synthetic_reward_reaches_its_optimum(tiny_folder, tmp_path, monkeypatch, sign):
    """Only with the right sign: reversed, the letter is said less."""
    wanted = rewards.loss
    monkeypatch.setattr(rewards, "loss", lambda *args, **given: sign * wanted(*args, **given))
    made = stage(5, max_new_tokens=2, samples=12)
    settings = config(stages=[made], learning_rate=2e-2, max_grad_norm=0, evaluate_every=0)
    _, rows = run(tiny_folder, tmp_path / "run", settings, language_model=False)
    own = [row["reward"] for row in rows if "loss" in row]
    assert own[-1] > 0.9 if sign > 0 else own[-1] < own[0]


RL = {"losses": {"reward": 1, "caption": 0.5}, "metrics": {"rouge1": 1, "bleu1": 1}}
THREE = [
    {"epochs": 1, "losses": {"caption": 1}},
    stage(2, **RL),
    {"epochs": 1, "losses": {"caption": 1, "concept": 1}},
]
OTHER = ("time", "images_per_second")


@pytest.mark.ci
def test_a_training_interrupted_in_a_self_critical_stage_goes_on_to_the_same_bits(tiny_folder, tmp_path):
    """Before its first checkpoint, within an epoch and after one; with dropout in the other stages."""
    settings = config(stages=THREE, checkpoint_every_steps=2)
    whole, rows = run(tiny_folder, tmp_path / "whole", settings, dropout=0.1)
    assert [(row["step"], row["epoch"]) for row in rows if row["stage"] == 2 and "valid_loss" in row] == [
        (3, 0),
        (6, 1),
        (9, 2),
    ]
    assert ["reward_loss" in row for row in rows if "loss" in row] == [False] * 3 + [True] * 6 + [False] * 3
    for at in (4, 6, 8, 10):

        def stop(row, at=at):
            if row["step"] == at and "loss" in row:
                raise Interrupted

        with pytest.raises(Interrupted):
            run(tiny_folder, tmp_path / "parts", settings, dropout=0.1, log=stop)
    resumed, again = run(tiny_folder, tmp_path / "parts", settings, dropout=0.1)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    assert [{k: v for k, v in row.items() if k not in OTHER} for row in again] == [
        {k: v for k, v in row.items() if k not in OTHER} for row in rows
    ]


@pytest.mark.ci
def test_micro_batches_do_not_change_the_training(tiny_folder, tmp_path):
    found = []
    for size in (2, 8):
        settings = config(stages=[stage(1, **RL)], micro_batch_size=size, evaluate_every=0)
        loaded, rows = run(tiny_folder, tmp_path / str(size), settings)
        found.append(([row["loss"] for row in rows if "loss" in row], loaded.model.state_dict()))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-4)
    for name, weight in found[0][1].items():
        torch.testing.assert_close(weight, found[1][1][name], atol=1e-4, rtol=1e-4, msg=name)


def falling(gaps):
    """Validations with these image gaps, whose floor is 0.5."""
    left = iter(gaps)
    return lambda: {"valid_primary": 0.1, "valid_image_gap": next(left), "floor_image_gap": 0.5}


def test_a_stage_ends_when_a_watched_score_falls_below_its_floor(tiny_folder, tmp_path):
    """Also if the training is interrupted right after that; the next stage goes on."""
    stages = [stage(3), {"epochs": 1, "losses": {"caption": 1}}]
    settings = config(stages=stages, evaluate_every=0)

    def stop(row):
        if row["stage"] == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(tiny_folder, tmp_path / "run", settings, evaluate=falling([0.6, 0.5, 0.4]), log=stop)
    _, rows = run(tiny_folder, tmp_path / "run", settings, evaluate=falling([0.4] * 9))
    steps = [(row["stage"], row["step"]) for row in rows if "loss" in row]
    assert steps == [*((1, step) for step in range(1, 7)), (2, 7), (2, 8), (2, 9)]
    assert [row["valid_image_gap"] for row in rows if "valid_image_gap" in row] == [0.6, 0.5, 0.4, 0.4]
    assert resume.fallen(rows, 1) == [("image_gap", 0.4, 0.5)]
    assert [row.get("floor_image_gap") for row in rows if "valid_image_gap" in row] == [0.5, None, None, None]
    ended = patience.ended(settings, rows)
    assert patience.described(ended) == [
        "stage 1 ended after epoch 2 of 3: image_gap fell to 0.4000, below 0.5000 (stop_when)"
    ]
    assert schedule.total_steps(settings, 20, patience.saved(ended)) == rows[-1]["step"]
    assert patience.ended(settings, rows[:7]) == []  # after the first epoch
    assert patience.at_most(settings) == ", or less if stop_when ends a stage early"


@pytest.mark.ci
def test_the_start_of_a_stage_leaves_the_best_average_of_the_stage_before(tiny_folder, tmp_path):
    """Also if the training is killed right after that start, with early stopping and two files kept."""
    stages = [{"epochs": 1, "losses": {"caption": 1}}, stage(3, **RL)]
    settings = config(stages=stages, ema=0.5, patience=1, keep_best=2)
    values = [0.5, 0.9, 0.5, 0.4, 0.3]  # weights and average of stage 1; start of stage 2; its first epoch

    def scores(begun=0):
        left = iter(values[begun:])
        return lambda: {"valid_primary": next(left)}

    def stop(row):
        if row["epoch"] == 0:
            raise Interrupted

    whole, rows = run(tiny_folder, tmp_path / "whole", settings, dropout=0.1, evaluate=scores())
    with pytest.raises(Interrupted):
        run(tiny_folder, tmp_path / "parts", settings, dropout=0.1, evaluate=scores(), log=stop)
    parts, again = run(tiny_folder, tmp_path / "parts", settings, dropout=0.1, evaluate=scores(2))
    for found, made in ((whole, rows), (parts, again)):
        valid = [row for row in made if "valid_loss" in row]
        assert [(row["stage"], row["epoch"], row["waited"]) for row in valid] == [
            (1, 1, 0),
            (2, 0, 0),
            (2, 1, 1),
        ]
        assert found.model.state_dict().keys() == whole.model.state_dict().keys()
        for name, weight in found.model.state_dict().items():
            assert torch.equal(weight, whole.model.state_dict()[name]), name
    kept = [resume.kept(tmp_path / name) for name in ("whole", "parts")]
    assert kept[0] == kept[1]
    assert [(one["step"], one["average"], one["score"]) for one in kept[0]] == [
        (3, True, 0.9),
        (3, False, 0.5),
    ]


@pytest.mark.ci
def test_the_weights_before_a_self_critical_stage_may_be_the_best(tiny_folder, tmp_path):
    scores = iter((0.9, 0.5, 0.4))
    loaded, _ = run(
        tiny_folder, tmp_path, config(stages=[stage(2)]), evaluate=lambda: {"valid_primary": next(scores)}
    )
    before = load_tiny(tiny_folder).model.state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in loaded.model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [{"epochs": 1, "losses": {"reward": 1}}]}, "needs the section reward"),
        ({"stages": [stage() | {"losses": {"caption": 1}}]}, "is for the loss reward"),
        ({"stages": [stage(samples=1)]}, "leave_one_out compares"),
        ({"stages": [stage(metrics={})]}, "at least 1 item"),
    ],
)
def test_what_a_self_critical_stage_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_keys_at_their_defaults_leave_the_fingerprint_as_it_was():
    one = _written(config())["stages"][0]
    assert one == {"epochs": 2, "learning_rate": None, "losses": {"caption": 1.0, "concept": 1.0}}
    assert _written(config(stages=[stage()]))["stages"][0]["reward"]["samples"] == 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    made = DataConfig(root=root / "set", phantom=PhantomConfig(train=12, valid=4, test=2))
    return load(made, root / "runs")


MIX = {"metrics": {"bertscore": 0.5, "rouge1": 0.25, "cider": 0.25}, "samples": 2, "max_new_tokens": 6}


def planned(data, folder, root, score=None, **reward):
    stages = [{"epochs": 1, "losses": {"reward": 1, "caption": 0.1}, "reward": MIX | reward}]
    values = {
        "name": "a",
        "device": "cpu",
        "data": {"root": data.root},
        "model": {"checkpoint": str(folder), "image_size": 64},
        "score": score or {"bertscore": {"checkpoint": "standin"}, "metrics": ["bertscore"]},
        "train": {"stages": stages, "batch_size": 12, "micro_batch_size": 6, "learning_rate": 1e-3},
    }
    return Plan(Config.model_validate(values), data, root)


@pytest.mark.slow
def test_the_step_rewards_the_metrics_of_the_run_and_sets_floors(data, tiny_folder, tmp_path):
    """Against each metric by itself, with document frequencies of the training captions."""
    plan = planned(data, tiny_folder, tmp_path)
    step, work = plan.steps["train"], Work(plan.config, Terminal())
    examples = data.readable("train")
    captions = ["axial ct of the lung.", examples[1].caption, "", "A 3 cm nodule"]
    weights, values = step._measure(work)(MIX["metrics"], list(enumerate(captions)))
    assert weights == MIX["metrics"]
    assert values["rouge1"][1] == 1
    theirs = [example.caption for example in examples[:4]]
    documents = base.Documents([example.caption for example in examples])
    inputs = base.Inputs(captions, theirs, None, plan.config.score, 2023, documents=documents)
    for name, value in values.items():
        np.testing.assert_allclose(value, METRICS[name].measure(inputs).per_image, atol=1e-6)
    step.directory.mkdir(parents=True)
    work.build(step, step.directory)
    start, given, end = [json.loads(line) for line in (step.directory / "losses.jsonl").open()]
    assert (start["epoch"], start["step"], end["epoch"]) == (0, 0, 1)
    assert {"valid_bertscore", "valid_rouge1", "valid_cider", "valid_image_gap"} <= start.keys() & end.keys()
    assert start["floor_image_gap"] < start["valid_image_gap"] + 1e-9
    assert "floor_image_gap" not in end
    assert {"reward_loss", "caption_loss", *resume.SAMPLED} <= given.keys()
    assert 0 < given["reward"] < 1


def test_a_reward_is_part_of_the_fingerprint_and_needs_its_weights(data, tiny_folder, tmp_path):
    one, other = (planned(data, tiny_folder, tmp_path, **how) for how in ({}, {"samples": 3}))
    assert one.steps["train"].directory != other.steps["train"].directory
    lacking = planned(data, tiny_folder, tmp_path, metrics={"medcat": 1}).config
    assert "medcat compares captions, but no weights are named" in str(problems(lacking)[0])
    score = {section: {"checkpoint": "standin"} for section in ("bertscore", "bleurt")}
    score["metrics"] = ["bertscore"]
    untrained = planned(data, tiny_folder, tmp_path, score, metrics={"bleurt": 1}).config
    assert "its stand-in is not trained" in str(problems(untrained)[0])
    unknown = planned(data, tiny_folder, tmp_path, metrics={"overall": 1}).config
    assert "overall is no score of 2023" in str(problems(unknown)[0])


def test_the_memory_forecast_counts_samples_and_judges(tmp_path):
    plain, sampling = (
        memory.Model(sizes.of_model(ModelConfig()), config(stages=[one]), "cuda", True)
        for one in (
            {"epochs": 1, "losses": {"caption": 1}},
            stage(losses={"reward": 1, "caption": 1}, max_new_tokens=128),
        )
    )
    less, more = (memory.usage(model, memory.configured(model.config, 1)) for model in (plain, sampling))
    assert more.activations > 1.5 * less.activations
    assert more.weights == less.weights
    judged = replace(sampling, judges=10**9)
    assert memory.usage(judged, memory.configured(judged.config, 1)).weights == more.weights + 10**9
    many = memory.Setup(16, 1, True, 3, False)  # samples with gathered weights, as validation with a copy
    assert memory.usage(sampling, many).activations > sampling.weights
    assert {row["zero_stage"] for row in memory.table(sampling)} == {0, 1, 2, 3}
