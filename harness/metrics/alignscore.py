"""AlignScore (Zha et al. 2023): is every sentence of a caption supported by the reference?

Inference of the published checkpoint, as `src/alignscore/inference.py` of yuh-zha/AlignScore does it in mode
nli_sp, but without pytorch-lightning 1 and spacy. Scores equal the original's, computed one pair at a time.
"""

import pickle
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from harness.config.sections import Section
from harness.config.yamlfile import no_file
from harness.errors import Problem
from harness.metrics import text
from harness.metrics.base import Absent, Flagged, Inputs, Measured, Metric, Weights, cut_rows, empty, sign
from harness.metrics.cache import Row
from harness.metrics.neural import by_length, dtype, last_kept, row_by_row
from harness.models import checkpoints
from harness.models.checkpoints import Checkpoint, standin_name
from harness.models.outline import Flawed, Stored, read_pickle
from harness.store import fingerprint

OFFICIAL = "AlignScore-base.ckpt"
"""The organisers ask for roberta-large but load this file, and Lightning builds the model that it names."""
KEY = "score.alignscore.checkpoint"
HINT = f"Fetch {OFFICIAL} of yzha/AlignScore from the Hugging Face hub and name it as {KEY}"
PUNKT = "python -m nltk.downloader punkt_tab   (on a machine with internet; then copy the folder nltk_data)"
REWRITE = (
    "If you trust it, save it again without them: c = torch.load(FILE, 'cpu', weights_only=False); "
    "torch.save({key: c[key] for key in ('hyper_parameters', 'state_dict')}, FILE)"
)
CHUNK_WORDS = 350

Pair = tuple[str, str]
"""A chunk of the reference (the context), and a sentence of the prediction (the claim)."""


class AlignScoreConfig(Section):
    """The model of AlignScore."""

    checkpoint: Path | None = None
    """The local file AlignScore-base.ckpt, which the organisers load. Without it AlignScore is absent."""


def problems(config: AlignScoreConfig) -> list[Problem]:
    """What prevents AlignScore; found without loading it."""
    if what := no_file(config.checkpoint):
        return [Problem(f"{what}: {config.checkpoint}", key=KEY, hint=HINT)]
    found = []
    try:
        roberta = made_of(config.checkpoint)
    except Flawed as flaw:
        what = f"not a checkpoint of AlignScore: {config.checkpoint} {flaw}"
        found.append(Problem(what, key=KEY, hint=HINT))
    else:
        at_hand = checkpoints.find(roberta)
        found += checkpoints.flaws(at_hand, KEY) if at_hand else [checkpoints.missing(roberta, KEY)]
    if _splitter() is None:
        found.append(Problem("nltk has no sentence splitter here", key=KEY, hint=f"Fetch it: {PUNKT}"))
    return found


def measure(inputs: Inputs) -> Measured:
    """AlignScore of each raw prediction (the claim) with its raw reference (the context), in 0 to 1.

    Each sentence of the prediction has a probability of being aligned with each chunk of the reference. The
    score is the mean over the sentences of their best probability. Two captions of length 0 score 1. Any
    other blank prediction scores 0; the organisers' code stops there. If only the reference is blank, it is
    an empty context, as in the organisers' code.
    """
    file, precision = inputs.config.alignscore.checkpoint, inputs.config.precision
    if wrong := problems(inputs.config.alignscore):
        raise Absent("; ".join(f"{problem}. {problem.hint}" for problem in wrong))
    standin, roberta = standin_name(file.parent), checkpoints.find(made_of(file))
    contents = identity(inputs.config.alignscore, inputs.cache)
    name = f"STAND-IN {standin}" if standin else file.stem
    name += f"@{checkpoints.sha256(file, inputs.cache)[:8]}"
    splits = f"nltk:{metadata.version('nltk')}@{fingerprint(contents['punkt'])[:8]}"
    signature = sign("alignscore", inputs.edition, name, "nli_sp", "pre:raw", precision, splits)
    if roberta.local:
        signature += f"|{roberta.folder.name}@{checkpoints.digest(roberta, inputs.cache)}"

    def compute(rows: Sequence[Row]) -> np.ndarray:
        return load(file, inputs.device, precision).scores(rows)

    pairs = list(zip(inputs.references, inputs.predictions, strict=True))
    per_image, cut = inputs.scored_by_all([signature, contents], pairs, compute).T
    as_official = file.name == OFFICIAL and not standin and precision == "fp32"
    official, doubts = _official(inputs, file, roberta) if as_official else (False, [])
    return Measured(
        per_image,
        signature,
        official=official,
        warnings=cut_rows("alignscore", cut) + _blank_rows(inputs),
        doubts=doubts,
    )


