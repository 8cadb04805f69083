"""The classifier of concepts: pooling, its two losses and their gradients, against formulas and torch."""

from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.preprocessing import MultiLabelBinarizer
from torch import nn

from harness.concepts.settings import HeadConfig
from harness.models import head
from harness.models.head import Asymmetric, CrossEntropy, GeM, Head, Mean

BATCH, TOKENS, WIDTH, LABELS = 6, 5, 8, 7


class Encoder(nn.Module):
    """As much of a captioner as a head needs."""

    feature_width, class_tokens = WIDTH, 1

    def __init__(self) -> None:
        super().__init__()
        self.head = None


@pytest.fixture
def given() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels, of which some are on the wrong side."""
    draw = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(BATCH, LABELS, generator=draw, dtype=torch.float64)
    return logits.requires_grad_(), (torch.rand(BATCH, LABELS, generator=draw) < 0.3).double()


def gradient(loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, logits)[0]


# the losses


@pytest.mark.parametrize("weights", [torch.ones(LABELS), torch.arange(LABELS) + 0.5])
def test_cross_entropy_is_torchs_mean_of_each_image(given, weights):
    logits, wanted = given
    ours = CrossEntropy(weights.double())(logits, wanted)
    theirs = BATCH * nn.BCEWithLogitsLoss(pos_weight=weights.double())(logits, wanted)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits))


def published(logits, wanted, gamma_negative, gamma_positive, clip):
    """The loss as in the paper's equations 1, 4 and 5, with nothing done for numbers near 0 and 1."""
    probability = 1 / (1 + torch.exp(-logits))
    shifted = torch.maximum(probability - clip, torch.zeros_like(probability))
    positive = (1 - probability) ** gamma_positive * torch.log(probability)
    negative = shifted**gamma_negative * torch.log(1 - shifted)
    return -(wanted * positive + (1 - wanted) * negative).sum()


@pytest.mark.parametrize("gammas", [(4, 1), (2, 0), (0, 0), (1.5, 0.5)])
@pytest.mark.parametrize("clip", [0.05, 0.2, 0.0])
def test_the_asymmetric_loss_is_the_published_one(given, gammas, clip):
    logits, wanted = given
    ours, theirs = Asymmetric(*gammas, clip)(logits, wanted), published(logits, wanted, *gammas, clip)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits), rtol=1e-7, atol=1e-7)


def test_without_focus_and_clip_it_is_cross_entropy_summed_over_labels(given):
    logits, wanted = given
    plain = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
    torch.testing.assert_close(Asymmetric(0, 0, 0.0)(logits, wanted), plain)


def test_the_gradient_of_an_easy_negative_is_that_of_equation_8(given):
    logits, _ = given
    wanted, gamma, clip = torch.zeros_like(logits), 4, 0.05
    found = gradient(Asymmetric(gamma, 1, clip)(logits, wanted), logits)
    p = logits.detach().sigmoid()
    m = (p - clip).clamp(min=0)
    expected = m**gamma * (1 / (1 - m) - gamma / m.clamp(min=1e-300) * (1 - m).log()) * p * (1 - p)
    torch.testing.assert_close(found, torch.where(p > clip, expected, 0.0), rtol=1e-7, atol=1e-9)
    assert (found[p < clip] == 0).all()
    assert (p < clip).any()


@pytest.mark.parametrize("gammas", [(4, 1), (0.5, 0.5), (0, 0)])
@pytest.mark.parametrize("clip", [0.05, 0.0])
def test_losses_of_extreme_logits_and_their_gradients_are_finite(gammas, clip):
    logits = torch.tensor([[-1e4, -90.0, -17.0, 0.0, 17.0, 90.0, 1e4]]).requires_grad_()
    for wanted in (torch.zeros_like(logits), torch.ones_like(logits)):
        for criterion in (Asymmetric(*gammas, clip), CrossEntropy(torch.ones(7))):
            loss = criterion(logits, wanted)
            assert torch.isfinite(loss)
            assert torch.isfinite(gradient(loss, logits)).all()


