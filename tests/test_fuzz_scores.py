"""Damaged score inputs: each is read, or refused in a few sentences that name a file.

`HARNESS_FUZZ_CASES=2000` tries 2000 of them.
"""

import json
import random
import zipfile
from collections import Counter

from support.fuzzing import cases, within

from harness import scoring
from harness.errors import UserError
from harness.metrics.settings import ScoreConfig

IDS = [f"scan_{number:06d}" for number in (1, 2, 16, 300)]
WORDS = ["CT", "axial", "5 cm", "a,b", '"sail"', "x|y", "µ", "", "C1;C2", "a;b", "\u2028"]
MARKS = [
    *'"|,;\t\n\r\0 []{}:\ufeff\u2028é',
    "\r\n",
    "null",
    "NaN",
    "1e999",
    "\\ud800",
    '"image_id"',
    "9" * 5000,
]


def table(values: dict[str, str], rng: random.Random) -> str:
    sign = rng.choice("|\t,,")
    end = rng.choice(["\n", "\n", "\r\n", "\r"])
    rows = list(values.items())
    if rng.random() < 0.6:
        rows = [("ID", "Caption"), *rows]
    quoted = sign == ","
    clean = str if quoted else lambda text: text.replace(sign, "/")
    rows = [(key, '"' + text.replace('"', '""') + '"' if quoted else clean(text)) for key, text in rows]
    return "".join(f"{key}{sign}{text}{end}" for key, text in rows)


def coco(values: dict[str, str], rng: random.Random) -> str:
    as_id = rng.choice([str, lambda key: int(key[-6:]), lambda key: f"{key}.jpg", lambda key: key[-6:]])
    entries = [{"image_id": as_id(key), "caption": text} for key, text in values.items()]
    for _ in range(rng.choice([0, 0, 0, 1])):
        entry = rng.choice(entries)
        odd = [None, 1.5, True, [], {}, "", " ", -1, 10**30, float("nan"), "scan_000016", 16, "x" * 300]
        entry[rng.choice(["image_id", "caption", "id"])] = rng.choice(odd)
    whole = [{"annotations": entries}, {"annotations": entries, "images": [None]}, {"a": entries}]
    return json.dumps(rng.choice([*[entries] * 6, *whole]), ensure_ascii=rng.random() < 0.5)


def damaged(text: str, rng: random.Random) -> str:
    at, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    lines = text.split("\n")
    return rng.choice(
        [
            text[:at] + text[end:],
            text[:at],
            text[:at] + rng.choice(MARKS) + text[at:],
            text[:at] + rng.choice(MARKS) + text[at + 1 :],
            rng.choice(MARKS) + text,
            text + text[at:],
            "\n".join(rng.sample(lines, len(lines))),
            text.replace(rng.choice(IDS), rng.choice(["ID", "scan_16", "b\x1b[31m", "16", "../x"])),
            "[" * rng.choice([10, 20_000]) + text,
        ]
    )


def written(path, text: str, rng: random.Random) -> None:
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.04:
        data = text.encode(rng.choice(["utf-8-sig", "utf-16", "utf-32", "cp037"]), "replace")
    if rng.random() < 0.06:
        name = rng.choice(["submission.csv", "captions_val_results.json", "a/b.txt"])
        with zipfile.ZipFile(path, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            archive.writestr(name, data)
        data = path.read_bytes()
    if rng.random() < 0.05:
        at = rng.randrange(len(data) + 1)
        data = data[:at] + bytes([rng.randrange(256)]) + data[at + rng.randrange(20) :]
    path.write_bytes(data)


def test_score_inputs_are_read_or_refused_in_a_few_sentences(tmp_path):
    rng = random.Random("score inputs")
    fates: Counter[str] = Counter()
    for number in range(cases(300)):
        task = rng.choice(["caption", "caption", "caption", "concept"])
        words = WORDS if task == "caption" else ["C1", "C2;C3", "", "C4 ; C5", "C1"]
        values = {key: " ".join(rng.choices(words, k=1 if task == "concept" else 3)) for key in IDS}
        texts = [rng.choice([table, coco])(values, rng), rng.choice([table, table, coco])(dict(values), rng)]
        for side in (0, 0, 1):
            if rng.random() < 0.25:
                texts[side] = damaged(texts[side], rng)
        paths = [tmp_path / f"p{rng.choice(['.csv', '.csv', '', '.json'])}", tmp_path / "r.csv"]
        for path, text in zip(paths, texts, strict=True):
            written(path, text, rng)
        with within(20, (number, task, [path.read_bytes()[:300] for path in paths])):
            fates[fate(*paths, task)] += 1
    assert fates["read"] > 0.2 * fates.total(), fates
    assert fates["refused"] > 0.2 * fates.total(), fates


def fate(predictions, references, task: str) -> str:
    refused, rows = None, None
    try:
        rows = scoring.rows(predictions, references, task=task)
    except UserError as error:
        refused = error
    if refused is not None:
        assert refused.exit_code == 2
        assert refused.problems
        assert all(str(problem.file) in str(refused) for problem in refused.problems)
        assert len(str(refused)) < 6000
        return "refused"
    assert len(rows.ids) == len(set(rows.ids)) == len(rows.predictions) == len(rows.references)
    assert sum(map(len, rows.warnings)) < 6000
    if task == "concept":
        scores, _ = scoring.score_concepts(rows, None, 2026, bootstrap=0)
        assert 0 <= scores["f1"].value <= 1
    return "read"


def test_captions_that_were_read_are_scored(tmp_path):
    """A few cases to the end: whatever was read as a caption has a score."""
    rng = random.Random("scores")
    config = ScoreConfig(metrics=("rouge1",), bootstrap=0)
    for number in range(cases(10) // 10 + 1):
        values = {key: "".join(rng.choices([*WORDS, *MARKS], k=4)) for key in IDS}
        (tmp_path / "p.json").write_text(
            json.dumps([{"image_id": k, "caption": v} for k, v in values.items()])
        )
        (tmp_path / "r.json").write_text(json.dumps([{"image_id": k, "caption": k} for k in values]))
        with within(20, (number, values)):
            rows = scoring.rows(tmp_path / "p.json", tmp_path / "r.json")
            scores, _ = scoring.score(rows, config, 2023, "cpu")
        assert rows.predictions == list(values.values())
        assert 0 <= scores["rouge1"].value <= 1
