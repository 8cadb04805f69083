"""`harness caption`: any images, captioned as the run captions its own."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import harness

from harness import captioning
from harness.data import given
from harness.data.images import decode
from harness.errors import UserError
from harness.store import parsed


def rows(file: Path) -> dict[str, str]:
    """Captions by id, read without our readers."""
    with file.open(newline="", encoding="utf-8") as table:
        return {row["ID"]: row["caption"] for row in csv.DictReader(table)}


def own(run: Path, split: str = "test") -> dict[str, str]:
    """The captions of a split as a run left them."""
    record = json.loads((run / "run.json").read_text())
    return rows(run.parents[1] / record["artifacts"][f"predictions/{split}_after.csv"])


@pytest.fixture
def project(small_run, tmp_path, monkeypatch) -> Path:
    """A copy of a small finished project, without its data; a clone may have data of that name."""
    for name in ("runs", "data"):
        shutil.copytree(small_run / "kept" / name, tmp_path / name)
    shutil.move(tmp_path / "data" / "phantom" / "test", tmp_path / "mine")
    shutil.rmtree(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("option", ["--out", "--html"])
def test_an_output_that_can_not_be_written_is_refused_before_the_work(project, option):
    image = next((project / "mine").iterdir())
    content = image.read_bytes()
    os.mkfifo("pipe")
    for out, why in (("pipe", "not a regular file"), (image, "would overwrite an input")):
        done = harness(project, "caption", "small/opt-s42", image, option, out, code=2)
        assert why in done.stderr
        assert option in done.stderr
        assert image.read_bytes() == content


def test_a_folder_that_can_not_be_made_is_refused_before_the_export(project):
    said = harness(project, "export", "small/opt-s42", "/proc/made", code=2).stderr
    assert "FOLDER: can't be written" in said


@pytest.mark.parametrize("how", ["bit", "tokenizer", "gone"])
def test_a_stand_in_that_is_not_what_its_step_left_gives_no_captions_and_no_export(project, how):
    """The frozen language model is in it; a training has only the weights that it changed."""
    run = project / "runs" / "small" / "opt-s42"
    tiny = run.parents[1] / json.loads((run / "run.json").read_text())["steps"]["tiny"]
    file = {"bit": "model.safetensors", "tokenizer": "tokenizer.json", "gone": "DONE"}[how]
    if how == "gone":
        shutil.rmtree(tiny)
    else:
        content = bytearray((tiny / file).read_bytes())
        content[len(content) // 2] ^= 1
        (tiny / file).write_bytes(content)
    for command in (["caption", run, "mine", "--out", "captions.csv"], ["export", run, "exported"]):
        said = harness(project, *command, code=2).stderr
        assert f"{tiny.name}/{file}: not what the step left" in said
        assert "--weights" in said


def test_the_runs_own_images_get_the_runs_own_captions(project):
    """Without the data of the run; damaged files are named, and the others have their captions."""
    run = project / "runs" / "small" / "opt_dedup-s42"
    (project / "mine" / "bad.jpg").write_bytes(b"\xff\xd8 no more")
    (project / "mine" / "notes.txt").write_text("mine")
    options = ("--out", "captions.csv", "--html", "page.html", "--device", "cpu")
    done = harness(project, "caption", run, "mine", *options, code=1)
    assert rows(project / "captions.csv") == own(run)
    assert "mine/bad.jpg: not a whole image" in done.stderr
    assert "STAND-IN" in done.stderr
    assert "no images, so left out (1): notes.txt" in done.stderr
    assert not list(project.glob(".captions.csv-*"))
    page = (project / "page.html").read_text()
    assert page.count('"thumbnail":"') == 6
    assert "STAND-IN" in page
    assert "bad.jpg" in page


@pytest.mark.slow
def test_captions_from_before_an_interruption_are_kept(project, monkeypatch):
    from harness.cli.terminal import Terminal
    from harness.decoding import predict

    captioner = captioning.of(project / "runs" / "small" / "opt-s42", "cpu", 2)
    images = given.look([project / "mine"], project / "png").images
    asked = []
    true = predict.candidates

    def cut(loaded, pixels, indices, config, draws, done, *rest):
        def keep(part, found):
            done(part, found)
            asked.append(part)
            if len(asked) == 1:
                raise KeyboardInterrupt

        return true(loaded, pixels, indices, config, draws, keep, *rest)

    monkeypatch.setattr(predict, "candidates", cut)
    with pytest.raises(KeyboardInterrupt):
        captioner.captions(images, project / "work", Terminal(silent=True))
    found = captioner.captions(images, project / "work", Terminal(silent=True))
    assert len(asked) == 3  # of 6 images in batches of 2, none was decoded again
    assert found == own(captioner.folder)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"task": "concepts", "concepts": {"predictor": "knn"}}, "task"),
        ({"retrieval": {"neighbours": 1}}, "retrieval"),
        ({"consensus": {"utility": {"rouge1": 1}}}, "data.root"),
        ({"consensus": {"utility": {"medcat": 1}}}, "consensus.utility"),
        ({"model": {"prompt": {"retrieved": 2}}}, "model.prompt.retrieved"),
        ({"model": {"prompt": {"concepts": "a/b-s1"}}}, "model.prompt.concepts"),
    ],
)
def test_runs_that_need_more_than_an_image_are_refused(project, section, key):
    run = project / "runs" / "small" / "opt-s42"
    record = parsed((run / "run.json").read_bytes())
    for name, value in section.items():
        whole = record["config"][name] if isinstance(record["config"].get(name), dict) else {}
        record["config"][name] = {**whole, **value} if isinstance(value, dict) else value
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError) as caught:
        captioning.of(run)
    assert key in [problem.key for problem in caught.value.problems]


def test_a_run_whose_training_has_not_finished_is_refused(project):
    run = project / "runs" / "small" / "opt-s42"
    record = parsed((run / "run.json").read_bytes())
    (project / "runs" / record["steps"]["train"] / "DONE").unlink()
    with pytest.raises(UserError, match="no trained weights"):
        captioning.of(run)


# the images


def grey(size=(40, 30)) -> np.ndarray:
    """uint8 (H, W) with all levels from 0 to 255."""
    return np.linspace(0, 255, size[0] * size[1]).round().astype(np.uint8).reshape(size[1], size[0])


def test_images_of_many_kinds_are_one_picture(tmp_path):
    plain = Image.fromarray(grey())
    plain.save(tmp_path / "a.png")
    Image.fromarray(grey().astype(np.uint16) * 100 + 7).save(tmp_path / "b.png")
    plain.convert("P").save(tmp_path / "c.gif")
    plain.convert("LA").save(tmp_path / "d.tiff")
    half = plain.convert("RGBA")
    half.putalpha(128)
    half.save(tmp_path / "f.png")
    plain.save(tmp_path / "e.tif", save_all=True, append_images=[plain, plain])
    found = given.look([tmp_path], tmp_path / "png")
    assert [one.id for one in found.images] == list("abcdef")
    for one in found.images[:5]:
        assert np.array_equal(np.asarray(decode(one.image))[..., 0], grey()), one.file
    assert [one.note for one in found.images] == [
        "",
        "grey values of more than 8 bits: from smallest to largest value",
        "",
        "",
        "the first of 3 frames",
        "transparent pixels on black",
    ]


def test_ids_are_paths_if_names_occur_twice(tmp_path):
    for name in ("a.png", "x/a.png", "x/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(grey()).save(tmp_path / name)
    found = given.look([tmp_path / "x", tmp_path / "a.png", tmp_path / "x" / "a.png"], tmp_path)
    assert [one.id for one in found.images] == ["x/a.png", "x/b.jpg", "a.png"]
    assert "several images have the same name, such as a" in found.remarks[0]
    assert [one.id for one in given.look([tmp_path / "x"], tmp_path).images] == ["a", "b"]


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.png: not a whole image"):
        given.look([tmp_path], tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        given.look([tmp_path / "b.png", tmp_path / "a.png"], tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"no image in .*DICOM are read"):
        given.look([tmp_path], tmp_path)


# DICOM, written by pydicom; the expected grey levels are of the standard's formula, PS3.3 C.11.2.1.2


def write_dicom(file: Path, values: np.ndarray, **header) -> None:
    """A file of 12-bit values (H, W) or frames (N, H, W)."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3"
    data = FileDataset(str(file), {}, file_meta=meta, preamble=bytes(128))
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3"
    data.Rows, data.Columns = values.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.PixelData = values.astype("<u2").tobytes()
    if values.ndim == 3:
        data.NumberOfFrames = len(values)
    for name, value in header.items():
        setattr(data, name, value)
    data.save_as(file, enforce_file_format=True)


