"""Which weights are official, what fingerprints contain of them, and that nothing runs before scoring."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from support import published
from support.commands import harness

from harness import metrics, scoring
from harness.config.schema import Config
from harness.metrics import bertscore, medcat, similarity
from harness.metrics.base import Inputs, Measured, Metric
from harness.metrics.settings import ScoreConfig
from harness.models import checkpoints
from harness.steps.plan import problems

CAPTIONS = (["lung nodule", "mass"], ["lung", "mass nodule"])
SETTLED = (10**18, 10**18)
"""Dates long ago."""


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def section(**values) -> ScoreConfig:
    return ScoreConfig.model_validate(json.loads(json.dumps(values, default=str)))


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    return published.python_with_medcat(tmp_path_factory.mktemp("python"))


def by_medcat(config: ScoreConfig, cache: Path | None = None) -> Measured:
    return medcat.measure(Inputs(*CAPTIONS, None, config, 2025, cache=cache))


def test_a_pack_is_official_by_its_contents_alone(python, tmp_path):
    pack = published.pack(tmp_path / medcat.OFFICIAL)
    named = {"medcat": {"model_pack": pack, "python": python}}
    unknown = by_medcat(section(**named))
    assert not unknown.official
    (told,) = unknown.doubts
    found = re.search(r"score\.trusted=\[([0-9a-f]{64})\]", told)[1]
    for trusted in (found, found.upper(), sha256(pack / "cdb.dat")):
        known = by_medcat(section(**named, trusted=[trusted]))
        assert known.official
        assert known.doubts == []
        assert f"@{found[:8]}|" in known.signature
    (pack / "cdb.dat").write_text((pack / "cdb.dat").read_text() + " ")
    assert not by_medcat(section(**named, trusted=[found])).official
    shutil.copytree(pack, tmp_path / "other_name")
    elsewhere = section(medcat={"model_pack": tmp_path / "other_name", "python": python})
    assert by_medcat(elsewhere).doubts == [], "another model is not official whatever it holds"


def test_the_sum_of_a_folder_is_what_the_guide_says(tmp_path):
    folder = published.pack(tmp_path / "pack")
    for name in ("b/weights.pt", "a-b", "a/x", "B", ".git/config", "__pycache__/x.pyc", "b/.hidden"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    (folder / "a" / "again").symlink_to(folder, target_is_directory=True)
    (folder / "linked").symlink_to(folder / "a" / "x")
    guide = Path(__file__).parents[1] / "docs" / "scoring.md"
    (line,) = re.findall(r"^(cd FOLDER && find .*)$", guide.read_text(encoding="utf-8"), re.MULTILINE)
    command = line.replace("FOLDER", str(folder))
    (folder / "a" / "again").unlink()  # which find would call a loop
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    (folder / "a" / "again").symlink_to(folder, target_is_directory=True)
    assert checkpoints.sha256(folder, None) == said.split()[0]
    assert [name for name, _ in checkpoints.walk(folder)] == [
        "B",
        "a-b",
        "a/x",
        "b/weights.pt",
        "cdb.dat",
        "linked",
    ]


def test_a_zip_is_read_itself_and_not_the_folder_beside_it(python, tmp_path):
    """MedCAT unpacks a zip beside itself once, and reads that folder ever after."""
    pack = tmp_path / f"{medcat.OFFICIAL}.zip"
    with zipfile.ZipFile(pack, "w") as parts:
        parts.writestr("cdb.dat", json.dumps(published.NAMES))
    config = section(medcat={"model_pack": pack, "python": python}, trusted=[sha256(pack)])
    expected = by_medcat(config)
    assert expected.official
    assert not pack.with_suffix("").exists()
    published.pack(pack.with_suffix(""), {"lung": ["C9", "T1"]})
    assert by_medcat(config).per_image.tolist() == expected.per_image.tolist()


@pytest.mark.parametrize("given", ["./bin/python", "bin/python", "python"])
def test_a_python_is_named_by_any_path(given, python, tmp_path, monkeypatch):
    pack = published.pack(tmp_path / "pack")
    monkeypatch.chdir(python.parent if given == "python" else python.parents[1])
    named = section(medcat={"model_pack": pack, "python": given})
    assert medcat.problems(named.medcat) == []
    assert by_medcat(named).per_image.tolist() == pytest.approx([2 / 3, 2 / 3])


def replaced(file: Path, content: bytes) -> None:
    """Other bytes of the same size, with the dates of the old ones, in the same place."""
    before = file.stat()
    assert len(content) == before.st_size
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_what_determines_medcats_numbers_is_in_its_identity(python, tmp_path):
    pack = published.pack(tmp_path / "pack")
    (pack / "spacy_model").mkdir()
    (pack / "spacy_model" / "weights").write_text("1")
    config = section(metrics=["medcat"], medcat={"model_pack": pack, "python": python})
    seen = [metrics.identities_of(config, tmp_path)]
    numbers = [by_medcat(config, tmp_path).per_image.tolist()]
    replaced(pack / "cdb.dat", (pack / "cdb.dat").read_bytes().replace(b"nodule", b"module"))
    seen.append(metrics.identities_of(config, tmp_path))
    numbers.append(by_medcat(config, tmp_path).per_image.tolist())
    assert numbers[0] != numbers[1], "kept numbers are of the other pack"
    replaced(pack / "spacy_model" / "weights", b"2")
    seen.append(metrics.identities_of(config, tmp_path))
    spacy = published.install(python.parents[1], "spacy", "3.7.0")
    seen.append(metrics.identities_of(config, tmp_path))
    shutil.rmtree(spacy)
    assert len({json.dumps(one) for one in seen}) == len(seen)


def test_hashes_that_are_kept_are_of_these_bytes(tmp_path):
    file = tmp_path / "weights.bin"
    file.write_bytes(b"a" * 100)
    os.utime(file, SETTLED)
    for content in (b"b", b"c", b"d"):
        replaced(file, content * 100)
        assert checkpoints.sha256(file, tmp_path) == sha256(file)
        other = tmp_path / "other"
        other.write_bytes(content.upper() * 100)
        other.replace(file)
        os.utime(file, SETTLED)
        assert checkpoints.sha256(file, tmp_path) == sha256(file)


# --- The cache of the hub --------------------------------------------------------------------------------


@pytest.fixture
def encoder(tmp_path) -> Path:
    source = bertscore.locate(section(bertscore={"checkpoint": "standin"}).bertscore)[0].folder
    folder = tmp_path / "encoder"
    folder.mkdir()
    for file in filter(Path.is_file, source.iterdir()):
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(bertscore, "OFFICIAL", (bertscore.OFFICIAL[0], 6))
    return tmp_path / "hub"


def by_hub(**values) -> tuple[metrics.Score, list[str]]:
    settings = {"bertscore": {"layer": 6}, "metrics": ["bertscore"], "bootstrap": 0} | values
    scores, warnings = metrics.score(*CAPTIONS, None, section(**settings), 2023)
    return scores["bertscore"], warnings


def test_what_the_hubs_client_fetched_is_official(encoder, cache):
    snapshot = published.hub_cache(cache, bertscore.OFFICIAL[0], encoder)
    found, warnings = by_hub()
    assert found.official
    assert "|microsoft/deberta-xlarge-mnli|" in found.signature
    assert warnings == []
    vocabulary = (snapshot / "vocab.txt").resolve()
    vocabulary.write_bytes(vocabulary.read_bytes().replace(b"\nlung\n", b"\nl\xc3\xbcng\n"))
    changed, (warning,) = by_hub()
    assert not changed.official
    assert re.search(r"\|microsoft/deberta-xlarge-mnli@[0-9a-f]{8}\|", changed.signature)
    assert "hf download microsoft/deberta-xlarge-mnli" in warning
    assert by_hub(trusted=[checkpoints.sha256(snapshot, None)])[0].official


def test_a_cache_made_by_hand_is_not_official(encoder, cache):
    snapshot = published.hub_cache(cache, bertscore.OFFICIAL[0], encoder)
    shutil.rmtree(snapshot)
    shutil.copytree(encoder, snapshot)
    assert by_hub()[0].official, "a copy without links is as good"
    shutil.rmtree(cache / "models--microsoft--deberta-xlarge-mnli" / "blobs")
    assert not by_hub()[0].official


def test_a_local_folder_is_official_by_its_contents_and_its_name(encoder, cache, tmp_path):
    found = checkpoints.sha256(encoder, None)
    assert not by_hub(bertscore={"layer": 6, "checkpoint": encoder}, trusted=[found])[0].official
    named = encoder.rename(tmp_path / "deberta-xlarge-mnli")
    assert by_hub(bertscore={"layer": 6, "checkpoint": named}, trusted=[found])[0].official
    unknown, warnings = by_hub(bertscore={"layer": 6, "checkpoint": named}, trusted=["0" * 64])
    assert not unknown.official
    assert any(found in warning for warning in warnings)


def test_means_are_official_where_their_parts_are(monkeypatch):
    def part(name: str, official: bool) -> Metric:
        import numpy as np

        return Metric(lambda _: Measured(np.array([0.5, 0.7]), name, official=official))

    for official in (True, False):
        parts = {"medcat": part("medcat", True), "alignscore": part("alignscore", official)}
        monkeypatch.setattr("harness.metrics.table.METRICS", parts)
        scores, _ = metrics.score(*CAPTIONS, None, section(metrics=list(parts)), 2025)
        assert scores["factuality"].official is official


@pytest.mark.parametrize("wrong", ["abc", "g" * 64, "0" * 63, 12])
def test_a_sum_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="trusted"):
        section(trusted=[wrong])


# --- Nothing is executed before scoring ------------------------------------------------------------------


@pytest.fixture
def spy(tmp_path) -> Path:
    """A program that leaves a mark beside itself when it is run."""
    program = tmp_path / "spy" / "python"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {program.parent}/executed\n")
    program.chmod(0o755)
    return program


def traps(spy: Path, tmp_path: Path) -> dict:
    """A `score:` section all of whose parts leave a mark if they are run, imported or unpickled."""
    mark = f"import pathlib; pathlib.Path({str(spy.parent / 'executed')!r}).touch()"
    insight = tmp_path / "insight"
    for part in similarity.PARTS:
        (insight / part).parent.mkdir(parents=True, exist_ok=True)
        (insight / part).write_text(mark) if "." in Path(part).name else (insight / part).mkdir(exist_ok=True)
    pack = published.pack(tmp_path / "pack")
    (pack / "cdb.dat").write_bytes(b"cos\nsystem\n(S'touch %s/executed'\ntR." % os.fsencode(spy.parent))
    align = tmp_path / "AlignScore-base.ckpt"
    with zipfile.ZipFile(align, "w") as parts:
        parts.writestr("x/data.pkl", (pack / "cdb.dat").read_bytes())
    return {
        "metrics": ["rouge1", "medcat", "similarity", "alignscore"],
        "medcat": {"model_pack": str(pack), "python": str(spy)},
        "similarity": {"folder": str(insight)},
        "alignscore": {"checkpoint": str(align)},
    }


def test_looking_executes_nothing(spy, tmp_path):
    values = {"name": "x", "edition": 2025, "data": {"root": tmp_path}, "model": {"checkpoint": "tiny"}}
    config = Config.model_validate(values | {"score": traps(spy, tmp_path)})
    found = problems(config)
    assert any("AlignScore" in problem.what for problem in found)
    metrics.identities_of(config.score, tmp_path)
    for section_name in ("medcat", "similarity"):
        getattr(metrics, section_name).identity(getattr(config.score, section_name), tmp_path)
    assert not (spy.parent / "executed").exists()


@pytest.mark.parametrize("command", [["run", "x.yaml", "--dry-run"], ["doctor", "x.yaml"]])
def test_commands_that_only_look_execute_nothing(command, spy, tmp_path):
    import yaml

    values = {"name": "x", "edition": 2025, "device": "cpu", "score": traps(spy, tmp_path)}
    values |= {
        "data": {"root": str(tmp_path / "set"), "phantom": {"train": 4}},
        "model": {"checkpoint": "tiny"},
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(values))
    done = harness(tmp_path, *command, code=None)
    assert "Traceback" not in done.stderr
    assert "score.alignscore.checkpoint" in done.stdout
    assert not (spy.parent / "executed").exists()


def test_what_a_runs_folder_names_is_not_executed(spy, tmp_path):
    sums = ["a" * 64]
    record = {"config": {"score": {**traps(spy, tmp_path), "trusted": sums}}, "edition": 2025, "steps": {}}
    run = (tmp_path / "run", record)
    taken = scoring.settings(2025, run=run)
    assert taken.trusted == (), "or a folder from elsewhere makes its own weights official"
    assert taken.alignscore.checkpoint == tmp_path / "AlignScore-base.ckpt"
    assert taken.medcat == ScoreConfig().medcat
    assert taken.similarity == ScoreConfig().similarity
    said = list(scoring.passed_over(run, taken))
    assert len(said) == 3
    assert f"--set score.medcat.python={spy}" in said[1]
    assert f"--set 'score.trusted=[{sums[0]}]'" in said[2]
    named = scoring.settings(2025, run=run, sets=[f"score.medcat.python={spy}"])
    assert len(list(scoring.passed_over(run, named))) == 2
    assert named.medcat.python == spy, "the user's own word counts"
