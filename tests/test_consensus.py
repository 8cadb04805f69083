"""Consensus equals a brute-force loop and mbrs; ties, weights, several captions of an image, the command."""

import json
import sys
from unittest.mock import MagicMock

import numpy as np
import pytest
from support.commands import harness

from harness.data import captionfiles
from harness.decoding import consensus
from harness.decoding.consensus import Candidate
from harness.errors import UserError
from harness.metrics import lexical, text
from harness.metrics.base import Documents, Measured, Metric
from harness.metrics.settings import ScoreConfig
from harness.records.files import read_captions

WORDS = ["a", "the", "chest", "ct", "x-ray", "shows", "nodule", "in", "of", "left", "lung", "mass"]
STANDIN = ScoreConfig.model_validate({"bertscore": {"checkpoint": "standin"}, "bootstrap": 0})


def drawn(seed: int, images: int = 12, most: int = 8) -> dict[str, list[Candidate]]:
    """Candidates of some images; captions repeat, and weights and log-probabilities differ."""
    random = np.random.default_rng(seed)
    found = {}
    for image in range(images):
        captions = [" ".join(random.choice(WORDS, random.integers(1, 9))) for _ in range(most)]
        rows = random.integers(0, most, random.integers(1, most + 1))
        found[f"image_{image}"] = [
            Candidate(captions[row], float(random.integers(1, 4)), float(-random.integers(1, 9)), f"run {n}")
            for n, row in enumerate(rows)
        ]
    return found


def brute_force(given: list[Candidate], compare) -> tuple[Candidate, float]:
    """The rule of the docstring, word by word, with one call for each pair of candidates."""
    total = sum(one.weight for one in given)
    means = [sum(r.weight * compare([c.caption], [r.caption])[0] for r in given) / total for c in given]
    order = sorted(
        (n for n, mean in enumerate(means) if mean >= max(means) - consensus.TIE),
        key=lambda n: (-given[n].log_probability, n),
    )
    return given[order[0]], max(means)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("weights", [{"rouge1": 1.0}, {"rouge1": 0.3, "bleu1": 0.7}, {"cider": 1.0}])
def test_consensus_equals_a_brute_force_loop(seed, weights):
    candidates = drawn(seed)
    documents = Documents([one.caption for given in candidates.values() for one in given])
    utility = consensus.Utility(weights, ScoreConfig(), 2023, documents=documents)
    found = dict(consensus.choose(candidates, utility))
    assert list(found) == list(candidates)
    for image, given in candidates.items():
        best, mean = brute_force(given, utility)
        assert found[image].candidate.caption == best.caption
        assert found[image].utility == pytest.approx(mean, abs=1e-9)


@pytest.mark.ci
def test_parts_of_any_size_give_the_same_choices():
    candidates = drawn(7, images=30)
    utility = consensus.Utility({"bertscore": 1.0}, STANDIN, 2023)
    whole = dict(consensus.choose(candidates, utility, texts=10_000))
    assert whole == dict(consensus.choose(candidates, utility, texts=1))


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:.max_length. is ignored")
def test_consensus_equals_mbrs(monkeypatch):
    """mbrs's own decoder and BERTScore on the same encoder.

    Its other neural metrics are left out: COMET's package needs numpy 1.
    """
    for name in ("comet", "cometkiwi", "xcomet", "metricx"):
        monkeypatch.setitem(sys.modules, f"mbrs.metrics.{name}", MagicMock())
    why = "mbrs is not installed (pip install --no-deps, see .ci/run)"
    pytest.importorskip("mbrs.decoders", reason=why, exc_type=ImportError)
    from mbrs.decoders import DecoderMBR
    from mbrs.metrics import MetricBERTScore

    from harness.metrics import bertscore

    place, layer = bertscore.locate(STANDIN.bertscore)
    theirs = DecoderMBR(
        DecoderMBR.Config(),
        MetricBERTScore(
            MetricBERTScore.Config(model_type=str(place.folder), num_layers=layer, nthreads=0, cpu=True)
        ),
    )
    utility = consensus.Utility({"bertscore": 1.0}, STANDIN, 2023)
    candidates = {
        image: [Candidate(one.caption) for one in given] for image, given in drawn(3, images=20).items()
    }
    for image, choice in consensus.choose(candidates, utility):
        captions = [text.official(one.caption) for one in candidates[image]]
        best = theirs.decode(captions, captions, nbest=len(captions))
        assert choice.utility == pytest.approx(best.score[0], abs=1e-5)
        tied = {
            sentence
            for sentence, score in zip(best.sentence, best.score, strict=True)
            if score > best.score[0] - 1e-5
        }
        assert text.official(choice.candidate.caption) in tied


