"""Comparisons against scipy's tests, against scoring the drawn captions again, and under a known truth."""

import csv
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.comparisons import given, harness, system, write_file

from harness import metrics
from harness.errors import UserError
from harness.metrics import METRICS, Score, bootstrap
from harness.metrics.settings import ScoreConfig
from harness.scoring import compare
from harness.scoring.compare import Difference, System
from harness.store import write_json

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "pairs.csv"


def counts(rows: int, seed: int) -> np.ndarray:
    """Statistics of BLEU-1 (rows, 3) as captions of 5 to 40 words give them."""
    random = np.random.default_rng(seed)
    words, theirs = random.integers(5, 40, (2, rows))
    return np.stack([random.binomial(np.minimum(words, theirs), 0.4), words, theirs], 1)


def only(*systems: System, **more) -> Difference:
    (found,) = compare.compare(systems, **more)
    return found


def bleu_by_index(a: np.ndarray, b: np.ndarray):
    """scipy's form of a corpus metric: samples of row numbers into both systems' statistics."""
    both = np.vstack([a, b]).astype(float)

    def difference(ours, theirs, axis=-1):
        ours, theirs = (both[rows.astype(int)].sum(-2) for rows in (ours, theirs))
        return METRICS["bleu1"].aggregate(theirs) - METRICS["bleu1"].aggregate(ours)

    return difference, (np.arange(len(a)), np.arange(len(a)) + len(a))


def mean_gap(a, b, axis=-1):
    return b.mean(axis) - a.mean(axis)


@pytest.fixture(scope="module")
def golden() -> dict[str, list[str]]:
    """32 references, two systems' captions for them, ids."""
    with GOLDEN.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    found = {key: [row[key] for row in rows] for key in ("ID", "reference", "prediction")}
    shuffled = random.Random(0)
    found["other"] = [
        " ".join(shuffled.sample(words, max(1, len(words) - 3))) if (words := text.split()) else ""
        for text in found["prediction"]
    ]
    return found


def scored(label: str, ids: list[str], captions: list[str], references: list[str], *names: str) -> System:
    config = ScoreConfig(metrics=names, bootstrap=0)
    return System(label, ids, "same", metrics.score(captions, references, None, config, 2023)[0])


@pytest.mark.parametrize("seed", range(3))
def test_exact_p_and_difference_equal_scipy_for_eight_rows(seed):
    from scipy.stats import permutation_test

    # coarse scores, so that many swaps tie with the observed difference
    a, b = np.random.default_rng(seed).integers(0, 5, (2, 8)) / 5
    found = only(system("a", rouge1=a), system("b", rouge1=b))
    oracle = permutation_test((a, b), mean_gap, permutation_type="samples", vectorized=True)
    assert found.difference == pytest.approx(oracle.statistic, abs=1e-12)
    assert found.p == pytest.approx(oracle.pvalue, abs=1e-12)
    one_sample = permutation_test((b - a,), np.mean, permutation_type="samples")
    assert found.p == pytest.approx(one_sample.pvalue, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_exact_p_of_a_corpus_metric_equals_scipy(seed):
    from scipy.stats import permutation_test

    a, b = counts(8, seed), counts(8, seed + 10)
    found = only(system("a", bleu1=a), system("b", bleu1=b))
    statistic, data = bleu_by_index(a, b)
    oracle = permutation_test(data, statistic, permutation_type="samples", vectorized=True)
    assert found.difference == pytest.approx(float(oracle.statistic), abs=1e-12)
    assert found.p == pytest.approx(float(oracle.pvalue), abs=1e-12)


def test_random_swaps_agree_with_scipy():
    from scipy.stats import permutation_test

    random = np.random.default_rng(5)
    a, b = random.random((2, 150))
    b = b + 0.05
    first, second = counts(150, 1), counts(150, 2)
    rouge, bleu = compare.compare(
        [system("a", rouge1=a, bleu1=first), system("b", rouge1=b, bleu1=second)], resamples=4_000
    )
    options = {"permutation_type": "samples", "vectorized": True, "n_resamples": 4_000, "rng": 0}
    statistic, data = bleu_by_index(first, second)
    assert 0.02 < rouge.p < 0.98, "a p at the floor would agree with anything"
    assert rouge.p == pytest.approx(permutation_test((a, b), mean_gap, **options).pvalue, abs=0.03)
    oracle = permutation_test(data, statistic, batch=200, **options)
    assert bleu.p == pytest.approx(float(oracle.pvalue), abs=0.03)


def test_interval_agrees_with_scipy_paired_bootstrap():
    from scipy.stats import bootstrap as scipy_bootstrap

    random = np.random.default_rng(3)
    a = random.random(400)
    b = 0.8 * a + 0.3 * random.random(400)  # paired: far narrower than two sets apart
    first, second = counts(400, 1), counts(400, 2)
    rouge, bleu = compare.compare([system("a", rouge1=a, bleu1=first), system("b", rouge1=b, bleu1=second)])
    options = {"paired": True, "method": "percentile", "n_resamples": 5_000, "batch": 250, "rng": 0}
    statistic, data = bleu_by_index(first, second)
    for found, oracle in (
        (rouge, scipy_bootstrap((a, b), mean_gap, vectorized=True, **options)),
        (bleu, scipy_bootstrap(data, statistic, vectorized=True, **options)),
    ):
        low, high = oracle.confidence_interval
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.08 * (high - low))