def _blank_rows(inputs: Inputs) -> list[Flagged]:
    """The rows with a blank prediction, and their score."""
    both = empty(inputs.pairs)
    blank = np.array([text.is_empty(caption) for caption in inputs.predictions])
    kinds = (
        (both, "with both captions of length 0: alignscore is 1"),
        (blank & ~both, "with a blank prediction: alignscore is 0; the organisers' code stops there"),
    )
    return [Flagged(np.flatnonzero(rows).tolist(), what) for rows, what in kinds if rows.any()]


def _official(inputs: Inputs, file: Path, roberta: Checkpoint) -> tuple[bool, list[str]]:
    """Whether the contents of the checkpoint and of RoBERTa are the published ones, and why not."""
    if not inputs.trusts(file):
        return False, [checkpoints.untrusted(KEY, file, inputs.cache)]
    if Path(roberta.name).is_absolute():  # the published file has a hub name, so the user wrote this path
        return True, []
    return inputs.official(roberta, roberta.name, KEY)


def identity(config: AlignScoreConfig, cache: Path | None) -> dict[str, Any]:
    """What determines the scores: the checkpoint, its RoBERTa, and nltk's data for English."""
    try:
        roberta = checkpoints.find(made_of(config.checkpoint))
    except Flawed:
        roberta = None
    punkt = _punkt()
    return {
        "checkpoint": checkpoints.sha256(config.checkpoint, cache),
        "roberta": roberta and checkpoints.contents(roberta.folder, cache),
        "punkt": punkt and checkpoints.sums(punkt, cache),
    }


@last_kept(lambda file: identity(AlignScoreConfig(checkpoint=file), None))
def load(file: Path, device: str, precision: str = "fp32") -> "Scorer":
    """The AlignScore of a checkpoint file; the last one used stays in memory."""
    return Scorer(file, device, precision)


class Scorer:
    """An AlignScore model: a RoBERTa, and a layer on its pooled output with three labels.

    `limit` is the largest number of tokens in a pair.
    """

    def __init__(self, file: Path, device: str, precision: str = "fp32"):
        from transformers import AutoTokenizer

        folder = checkpoints.find(made_of(file)).folder
        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.encoder, self.head = _build(folder, file)
        for part in (self.encoder, self.head):
            part.eval().to(device, dtype(precision))
        positions = self.encoder.config.max_position_embeddings - self.encoder.config.pad_token_id - 1
        self.limit = min(self.tokenizer.model_max_length, positions)

    def scores(self, rows: Sequence[Row]) -> np.ndarray:
        """(n, 2): the score of each (reference, prediction), and the tokens that a pair was cut to, or 0."""
        split = _splitter()
        made = [_pairs(split, *row) for row in rows]
        distinct = list(dict.fromkeys(pair for chunks in made for pairs in chunks for pair in pairs))
        aligned, cut = self.aligned(distinct)
        scores = [_score(row, chunks, aligned) for row, chunks in zip(rows, made, strict=True)]
        long = [any(pair in cut for pairs in chunks for pair in pairs) for chunks in made]
        return np.column_stack([scores, self.limit * np.array(long)])

    def aligned(self, pairs: Sequence[Pair]) -> tuple[dict[Pair, float], set[Pair]]:
        """The probability that each pair is aligned, and the pairs that were cut."""
        if not pairs:
            return {}, set()
        whole = self.tokenizer(*map(list, zip(*pairs, strict=True)), verbose=False)["input_ids"]
        cut = {pair for pair, ids in zip(pairs, whole, strict=True) if len(ids) > self.limit}
        encoded = [
            self._cut(pair, len(ids)) if pair in cut else ids for pair, ids in zip(pairs, whole, strict=True)
        ]
        probabilities = by_length(
            lambda rows, width: self._forward([encoded[row] for row in rows], width),
            [len(ids) for ids in encoded],
            self.limit,
            self.device,
        )
        return dict(zip(pairs, probabilities, strict=True)), cut

    def _cut(self, pair: Pair, length: int) -> list[int]:
        """The tokens of a pair with its chunk cut; if that is not enough, both are, the longer one first."""
        chunk = len(self.tokenizer(pair[0], add_special_tokens=False, verbose=False)["input_ids"])
        how = "only_first" if chunk > length - self.limit else "longest_first"
        return self.tokenizer(*pair, truncation=how, max_length=self.limit)["input_ids"]

    def _forward(self, encoded: list[list[int]], width: int) -> list[float]:
        import torch

        padding = self.tokenizer.pad_token_id
        ids = torch.tensor([tokens + [padding] * (width - len(tokens)) for tokens in encoded])
        mask = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens in encoded])
        with torch.inference_mode():
            pooled = self.encoder(ids.to(self.device), mask.to(self.device)).pooler_output
            return row_by_row(self.head, pooled).float().softmax(-1)[:, 0].tolist()