def test_ties_go_to_the_log_probability_and_then_to_the_first():
    def same(ours, theirs, images=None):
        return np.array([float(a == b) for a, b in zip(ours, theirs, strict=True)])

    def chosen(*given: Candidate) -> str:
        ((_, choice),) = consensus.choose({"a": given}, same)
        return choice.candidate.source

    first, second = Candidate("x", source="1"), Candidate("y", source="2")
    assert chosen(first, second) == "1"
    assert chosen(second, first) == "2"
    assert chosen(Candidate("x", 1, -2.0, "1"), Candidate("y", 1, -1.0, "2")) == "2"
    assert chosen(Candidate("x", 1, -1.0, "1"), Candidate("y", 1.5, -9.0, "2")) == "2"
    # a caption that occurs twice outweighs, and is known by its more probable occurrence
    assert chosen(first, Candidate("y", 1, -3, "2"), Candidate("y", 1, -2, "3")) == "3"


def test_the_candidates_of_a_source_share_its_weight_and_its_name():
    """A source of 18 samples does not drown one caption, and a caption that occurs often counts more."""
    samples = [Candidate("y", source=f"sample{n}") for n in range(17)] + [Candidate("z", source="beam1")]
    given = consensus.of_source(samples, "own", 2.0)
    assert sum(one.weight for one in given) == pytest.approx(2.0)
    assert [given[0].source, given[-1].source] == ["own/sample0", "own/beam1"]
    (alone,) = consensus.of_source([Candidate("x")], "a/b-s1", 1.0)
    assert (alone.weight, alone.source) == (1.0, "a/b-s1")

    def same(ours, theirs, images=None):
        return np.array([float(a == b) for a, b in zip(ours, theirs, strict=True)])

    def chosen(weight: float) -> str:
        given = [*consensus.of_source(samples, "own", weight), alone]
        ((_, choice),) = consensus.choose({"a": given}, same)
        return choice.candidate.caption

    assert chosen(1.1) == "y"
    assert chosen(1.0) == "x"


def test_a_blank_caption_is_chosen_only_if_all_are_blank():
    candidates = {
        "a": [Candidate(""), Candidate("."), Candidate("a chest")],
        "b": [Candidate(""), Candidate(" ")],
    }
    utility = consensus.Utility({"rouge1": 1.0}, ScoreConfig(), 2023)
    found = dict(consensus.choose(candidates, utility))
    assert [choice.candidate.caption for choice in found.values()] == ["a chest", ""]


def test_many_candidates_of_an_image_are_compared_in_blocks(monkeypatch):
    candidates = {"a": [Candidate(f"word{n} chest word{n % 7}") for n in range(60)]}
    utility = consensus.Utility({"rouge1": 1.0}, ScoreConfig(), 2023)
    whole = dict(consensus.choose(candidates, utility))
    sizes = []

    def compare(ours, theirs, images=None):
        sizes.append(len(ours))
        return utility(ours, theirs, images)

    monkeypatch.setattr(consensus, "_ROWS", 1000)
    assert dict(consensus.choose(candidates, compare)) == whole
    assert max(sizes) == 1000


def test_a_number_that_is_not_finite_is_a_reason(monkeypatch):
    broken = Metric(lambda inputs: Measured(np.full(len(inputs.predictions), np.nan), "rouge1|x"))
    monkeypatch.setitem(consensus.METRICS, "rouge1", broken)
    utility = consensus.Utility({"rouge1": 1.0}, ScoreConfig(), 2023)
    with pytest.raises(UserError, match="the consensus needs rouge1: gave no finite number"):
        utility(["a"], ["b"])


def test_a_mean_of_an_edition_becomes_its_metrics():
    assert consensus.mixture({"rouge1": 2, "bleu1": 6}, 2023) == {"rouge1": 0.25, "bleu1": 0.75}
    relevance = {"bertscore": 1 / 6, "rouge1": 1 / 6, "similarity": 1 / 6}
    factuality = {"medcat": 1 / 4, "alignscore": 1 / 4}
    assert consensus.mixture({"overall": 3}, 2025) == pytest.approx(relevance | factuality)


def test_the_utility_of_bertscore_of_2025_counts_the_words_of_the_documents():
    ours, theirs = ["a chest x-ray", "a nodule"], ["the chest x-ray", "a large nodule"]
    few, many = Documents(["a nodule"]), Documents(["a chest", "a nodule", "a large chest", "the nodule"])
    found = [
        consensus.Utility({"bertscore": 1.0}, STANDIN, 2025, documents=one)(ours, theirs)
        for one in (few, many)
    ]
    assert np.abs(found[0] - found[1]).max() > 1e-4
    # one row or several: the frequencies are those of the documents
    alone = consensus.Utility({"bertscore": 1.0}, STANDIN, 2025, documents=many)(ours[:1], theirs[:1])
    assert alone[0] == found[1][0]


def test_a_file_may_hold_several_candidates_of_an_image(tmp_path):
    table = tmp_path / "samples.csv"
    table.write_text('ID,Caption\na,"one"\nb,"two"\na,"three"\na,"one"\n', encoding="utf-8")
    assert captionfiles.read_candidates(table).candidates == {"a": ["one", "three", "one"], "b": ["two"]}
    with pytest.raises(UserError, match="repeated id"):
        captionfiles.read(table)
    results = tmp_path / "samples.json"
    rows = [{"image_id": "a", "caption": "one"}, {"image_id": "a", "caption": "two"}]
    results.write_text(json.dumps(rows), encoding="utf-8")
    assert captionfiles.read_candidates(results).candidates == {"a": ["one", "two"]}
    with pytest.raises(UserError, match="repeated image_id"):
        captionfiles.read(results)
    piped = tmp_path / "piped.csv"
    piped.write_text("a|one|lost\na|two|lost\n", encoding="utf-8")
    assert list(captionfiles.read_candidates(piped).cut) == ["a", "a"]


