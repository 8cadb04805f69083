"""The halves of a split: fixed by the id, and about equal."""

from harness.data.halves import HELD, TUNE, half


def test_the_half_of_an_id_never_changes():
    """Else a run that was tuned on one half would be reported on images that it was tuned on."""
    ids = [f"ImageCLEFmedCaption_2023_valid_{number:06d}" for number in range(6)]
    assert [half(image) for image in ids] == [TUNE, HELD, HELD, TUNE, TUNE, HELD]


def test_each_half_has_about_half_of_the_images():
    halves = [half(f"image{number}") for number in range(10_000)]
    assert set(halves) == {TUNE, HELD}
    assert abs(halves.count(TUNE) - 5_000) < 200