def dicom(tmp_path, values, **header) -> tuple[np.ndarray, str]:
    """The grey levels that are captioned, and the note."""
    pytest.importorskip("pydicom")
    (tmp_path / "in").mkdir()
    write_dicom(tmp_path / "in" / "IM0001", values, **header)  # scanners write no suffix
    (one,) = given.look([tmp_path / "in"], tmp_path).images
    return np.asarray(decode(one.image))[..., 0], one.note


def windowed(values: np.ndarray, centre: float, width: float) -> np.ndarray:
    """The standard's linear window, as 0 to 255."""
    return (((values - (centre - 0.5)) / (width - 1) + 0.5).clip(0, 1) * 255).round()


def test_dicom_is_rescaled_and_gets_its_first_window(tmp_path):
    stored = np.arange(4000).reshape(50, 80)
    header = {"RescaleSlope": 2, "RescaleIntercept": -1024, "WindowCenter": [40, 500]}
    levels, note = dicom(tmp_path, stored, **header, WindowWidth=[400, 1500])
    assert np.abs(levels - windowed(2 * stored - 1024.0, 40, 400)).max() <= 1
    assert note == "window 40/400"
    assert {0, 255} <= set(levels.flat)


def test_dicom_of_monochrome1_is_inverted(tmp_path):
    stored = np.arange(4000).reshape(50, 80)
    header = {"PhotometricInterpretation": "MONOCHROME1", "WindowCenter": 2000, "WindowWidth": 1000}
    levels, note = dicom(tmp_path, stored, **header)
    assert np.abs(levels - (255 - windowed(stored, 2000, 1000))).max() <= 1
    assert "inverted (MONOCHROME1)" in note


def test_dicom_without_a_window_is_stretched_without_its_padding(tmp_path):
    stored = np.stack([np.full((50, 80), 7), np.zeros((50, 80))])
    stored[0, :, 1:] = np.linspace(1000, 3000, 79).round()
    levels, note = dicom(tmp_path, stored, PixelPaddingValue=7)
    assert np.abs(levels[:, 1:] - (stored[0, :, 1:] - 1000) / 2000 * 255).max() <= 1
    assert not levels[:, 0].any()
    assert note == "the first of 2 frames, no window: from smallest to largest value"


def test_dicom_without_pydicom_names_the_package(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pydicom", None)
    (tmp_path / "a.dcm").write_bytes(bytes(128) + b"DICM")
    with pytest.raises(UserError, match="pip install pydicom"):
        given.look([tmp_path], tmp_path)
