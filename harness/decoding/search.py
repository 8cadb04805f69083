"""Greedy and beam search, equal to transformers' `generate`, over any model that gives logits token by token.

The model is a `base.Decoding`. Images whose captions are done leave the batch. A step does not wait for the
device, except to see which images are done.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from harness.config.sections import PredictConfig
from harness.models.base import Decoding

_NEVER = -1e9  # the score of what must not be chosen, as in transformers
_LOOK = 8  # steps between looks at which images are done, if a look stops the device


class Captions(NamedTuple):
    """Captions of each image, best first: new token ids (B, N, T) and scores (B, N).

    Ids after the first end token mean nothing. The score of a greedy caption is the sum of its tokens'
    log-probabilities. That of a beam is after penalties and divided by length ** length_penalty, as
    transformers' `sequences_scores`.
    """

    ids: Tensor
    scores: Tensor


def search(decoding: Decoding, config: PredictConfig, end: int, pad: int) -> Captions:
    """The captions of each image of a batch that has just begun.

    Greedy search gives one caption for each image, beam search as many as there are beams.
    """
    return (_greedy if config.num_beams == 1 else _beams)(decoding, config, end, pad)


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
    logits, said, most = decoding.logits, decoding.context.shape[1], config.max_new_tokens
    images = torch.arange(len(logits), device=logits.device)
    ids = _blank(decoding, len(images), most, pad)
    scores = torch.zeros(len(images), device=logits.device)
    every, totals = ids.clone(), scores.clone()
    done = torch.zeros_like(images, dtype=torch.bool)
    for new in range(most):
        logits = logits.float()
        tokens = penalised(logits, ids[:, : said + new], new, config, end).argmax(-1)
        gained = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        scores = scores + gained.masked_fill(done, 0)
        tokens = tokens.masked_fill(done, pad)
        ids[:, said + new] = tokens
        done = done | (tokens == end)
        if new + 1 == most:
            break
        if (going := _going(done, new, decoding.captured)) is not None:
            every[images], totals[images] = ids, scores
            images, ids, scores, done, tokens = (one[going] for one in (images, ids, scores, done, tokens))
            if not len(going):
                break
            decoding.keep(going)
        logits = decoding.step(tokens)
    every[images], totals[images] = ids, scores
    return Captions(every[:, None, said:], totals[:, None])


class _State(NamedTuple):
    """Beams of the images that go on (B,): `K` that grow, and the best `K` that have ended."""

    images: Tensor
    ids: Tensor
    """(B, K, T) of the beams that grow, best first, with the sums (B, K) of their log-probabilities."""
    sums: Tensor
    best: Tensor
    """(B, K, T) of the captions that have ended, best first, with their scores (B, K)."""
    scores: Tensor
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
    ids, scores = state.best.clone(), state.scores.clone()
    own = torch.arange(count * len(ids), device=ids.device).view(-1, count)
    logits = decoding.logits.repeat_interleave(count, 0)
    for new in range(most):
        sums, beams, tokens = _candidates(state, logits, said, new, config, end)
        ends = (tokens == end) | (new + 1 == most)
        longer = state.ids.take_along_dim(beams[:, :, None], 1)
        longer[:, :, said + new] = tokens
        state = _ended(state, longer, sums, ends, (new + 1) ** config.length_penalty)
        kept = (sums + ends * _NEVER).topk(count)
        grown = longer.take_along_dim(kept.indices[:, :, None], 1)
        state = _closed(state._replace(ids=grown, sums=kept.values), (new + 1) ** config.length_penalty)
        if new + 1 == most:
            break
        rows = own[: len(beams), :1] + beams.gather(1, kept.indices)
        if (going := _going(~state.open, new, decoding.captured)) is not None:
            ids[state.images], scores[state.images] = state.best, state.scores
            state, rows = state.of(going), rows[going]
            if not len(going):
                break
            decoding.keep(rows.flatten())
        else:
            decoding.reorder(rows.flatten())
        logits = decoding.step(state.ids[:, :, said + new].flatten())
    ids[state.images], scores[state.images] = state.best, state.scores
    return Captions(ids[:, :, said:], scores)


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
        best=ids,
        scores=torch.full((images, count), _NEVER, device=place),
        ended=torch.zeros(images, count, dtype=torch.bool, device=place),
        open=torch.ones(images, dtype=torch.bool, device=place),
    )


def _candidates(
    state: _State, logits: Tensor, said: int, new: int, config: PredictConfig, end: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best 2 K next tokens of each image's beams: sums of log-probabilities, beams and tokens, (B, 2 K).

    Each beam can end in one way only, so at least K of them go on.
    """
    images, count = state.sums.shape
    ids = state.ids[:, :, : said + new].flatten(0, 1)
    scores = penalised(logits.float().log_softmax(-1), ids, new, config, end)
    sums = (scores.view(images, count, -1) + state.sums[:, :, None]).flatten(1)
    found = sums.topk(2 * count)
    vocabulary = scores.shape[1]
    return found.values, found.indices // vocabulary, found.indices % vocabulary


def _ended(state: _State, longer: Tensor, sums: Tensor, ends: Tensor, length: float) -> _State:
    """The state with those of the first K candidates that end, if they are among the best."""
    count = state.ids.shape[1]
    now = ends & (torch.arange(2 * count, device=ends.device) < count)
    scores = sums / length + (~state.open)[:, None] * _NEVER
    best = torch.cat([state.scores, scores + ~now * _NEVER], 1).topk(count)
    return state._replace(
        best=torch.cat([state.best, longer], 1).take_along_dim(best.indices[:, :, None], 1),
        scores=best.values,
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