@pytest.fixture
def files(tmp_path):
    """Three sources, one a JSON with ids by number and two captions of an image."""
    (tmp_path / "a.csv").write_text(
        "ImageCLEF_1|a chest x-ray with a nodule\nImageCLEF_2|ct of the abdomen\n", encoding="utf-8"
    )
    (tmp_path / "b.csv").write_text(
        'ID,Caption\nImageCLEF_1,"chest x-ray, with a nodule"\nImageCLEF_2,"mri of the knee"\n',
        encoding="utf-8",
    )
    rows = [(1, "a chest x-ray"), (2, "mri of a knee"), (2, "mri of the knee")]
    (tmp_path / "c.json").write_text(
        json.dumps([{"image_id": number, "caption": caption} for number, caption in rows]), encoding="utf-8"
    )
    return tmp_path


def test_the_command_writes_the_consensus_of_files(files):
    sources = ("a.csv", "b.csv", "c.json")
    how = ("--utility", "rouge1", "--per-image", "why.csv", "--format", "json")
    found = harness(files, "consensus", *sources, "--out", "run.csv", *how)
    assert "c.json: 3 captions of 2 images" in found.stderr
    assert "warning: c.json: 2 image_ids matched by number" in found.stderr
    assert "2 images, 6 distinct candidates, 18 comparisons" in found.stderr
    printed = json.loads(found.stdout)
    assert printed["sources"] == {"a.csv": 0, "b.csv": 2, "c.json": 0}
    assert list(printed["signatures"]) == ["rouge1"]
    chosen = read_captions(files / "run.csv")
    assert chosen == {"ImageCLEF_1": "chest x-ray, with a nodule", "ImageCLEF_2": "mri of the knee"}
    # the weight of c.json is shared by its two captions of the second image
    knee, other, abdomen = "mri of the knee", "mri of a knee", "ct of the abdomen"
    r = lexical.rouge1_f
    expected = (1.5 * r(knee, knee) + 0.5 * r(knee, other) + r(knee, abdomen)) / 3
    row = (files / "why.csv").read_text(encoding="utf-8").splitlines()[2].split(",")
    assert row[:2] == ["ImageCLEF_2", "b.csv"]
    assert float(row[2]) == pytest.approx(expected, abs=1e-6)


def test_the_weights_of_sources_decide(files):
    how = ("--out", "run.csv", "--utility", "rouge1", "--weights", "9,1,1")
    harness(files, "consensus", "a.csv", "b.csv", "c.json", *how)
    assert read_captions(files / "run.csv")["ImageCLEF_2"] == "ct of the abdomen"


def test_two_captions_of_equal_weight_are_no_choice(files):
    how = ("--out", "run.csv", "--utility", "rouge1")
    said = harness(files, "consensus", "a.csv", "b.csv", *how).stderr
    assert "warning: 2 images have two captions of equal weight" in said
    assert "equal weight" not in harness(files, "consensus", "a.csv", "b.csv", "c.json", *how).stderr
    assert (
        "equal weight" not in harness(files, "consensus", "a.csv", "b.csv", *how, "--weights", "2,1").stderr
    )


@pytest.mark.ci
def test_mistakes_of_the_command_are_explained(files):
    def failed(*arguments: str) -> str:
        found = harness(files, "consensus", *arguments, "--out", "run.csv", code=2)
        assert "Traceback" not in found.stderr
        assert not (files / "run.csv").exists()
        return found.stderr

    assert "2 numbers above 0" in failed("a.csv", "b.csv", "--utility", "rouge1", "--weights", "1")
    assert "2 numbers above 0" in failed("a.csv", "b.csv", "--utility", "rouge1", "--weights", "1,nan")
    assert "got 'rouge=1'" in failed("a.csv", "b.csv", "--utility", "rouge=1")
    said = failed("a.csv", "b.csv")
    assert "weights are not on this machine" in said
    assert "--utility rouge1" in said
    assert "would overwrite an input" in failed("a.csv", "b.csv", "--per-image", "a.csv")
    assert "the same file as --out" in failed("a.csv", "b.csv", "--per-image", "run.csv")
    assert "is given twice" in failed("a.csv", "a.csv", "--utility", "rouge1")
    assert "is a folder" in failed("a.csv", "b.csv", "--per-image", ".")
    assert "got 'rouge1=3'" in failed("a.csv", "b.csv", "--utility", "rouge1=2,rouge1=3")
    (files / "d.csv").write_text("ImageCLEF_1|a\nImageCLEF_3|b\n", encoding="utf-8")
    said = failed("a.csv", "d.csv", "--utility", "rouge1")
    for part in ("no caption in d.csv", "ImageCLEF_2", "no caption in a.csv", "ImageCLEF_3"):
        assert part in said
