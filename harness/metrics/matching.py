"""BERTScore on an accelerator: host and device work at the same time, and pairs are matched on the device.

One thread of the host reads or tokenises the next texts, another one stores the embeddings of the last ones.
The thread between them only starts work of the device, and waits for it if `AHEAD` batches are not yet done.
As on a CPU, a score depends on its two texts alone: batches of one width have one number of rows, also those
of pairs (see `neural.batches`).
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import embedding

from harness.machine.device import module, ram
from harness.metrics.cache import Embedded
from harness.metrics.neural import filled, padded

if TYPE_CHECKING:
    from torch import Tensor

    from harness.metrics.bertscore import Embeddings

BUDGET = 4096
"""Tokens in a batch of the encoder: each width ends with a batch that is half full on average."""
PIECE = 512
"""Texts that are read or tokenised at once."""
AHEAD = 4
"""Batches whose embeddings are not yet on the host."""
BACKLOG = 16
"""Batches that wait to be stored; if the disk is slower than the encoder, others are kept in memory alone."""
PAIR_STEP, PAIR_BUDGET = 32, 16384
"""Pairs are padded to multiples of this many tokens; tokens of both sides in a batch of pairs."""
SHARE = 3
"""The embeddings of one group take at most a third of the free memory: they are copied once."""


def f1(pairs: Sequence[tuple[str, str]], store: "Embeddings", weigh: Callable[[Any], Any]) -> np.ndarray:
    """F1 (n,) of pairs of texts that are not blank; `weigh` as for `bertscore.f1`."""
    found = []
    for group in _groups(pairs, store):
        texts = list(dict.fromkeys(text for pair in group for text in pair))
        found.append(_matched(group, Encoded(store, texts), weigh))
    precision, recall = np.concatenate(found, axis=1).astype(float) if found else np.zeros((2, 0))
    both = precision + recall
    return np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both != 0)


def _groups(pairs: Sequence[tuple[str, str]], store: "Embeddings") -> Iterator[list[tuple[str, str]]]:
    """The pairs in parts whose embeddings fit in the device's memory; a text has at most a token per byte."""
    kind = store.device.partition(":")[0]
    free = ram() if kind == "cpu" else module(kind).mem_get_info()[0]
    most = free / SHARE / (4 * store.model.config.hidden_size)
    group: list[tuple[str, str]] = []
    tokens = 0
    for pair in pairs:
        own = sum(min(len(text.encode(errors="surrogatepass")) + 10, store.limit or 10**9) for text in pair)
        if group and tokens + own > most:
            yield group
            group, tokens = [], 0
        group.append(pair)
        tokens += own
    if group:
        yield group


class _Batch(NamedTuple):
    """A batch of the encoder: its texts with their token ids, and their embeddings (b, width, d).

    `vectors` are on the host when the event `copied` has come.
    """

    texts: list[tuple[str, list[int]]]
    vectors: "Tensor"
    copied: Any


