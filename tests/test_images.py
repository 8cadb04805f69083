"""Pixels against PIL itself; the cache with two processes, damage and a full disk."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.disks import small_disk

from harness.data.images import DAMAGE, decode, each, open_pixels, resize, unbuilt
from harness.data.listing import Example
from harness.errors import UserError


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def examples(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for number, size in enumerate([(40, 60), (64, 64), (90, 31), (33, 47), (200, 120)]):
        path = tmp_path / "images" / f"i{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path)
        rows.append(Example(path.stem, path, "a caption", (), None))
    return rows


def oracle(example: Example, size: int) -> np.ndarray:
    return np.asarray(Image.open(example.image).convert("RGB").resize((size, size), Image.BICUBIC))


@pytest.mark.parametrize("size", [28, 64, 224])
def test_resize_is_pil_squashing_bicubic(examples, size):
    for example in examples:
        pixels = resize(decode(example.image), size)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, oracle(example, size))


@pytest.mark.parametrize(("low", "high"), [(0, 65535), (1000, 1255), (30, 4095)])
def test_16_bit_grey_is_windowed_not_saturated(low, high):
    grey = np.linspace(low, high, 256).round().astype(np.uint16).reshape(16, 16)
    pixels = np.asarray(decode(png(Image.fromarray(grey))))
    expected = np.round((grey.astype(float) - low) / (high - low) * 255).astype(np.uint8)
    np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, axis=2))
    if high > 300:  # the trap: PIL alone cuts everything above 255
        assert len(np.unique(np.asarray(Image.fromarray(grey.astype(np.int32)).convert("RGB")))) < 200


def test_a_flat_16_bit_image_is_black():
    assert not np.asarray(decode(png(Image.fromarray(np.full((4, 4), 900, np.uint16))))).any()


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "CMYK", "RGBA", "LA"])
def test_opaque_images_of_every_mode_are_as_pil_converts_them(mode):
    rng = np.random.default_rng(1)
    rgb = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8))
    image = rgb.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    np.testing.assert_array_equal(np.asarray(decode(buffer.getvalue())), np.asarray(image.convert("RGB")))


def test_transparency_lies_over_black():
    rgba = np.full((2, 2, 4), 200, np.uint8)
    rgba[0, 0, 3], rgba[1:, :, 3] = 0, 255
    pixels = np.asarray(decode(png(Image.fromarray(rgba))))
    assert pixels[0, 0].tolist() == [0, 0, 0]
    assert pixels[1, 1].tolist() == [200, 200, 200]


def test_orientation_tag_is_left_alone(tmp_path):
    image = Image.new("RGB", (10, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert decode(tmp_path / "turned.jpg").size == (10, 20)


@pytest.mark.parametrize("keep", [0, 1, 20, 0.5, 0.95])
def test_damage_is_noticed(keep):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (80, 80, 3), np.uint8)).save(buffer, "JPEG")
    whole = buffer.getvalue()
    with pytest.raises(DAMAGE):
        decode(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])


@pytest.mark.parametrize("cached", [True, False])
def test_pixels_by_number_and_by_array(examples, tmp_path, cached):
    seen = []
    pixels = open_pixels(
        examples, 56, tmp_path / "cache" if cached else None, progress=lambda *at: seen.append(at)
    )
    assert len(pixels) == 5
    assert pixels.shape == (5, 56, 56, 3)
    np.testing.assert_array_equal(pixels[2], oracle(examples[2], 56))
    order = np.array([4, 0, 4])
    np.testing.assert_array_equal(pixels[order], [oracle(examples[i], 56) for i in order])
    assert pixels[np.array([], int)].shape == (0, 56, 56, 3)
    assert seen == ([(n, 5) for n in range(1, 6)] if cached else [])


def test_the_cache_is_built_once_and_again_when_an_image_changes(examples, tmp_path):
    cache, seen = tmp_path / "cache", []

    def count(done, total):
        seen.append(done)

    assert unbuilt(examples, 28, cache) == 5 * 28 * 28 * 3
    open_pixels(examples, 28, cache, progress=count)
    open_pixels(examples, 28, cache, progress=count)
    assert len(seen) == 5
    assert (unbuilt(examples, 28, cache), unbuilt(examples, 56, cache)) == (0, 5 * 56 * 56 * 3)
    Image.new("RGB", (9, 9), (255, 0, 0)).save(examples[3].image)
    pixels = open_pixels(examples, 28, cache, progress=count)
    assert len(seen) == 10
    assert pixels[3].reshape(-1, 3).tolist() == [[255, 0, 0]] * 28 * 28


def builder(images: Path, cache: Path, times: int, size: int = 224) -> subprocess.Popen[str]:
    """A process that opens the pixels of all images, each `times` times; it says how many it decoded, and
    their sum."""
    program = """
import sys
from pathlib import Path
import numpy as np
from harness.data.images import open_pixels
from harness.data.listing import Example
paths = sorted(Path(sys.argv[1]).iterdir()) * int(sys.argv[3])
built = []
pixels = open_pixels([Example(p.stem, p, None, (), None) for p in paths], int(sys.argv[4]), Path(sys.argv[2]),
                     progress=lambda *at: built.append(at))