@pytest.mark.slow
def test_corpus_difference_equals_scoring_the_drawn_captions_anew(golden, monkeypatch):
    names = ("meteor", "bleu1")
    ours, theirs = (
        scored(key, golden["ID"], golden[key], golden["reference"], *names) for key in ("prediction", "other")
    )
    monkeypatch.setattr(compare, "DRAWS", 1)
    found = {one.metric: one for one in compare.compare([ours, theirs], seed=7)}
    times = next(bootstrap.weights(32, 1, 7))[0]
    assert times.max() > 1
    drawn = {
        key: [text for text, count in zip(golden[key], times, strict=True) for _ in range(count)]
        for key in ("ID", "prediction", "other", "reference")
    }
    one, two = (
        scored(key, drawn["ID"], drawn[key], drawn["reference"], *names) for key in ("prediction", "other")
    )
    for name in names:
        again = two.scores[name].value - one.scores[name].value
        assert found[name].low == found[name].high == pytest.approx(again, abs=1e-6)
        whole = theirs.scores[name].value - ours.scores[name].value
        assert found[name].difference == pytest.approx(whole, abs=1e-6) != pytest.approx(again, abs=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_a_system_does_not_differ_from_itself(rows):
    statistics = {"meteor": np.random.default_rng(0).integers(1, 9, (rows, 23)), "bleu1": counts(rows, 0)}
    scores = {"rouge1": np.random.default_rng(1).random(rows) / 3}
    twins = [system(label, **statistics, **scores) for label in "ab"]
    for found in compare.compare(twins):
        end = 0 if rows > 1 else None
        assert (found.difference, found.low, found.high, found.p, found.adjusted_p) == (0, end, end, 1, 1)
        assert (found.real, found.verdict) == (False, "not shown")


@pytest.mark.ci
def test_under_the_null_five_percent_are_found():
    """300 times two systems that nothing tells apart, 40 rows each."""
    found = []
    for seed in range(300):
        a, b = np.random.default_rng(seed).random((2, 40))
        pair = [
            system("a", rouge1=a, bleu1=counts(40, 2 * seed)),
            system("b", rouge1=b, bleu1=counts(40, 2 * seed + 1)),
        ]
        found.append([one.p < 0.05 for one in compare.compare(pair, resamples=999, seed=seed)])
    assert np.mean(found, axis=0) == pytest.approx([0.05, 0.05], abs=0.025)  # two standard errors


def test_a_known_shift_is_found_and_named():
    random = np.random.default_rng(0)
    a = random.random(500)
    b = a + 0.02 + 0.05 * random.standard_normal(500)
    found = only(system("base", rouge1=a), system("better", rouge1=b))
    assert found.real
    assert found.verdict == "better higher"
    assert found.low < 0.02 < found.high
    assert found.p == pytest.approx(2 / 10_000)
    turned = only(system("better", rouge1=b), system("base", rouge1=a))
    assert (turned.verdict, turned.p) == (found.verdict, found.p)
    assert (turned.difference, turned.low, turned.high) == pytest.approx(
        (-found.difference, -found.high, -found.low), abs=1e-12
    )


def test_rows_are_aligned_by_id():
    random = np.random.default_rng(0)
    a, b, first, second = *random.random((2, 60)), counts(60, 1), counts(60, 2)
    ours, theirs = system("a", rouge1=a, bleu1=first), system("b", rouge1=b, bleu1=second)
    order = random.permutation(60)
    ids = [ours.ids[row] for row in order]
    moved = system("b", ids, rouge1=b[order], bleu1=second[order])
    assert compare.compare([ours, moved]) == compare.compare([ours, theirs])


def test_pairs_are_corrected_together_and_metrics_apart():
    random = np.random.default_rng(4)
    rows = random.random((3, 80))
    rows[2] += 0.13
    systems = [system(label, rouge1=row, cider=1 - row) for label, row in zip("abc", rows, strict=True)]
    found = compare.compare(systems)
    assert [(d.metric, d.a, d.b) for d in found] == [
        (metric, *pair) for metric in ("rouge1", "cider") for pair in ("ab", "ac", "bc")
    ]
    for family in (found[:3], found[3:]):
        assert [d.adjusted_p for d in family] == compare.holm([d.p for d in family])
    two = only(systems[0], systems[2], metrics=["rouge1"])
    assert two.adjusted_p == two.p == found[1].p < found[1].adjusted_p


def test_holm_against_a_worked_example():
    # four hypotheses: 4 x 0.005, 3 x 0.01, then 2 x 0.03, and 1 x 0.04 raised to the one before
    assert compare.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("a", "b", "changes"),
    [
        ("m|clef2023|x|layer:40|fp32", "m|clef2023|x|layer:6|fp32", "layer: 40 / 6"),
        (
            "m|clef2023|x|layer:40|fp32",
            "m|clef2025|y|layer:40|bf16",
            "clef2023 / clef2025; x / y; fp32 / bf16",
        ),
        ("m|clef2023|a", "m|clef2023|a|ptb:no", "- / ptb:no"),
        ("m|v:1.5|x:2", "m|v:1.5", "x:2 / -"),
        ("m|like:s:0.1", "m|like:s:0.2", "like: s:0.1 / s:0.2"),
    ],
)
def test_how_signatures_differ(a, b, changes):
    assert compare.signature_changes(a, b) == changes


