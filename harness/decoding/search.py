"""Greedy and beam search and sampling, equal to transformers' `generate`, over any model that gives logits.

The model is a `base.Decoding`. Images whose captions are done leave the batch. A step does not wait for the
device, except to see which images are done.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness.config.sections import PredictConfig, Truncation
from harness.models.base import Decoding

_NEVER = -1e9  # the score of what must not be chosen, as in transformers
_LOOK = 8  # steps between looks at which images are done, if a look stops the device


class Captions(NamedTuple):
    """Captions of each image: new token ids (B, N, T), scores (B, N) and log-probabilities (B, N).

    Ids after the first end token mean nothing. `log_probabilities` are the model's own, with neither
    penalties nor truncation: the sum over the tokens of the caption, with its end token if it has one.
    `scores` are those of the search. For a greedy caption it is the same. For a beam, which is best first, it
    is after penalties and divided by length ** length_penalty, as transformers' `sequences_scores`. For a
    sample it is the log-probability of its tokens in the distribution that they are sampled from.
    """

    ids: Tensor
    scores: Tensor
    log_probabilities: Tensor


def search(decoding: Decoding, config: PredictConfig, end: int, pad: int) -> Captions:
    """The captions of each image of a batch that has just begun.

    Greedy search gives one caption for each image. Beam search gives one for each beam.
    """
    return (_greedy if config.num_beams == 1 else _beams)(decoding, config, end, pad)


def sample(
    decoding: Decoding, settings: Truncation, config: PredictConfig, draws: Tensor, end: int, pad: int
) -> Captions:
    """Sample captions of each image of a batch that has just begun, with as many rows an image as captions.

    `draws` (R, T) are uniform from 0 to 1, one for each row and token, T >= `max_new_tokens`. A token is the
    first whose cumulative probability, in the order of the vocabulary, reaches its draw. Samples obey the
    lengths, penalties and n-gram limit of `config` as beams do; these come before the truncation.
    """

    def drawn(scores: Tensor, rows: Tensor, new: int) -> tuple[Tensor, Tensor]:
        chances = truncated(scores, settings)
        tokens = _quantile(chances.exp(), draws[rows, new])
        return tokens, chances.gather(1, tokens[:, None])[:, 0]

    return _row_by_row(decoding, len(draws) // len(decoding.logits), config, end, pad, drawn)


def truncated(logits: Tensor, settings: Truncation) -> Tensor:
    """Log-probabilities (R, V) of tokens with these logits (R, V), -inf for tokens that are cut.

    Temperature, top-k, top-p and epsilon apply in this order, each to what the one before leaves, as the
    warpers of transformers. Of tokens with equal logits all or none are cut. The gradient flows to `logits`.
    Another pass over the same tokens rounds otherwise, so it may cut a token that was sampled at the edge.
    """
    scores = logits.float() / settings.temperature
    if 0 < settings.top_k < scores.shape[1]:
        scores = _from(scores, scores.topk(settings.top_k).values[:, -1:])
    if settings.top_p < 1:
        rising = scores.sort().values
        less = (rising.softmax(-1).cumsum(-1) <= 1 - settings.top_p)[:, :-1].sum(-1, keepdim=True)
        scores = _from(scores, rising.gather(1, less))
    if settings.epsilon:
        cut = (scores.softmax(-1) < settings.epsilon) & (scores < scores.amax(-1, keepdim=True))
        scores = scores.masked_fill(cut, -torch.inf)
    return scores.log_softmax(-1)


def uniforms(seed: int, images: Sequence[str], count: int, length: int) -> Tensor:
    """Draws for `sample` from 0 to below 1, (B * count, length) float32, on the CPU.

    Each depends on the run's seed, the image's id, the number of the sample and the place of the token alone.
    So they are the same in any batch, on any number of ranks and after a resume, and further samples or
    tokens leave the first ones as they were.
    """
    rows = [(image, number) for image in images for number in range(count)]
    raw = np.stack([_philox(f"{seed}/{number}/{image}").random_raw(length) for image, number in rows])
    return torch.from_numpy((raw >> 40).astype(np.float32) * np.float32(2**-24))


def _philox(key: str) -> np.random.Philox:
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little"))


def _from(scores: Tensor, least: Tensor) -> Tensor:
    """Scores (R, V) without those below the `least` (R, 1)."""
    return scores.masked_fill(scores < least, -torch.inf)


def _quantile(chances: Tensor, draws: Tensor) -> Tensor:
    """The tokens (R,) at these draws (R,) of probabilities (R, V); never a token of probability 0."""
    reached = chances.cumsum(-1).masked_fill(
        chances == 0, 0
    )  # a parallel sum may fall where nothing is added
    wanted = draws[:, None] * reached.amax(-1, keepdim=True)
    return ((reached >= wanted) & (reached > 0)).int().argmax(-1)


def penalised(scores: Tensor, ids: Tensor, new: int, config: PredictConfig, end: int) -> Tensor:
    """Scores (R, V) of the token that follows ids (R, T), `new` of them of the caption, after penalties."""
    if config.repetition_penalty != 1:
        said = scores.gather(1, ids)
        less = torch.where(said < 0, said * config.repetition_penalty, said / config.repetition_penalty)
        scores = scores.scatter(1, ids, less)
    size = config.no_repeat_ngram_size
    if 0 < size <= ids.shape[1]:
        scores = scores.masked_fill(_repeats(ids, size, scores.shape[1]), -torch.inf)
    if new < config.min_new_tokens:
        scores = scores.masked_fill(torch.arange(scores.shape[1], device=scores.device) == end, -torch.inf)
    return scores


def _repeats(ids: Tensor, size: int, vocabulary: int) -> Tensor:
    """Which tokens would end a sequence of `size` tokens that ids (R, T) already have, (R, V)."""
    seen = ids.unfold(1, size, 1)
    same = (seen[:, :, :-1] == ids[:, None, ids.shape[1] - size + 1 :]).all(-1)
    column = seen[:, :, -1].masked_fill(~same, vocabulary)  # a column more takes what is not the same
    none = torch.zeros(len(ids), vocabulary + 1, dtype=torch.bool, device=ids.device)
    return none.scatter(1, column, True)[:, :-1]


def _going(done: Tensor, new: int, captured: bool) -> Tensor | None:
    """The images (B',) that go on if others leave, from which of them are done (B,); None if all go on.

    Captured steps are of few sizes only: there, half of the batch leaves at once.
    """
    if captured and new % _LOOK:
        return None
    going = (~done).nonzero()[:, 0]
    size = len(done)
    while captured and len(going) and size >= 2 * len(going):
        size //= 2
    if captured and len(going):
        going = done.long().argsort(stable=True)[:size].sort().values
    return going if len(going) < len(done) else None


def _blank(decoding: Decoding, rows: int, most: int, fill: int) -> Tensor:
    """The ids (rows, T) before the first step: what was said before the caption, then `fill`."""
    said = decoding.context
    ids = torch.full((rows, said.shape[1] + most), fill, device=decoding.logits.device)
    ids[:, : said.shape[1]] = said.repeat_interleave(rows // len(said), 0)
    return ids


def _greedy(decoding: Decoding, config: PredictConfig, end: int, pad: int) -> Captions:
    def best(scores: Tensor, rows: Tensor, new: int) -> tuple[Tensor, Tensor]:
        return scores.argmax(-1), scores.new_zeros(len(rows))

    found = _row_by_row(decoding, 1, config, end, pad, best)
    return found._replace(scores=found.log_probabilities)


def _row_by_row(
    decoding: Decoding,
    count: int,
    config: PredictConfig,
    end: int,
    pad: int,
    choose: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
) -> Captions:
    """`count` captions of each image, which grow without a look at each other.

    `choose` gets the scores (R, V) after penalties, the rows (R,) that go on, and how many tokens they have.
    It gives the next tokens (R,) and what these add to the scores of the captions (R,).
    """
    images, said, most = len(decoding.logits), decoding.context.shape[1], config.max_new_tokens
    logits = decoding.logits.repeat_interleave(count, 0)
    rows = torch.arange(len(logits), device=logits.device)
    ids = _blank(decoding, len(rows), most, pad)
    sums = torch.zeros(len(rows), 2, device=logits.device)
    every, totals = ids.clone(), sums.clone()
    done = torch.zeros_like(rows, dtype=torch.bool)
    for new in range(most):
        logits = logits.float()
        tokens, gained = choose(penalised(logits, ids[:, : said + new], new, config, end), rows, new)
        own = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        sums = sums + torch.stack([gained, own], 1).masked_fill(done[:, None], 0)
        tokens = tokens.masked_fill(done, pad)
        ids[:, said + new] = tokens
        done = done | (tokens == end)
        if new + 1 == most:
            break
        if (going := _going(done, new, decoding.captured)) is not None:
            every[rows], totals[rows] = ids, sums
            rows, ids, sums, done, tokens = (one[going] for one in (rows, ids, sums, done, tokens))
            if not len(going):
                break
            decoding.keep(going)
        logits = decoding.step(tokens)
    every[rows], totals[rows] = ids, sums
    return Captions(every[:, said:].unflatten(0, (images, count)), *totals.view(images, count, 2).unbind(-1))


class _State(NamedTuple):
    """Beams of the images that go on (B,): `K` that grow, and the best `K` that have ended."""

    images: Tensor
    ids: Tensor
    """(B, K, T) of the beams that grow, best first."""
    sums: Tensor
    """(B, K): the sums of their log-probabilities after penalties, and of the model's own."""
    own: Tensor
    best: Tensor
    """(B, K, T) of the captions that have ended, best first, with scores (B, K) and own sums (B, K)."""
    scores: Tensor
    best_own: Tensor
    ended: Tensor
    """Which of the best are captions, and not what the search began with."""
    open: Tensor
    """Whether a beam of the image may still become better than the worst of the best."""

    def of(self, images: Tensor) -> "_State":
        """The state of these images only."""
        return _State(*(one[images] for one in self))


def _beams(decoding: Decoding, config: PredictConfig, end: int, pad: int) -> Captions:
    count, most, said = config.num_beams, config.max_new_tokens, decoding.context.shape[1]
    state = _first(decoding, config, pad or end)
    ids, scores, owns = state.best.clone(), state.scores.clone(), state.best_own.clone()
    first = torch.arange(0, count * len(ids), count, device=ids.device)[:, None]
    logits = decoding.logits.repeat_interleave(count, 0)
    for new in range(most):
        sums, own, beams, tokens = _candidates(state, logits, said, new, config, end)
        ends = (tokens == end) | (new + 1 == most)
        longer = state.ids.take_along_dim(beams[:, :, None], 1)
        longer[:, :, said + new] = tokens
        state = _ended(state, longer, sums, own, ends, (new + 1) ** config.length_penalty)
        kept = (sums + ends * _NEVER).topk(count)
        grown = longer.take_along_dim(kept.indices[:, :, None], 1)
        state = state._replace(ids=grown, sums=kept.values, own=own.gather(1, kept.indices))
        state = _closed(state, (new + 1) ** config.length_penalty)
        if new + 1 == most:
            break
        rows = first[: len(beams)] + beams.gather(1, kept.indices)
        if (going := _going(~state.open, new, decoding.captured)) is not None:
            ids[state.images], scores[state.images] = state.best, state.scores
            owns[state.images] = state.best_own
            state, rows = state.of(going), rows[going]
            if not len(going):
                break
            decoding.keep(rows.flatten())
        else:
            decoding.reorder(rows.flatten())
        logits = decoding.step(state.ids[:, :, said + new].flatten())
    ids[state.images], scores[state.images] = state.best, state.scores
    owns[state.images] = state.best_own
    return Captions(ids[:, :, said:], scores, owns)


def _first(decoding: Decoding, config: PredictConfig, fill: int) -> _State:
    """The state before the first step: only the first beam of an image counts, because all are the same."""
    images, count = len(decoding.logits), config.num_beams
    place = decoding.logits.device
    ids = _blank(decoding, images * count, config.max_new_tokens, fill).view(images, count, -1)
    sums = torch.full((images, count), _NEVER, device=place)
    sums[:, 0] = 0
    return _State(
        images=torch.arange(images, device=place),
        ids=ids,
        sums=sums,
        own=torch.zeros_like(sums),
        best=ids,
        scores=torch.full((images, count), _NEVER, device=place),
        best_own=torch.zeros_like(sums),
        ended=torch.zeros(images, count, dtype=torch.bool, device=place),
        open=torch.ones(images, dtype=torch.bool, device=place),
    )


def _candidates(
    state: _State, logits: Tensor, said: int, new: int, config: PredictConfig, end: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best 2 K next tokens of each image's beams: both sums, beams and tokens, each (B, 2 K).

    Each beam can end in one way only, so at least K of them go on.
    """
    images, count = state.sums.shape
    ids = state.ids[:, :, : said + new].flatten(0, 1)
    plain = logits.float().log_softmax(-1)
    scores = penalised(plain, ids, new, config, end)
    sums = (scores.view(images, count, -1) + state.sums[:, :, None]).flatten(1)
    found = sums.topk(2 * count)
    vocabulary = scores.shape[1]
    beams, tokens = found.indices // vocabulary, found.indices % vocabulary
    own = plain.view(images, -1).gather(1, found.indices) + state.own.gather(1, beams)
    return found.values, own, beams, tokens


def _ended(state: _State, longer: Tensor, sums: Tensor, own: Tensor, ends: Tensor, length: float) -> _State:
    """The state with those of the first K candidates that end, if they are among the best."""
    count = state.ids.shape[1]
    now = ends & (torch.arange(2 * count, device=ends.device) < count)
    scores = sums / length + (~state.open)[:, None] * _NEVER
    best = torch.cat([state.scores, scores + ~now * _NEVER], 1).topk(count)
    return state._replace(
        best=torch.cat([state.best, longer], 1).take_along_dim(best.indices[:, :, None], 1),
        scores=best.values,
        best_own=torch.cat([state.best_own, own], 1).gather(1, best.indices),
        ended=torch.cat([state.ended, now], 1).gather(1, best.indices),
    )


def _closed(state: _State, length: float) -> _State:
    """Close images whose best beam, if it ended now, would not be better than the worst of K captions.

    With a positive length penalty a later end can still be better; transformers' `early_stopping: False`
    ignores this too.
    """
    worst = torch.where(state.ended, state.scores.amin(1, keepdim=True), _NEVER)
    better = (state.sums[:, :1] / length > worst).any(1)
    return state._replace(open=state.open & better)