print(len(built), int(np.asarray(pixels, np.int64).sum()))
"""
    command = [sys.executable, "-c", program, str(images), str(cache), str(times), str(size)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(found):
    for _ in range(20_000):
        if result := found():
            return result
        time.sleep(0.005)
    raise AssertionError("it did not come")


@pytest.mark.ci
def test_two_processes_build_one_cache(examples, tmp_path):
    both = [builder(examples[0].image.parent, tmp_path / "cache", 40) for _ in range(2)]
    outputs = [process.communicate()[0].split() for process in both]
    assert sorted(int(built) for built, _ in outputs) == [0, 200]
    expected = 40 * sum(int(oracle(example, 224).astype(np.int64).sum()) for example in examples)
    assert {int(total) for _, total in outputs} == {expected}
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    assert not list((tmp_path / "cache").glob("*.tmp"))


@pytest.mark.ci
def test_a_killed_builder_is_succeeded_and_leaves_nothing_behind(examples, tmp_path):
    images, cache = examples[0].image.parent, tmp_path / "cache"
    killed = builder(images, cache, 400)
    half = wait_for(lambda: list(cache.glob("*.tmp")))[0]
    waiting = builder(images, cache, 400, 8)  # of another size, so of another name
    killed.kill()
    killed.communicate()
    assert half.exists()
    assert waiting.communicate()[0].split()[0] == "2000"
    after = builder(images, cache, 40)
    assert after.communicate()[0].split()[0] == "200"
    assert not list(cache.glob("*.tmp"))


def test_an_interrupted_builder_clears_up(examples, tmp_path):
    cache = tmp_path / "cache"
    process = builder(examples[0].image.parent, cache, 400)
    wait_for(lambda: list(cache.glob("*.tmp")))
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in error
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


@pytest.mark.slow
def test_a_process_that_waits_builds_what_a_killed_one_began(examples, tmp_path):
    images, cache = examples[0].image.parent, tmp_path / "cache"
    killed = builder(images, cache, 200)
    wait_for(lambda: list(cache.glob("*.tmp")))
    killed.send_signal(signal.SIGSTOP)  # it holds its lock for as long as it lives
    waiting = builder(images, cache, 200)
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(1.5)
    killed.kill()
    killed.communicate()
    assert waiting.communicate()[0].split()[0] == "1000"
    assert [path.suffix for path in cache.iterdir() if path.suffix != ".lock"] == [".npy"]


@pytest.mark.slow
def test_what_is_still_being_built_is_not_swept_away(examples, tmp_path):
    images, cache = examples[0].image.parent, tmp_path / "cache"
    slow = builder(images, cache, 200)
    wait_for(lambda: list(cache.glob("*.tmp")))
    slow.send_signal(signal.SIGSTOP)
    assert builder(images, cache, 1, 8).communicate()[0].split()[0] == "5"
    slow.send_signal(signal.SIGCONT)
    assert slow.communicate()[0].split()[0] == "1000"


def test_decoders_do_not_run_away_from_a_slow_writer():
    """Whatever is decoded and not yet written lies in memory."""
    begun, most = [], 0
    for taken, _ in enumerate(each(begun.append, range(200), workers=2), 1):
        time.sleep(0.001)
        most = max(most, len(begun) - taken)
    assert len(begun) == 200
    assert 0 < most <= 8


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", 4) as place:
        yield place


def test_a_full_disk_stops_the_builder_at_once_and_lives(examples, tmp_path, disk):
    done = builder(examples[0].image.parent, disk / "cache", 40)  # 30 MB
    printed, error = done.communicate()
    assert (done.returncode, printed) == (1, "")
    assert "data.cache: the decoded images need 30 MB" in error
    assert not list((disk / "cache").glob("pixels-*.[tn]*"))


def test_space_that_others_take_meanwhile_is_an_error_and_no_signal(examples, tmp_path, disk, monkeypatch):
    """The check beforehand sees space enough; a write through a memory map would now end in SIGBUS."""
    usage = namedtuple("usage", "total used free")(10**9, 0, 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    seen = []
    for reserving in (True, False):
        if not reserving:
            monkeypatch.delattr(os, "posix_fallocate")
        with pytest.raises(UserError, match=r"data\.cache=false"):
            open_pixels(examples * 40, 224, disk, progress=lambda *at: seen.append(at))
        assert not list(disk.glob("pixels-*.[tn]*"))
        assert bool(seen) == (not reserving)  # the space is taken before anything is decoded
    assert len(open_pixels(examples, 224, disk)) == 5


def test_a_damaged_image_leaves_no_cache(examples, tmp_path):
    examples[1].image.write_bytes(examples[1].image.read_bytes()[:500])
    with pytest.raises(UserError, match=r"i1\.png: not a whole image"):
        open_pixels(examples, 28, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_too_full_a_disk_is_told_before_writing(examples, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"data\.cache=false"):
        open_pixels(examples, 28, tmp_path / "cache")


@pytest.mark.slow
def test_works_beside_torch_and_leaves_no_thread(examples, tmp_path):
    program = """
import sys, threading
from pathlib import Path
import torch
from harness.data.images import open_pixels
from harness.data.listing import Example
torch.ones(100, 100) @ torch.ones(100, 100)
paths = sorted(Path(sys.argv[1]).iterdir())
pixels = open_pixels([Example(p.stem, p, None, (), None) for p in paths], 28, Path(sys.argv[2]))
assert torch.from_numpy(pixels[[0, 1]]).shape == (2, 28, 28, 3)
assert threading.active_count() == 1, threading.enumerate()
"""
    images: Path = examples[0].image.parent
    subprocess.run([sys.executable, "-c", program, str(images), str(tmp_path / "cache")], check=True)
