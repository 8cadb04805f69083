"""Concept F1 of 2025 and 2026: does MedCAT find the same UMLS concepts in caption and reference?

The organisers pin MedCAT below 2, which needs numpy below 2, so it can't be installed with this program. A
Python that has it runs `medcat_worker.py` in a second process.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from harness.config.editions import EDITIONS
from harness.config.sections import Section
from harness.errors import Problem
from harness.metrics.base import Absent, Flagged, Inputs, Measured, Metric, Weights, empty, sign
from harness.metrics.cache import Row
from harness.models.checkpoints import sha256, sums, untrusted

OFFICIAL = "umls_self_train_model_pt2ch_3760d588371755d0"
"""The UMLS full model of the organisers' README; it needs a personal licence from UTS."""
PACK_KEY, PYTHON_KEY = "score.medcat.model_pack", "score.medcat.python"
PACK_HINT = f"With a UMLS licence, download {OFFICIAL}.zip from MedCAT's model page and name it as {PACK_KEY}"
PYTHON_HINT = (
    "MedCAT 1 does not work with the numpy of this program: python -m venv medcat && "
    f"medcat/bin/pip install 'medcat<2' 'pyarrow<20', then {PYTHON_KEY}: medcat/bin/python"
)
WORKER = Path(__file__).with_name("medcat_worker.py")
_PACKAGES = """
import json
from importlib.metadata import distributions
print(json.dumps(sorted({f"{d.metadata['Name']}-{d.version}" for d in distributions()})))
"""


class MedCatConfig(Section):
    """The model of MedCAT's concept F1."""

    model_pack: Path | None = None
    """A local MedCAT model pack for UMLS (zip or folder). Without it the concept F1 is absent."""
    python: Path | None = None
    """A Python with medcat<2 and pyarrow<20, which conflict with our packages; by default this one."""


def problems(config: MedCatConfig) -> list[Problem]:
    """What is wrong with the model pack and its Python; neither is executed."""
    found = []
    if (
        not (config.model_pack.suffix == ".zip" and config.model_pack.is_file())
        and not (config.model_pack / "cdb.dat").is_file()
    ):
        what = f"no model pack of MedCAT 1 (a zip, or a folder with cdb.dat): {config.model_pack}"
        found.append(Problem(what, key=PACK_KEY, hint=PACK_HINT))
    python = _python(config)
    if not python.is_file():
        found.append(Problem(f"no such program: {python}", key=PYTHON_KEY, hint=PYTHON_HINT))
    elif (flaw := _flaw(python, _seen(python))) and _is_environment(python):
        found.append(Problem(flaw, key=PYTHON_KEY, hint=PYTHON_HINT))
    return found


def identity(config: MedCatConfig, cache: Path | None) -> dict[str, Any]:
    """What determines the scores and is visible without running anything: pack, Python and packages."""
    python = _python(config)
    program = sha256(python, cache) if python.is_file() else None
    pack = sums(config.model_pack, cache) if config.model_pack else None
    return {"pack": pack, "python": program, "packages": _seen(python)}


def measure(inputs: Inputs) -> Measured:
    """F1 of the UMLS concepts that MedCAT finds in each raw prediction and its raw reference.

    The score is in 0 to 1, and a concept counts once per caption. As in the evaluators of 2025 and 2026, two
    captions of length 0 score 1. Two captions without any concept score 0, also if they are only white space.
    """
    config = inputs.config.medcat
    if wrong := problems(config):
        raise Absent("; ".join(f"{problem}. {problem.hint}" for problem in wrong))
    python, pack = _python(config), config.model_pack
    packages = _packages(python)
    if flaw := _flaw(python, packages):
        raise Absent(f"{PYTHON_KEY}: {flaw}. {PYTHON_HINT}")
    name = f"{pack.stem}@{sha256(pack, inputs.cache)[:8]}"
    version = _version(packages)
    signature = sign("medcat", inputs.edition, name, "pre:raw", f"medcat:{version}")
    what = [signature, identity(config, inputs.cache), packages]

    def compute(rows: Sequence[Row]) -> list[list[float]]:
        found = concepts({caption for row in rows for caption in row}, pack, python)
        return [[_score(row, found)] for row in rows]

    per_image = inputs.scored(what, inputs.pairs, compute)[:, 0]
    rows = np.flatnonzero(empty(inputs.pairs)).tolist()
    said = f"with both captions of length 0: medcat is 1 by {EDITIONS[inputs.edition].blanks.rule}"
    warnings = [Flagged(rows, said)] if rows else []
    trusted = pack.stem == OFFICIAL and inputs.trusts(pack)
    doubts = [] if trusted or pack.stem != OFFICIAL else [untrusted(PACK_KEY, pack, inputs.cache)]
    return Measured(per_image, signature, official=trusted, warnings=warnings, doubts=doubts)


