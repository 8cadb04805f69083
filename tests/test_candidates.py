"""Candidates of a predict step: interrupted, in any batch and order, and on several ranks."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from support.commands import harness
from support.experiments import EXPERIMENT
from support.models import pixels

from harness.config.sections import PredictConfig
from harness.decoding import predict
from harness.records.files import (
    Candidate,
    read_candidates,
    read_captions,
    read_rows,
    write_candidates,
    write_captions,
)

SAMPLES = {"count": 3, "temperature": 0.9, "top_p": 0.95}
CONFIG = {"num_beams": 3, "max_new_tokens": 14, "min_new_tokens": 2, "batch_size": 7}
IDS = [f"image_{i}" for i in range(9)]


def split(loaded, folder: Path, order=tuple(range(8)), progress=lambda done, total: None, **changes):
    """Caption the images in this order; the last of `IDS` can't be read."""
    folder.mkdir(exist_ok=True)
    config = PredictConfig(**CONFIG | {"num_return_sequences": 2, "samples": SAMPLES} | changes)
    ids, images = [*(IDS[i] for i in order), IDS[8]], pixels(8, 64, 1)[list(order)]
    predict.predict_split(loaded, ids, images, config, folder, progress, {IDS[8]: "a constant"}, 42)
    return read_candidates(folder / "candidates.csv") if config.has_candidates else None


@pytest.fixture
def whole(loaded, tmp_path):
    return split(loaded, tmp_path / "whole")


def assert_same(found: dict[str, list[Candidate]], expected: dict[str, list[Candidate]]) -> None:
    """Log-probabilities round by the size of the batch."""
    assert found.keys() == expected.keys()
    for image, given in found.items():
        ours, theirs = ([(one.source, one.caption) for one in each] for each in (given, expected[image]))
        assert ours == theirs
        own = [one.log_probability for one in expected[image]]
        assert [one.log_probability for one in given] == pytest.approx(own, abs=2e-4)


def test_candidates_are_beams_and_samples_and_the_caption_is_the_best_beam(loaded, whole, tmp_path):
    sources = ["beam1", "beam2", "sample1", "sample2", "sample3"]
    assert all([one.source for one in whole[image]] == sources for image in IDS[:8])
    assert whole[IDS[8]] == [Candidate("a constant", source="constant")]
    assert split(loaded, tmp_path / "alone", num_return_sequences=1, samples=None) is None
    assert not (tmp_path / "alone" / "candidates.csv").exists()
    captions = read_captions(tmp_path / "alone" / "predictions.csv")
    assert captions == {image: given[0].caption for image, given in whole.items()}
    assert (tmp_path / "whole" / "predictions.csv").read_bytes() == (
        tmp_path / "alone" / "predictions.csv"
    ).read_bytes()
    assert len({one.caption for image in IDS[:8] for one in whole[image][2:]}) > 4
    assert all(one.log_probability < 0 for image in IDS[:8] for one in whole[image])


def test_candidates_are_the_same_in_any_batch_and_order(loaded, whole, tmp_path):
    assert_same(split(loaded, tmp_path / "one", batch_size=1), whole)
    order = (5, 2, 7, 0, 3, 6, 1, 4)
    found = split(loaded, tmp_path / "order", order, batch_size=3)
    assert list(found) == [*(IDS[i] for i in order), IDS[8]]
    assert_same(found, whole)
    fewer = split(loaded, tmp_path / "fewer", samples=SAMPLES | {"count": 2})
    assert_same(fewer, {image: given[:4] for image, given in whole.items()})


def test_an_interrupted_split_goes_on_with_the_same_samples(loaded, whole, tmp_path):
    def interrupted(done, total):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split(loaded, tmp_path / "cut", progress=interrupted, batch_size=2)
    assert not (tmp_path / "cut" / "candidates.csv").exists()
    counts = []
    found = split(loaded, tmp_path / "cut", progress=lambda done, total: counts.append(done), batch_size=1)
    assert counts == [7, 8]
    assert_same(found, whole)
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["candidates.csv", "predictions.csv"]


def test_a_file_of_candidates_is_read_as_written(tmp_path):
    odd = 'a "mass",\r\nor two'
    candidates = {"a": [Candidate(odd, 1.0, -1.5, "beam1"), Candidate("", 1.0, -2.25, "sample1")]}
    candidates["b"] = [Candidate("constant", source="constant")]
    assert read_candidates(write_candidates(tmp_path / "candidates.csv", candidates)) == candidates
    file = write_captions(tmp_path / "predictions.csv", {"a": odd})
    assert read_candidates(file) == {"a": [Candidate(odd)]}
    for text in ("", "ID,source\na,b\n", "ID,source,log_probability,caption\na,beam1,low,x\n"):
        file.write_text(text)
        with pytest.raises(ValueError):  # noqa: PT011
            read_candidates(file)


@pytest.mark.slow
def test_two_ranks_sample_as_one(small_run, tmp_path):
    found = []
    for ranks in ("1", "2"):
        place = tmp_path / ranks
        for name in ("data", "runs"):
            shutil.copytree(small_run / "kept" / name, place / name)
        text = EXPERIMENT.replace("  opt_dedup: {postprocess: {deduplicate: true}}\n", "")
        text = text.replace("max_new_tokens: 24", "max_new_tokens: 24, samples: {count: 4}, batch_size: 2")
        (place / "small.yaml").write_text(text)
        harness(place, "run", "small.yaml", "--nproc", ranks)
        record = json.loads((place / "runs" / "small" / "opt-s42" / "run.json").read_text())
        assert record["made"]["predict-valid"]["ranks"] == int(ranks)
        found.append(
            read_candidates(place / "runs" / record["artifacts"]["predictions/valid_candidates.csv"])
        )
    assert_same(*found)


def test_tables_hold_captions_of_any_length(tmp_path):
    """The csv module refuses fields of more than 131,072 characters, unless told otherwise."""
    before, text = csv.field_size_limit(), "wort\r\n, " * 40_000
    write_candidates(tmp_path / "c.csv", {"a": [Candidate(text, source="beam1")]})
    assert [one.caption for one in read_candidates(tmp_path / "c.csv")["a"]] == [text]
    write_captions(tmp_path / "p.csv", {"a": text})
    assert read_captions(tmp_path / "p.csv") == {"a": text}
    assert read_rows(tmp_path / "p.csv") == [{"ID": "a", "caption": text}]
    assert csv.field_size_limit() == before
