"""Greedy and beam search against transformers' `generate` on the same model; images that leave the batch."""

import random

import pytest
import torch
from support.generate import SIDE, WORDS, captioner, generated
from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from harness.config.sections import PredictConfig
from harness.decoding import batches
from harness.decoding.search import penalised, search
from harness.models.cache import CachedDecoding

PROMPT = torch.tensor([2, 7])
CASES = 16  # of each model


def options(draw: random.Random) -> dict:
    """Options of `predict`, drawn so that each is often at its default."""
    most = draw.choice((1, 2, 7, 12))
    return {
        "num_beams": draw.choice((1, 1, 2, 3, 5)),
        "max_new_tokens": most,
        "min_new_tokens": draw.choice((0, 0, 1, 4, most)),
        "length_penalty": draw.choice((1.0, 1.0, 0.0, 0.6, 2.0, -1.0)),
        "repetition_penalty": draw.choice((1.0, 1.0, 1.3, 0.8)),
        "no_repeat_ngram_size": draw.choice((0, 0, 1, 2, 3)),
    }


def images(count: int, seed: int) -> torch.Tensor:
    return 2 * torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def ours(model, pixels, given: dict, end: int, pad: int):
    config = PredictConfig(**given)
    with torch.inference_mode(), model.decoder(config.num_beams, config.max_new_tokens) as begin:
        return search(begin(pixels, PROMPT.expand(len(pixels), -1)), config, end, pad)


def theirs(model, pixels, given: dict, end: int, pad: int):
    """All captions of each image with their scores, as `generate` orders them."""
    given = given | {"num_return_sequences": given["num_beams"]}
    if given["num_beams"] == 1:
        del given["length_penalty"]
    found, ids = generated(model, pixels, PROMPT, end, pad, **given)
    return ids.view(len(pixels), given["num_beams"], -1), found


