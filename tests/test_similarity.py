"""Similarity of 2025 and 2026, on a small model in the layout of the published MedImageInsight."""

import base64
import io
import os
import py_compile
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.errors import UserError
from harness.metrics import similarity
from harness.metrics.base import Absent, Flagged, Inputs
from harness.metrics.settings import ScoreConfig
from harness.models import checkpoints

PREDICTIONS = [
    "CT shows a nodule. The heart is normal in size.",
    "Chest radiograph of Dr. Smith showing an effusion",
    "A torn meniscus",
    "CT shows a nodule. A mass is seen.",
    "",
    "A nodule.",
    " ",
]


def inputs(section: dict, images: list[Path] | None = None, cache: Path | None = None) -> Inputs:
    return Inputs(PREDICTIONS, PREDICTIONS, images, ScoreConfig.model_validate(section), 2025, cache=cache)


MODULE = '''
import base64, io, os
import numpy as np
import torch
from PIL import Image
from MedImageInsight.tokens import tokenize


class MedImageInsight:
    """The published interface: random projections of pixels and of byte counts."""

    def __init__(self, model_dir, vision_model_name, language_model_name):
        self.files = [os.path.join(model_dir, "vision_model", vision_model_name)]
        self.model = self.device = None
        self.batches = []

    def load_model(self):
        print("Model loaded successfully")
        assert all(map(os.path.exists, self.files))
        torch.manual_seed(0)
        self.model = torch.nn.ModuleDict({"image": torch.nn.Linear(192, 8), "text": torch.nn.Linear(256, 8)})
        torch.nn.init.normal_(self.model["text"].weight)
        torch.nn.init.normal_(self.model["image"].weight)
        self.device = "cuda:7"
        self.tokenize, self.max_length = tokenize, 12

    def encode(self, images=None, texts=None):
        out = {"image_embeddings": None, "text_embeddings": None}
        self.batches.append(len(images or texts))
        if images is not None:
            opened = [Image.open(io.BytesIO(base64.b64decode(image))) for image in images]
            opened = [i.convert("RGB") if i.mode in ("L", "LA") else i for i in opened]
            pixels = np.stack([np.asarray(i.resize((8, 8))).reshape(-1) / 255 - 0.3 for i in opened])
            values = torch.tensor(pixels).float().to(self.device)
            out["image_embeddings"] = self.model["image"](values).numpy()
        if texts is not None:
            counts = torch.tensor(tokenize(texts, max_length=12, truncation=True)["counts"]).float()
            out["text_embeddings"] = self.model["text"](counts.to(self.device)).numpy()
        return out
'''
TOKENS = """
def tokenize(texts, truncation=False, max_length=None, **_):
    ids = [[ord(c) % 256 for c in text][: max_length if truncation else None] for text in texts]
    return {"input_ids": ids, "counts": [[row.count(n) / 3 for n in range(256)] for row in ids]}
"""


@pytest.fixture
def insight(tmp_path) -> Path:
    """A folder laid out as lion-ai/MedImageInsights, with a small model of the same interface in it."""
    folder = tmp_path / "MedImageInsights"
    for part in similarity.PARTS:
        place = folder / part
        if place.suffix and not part.endswith("4.16.2"):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text("weights")
        else:
            place.mkdir(parents=True)
    (folder / "medimageinsightmodel.py").write_text(MODULE)
    (folder / "MedImageInsight" / "__init__.py").touch()
    (folder / "MedImageInsight" / "tokens.py").write_text(TOKENS)
    yield folder
    for name in [name for name in sys.modules if name.startswith("MedImageInsight")]:
        del sys.modules[name]


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    draw = np.random.default_rng(1)
    paths = []
    for number, mode in enumerate(["RGB", "L", "RGB", "LA", "P", "RGB", "L"]):
        path = tmp_path / f"{number}.png"
        Image.fromarray(draw.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)).convert(mode).save(path)
        paths.append(path)
    Image.fromarray(draw.integers(0, 4000, (30, 30)).astype(np.uint16)).save(paths[6])
    return paths


def test_similarity_equals_the_evaluator_of_2025_one_pair_at_a_time(insight, pictures, monkeypatch):
    """Its loop again, over the plain files; those that the published code cannot read are in another test."""
    import torch

    before = sys.path.copy()
    found = similarity.measure(inputs({"similarity": {"folder": insight}}, pictures))
    assert sys.path == before
    monkeypatch.syspath_prepend(str(insight))
    from medimageinsightmodel import MedImageInsight

    model = MedImageInsight(str(insight / "2024.09.27"), "medimageinsigt-v1.0.0.pt", "language_model.pth")
    model.load_model()
    model.device = "cpu"
    expected = []
    for path, caption in list(zip(pictures, PREDICTIONS, strict=True))[:4]:
        image = base64.encodebytes(path.read_bytes()).decode("utf-8")
        with torch.no_grad():
            both = model.encode(images=[image], texts=[caption])
        v, c = both["image_embeddings"][0], both["text_embeddings"][0]
        expected.append(2.5 * np.max([np.dot(c, v) / (np.linalg.norm(c) * np.linalg.norm(v)), 0]))
    np.testing.assert_allclose(found.per_image[[0, 1, 2]], expected[:3], atol=1e-6)
    assert np.ptp(found.per_image) > 0.3
    assert found.per_image[4] == 1.0, "both captions of length 0, in 2025"
    name = r"MedImageInsight-2024\.09\.27@[0-9a-f]{8}"
    assert re.fullmatch(rf"similarity\|clef2025\|{name}\|w:2\.5\|pre:raw\|fp32", found.signature)
    assert found.warnings == [
        Flagged([0, 1, 2, 3], "longer than similarity takes, cut at 12 tokens"),
        Flagged([4], "with both captions of length 0: similarity is 1 by the rule of 2025"),
    ]
    sys.modules.pop("medimageinsightmodel")


