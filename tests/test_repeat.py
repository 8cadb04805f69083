"""The same scores to the bit, whatever was scored, stored, lost or killed before."""

import csv
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from harness import metrics
from harness.metrics import bertscore, lexical, neural, text
from harness.metrics.cache import TextCache
from harness.metrics.settings import ScoreConfig

GOLDEN = Path(__file__).parent / "golden" / "pairs.csv"
ONLY = ScoreConfig.model_validate(
    {"bertscore": {"checkpoint": "standin"}, "bootstrap": 0, "metrics": ["bertscore"]}
)


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    """Pairs of all lengths, so that batches of many widths are made."""
    with GOLDEN.open(newline="", encoding="utf-8") as lines:
        rows = [(row["prediction"], row["reference"]) for row in csv.DictReader(lines)][::2]
    words = " ".join(f"{a} {b}" for a, b in rows).split()
    draw = random.Random(4)
    more = [tuple(" ".join(draw.choices(words, k=draw.randint(1, 40))) for _ in "ab") for _ in range(10)]
    return rows + more


def bits(pairs: list, cache: Path | None, year: int = 2023) -> list[float]:
    """BERTScore of each pair as a process scores it that holds no embedding yet."""
    bertscore.embeddings.cache_clear()
    sides = map(list, zip(*pairs, strict=True))
    return metrics.score(*sides, None, ONLY, year, cache=cache)[0]["bertscore"].per_image.tolist()


@pytest.fixture(scope="module")
def fresh(pairs) -> list[float]:
    return bits(pairs, None)


@pytest.mark.slow
def test_in_another_order_and_in_parts(pairs, fresh):
    order = np.random.default_rng(0).permutation(len(pairs))
    assert bits([pairs[i] for i in order], None) == [fresh[i] for i in order]
    for part in (slice(0, 1), slice(3, 8), slice(8, 26, 3)):
        assert bits(pairs[part], None) == fresh[part]


@pytest.mark.ci
def test_with_an_emptied_a_half_filled_and_a_full_cache(pairs, fresh, tmp_path):
    bits(pairs[:11], tmp_path)
    assert bits(pairs, tmp_path) == fresh, "some embeddings and scores were there"
    assert bits(pairs, tmp_path) == fresh, "all scores were there"
    (tmp_path / "scores.sqlite").unlink()
    assert bits(pairs, tmp_path) == fresh, "embeddings alone were there"
    for file in tmp_path.glob("embeddings-*"):
        file.unlink()
    (tmp_path / "scores.sqlite").unlink()
    assert bits(pairs, tmp_path) == fresh, "nothing was there"


@pytest.mark.slow
def test_texts_that_leave_a_small_store_come_back_the_same(pairs, fresh, monkeypatch):
    monkeypatch.setattr(bertscore, "STORE_BYTES", 200_000)
    monkeypatch.setattr(bertscore, "CHUNK", 5)
    assert bits(pairs, None) == fresh


PROGRAM = """
import json, sys
from pathlib import Path
from harness import metrics
from harness.metrics.settings import ScoreConfig
from harness.metrics import bertscore
bertscore.CHUNK = 4  # so that embeddings reach the disk a few at a time
given = json.loads(Path(sys.argv[1]).read_text())
config = ScoreConfig.model_validate(given["config"])
scores, _ = metrics.score(*given["captions"], None, config, 2023, cache=Path(given["cache"]))
print(json.dumps(scores["bertscore"].per_image.tolist()))
"""


@pytest.mark.slow
def test_after_a_killed_process_and_with_other_threads(pairs, fresh, tmp_path):
    given = {"captions": list(zip(*pairs, strict=True)), "cache": str(tmp_path / "cache")}
    given["config"] = json.loads(ONLY.model_dump_json(exclude_none=True))
    (tmp_path / "given.json").write_text(json.dumps(given))
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "given.json")]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE)
    kept, deadline = [], time.monotonic() + 120
    while not kept and killed.poll() is None and time.monotonic() < deadline:
        kept = [file for file in (tmp_path / "cache").glob("embeddings-*.sqlite") if file.stat().st_size]
    killed.kill()
    killed.communicate()
    assert kept, "it was killed in the middle"
    for threads in ("2", "1"):
        environment = os.environ | {"OMP_NUM_THREADS": threads}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert json.loads(done.stdout.splitlines()[-1]) == fresh
        (tmp_path / "cache" / "scores.sqlite").unlink()


@pytest.mark.ci
def test_an_embedding_is_a_function_of_the_text(pairs):
    """Each text alone, with all others, and with others of its width: the same bytes."""
    checkpoint, layer = bertscore.locate(ONLY.bertscore)
    clean = sorted({text.official(caption) for pair in pairs for caption in pair} - {""})
    together = bertscore.Embeddings(checkpoint.folder, layer, "cpu")
    together.add(clean)
    for start in range(0, len(clean), 7):
        few = bertscore.Embeddings.__new__(bertscore.Embeddings)
        few.__dict__.update(together.__dict__, _kept={}, _cut=set(), _bytes=0)
        few.add(clean[start : start + 1])
        assert few[clean[start]][1].numpy().tobytes() == together[clean[start]][1].numpy().tobytes()


def test_batches_are_of_one_shape_for_each_length():
    """What shares a batch may change; the shape that a row is computed in may not."""
    draw = random.Random(0)
    shape: dict[int, tuple[int, int]] = {}
    for _ in range(300):
        limit = draw.choice([96, 96, 512, None])
        lengths = [draw.randint(1, limit or 700) for _ in range(draw.randint(1, 60))]
        seen = []
        for rows, width in neural.batches(lengths, limit, 512):
            assert len(rows) == max(1, 512 // width)
            assert all(width - neural.WIDTH_STEP < lengths[row] <= width for row in rows)
            assert width <= (limit or width)
            seen += dict.fromkeys(rows)
            for row in rows:
                assert shape.setdefault((limit, lengths[row]), (len(rows), width)) == (len(rows), width)
        assert sorted(seen) == list(range(len(lengths)))


def test_cider_of_a_row_does_not_depend_on_other_predictions(pairs):
    predictions, references = (
        [text.official(caption) for caption in side] for side in zip(*pairs, strict=True)
    )
    whole = lexical.cider_scores(predictions, references)
    for keep in (0, 11, 25):
        others = ["zzz new words of another system"] * len(predictions)
        others[keep] = predictions[keep]
        assert lexical.cider_scores(others, references)[keep] == whole[keep]


def test_embeddings_of_another_length_are_not_taken(tmp_path):
    """The cut is in the name of the file that holds them."""
    checkpoint, layer = bertscore.locate(ONLY.bertscore)
    names = {TextCache(tmp_path, checkpoint.folder, layer, "fp32", cut).blobs.path for cut in (512, None, 96)}
    assert len(names) == 3