def test_other_signatures_and_absent_scores_are_not_compared():
    a, b = np.random.default_rng(0).random((2, 20))
    ours, theirs = system("a", rouge1=a, cider=a, bleurt=a), system("b", rouge1=b, cider=b)
    theirs.scores["cider"] = given("cider", b, signature="cider|clef2024")
    theirs.scores["clipscore"] = Score("clipscore", None, None, None, 20, "", False, 0, "needs images")
    found = {one.metric: one for one in compare.compare([ours, theirs])}
    assert found["rouge1"].reason is None
    assert found["cider"].reason == "the signatures differ: clef2023 / clef2024"
    assert found["bleurt"].reason == "not computed for b"
    assert found["clipscore"].reason == "not computed for a; absent for b: needs images"
    for one in (found["cider"], found["bleurt"], found["clipscore"]):
        assert one.verdict == "not compared"
        assert (one.difference, one.low, one.high, one.p, one.adjusted_p, one.real) == (None,) * 6


def test_nothing_left_to_compare_is_an_error_with_every_reason():
    a = np.random.default_rng(0).random(20)
    ours, theirs = system("a", rouge1=a), system("b", cider=a)
    with pytest.raises(UserError) as error:
        compare.compare([ours, theirs])
    assert error.value.exit_code == 1
    assert "a / b: rouge1: not computed for b" in str(error.value)
    assert "a / b: cider: not computed for a" in str(error.value)


def test_other_images_and_other_references_are_refused():
    a = np.random.default_rng(0).random(4)
    first = system("a", ids=["1", "2", "3", "4"], rouge1=a)
    others = [
        system("b", ids=["1", "2", "5", "6"], rouge1=a),
        system("c", ids=["1", "2", "3"], rouge1=a[:3]),
        system("d", ids=["4", "3", "2", "1"], references="changed", rouge1=a),
    ]
    with pytest.raises(UserError) as error:
        compare.compare([first, *others])
    text = str(error.value)
    assert "b: other images: lacks ids of a: 2, the first 3; has ids that a lacks: 2, the first 5" in text
    assert "c: other images: lacks ids of a: 1, the first 4" in text
    assert "d: other references than a, for the same ids" in text


