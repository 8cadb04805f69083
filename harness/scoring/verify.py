"""Our scores beside those of the original packages, one pair at a time, by the very weights in use."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness import metrics
from harness.config.editions import EDITIONS
from harness.metrics import Score, bertscore, concepts, java, text
from harness.metrics.base import Inputs
from harness.metrics.expected import quieten
from harness.models import checkpoints

TOLERANCE = 1e-5
SEED = 0
METEOR_SECONDS = 300

Pairs = Sequence[tuple[str, str]]
"""(prediction, reference) of each row."""


@dataclass(frozen=True)
class Verified:
    """One metric beside its original `package`: the largest `difference` over `rows` rows.

    Without a package or a comparison the difference is None, and `why` says so.
    """

    package: str | None
    rows: int
    difference: float | None
    why: str | None = None

    @property
    def fails(self) -> bool:
        """Whether the scores are further apart than `TOLERANCE`, or one of them is no number."""
        return self.difference is not None and not self.difference <= TOLERANCE


@dataclass(frozen=True)
class Original:
    """How an original package scores: `scores` of pairs (n,), each one alone unless `corpus`.

    `texts` gives the pairs that the package gets. A corpus metric's scores depend on all pairs, and both
    sides score the chosen rows as a corpus of their own.
    """

    package: str
    texts: Callable[[Inputs], Pairs]
    scores: Callable[[Inputs, Pairs], Sequence[float]]
    corpus: bool = False


def chosen(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` rows, the same at every call."""
    return sorted(np.random.default_rng(SEED).permutation(count)[:wanted].tolist())


def captions(inputs: Inputs, scores: Mapping[str, Score], wanted: int) -> dict[str, Verified]:
    """Each score of captions beside its original package, on `wanted` rows of the `inputs`.

    Rows with a blank side are left out: each edition has its own rule for those, and no package has.
    """
    quieten()
    metrics.unload()  # the original loads the weights once more
    return {name: _verified(name, score, inputs, wanted) for name, score in scores.items()}


def _verified(name: str, score: Score, inputs: Inputs, wanted: int) -> Verified:
    original = ORIGINALS.get(name)
    if score.value is None or score.per_image is None:
        return Verified(None, 0, None, f"absent: {score.reason}")
    if original is None:
        return Verified(None, 0, None, "no package to compare with")
    if inputs.config.precision != "fp32" and name in ("bertscore", "bleurt"):
        return Verified(original.package, 0, None, "not compared: the package computes in fp32")
    pairs = original.texts(inputs)
    rows = [row for row in chosen(len(pairs), wanted) if all(side.strip() for side in pairs[row])]
    if not rows:
        return Verified(original.package, 0, None, "not compared: a side of each chosen row is blank")
    ours = _again(name, inputs, rows) if original.corpus else score.per_image[rows]
    try:
        theirs = original.scores(inputs, [pairs[row] for row in rows])
    except Exception as error:  # whatever a package makes of these captions is its answer
        why = f"not compared: it stops at {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Verified(original.package, 0, None, why)
    return Verified(original.package, len(rows), float(np.abs(np.asarray(theirs) - ours).max()))


def _again(name: str, inputs: Inputs, rows: Sequence[int]) -> np.ndarray:
    """Our scores of some rows as a corpus of their own."""
    some = [[side[row] for row in rows] for side in (inputs.predictions, inputs.references)]
    config = inputs.config.model_copy(update={"metrics": (metrics.READINGS.get(name, name),), "bootstrap": 0})
    return metrics.score(*some, None, config, inputs.edition, inputs.device)[0][name].per_image


def _raw(inputs: Inputs) -> Pairs:
    return list(zip(inputs.predictions, inputs.references, strict=True))


def _clean(inputs: Inputs) -> Pairs:
    return inputs.clean_pairs


def _bertscore(inputs: Inputs, pairs: Pairs) -> list[float]:
    from bert_score import BERTScorer

    checkpoint, layer = bertscore.locate(inputs.config.bertscore)
    idf, cut = EDITIONS[inputs.edition].bertscore_idf, EDITIONS[inputs.edition].bertscore_tokens
    with _apart(), _without_t5(checkpoint.folder) as folder:
        # without a pool of processes: forked beside our threads it hung, or said on the terminal how it ends
        how = {"num_layers": layer, "idf": idf, "device": inputs.device, "nthreads": 0}
        scorer = BERTScorer(model_type=folder, **how)
    if cut:  # as the tokenizer of that time, which knew a limit
        scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, cut)
    if idf:
        scorer.compute_idf(inputs.clean_references)
    return [scorer.score([prediction], [reference])[2].item() for prediction, reference in pairs]


@contextlib.contextmanager
def _without_t5(folder: Path) -> Iterator[str]:
    """A link to a folder: bert-score takes every path with `t5` in it for a T5."""
    with contextlib.ExitStack() as kept:
        place = "t5"
        while "t5" in place:
            place = kept.enter_context(tempfile.TemporaryDirectory())
        link = Path(place, "encoder")
        link.symlink_to(folder.resolve(), target_is_directory=True)
        yield str(link)


