"""Sampling against transformers: its warpers, and `generate` with the same draws; samples in any batch."""

import random

import numpy as np
import pytest
import torch
from support.generate import SIDE, WORDS, captioner, generated
from transformers import (
    EpsilonLogitsWarper,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from harness.config.sections import PredictConfig, Truncation
from harness.decoding.search import sample, search, truncated, uniforms

PROMPT = torch.tensor([2, 7])
CUTS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 5},
    {"top_k": 500},
    {"top_p": 0.9},
    {"top_p": 0.01},
    {"epsilon": 0.02},
    {"epsilon": 0.999},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.7, "epsilon": 0.05},
]


def warped(logits: torch.Tensor, given: dict) -> torch.Tensor:
    """The log-probabilities by transformers' warpers, in the order of its `generate`."""
    warpers = LogitsProcessorList()
    if "temperature" in given:
        warpers.append(TemperatureLogitsWarper(given["temperature"]))
    if "top_k" in given:
        warpers.append(TopKLogitsWarper(given["top_k"]))
    if "top_p" in given:
        warpers.append(TopPLogitsWarper(given["top_p"]))
    if "epsilon" in given:
        warpers.append(EpsilonLogitsWarper(given["epsilon"]))
    return warpers(None, logits).log_softmax(-1)


@pytest.mark.parametrize("given", CUTS)
def test_truncation_and_its_gradient_are_those_of_transformers(given):
    draw = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(400, 50, generator=draw)).requires_grad_()
    found, expected = truncated(logits, Truncation(**given)), warped(logits, given)
    assert torch.equal(found, expected)
    tokens = found.detach().argmax(-1, keepdim=True)
    ours, theirs = (torch.autograd.grad(one.gather(1, tokens).sum(), logits)[0] for one in (found, expected))
    assert torch.equal(ours, theirs)
    assert torch.isfinite(ours).all()


def test_of_equal_tokens_all_or_none_are_cut():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    for given in ({"top_k": 2}, {"top_p": 0.5}, {"epsilon": 0.4}):
        kept = truncated(logits, Truncation(**given)).isfinite()
        assert kept.tolist() == [[False, True, True, True, False]], given


def images(count: int, seed: int) -> torch.Tensor:
    return 2 * torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def sampled(model, pixels, cut: dict, given: dict, draws, end: int = 5, pad: int = 1):
    config, count = PredictConfig(**given), len(draws) // len(pixels)
    prompts = PROMPT.expand(len(pixels), -1)
    with torch.inference_mode(), model.decoder(count, config.max_new_tokens) as begin:
        return sample(begin(pixels, prompts), Truncation(**cut), config, draws, end, pad)


def options(draw: random.Random) -> tuple[dict, dict]:
    most = draw.choice((1, 2, 7, 12))
    cut = {
        "temperature": draw.choice((1.0, 0.7, 1.5)),
        "top_k": draw.choice((0, 0, 3, 10)),
        "top_p": draw.choice((1.0, 0.9, 0.5)),
        "epsilon": draw.choice((0.0, 0.02, 0.2)),
    }
    return cut, {
        "max_new_tokens": most,
        "min_new_tokens": draw.choice((0, 0, 1, 4, most)),
        "repetition_penalty": draw.choice((1.0, 1.0, 1.3, 0.8)),
        "no_repeat_ngram_size": draw.choice((0, 0, 1, 2, 3)),
    }