def write_run(root: Path, variant: str, ids, captions, references, config=None, **record) -> Path:
    """A run's folder and its score step, with what `build` and `run` leave there for a comparison."""
    config = config or ScoreConfig(metrics=("rouge1", "bleu1"), bootstrap=100)
    scores, warnings = metrics.score(captions, references, None, config, 2023)
    step = root / "steps" / f"score-{variant}"
    metrics.write_arrays(step / "arrays.npz", ids, scores)
    result = {"scores": {name: score.as_dict() for name, score in scores.items()}, "warnings": warnings}
    write_json(step / "scores.json", result | {"references": metrics.references_fingerprint(ids, references)})
    found = {
        "name": "imageclef2023/ablation",
        "status": "FINISHED",
        "command": "harness run experiments/ablation.yaml",
        "edition": 2023,
        "artifacts": {},
        "config": {"score": json.loads(config.for_edition(2023).model_dump_json())},
        "steps": {"score-after": f"steps/score-{variant}"},
    }
    folder = root / "imageclef2023" / "ablation" / f"{variant}-s42"
    write_json(folder / "run.json", found | record)
    return folder


@pytest.fixture(scope="module")
def runs(golden, tmp_path_factory) -> tuple[Path, Path]:
    """Two runs: one with the captions as they are, one with three words less, in another order."""
    root = tmp_path_factory.mktemp("moved") / "runs"
    ids, ours, theirs = golden["ID"], golden["prediction"], golden["reference"]
    return (
        write_run(root, "opt_364", ids, ours, theirs),
        write_run(root, "opt_224", ids[::-1], golden["other"][::-1], theirs[::-1]),
    )


def test_two_runs_from_the_command_line(runs, tmp_path):
    done = harness(tmp_path, *runs)
    assert done.returncode == 0, done.stderr
    for words in ("2 systems, 32 images", "opt_224-s42 - opt_364-s42", "higher, lower: two-sided p < 0.05"):
        assert words in done.stdout
    assert "Holm" not in done.stdout


def test_what_is_no_run_beside_runs_is_skipped_with_a_word(runs, tmp_path):
    """As by `compare runs/x/*`; a folder that lost its record, and a folder elsewhere, are mistakes."""
    beside = runs[0].parent
    (beside / "mlflow.json").write_text("{}")
    (beside / "archive").mkdir(exist_ok=True)
    given = sorted(beside.iterdir())
    done = harness(tmp_path, *given)
    assert done.returncode == 0, done.stderr
    assert f"skipped, since they are not runs: {beside}/archive, {beside}/mlflow.json" in done.stderr
    assert "2 systems, 32 images" in done.stdout
    (tmp_path / "elsewhere").mkdir()
    assert "not a run" in harness(tmp_path, *given, "elsewhere").stderr
    lost = beside / "lost-s1"
    lost.mkdir()
    (lost / "config.yaml").write_text("")
    assert f"{lost}: not a run" in harness(tmp_path, *given, lost).stderr
    shutil.rmtree(lost)


def test_two_files_from_the_command_line_equal_the_two_runs(runs, golden, tmp_path):
    ids, turned = golden["ID"], golden["ID"][::-1]
    references = write_file(tmp_path / "labels.csv", ids, golden["reference"])
    ours = write_file(tmp_path / "opt_364.csv", ids, golden["prediction"])
    theirs = write_file(tmp_path / "opt_224.csv", turned, golden["other"][::-1])
    arguments = ["--references", references, "--metrics", "rouge1,bleu1", "--format", "json"]
    files, mixed = harness(tmp_path, ours, theirs, *arguments), harness(tmp_path, ours, runs[1], *arguments)
    assert (files.returncode, mixed.returncode) == (0, 0), files.stderr + mixed.stderr
    one, two = json.loads(files.stdout), json.loads(mixed.stdout)
    assert one["systems"] == ["opt_364.csv", "opt_224.csv"]
    assert one["scores"]["opt_364.csv"]["rouge1"]["signature"].startswith("rouge1|clef2023|")
    three = json.loads(harness(tmp_path, *runs, "--format", "json").stdout)
    numbers = [[list(d.values())[3:9] for d in found["differences"]] for found in (one, two, three)]
    assert len(numbers[0]) == 2
    assert numbers[0] == numbers[1] == numbers[2]
    values = one["scores"]
    for found in one["differences"]:
        ours, theirs = (values[label][found["metric"]]["value"] for label in one["systems"])
        assert found["difference"] == pytest.approx(theirs - ours, abs=1e-12)
        assert found["low"] < found["difference"] < found["high"]