def concepts(captions: set[str], pack: Path, python: Path) -> dict[str, set[str]]:
    """The CUIs that MedCAT finds in each caption; raises `Absent` with its last line if it fails."""
    asked = sorted(captions)
    with TemporaryDirectory() as folder:
        texts, found = Path(folder, "texts.json"), Path(folder, "concepts.json")
        texts.write_text(json.dumps(asked), encoding="utf-8")
        # MedCAT unpacks a zip next to the zip, and prefers what is already unpacked there
        here = Path(folder, pack.name)
        here.symlink_to(pack.resolve())
        command = [python, "-I", WORKER, here, texts, found]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", cwd=folder)
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise Absent(f"MedCAT failed on {pack} (exit code {done.returncode}): {last}")
        answers = json.loads(found.read_text(encoding="utf-8"))
    return {caption: set(cuis) for caption, cuis in zip(asked, answers, strict=True)}


def _score(pair: Row, found: Mapping[str, set[str]]) -> float:
    if not any(pair):
        return 1.0
    ours, theirs = (found[caption] for caption in pair)
    return 2 * len(ours & theirs) / (len(ours) + len(theirs)) if ours & theirs else 0.0


def _python(config: MedCatConfig) -> Path:
    """The Python, as an absolute path; a name that is not a file here is looked up on PATH."""
    given = config.python or Path(sys.executable)
    if given.is_file() or len(given.parts) > 1:
        return given.absolute()  # links are kept, since the path of its link tells Python its environment
    return Path(shutil.which(given) or given.absolute())


def _packages(python: Path) -> list[str]:
    """The packages that a Python reports, `name-version` each; none if it is not a Python."""
    try:
        done = subprocess.run([python, "-I", "-c", _PACKAGES], capture_output=True, encoding="utf-8")
        found = json.loads(done.stdout)
    except (OSError, ValueError):
        return []
    return [str(one) for one in found] if isinstance(found, list) else []


def _seen(python: Path) -> list[str]:
    """The packages in the package folders of a Python, `name-version` each, found without running it."""
    places = ("lib*/python3*/site-packages", "lib/python3*/dist-packages")
    folders = [folder for place in places for folder in python.parent.parent.glob(place)]
    return sorted({one.name.removesuffix(".dist-info") for f in folders for one in f.glob("*.dist-info")})


def _is_environment(python: Path) -> bool:
    """Whether a Python has only the packages of its own environment."""
    try:
        settings = (python.parent.parent / "pyvenv.cfg").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "include-system-site-packages = false" in settings


def _flaw(python: Path, packages: Sequence[str]) -> str | None:
    version = _version(packages)
    if version is None:
        return f"{python} has no package medcat; the organisers use MedCAT 1"
    if not version.startswith("1."):
        return f"{python} has MedCAT {version}; the organisers use MedCAT 1"
    return None


def _version(packages: Sequence[str]) -> str | None:
    versions = (one.rpartition("-")[2] for one in packages if one.lower().startswith("medcat-"))
    return next(versions, None)


METRIC = Metric(
    measure,
    weights=Weights("medcat", MedCatConfig, "model_pack", problems, identity, executes=True, hint=PACK_HINT),
)