@pytest.mark.parametrize("language_model", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_samples_and_both_log_probabilities_are_those_of_generate(seed, language_model, monkeypatch):
    """`generate` draws by `torch.multinomial`; here this is a plain loop over the vocabulary."""
    model, draw = captioner(seed, language_model), random.Random(seed)
    for _ in range(8):
        cut, given = options(draw)
        pixels, end, count = images(draw.choice((1, 2, 4)), draw.randrange(1000)), draw.randrange(3, WORDS), 3
        length = given["max_new_tokens"]
        draws = uniforms(seed, [str(draw.random()) for _ in pixels], count, length)
        found = sampled(model, pixels, cut, given, draws, end)
        columns = iter(draws.T)

        def drawn(chances, num_samples, columns=columns):
            pairs = zip(chances.double().numpy(), next(columns).numpy(), strict=True)
            return torch.tensor([[int(np.argmax(row.cumsum() >= one * row.sum()))] for row, one in pairs])

        monkeypatch.setattr(torch, "multinomial", drawn)
        theirs = given | {"do_sample": True, "num_return_sequences": count} | cut
        theirs["epsilon_cutoff"] = theirs.pop("epsilon")
        output, ids = generated(model, pixels, PROMPT, end, 1, **theirs)
        assert torch.equal(found.ids.flatten(0, 1)[:, : ids.shape[1]], ids), (cut, given)
        for own, sums in ((output.scores, found.scores), (output.logits, found.log_probabilities)):
            chances = torch.stack(own, 1).log_softmax(-1).gather(2, ids[:, :, None])[:, :, 0]
            before = (ids == end).cumsum(1) - (ids == end).int()
            expected = chances.masked_fill(before > 0, 0).sum(1)
            torch.testing.assert_close(sums.flatten(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("language_model", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
def test_log_probabilities_of_beams_are_the_models_own(beams, language_model):
    """Penalties and length do not change them: one pass over the caption gives the same."""
    model, draw = captioner(2, language_model), random.Random(beams)
    for _ in range(6):
        _, given = options(draw)
        given |= {"num_beams": beams, "length_penalty": draw.choice((0.0, 1.0, 2.0))}
        pixels, end = images(3, draw.randrange(1000)), draw.randrange(3, WORDS)
        config = PredictConfig(**given)
        with torch.inference_mode(), model.decoder(beams, config.max_new_tokens) as begin:
            found = search(begin(pixels, PROMPT.expand(len(pixels), -1)), config, end, 1)
        for image, captions in enumerate(found.ids):
            for ids, own in zip(captions.tolist(), found.log_probabilities[image].tolist(), strict=True):
                caption = ids[: ids.index(end) + 1] if end in ids else ids
                assert own == pytest.approx(summed(model, pixels[image], caption), abs=1e-4)


@torch.inference_mode()
def summed(model, image, caption: list[int]) -> float:
    """The log-probability of a caption by one pass over all of it."""
    ids = torch.cat([PROMPT, torch.tensor(caption)])[None]
    queries, states = model.see(image[None])
    if model.language_model is None:
        logits = model.read(ids, states)
    else:
        logits = model._speak(queries, ids, torch.ones_like(ids))
    rows = logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    return rows[range(len(caption)), caption].sum().item()


@pytest.mark.parametrize("language_model", [True, False])
def test_samples_are_the_same_in_any_batch_and_order_and_beside_more(language_model):
    model, cut = captioner(3, language_model), {"temperature": 0.9, "top_p": 0.95}
    given, names = {"max_new_tokens": 12, "min_new_tokens": 0}, [f"image_{i}" for i in range(7)]
    pixels = images(7, 1)

    def of(order: list[int], count: int = 4, length: int = 12):
        draws = uniforms(42, [names[i] for i in order], count, length)
        return sampled(model, pixels[order], cut, given, draws)

    whole = of(list(range(7)))
    assert len({tuple(ids) for ids in whole.ids.flatten(0, 1).tolist()}) > 20
    order = [4, 0, 6, 2, 5, 1, 3]
    assert torch.equal(of(order).ids, whole.ids[order])
    for image in range(7):
        alone = of([image], count=2, length=20)  # longer draws begin alike
        assert torch.equal(alone.ids[0], whole.ids[image, :2])
        torch.testing.assert_close(alone.log_probabilities[0], whole.log_probabilities[image, :2])


def test_draws_are_uniform_and_differ_by_seed_image_and_sample():
    draws = uniforms(1, [f"image_{i}" for i in range(300)], 4, 50).double().numpy()
    assert draws.shape == (1200, 50)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, 100, (0, 1))[0]
    assert ((counts - 600) ** 2 / 600).sum() < 148  # chi-squared, 99 degrees of freedom, p = .001
    assert np.abs(np.corrcoef(draws[:200]) - np.eye(200)).max() < 0.7
    assert not np.array_equal(uniforms(1, ["a"], 1, 9), uniforms(2, ["a"], 1, 9))
    # written down: these must not change between versions and machines
    np.testing.assert_allclose(
        uniforms(42, ["image_1"], 1, 3).numpy(), [[0.6007318, 0.3607375, 0.7672066]], atol=1e-7
    )