def _splitter() -> Callable[[str], list[str]] | None:
    """nltk's sentence splitter, or None if its data are not on this machine."""
    from nltk.tokenize import sent_tokenize

    return sent_tokenize if _punkt() else None


def _punkt() -> Path | None:
    """The folder or zip of nltk's data for splitting English, or None."""
    import nltk

    try:
        found = nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        return None
    return Path(found.zipfile.filename if hasattr(found, "zipfile") else found.path)


def _pairs(split: Callable[[str], list[str]], reference: str, prediction: str) -> list[list[Pair]]:
    """Each chunk of the reference, of about `CHUNK_WORDS` words, with each sentence of the prediction."""
    sentences = split(reference) or [""]
    chunks = len(reference.split()) // CHUNK_WORDS + 1
    size = max(len(sentences) // chunks, 1)
    claims = split(prediction)
    starts = range(0, len(sentences), size)
    return [[(" ".join(sentences[start : start + size]), claim) for claim in claims] for start in starts]


def _score(row: Row, chunks: list[list[Pair]], aligned: Mapping[Pair, float]) -> float:
    if not any(row):
        return 1.0
    if not chunks[0]:
        return 0.0
    return float(np.mean(np.max([[aligned[pair] for pair in pairs] for pairs in chunks], axis=0)))


def made_of(file: Path) -> str:
    """The name of the RoBERTa that a checkpoint was trained from.

    Read without torch, from the plain values that Lightning stores with the weights. Raises `Flawed` if the
    file is not a checkpoint of AlignScore.
    """
    content = read_pickle(file)
    try:
        name, weights = content["hyper_parameters"]["model"], content["state_dict"]
        if isinstance(name, str) and isinstance(weights["tri_layer.weight"], Stored):
            return name
    except (KeyError, TypeError, IndexError):
        pass
    raise Flawed("does not hold AlignScore's weights and settings")


def _build(folder: Path, file: Path) -> tuple[Any, Any]:
    """The encoder and the layer of three labels, with the weights of the checkpoint."""
    import torch
    from transformers import AutoConfig, RobertaModel

    try:
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    except pickle.UnpicklingError:
        raise Absent(f"{file} holds Lightning objects besides its weights. {REWRITE}") from None
    encoder = RobertaModel(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    head = torch.nn.Linear(encoder.config.hidden_size, 3)
    for part, prefix in ((encoder, "base_model."), (head, "tri_layer.")):
        mine = {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}
        mine.pop("embeddings.position_ids", None)  # a buffer that older transformers saved
        try:
            part.load_state_dict(mine)
        except RuntimeError as error:
            what = " ".join(str(error).split())[:300]
            raise Absent(f"{file} does not fit {folder}: {what}") from None
    return encoder, head


METRIC = Metric(
    measure,
    neural=True,
    weights=Weights(
        "alignscore", AlignScoreConfig, "checkpoint", problems, identity, unload=load.cache_clear, hint=HINT
    ),
)