@pytest.mark.parametrize("loss", get_args(HeadConfig.model_fields["loss"].annotation))
@pytest.mark.parametrize("pooling", get_args(HeadConfig.model_fields["pooling"].annotation))
def test_micro_batches_add_up_to_the_batch(loss, pooling):
    model = Encoder()
    head.attach(model, HeadConfig(loss=loss, pooling=pooling, class_weights="none"), range(LABELS), 20)
    features, wanted = torch.rand(BATCH, TOKENS, WIDTH), torch.randint(2, (BATCH, LABELS))
    whole = model.head.loss(features, wanted)
    whole.backward()
    before = [weight.grad.clone() for weight in model.head.parameters()]
    model.head.zero_grad()
    split = [model.head.loss(features[part], wanted[part]) for part in ([0], [1, 2, 3], [4, 5])]
    sum(split).backward()
    torch.testing.assert_close(sum(split), whole)
    for one, other in zip(model.head.parameters(), before, strict=True):
        torch.testing.assert_close(one.grad, other)
        assert other.abs().sum() > 0


# pooling


@pytest.mark.parametrize("exponent", [1.0, 3.0, 5.5])
def test_gem_is_its_formula_and_learns_its_exponent(exponent):
    features = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    pool = GeM().double()
    pool.exponent.data.fill_(exponent)
    found = pool(features)
    expected = (features.clamp(min=1e-6) ** exponent).mean(1) ** (1 / exponent)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    step = 1e-6
    with torch.no_grad():
        moved = [
            (features.clamp(min=1e-6) ** p).mean(1) ** (1 / p) for p in (exponent + step, exponent - step)
        ]
    slope = (moved[0].sum() - moved[1].sum()) / (2 * step)
    torch.testing.assert_close(pool.exponent.grad[0], slope, rtol=1e-5, atol=1e-5)


def test_gem_of_1_is_the_mean_and_a_large_exponent_gives_the_largest():
    features, pool = torch.rand(BATCH, TOKENS, WIDTH), GeM()
    assert pool.exponent.item() == 3
    pool.exponent.data.fill_(1)
    torch.testing.assert_close(pool(features), Mean()(features))
    pool.exponent.data.fill_(200)
    torch.testing.assert_close(pool(features), features.amax(1), rtol=0.01, atol=0)


def test_gem_of_features_without_a_positive_one_is_finite():
    pool = GeM()
    pool.exponent.data.fill_(9)  # 1e-6 to the power of 9 is 0 in fp32
    found = pool(-torch.rand(BATCH, TOKENS, WIDTH))
    found.sum().backward()
    torch.testing.assert_close(found, torch.full_like(found, 1e-6))
    assert torch.isfinite(pool.exponent.grad).all()


# the head


def attached(**changes) -> Head:
    model = Encoder()
    head.attach(model, HeadConfig(**changes), [10, 5, 1, 0, 2, 3, 9], 10)
    return model.head


def test_class_tokens_are_left_out_and_logits_are_those_of_the_mean():
    found, features = attached(), torch.randn(BATCH, TOKENS, WIDTH)
    expected = features[:, 1:].mean(1) @ found.linear.weight.T + found.linear.bias
    torch.testing.assert_close(found(features), expected)


def test_a_head_computes_in_fp32_whatever_the_encoder_computes_in():
    found, features = attached(), torch.randn(BATCH, TOKENS, WIDTH).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = found(features)
        loss = found.loss(features, torch.ones(BATCH, LABELS, dtype=torch.uint8))
    assert logits.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(logits, found(features.float()))


def test_a_new_head_knows_how_frequent_each_concept_is_and_is_always_the_same():
    one, other = attached(), attached()
    frequencies = (np.array([10, 5, 1, 0, 2, 3, 9]) + 1) / 12
    np.testing.assert_allclose(one.linear.bias.sigmoid().detach(), frequencies, rtol=1e-5)
    torch.manual_seed(5)
    assert torch.equal(attached().linear.weight, one.linear.weight)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert set(one.state_dict()) == {"linear.weight", "linear.bias"}
    assert set(attached(pooling="gem").state_dict()) == {"linear.weight", "linear.bias", "pool.exponent"}


def test_balanced_weights_are_negatives_by_positives_up_to_a_limit():
    model = Encoder()
    head.attach(model, HeadConfig(class_weights="balanced"), [1, 2, 50, 100], 200)
    assert model.head.criterion.weights.tolist() == [100, 99, 3, 1]
    assert attached().criterion.weights.tolist() == [1] * LABELS


def test_indicators_are_those_of_sklearn():
    rows = [[], [3], [6, 0], [2, 1, 5], []]
    theirs = MultiLabelBinarizer(classes=range(LABELS)).fit_transform(rows)
    ours = head.indicators(rows, LABELS)
    assert ours.dtype == torch.uint8
    assert ours.tolist() == theirs.tolist()


def test_class_weights_of_a_loss_that_has_none_are_refused():
    with pytest.raises(ValueError, match="class_weights"):
        HeadConfig(loss="asymmetric", class_weights="balanced")