def test_similarity_reads_the_images_that_the_published_code_does_not(pictures):
    def given(path: Path) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(similarity.encoded(path))))

    assert base64.b64decode(similarity.encoded(pictures[0])) == pictures[0].read_bytes()
    assert base64.b64decode(similarity.encoded(pictures[1])) == pictures[1].read_bytes()
    assert given(pictures[4]).mode == "RGB"
    assert np.ptp(np.asarray(given(pictures[6]))) == 255, "16-bit grey is windowed"
    pictures[0].write_bytes(pictures[0].read_bytes()[:200])
    with pytest.raises(UserError, match="not a whole image"):
        similarity.encoded(pictures[0])


def test_an_image_is_encoded_once_for_all_captions_and_loads_of_the_model(insight, pictures, tmp_path, capfd):
    first = inputs({"similarity": {"folder": insight}}, pictures, tmp_path / "cache")
    similarity.measure(first)
    model = similarity.load(insight, "cpu")
    model.model.batches.clear()
    similarity.measure(replace(first, predictions=[f"{caption} now" for caption in PREDICTIONS]))
    assert model.model.batches == [4, 4], "texts only"
    later = replace(first, predictions=[f"{caption} then" for caption in PREDICTIONS])
    similarity.load.cache_clear()
    found = similarity.measure(later).per_image
    assert similarity.load(insight, "cpu").model.batches == [4, 4], "images from the disk"
    similarity.load.cache_clear()
    np.testing.assert_allclose(similarity.measure(replace(later, cache=None)).per_image, found, atol=1e-7)
    assert "Model loaded" not in capfd.readouterr().out


def test_similarity_is_official_by_all_contents_of_its_folder(insight, pictures):
    """Its code computes the score as much as its weights do."""
    named = {"similarity": {"folder": insight}}
    trusted = checkpoints.sha256(insight, None)
    found = similarity.measure(inputs(named, pictures))
    assert not found.official
    assert trusted in found.doubts[0]
    assert similarity.measure(inputs(named | {"trusted": [trusted]}, pictures)).official
    (insight / "__pycache__").mkdir(exist_ok=True)
    (insight / "__pycache__" / "old.pyc").write_bytes(b"x")
    assert similarity.measure(inputs(named | {"trusted": [trusted]}, pictures)).official
    (insight / "MedImageInsight" / "tokens.py").write_text(TOKENS.replace("/ 3", "/ 5"))
    changed = similarity.measure(inputs(named | {"trusted": [trusted]}, pictures))
    assert not changed.official
    assert np.abs(changed.per_image - found.per_image).max() > 1e-3, "the changed code is what ran"


def test_bytecode_in_the_folder_is_not_run(insight, pictures):
    tokens = insight / "MedImageInsight" / "tokens.py"
    expected = similarity.measure(inputs({"similarity": {"folder": insight}}, pictures)).per_image
    source, state = tokens.read_text(), tokens.stat()
    tokens.write_text(source.replace("/ 3", "/ 5"))
    os.utime(tokens, ns=(state.st_atime_ns, state.st_mtime_ns))
    py_compile.compile(str(tokens))
    tokens.write_text(source)
    os.utime(tokens, ns=(state.st_atime_ns, state.st_mtime_ns))
    similarity.load.cache_clear()
    again = similarity.measure(inputs({"similarity": {"folder": insight}}, pictures)).per_image
    np.testing.assert_allclose(again, expected)


def test_similarity_says_what_is_missing(insight, pictures):
    config = {"similarity": {"folder": insight}}
    with pytest.raises(Absent, match="needs images"):
        similarity.measure(inputs(config))
    section = inputs(config).config.similarity
    assert similarity.problems(section) == []
    (insight / similarity.WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    (problem,) = similarity.problems(section)
    assert "a Git LFS pointer" in problem.what
    assert "lfs pull" in problem.hint
    (insight / similarity.WEIGHTS).unlink()
    (problem,) = similarity.problems(section)
    assert problem.what.endswith(f"lacks {similarity.WEIGHTS}")
    nowhere = ScoreConfig.model_validate({"similarity": {"folder": insight / "none"}}).similarity
    assert "no such folder" in similarity.problems(nowhere)[0].what


def test_similarity_names_the_package_that_the_published_code_lacks(insight, pictures):
    module = insight / "medimageinsightmodel.py"
    module.write_text("import timm_of_another_world\n" + module.read_text())
    with pytest.raises(Absent, match="No module named 'timm_of_another_world'"):
        similarity.measure(inputs({"similarity": {"folder": insight}}, pictures))


def test_problems_are_found_without_torch(insight):
    code = (
        "import sys\n"
        "from harness.metrics.settings import ScoreConfig\n"
        "from harness.metrics import similarity\n"
        "config = ScoreConfig.model_validate({'similarity': {'folder': sys.argv[1]}})\n"
        "assert similarity.problems(config.similarity) == []\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
    )
    command = [sys.executable, "-c", code, str(insight)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