def test_csv_has_a_row_for_each_metric_and_pair(runs, golden, tmp_path):
    third = write_run(
        tmp_path / "runs", "opt_448", golden["ID"], golden["other"][::-1], golden["reference"],
        ScoreConfig(metrics=("rouge1",), bootstrap=0),
    )  # fmt: skip
    done = harness(tmp_path, *runs, third, "--format", "csv", "--resamples", "499")
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert [(row["metric"], row["a"], row["b"]) for row in rows][:3] == [
        ("rouge1", "opt_364-s42", "opt_224-s42"),
        ("rouge1", "opt_364-s42", "opt_448-s42"),
        ("rouge1", "opt_224-s42", "opt_448-s42"),
    ]
    assert all(float(row["adjusted_p"]) >= float(row["p"]) for row in rows if row["p"])
    assert [row["reason"] for row in rows][4] == "not computed for opt_448-s42"
    assert [rows[4][key] for key in ("difference", "low", "p", "real")] == ["", "", "", ""]
    table = harness(tmp_path, *runs, third)
    assert "by Holm over the pairs of a metric" in table.stdout
    assert "opt_364-s42 and opt_448-s42 not compared by bleu1: not computed for opt_448-s42" in table.stdout


def test_other_signatures_from_the_command_line(runs, golden, tmp_path):
    references = write_file(tmp_path / "labels.csv", golden["ID"], golden["reference"])
    ours = write_file(tmp_path / "ours.csv", golden["ID"], golden["prediction"])
    done = harness(
        tmp_path, runs[0], ours, "--references", references, "--metrics", "rouge1", "--edition", "2024"
    )
    assert done.returncode == 1
    assert "rouge1: the signatures differ: clef2023 / clef2024" in done.stderr
    assert done.stdout == ""


def test_every_mistake_at_once(runs, golden, tmp_path):
    ids, references = golden["ID"], golden["reference"]
    old = write_run(tmp_path / "runs", "old", ids, references, references)
    (tmp_path / "runs" / "steps" / "score-old" / "arrays.npz").unlink()
    early = write_run(tmp_path / "runs", "early", ids, references, references, steps={}, status="FAILED")
    done = harness(tmp_path, runs[0], old, early, tmp_path)
    assert done.returncode == 2
    again = "harness run experiments/ablation.yaml"
    assert f"{old}: scored by an older version" in done.stderr
    assert f"Score it again: {again}" in done.stderr
    assert f"{early}: the run (status FAILED) has no scores\n       Finish it: {again}" in done.stderr
    assert f"{tmp_path}: not a run: it has no run.json" in done.stderr
    file = write_file(tmp_path / "ours.csv", ids, references)
    done = harness(tmp_path, file, file, tmp_path / "nowhere")
    assert done.returncode == 2
    for words in ("nowhere: no such file", f"{file}: given more than once", "--references: is needed"):
        assert words in done.stderr
    assert "needs at least two" in harness(tmp_path, runs[0]).stderr


def test_other_images_are_refused_before_anything_is_scored(runs, golden, tmp_path):
    references = write_file(tmp_path / "labels.csv", golden["ID"][:30], golden["reference"][:30])
    ours = write_file(tmp_path / "ours.csv", golden["ID"][:30], golden["prediction"][:30])
    done = harness(tmp_path, runs[0], ours, "--references", references)
    assert done.returncode == 2
    assert "ours.csv: other images: lacks ids of opt_364-s42: 2, the first golden_31" in done.stderr
    assert "scoring" not in done.stderr
    changed = ["another text", *golden["reference"][1:]]
    write_file(references, golden["ID"], changed)
    write_file(ours, golden["ID"], golden["prediction"])
    done = harness(tmp_path, runs[0], ours, "--references", references)
    assert done.returncode == 2
    assert "ours.csv: other references than opt_364-s42, for the same ids" in done.stderr