class Encoded:
    """The embeddings of texts one after the other on the device, padding included.

    `vectors` (n, d); `ids` (n,) on the host. `spans` are the first token and the number of tokens of each
    text. The store gives the embeddings that it has, and keeps the others.
    """

    def __init__(self, store: "Embeddings", texts: Sequence[str]):
        self.spans: dict[str, tuple[int, int]] = {}
        self._store, self._total = store, 0
        self._vectors: list[Tensor] = []
        self._ids: list[np.ndarray] = []
        self._coming: deque[_Batch] = deque()
        texts = sorted(texts, key=len, reverse=True)
        pieces = [texts[start : start + PIECE] for start in range(0, len(texts), PIECE)]
        with _thread() as reading, _thread() as keeping:
            kept: deque[Future] = deque()
            for batch, width in self._batches(_one_ahead(reading, self._read, pieces)):
                self._start(batch, width)
                self._store_done(keeping, kept, AHEAD)
            self._store_done(keeping, kept, 0)
            for one in kept:
                one.result()
        self.ids = np.concatenate(self._ids)
        self.vectors = torch.cat(self._vectors)
        self._vectors.clear()

    def _read(self, piece: list[str]) -> tuple[dict[str, Embedded], list[tuple[str, list[int]]]]:
        """What the store has of these texts, and the token ids of the others."""
        known = self._store.known(piece)
        new = [text for text in piece if text not in known]
        return known, list(zip(new, self._store.encode(new), strict=True))

    def _known(self, known: dict[str, Embedded]) -> None:
        for text, embedded in known.items():
            self._add(text, len(embedded.ids), len(embedded.ids))
        if known:
            vectors = torch.from_numpy(np.concatenate([embedded.vectors for embedded in known.values()]))
            self._vectors.append(vectors.to(self._store.device))
            self._ids.append(np.concatenate([embedded.ids for embedded in known.values()]))

    def _add(self, text: str, tokens: int, width: int) -> None:
        self.spans[text] = (self._total, tokens)
        self._total += width

    def _batches(self, pieces: Iterable[tuple]) -> Iterator[tuple[list[tuple[str, list[int]]], int]]:
        """New texts with their ids in batches of one width: those that are full at once, then the others."""
        waiting: dict[int, list[tuple[str, list[int]]]] = {}
        for known, new in pieces:
            self._known(known)
            for text, ids in new:
                width = padded(len(ids), self._store.limit)
                waiting.setdefault(width, []).append((text, ids))
                if len(waiting[width]) == self._rows(width):
                    yield waiting.pop(width), width
        yield from ((waiting[width], width) for width in sorted(waiting, reverse=True))

    def _rows(self, width: int) -> int:
        return max(1, (self._store.batch_tokens or BUDGET) // width)

    def _start(self, texts: list[tuple[str, list[int]]], width: int) -> None:
        """Start the encoder on a batch, and the copy of its embeddings to the host; waits for neither."""
        self._store.check_memory(width)
        (rows,) = filled([ids for _, ids in texts], self._rows(width))
        ids, mask = self._store.padded(rows, width)
        vectors = self._store.encoded(ids, mask)[: len(texts)]
        host = torch.empty(vectors.shape, pin_memory=not vectors.is_cpu)
        host.copy_(vectors, non_blocking=True)
        copied = module(vectors.device.type).Event()
        copied.record()
        self._coming.append(_Batch(texts, host, copied))
        for text, tokens in texts:
            self._add(text, len(tokens), width)
        self._vectors.append(vectors.flatten(0, 1))
        self._ids.append(ids[: len(texts)].flatten())

    def _store_done(self, keeping: ThreadPoolExecutor, kept: deque[Future], ahead: int) -> None:
        """Have the oldest batches stored until only `ahead` are on their way to the host.

        This thread waits for the device, because torch-npu would wait for device 0 in another one.
        """
        while len(self._coming) > ahead:
            batch = self._coming.popleft()
            batch.copied.synchronize()
            while kept and kept[0].done():
                kept.popleft().result()
            kept.append(keeping.submit(self._keep, batch, len(kept) < BACKLOG))

    def _keep(self, batch: _Batch, on_disk: bool) -> None:
        rows = zip(batch.texts, batch.vectors.numpy(), strict=True)
        cut = self._store.is_cut
        made = {text: Embedded(ids, row[: len(ids)], cut(text)) for (text, ids), row in rows}
        self._store.keep(made, on_disk=on_disk)


@contextlib.contextmanager
def _thread() -> Iterator[ThreadPoolExecutor]:
    """A thread for work in the order given; an interrupted command does not wait for it."""
    pool = ThreadPoolExecutor(1)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _one_ahead(pool: ThreadPoolExecutor, call: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """The results of `call` in order; the next one is made while this one is used."""
    coming = deque(pool.submit(call, item) for item in items[:1])
    for item in [*items[1:], None]:
        result = coming.popleft().result()
        if item is not None:
            coming.append(pool.submit(call, item))
        yield result


@torch.inference_mode()
def _matched(pairs: Sequence[tuple[str, str]], of: Encoded, weigh: Callable[[Any], Any]) -> np.ndarray:
    """Precision and recall (2, n) of pairs; padding is neither matched nor weighed."""
    device, weights = of.vectors.device, weigh(torch.from_numpy(of.ids)).to(of.vectors.device)
    spans = np.array([[of.spans[text] for text in pair] for pair in pairs])  # (n, side, start and length)
    batches = list(_of_one_shape(spans[..., 1]))
    order = np.concatenate([rows for rows, _ in batches])
    there = torch.from_numpy(spans[order]).to(device)
    found, begun = [], 0
    for rows, widths in batches:
        some = there[begun : begun + len(rows)]
        begun += len(rows)
        sides = [_side(of.vectors, weights, *some[:, side].unbind(1), widths[side]) for side in (0, 1)]
        found.append(_means(*sides))
    result = np.zeros((2, len(pairs)))
    result[:, order] = torch.cat(found, dim=1).cpu().numpy()
    return result


def _of_one_shape(lengths: np.ndarray) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """Rows of pairs in batches of one shape, and the tokens to which both sides are padded."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for row, pair in enumerate((-(-lengths // PAIR_STEP) * PAIR_STEP).tolist()):
        shapes.setdefault(tuple(pair), []).append(row)
    for widths, rows in shapes.items():
        yield from ((batch, widths) for batch in filled(rows, max(1, PAIR_BUDGET // sum(widths))))


def _side(
    vectors: "Tensor", weights: "Tensor", start: "Tensor", length: "Tensor", width: int
) -> tuple["Tensor", "Tensor", "Tensor"]:
    """One side of a batch of pairs: embeddings (b, w, d), weights (b, w), and which are tokens (b, w)."""
    place = torch.arange(width, device=vectors.device)
    real = place < length[:, None]
    at = torch.where(real, start[:, None] + place, 0)
    return embedding(at, vectors), weights[at] * real, real


def _means(prediction: tuple, reference: tuple) -> "Tensor":
    """The weighted means (2, b) of the best cosines of each side's tokens; 0 without weight."""
    (ours, weights, real), (theirs, their_weights, their_real) = prediction, reference
    cosines = ours @ theirs.mT
    best = cosines.masked_fill(~their_real[:, None], -torch.inf).amax(2)
    their_best = cosines.masked_fill(~real[:, :, None], -torch.inf).amax(1)
    both = torch.stack([(best * weights).sum(1), (their_best * their_weights).sum(1)])
    totals = torch.stack([weights.sum(1), their_weights.sum(1)])
    return torch.where(totals == 0, 0, both / totals)