def _rouge1(_: Inputs, pairs: Pairs) -> list[float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1"], use_stemmer=False)
    return [scorer.score(reference, prediction)["rouge1"].fmeasure for prediction, reference in pairs]


def _bleurt(inputs: Inputs, pairs: Pairs) -> list[float]:
    import torch
    from bleurt_pytorch import BleurtForSequenceClassification, BleurtTokenizer

    folder = checkpoints.find(inputs.config.bleurt.checkpoint).folder
    tokenizer = BleurtTokenizer.from_pretrained(folder)
    model = BleurtForSequenceClassification.from_pretrained(folder).eval().to(inputs.device)
    longest = min(512, model.config.max_position_embeddings)
    found = []
    for prediction, reference in pairs:
        encoded = tokenizer(
            [reference], [prediction], truncation=True, max_length=longest, return_tensors="pt"
        )
        with torch.inference_mode():
            found.append(model(**encoded.to(inputs.device)).logits.item())
    return found


def _bleu1(_: Inputs, pairs: Pairs) -> list[float]:
    from pycocoevalcap.bleu.bleu import Bleu

    one = ({0: [reference]} for _, reference in pairs), ({0: [prediction]} for prediction, _ in pairs)
    return [Bleu(1).compute_score(*pair, verbose=0)[0][0] for pair in zip(*one, strict=True)]


def _meteor(_: Inputs, pairs: Pairs) -> list[float]:
    """By pycocoevalcap's client, which would wait without end for a caption of two lines."""
    from pycocoevalcap.meteor.meteor import Meteor

    # the jar takes all white space for one blank
    lines = [tuple(map(text.collapse, pair)) for pair in pairs]
    with _java_on_path():
        original = Meteor()
    watchdog = threading.Timer(METEOR_SECONDS, original.meteor_p.kill)
    watchdog.start()
    try:
        return [
            original.compute_score({0: [reference]}, {0: [prediction]})[1][0]
            for prediction, reference in lines
        ]
    finally:
        watchdog.cancel()
        original.meteor_p.kill()
        original.meteor_p.communicate()
        if original.lock.locked():  # it takes the lock again when it goes
            original.lock.release()


def _cider(_: Inputs, pairs: Pairs) -> Sequence[float]:
    from pycocoevalcap.cider.cider import Cider

    truth = {row: [reference] for row, (_, reference) in enumerate(pairs)}
    return Cider().compute_score(truth, {row: [prediction] for row, (prediction, _) in enumerate(pairs)})[1]


def _cider_ptb(inputs: Inputs, pairs: Pairs) -> Sequence[float]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokenised(side: int) -> list[str]:
        # one line a caption, or its lines are taken for those of other rows
        given = {row: [{"caption": text.collapse(pair[side])}] for row, pair in enumerate(pairs)}
        with _java_on_path(), _apart():
            found = PTBTokenizer().tokenize(given)
        return [found[row][0] for row in given]

    return _cider(inputs, list(zip(tokenised(0), tokenised(1), strict=True)))


@contextlib.contextmanager
def _java_on_path() -> Iterator[None]:
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{Path(java.find()).parent}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """What a package and its Java say of their progress, kept off the terminal; errors are raised."""
    kept = os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


ORIGINALS: Mapping[str, Original] = {
    "bertscore": Original("bert-score", _clean, _bertscore),
    "rouge1": Original("rouge-score", _clean, _rouge1),
    "bleurt": Original("bleurt-pytorch", _clean, _bleurt),
    "bleu1": Original("pycocoevalcap", _clean, _bleu1),
    "meteor": Original("pycocoevalcap", _clean, _meteor),
    "cider": Original("pycocoevalcap", _clean, _cider, corpus=True),
    "cider_ptb": Original("pycocoevalcap", _raw, _cider_ptb, corpus=True),
}


def concept_lists(
    predictions: Sequence[Set[str]],
    references: Sequence[Set[str]],
    manual: Sequence[Set[str]] | None,
    scores: Mapping[str, Score],
    edition: int,
    wanted: int,
) -> dict[str, Verified]:
    """The scores of concept detection beside sklearn's F1.

    Left out are images of two empty sets, and for `f1_secondary` those whose manual set has none of its
    concepts, as the organisers leave them out.
    """
    only = concepts.SECONDARY
    whole = list(zip(predictions, references, strict=True))
    given = {"f1": (whole, [bool(p or r) for p, r in whole])}
    if manual is not None:
        some = [(p & only, r & only) for p, r in zip(predictions, manual, strict=True)]
        given["f1_secondary"] = (some, [bool(r) for _, r in some])

    def verified(name: str, score: Score) -> Verified:
        if score.value is None:
            return Verified(None, 0, None, f"absent: {score.reason}")
        pairs, counted = given[name]
        rows = [row for row in chosen(len(pairs), wanted) if counted[row]]
        if not rows:
            return Verified("scikit-learn", 0, None, "not compared: none of the chosen rows counts")
        sides = ([side[row] for row in rows] for side in (predictions, references, manual or references))
        ours = metrics.score_concepts(*sides, edition, 0)[name].per_image
        theirs = [_concept_f1(*pairs[row]) for row in rows]
        return Verified("scikit-learn", len(rows), float(np.abs(np.asarray(theirs) - ours).max()))

    return {name: verified(name, score) for name, score in scores.items()}


def _concept_f1(prediction: Set[str], reference: Set[str]) -> float:
    from sklearn.metrics import f1_score

    union = sorted(prediction | reference)
    sides = ([cui in side for cui in union] for side in (reference, prediction))
    return float(f1_score(*sides, average="binary", zero_division=0))