def assert_equal(model, pixels, given: dict, end: int, pad: int) -> None:
    found = ours(model, pixels, given, end, pad)
    ids, output = theirs(model, pixels, given, end, pad)
    fill = pad if given["num_beams"] == 1 else pad or end
    assert torch.equal(found.ids[:, :, : ids.shape[2]], ids), given
    assert (found.ids[:, :, ids.shape[2] :] == fill).all()
    if given["num_beams"] > 1:
        torch.testing.assert_close(found.scores.flatten(), output.sequences_scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("language_model", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_captions_and_scores_are_those_of_generate(seed, language_model):
    model, draw = captioner(seed, language_model), random.Random(seed)
    for _ in range(CASES):
        pixels = images(draw.choice((1, 2, 5)), draw.randrange(1000))
        assert_equal(model, pixels, options(draw), draw.randrange(3, WORDS), draw.choice((0, 1)))


@pytest.mark.parametrize("language_model", [True, False])
def test_half_precision_is_that_of_generate(language_model):
    model, draw = captioner(1, language_model), random.Random(1)
    model.compute_in(torch.bfloat16, False)
    for _ in range(CASES):
        pixels, given = images(2, draw.randrange(1000)), options(draw)
        found = ours(model, pixels, given, 5, 1).ids[:, 0]
        ids, _ = theirs(model, pixels, given, 5, 1)
        assert torch.equal(found[:, : ids.shape[2]], ids[:, 0]), given


@pytest.mark.parametrize("language_model", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_ties_are_broken_as_generate_breaks_them(seed, language_model):
    """One image at a time: `generate` sorts the equal captions of an image again while others go on."""
    model, draw = captioner(seed, language_model, twins=True), random.Random(seed)
    for _ in range(CASES):
        assert_equal(model, images(1, draw.randrange(1000)), options(draw), draw.randrange(3, WORDS), 1)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_penalties_are_those_of_transformers(size):
    draw = torch.Generator().manual_seed(size)
    for length in range(12):
        ids = torch.randint(4, (40, length), generator=draw)
        scores = torch.randn(40, 4, generator=draw)
        config = PredictConfig(no_repeat_ngram_size=size, repetition_penalty=1.7, min_new_tokens=3)
        expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, scores)
        expected = NoRepeatNGramLogitsProcessor(size)(ids, expected)
        if length < 3:
            expected[:, 2] = -torch.inf
        assert torch.equal(penalised(scores, ids, length, config, 2), expected)


class Rows:
    """A decoding that notes how many rows each step has."""

    def __init__(self, decoding):
        self.decoding, self.rows = decoding, []

    def __getattr__(self, name):
        return getattr(self.decoding, name)

    def step(self, tokens):
        self.rows.append(len(tokens))
        return self.decoding.step(tokens)


def ending() -> tuple:
    """A model, images and end token for which greedy captions and beams end at different times."""
    return captioner(2, False), images(8, 3), 5


@pytest.mark.parametrize("beams", [1, 3])
def test_images_leave_the_batch_when_their_captions_are_done(beams):
    model, pixels, end = ending()
    config = PredictConfig(num_beams=beams, max_new_tokens=24, min_new_tokens=0)
    with torch.inference_mode(), model.decoder(beams, 24) as begin:
        found = Rows(begin(pixels, PROMPT.expand(len(pixels), -1)))
        search(found, config, end, 1)
    alone = []
    for image in pixels:
        with torch.inference_mode(), model.decoder(beams, 24) as begin:
            one = Rows(begin(image[None], PROMPT[None]))
            search(one, config, end, 1)
            alone.append(len(one.rows))
    assert len(set(alone)) > 2
    assert found.rows == [beams * sum(steps > at for steps in alone) for at in range(max(alone))]
    assert all(rows for rows in found.rows)


@pytest.mark.parametrize("language_model", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
def test_steps_of_fixed_shape_give_the_same_captions(language_model, beams, monkeypatch, caplog):
    """What a graph captures on CUDA, without a graph: all of the memory is read under a mask."""
    model, draw = captioner(2, language_model), random.Random(beams)
    cases = [(images(4, draw.randrange(99)), draw.randrange(3, WORDS)) for _ in range(6)]
    given = {"num_beams": beams, "max_new_tokens": 20, "min_new_tokens": 0}
    expected = [ours(model, pixels, given, end, 1) for pixels, end in cases]
    made = CachedDecoding.__init__

    def fixed(self, width, length, kind):
        made(self, width, length, "cuda")

    monkeypatch.setattr(CachedDecoding, "__init__", fixed)
    for (pixels, end), wanted in zip(cases, expected, strict=True):
        found = ours(model, pixels, given, end, 1)
        for image in range(len(pixels)):
            for beam in range(beams):
                one, other = (ids[image, beam].tolist() for ids in (found.ids, wanted.ids))
                length = one.index(end) if end in one else len(one)
                assert one[:length] == other[:length]
        torch.testing.assert_close(found.scores, wanted.scores, atol=1e-4, rtol=1e-5)
    assert all("without a CUDA graph" in record.message for record in caplog.records)
    assert caplog.records


def test_a_batch_of_a_decoder_leaves_nothing_to_the_next():
    """Batches share memory; a smaller one, whose captions are shorter, comes after a larger one."""
    model, pixels, end = ending()
    config = PredictConfig(num_beams=3, max_new_tokens=12, min_new_tokens=0)
    with torch.inference_mode(), model.decoder(3, 12) as begin:
        every = PROMPT.expand(len(pixels), -1)
        parts = [
            search(begin(pixels[part], every[part]), config, end, 1).ids
            for part in (slice(5), slice(5, 8), slice(5))
        ]
    given = {"num_beams": 3, "max_new_tokens": 12, "min_new_tokens": 0}
    for part, found in zip((pixels[:5], pixels[5:], pixels[:5]), parts, strict=True):
        assert torch.equal(found, ours(model, part, given, end, 1).ids)


class Memory:
    """A device with 4,000 bytes free, of which a batch of 16 takes `taken` more than before."""

    def __init__(self, taken: int) -> None:
        self.taken = taken

    def reset_peak_memory_stats(self) -> None: ...
    def memory_allocated(self) -> int:
        return 1000

    def max_memory_allocated(self) -> int:
        return 1000 + self.taken

    def memory_reserved(self) -> int:
        return 1500

    def mem_get_info(self) -> tuple[int, int]:
        return 3500, 9000


@pytest.mark.parametrize(
    ("taken", "beams", "sizes"),
    [
        (160, 1, [16, 256, 228]),  # 320 images fit
        (160, 5, [16, 64, 64, 64, 64, 64, 64, 64, 36]),  # 512 rows
        (800, 1, [16, 64, 64, 64, 64, 64, 64, 64, 36]),  # just 64 images fit
        (801, 1, [16] + [32] * 15 + [4]),
        (90000, 1, [16] * 31 + [4]),
    ],
)
def test_an_automatic_batch_fits_the_memory(taken, beams, sizes, monkeypatch):
    monkeypatch.setattr(batches.device, "module", lambda kind: Memory(taken))
    config = PredictConfig(num_beams=beams, batch_size="auto")
    found = list(batches.slices(500, config, "cuda"))
    assert [part.stop - part.start for part in found] == sizes
    assert [i for part in found for i in range(500)[part]] == list(range(500))


def test_an_automatic_batch_on_a_cpu_is_that_of_the_default():
    parts = [
        list(batches.slices(40, PredictConfig(**given), "cpu")) for given in ({}, {"batch_size": "auto"})
    ]
    assert parts[0] == parts[1]
