"""The self-critical gradient against closed forms; its samples, rewards and training."""

import itertools

import numpy as np
import pytest
import torch
from support.models import load_tiny
from support.training import config, measure, run, said, splits

from harness.config.sections import Truncation
from harness.decoding.search import truncated
from harness.machine import device
from harness.models.text import IGNORE
from harness.training import rewards, schedule
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


def rising():
    """A validation whose score is always better than before."""
    scores = iter(range(100))
    return lambda: {"valid_primary": float(next(scores))}


REWARD = {"metrics": {"rouge1": 1.0}, "samples": 4, "max_new_tokens": 8}


def stage(epochs=1, losses=None, **reward):
    """A self-critical stage that rewards the share of the word `nodule`."""
    losses = losses or {"reward": 1}
    return {"epochs": epochs, "losses": losses, "reward": REWARD | reward, "schedule": "constant"}


def critic(loaded, settings, **model):
    """The sampler of the first stage, with the pixels (2, 4, 3, S, S) and images of two micro-batches."""
    split = splits(loaded)["train"]
    made = SelfCritical(
        schedule.stages(settings)[0], loaded, split.ids, split.captions, measure, seed=1, multiple=1
    )
    images = [np.array([3, 1, 8, 5]), np.array([2, 9, 0, 7])]
    seen = [loaded.normalise(torch.from_numpy(split.pixels[part])) for part in images]
    return made, images, seen


@pytest.mark.parametrize("language_model", [True, False])
@pytest.mark.parametrize("cut", [{}, {"top_k": 5, "temperature": 1.3}])
def test_one_pass_with_gradient_gives_the_probabilities_of_the_samples(tiny_folder, language_model, cut):
    """Start token, prompt and positions: the loss with advantages of 1 is minus the sampler's scores."""
    loaded = load_tiny(tiny_folder, language_model=language_model, dropout=0.3)
    made, images, seen = critic(loaded, config(stages=[stage(**cut)]))
    found = made._sampled(0, images, seen)
    loaded.model.freeze(["reward"], True)
    loaded.model.train()
    for part, pixels_of_part, samples in zip(images, seen, found, strict=True):
        given = made._collated(part, samples, np.ones((4, 4)))
        with without_dropout(loaded.model):
            computed = loaded.model(pixels_of_part, samples=given)
        expected = -sum(sum(one.chances) for one in samples)
        assert computed.reward.item() == pytest.approx(expected, rel=1e-5)
        assert (computed.caption, computed.concept) == (None, None)
    computed.reward.backward()
    own = {name: p.grad for name, p in loaded.model.named_parameters() if p.requires_grad}
    assert all(grad is not None and torch.isfinite(grad).all() for grad in own.values())
    assert loaded.model(seen[0], samples=given).reward.item() != pytest.approx(computed.reward.item())


def share_of_nodule(loaded):
    made, images, seen = critic(loaded, config(stages=[stage(samples=20)]))
    texts = [text for part in made._sampled(9, images, seen) for one in part for text in one.texts]
    return np.mean(said([(0, text) for text in texts])["rouge1"])


@pytest.mark.parametrize("sign", [1, -1])
def test_a_synthetic_reward_reaches_its_optimum(tiny_folder, tmp_path, monkeypatch, sign):
    """Only with the right sign: reversed, the word is said less."""
    before = share_of_nodule(load_tiny(tiny_folder))
    wanted = rewards.loss
    monkeypatch.setattr(rewards, "loss", lambda *args, **given: sign * wanted(*args, **given))
    settings = config(stages=[stage(6, max_new_tokens=4)], learning_rate=3e-3)
    loaded, rows = run(tiny_folder, tmp_path / "run", settings, evaluate=rising())
    own = [row["reward"] for row in rows if "loss" in row]
    print(before, own)
    if sign > 0:
        assert own[-1] > 0.9
    else:
        assert own[-1] <= own[0]
