"""Where BLIP-2 looks: against transformers' own attention, on disk, after an interruption, on the page."""

import numpy as np
import pytest
import torch
from support import pages
from support.models import pixels
from support.reports import captions, data_of, record, write_data, write_run

from harness import report
from harness.config.sections import PredictConfig
from harness.decoding import predict
from harness.models.blip2 import small

browser = pages.browser  # the fixture
IDS = [f"image_{i}" for i in range(6)]


@pytest.mark.parametrize("speaks", [True, False])
def test_a_map_is_the_mean_of_the_attention_that_transformers_gives(speaks):
    sample = small.make()
    model, images = sample.model, sample.pixels
    if not speaks:
        model.language_model = model.language_projection = None
    with torch.no_grad(), model.looking() as seen:
        before = model.see(images)[0]
        found = seen()
    with torch.no_grad():
        patches = model.vision_model(pixel_values=images).last_hidden_state
        queries = model.query_tokens.expand(len(images), -1, -1)
        layers = model.qformer(
            query_embeds=queries, encoder_hidden_states=patches, output_attentions=True
        ).cross_attentions
        assert torch.equal(model.see(images)[0], before)
    layers = [one for one in layers if one is not None]
    if not speaks and model.qformer.encoder.layer[-1].has_cross_attention:
        layers = layers[:-1]
    wanted = torch.stack(layers[-2:]).mean((0, 2, 3))[:, 1:]
    side = round(wanted.shape[1] ** 0.5)
    wanted = 255 * wanted / wanted.amax(1, keepdim=True)
    assert found.shape == (len(images), side, side)
    assert (found.flatten(1).float() - wanted).abs().max() <= 0.51
    assert seen() is not None
    assert not any(one._forward_hooks for one in model.modules()), "the model is as it was"


def test_a_fine_map_is_pooled_and_one_that_is_no_square_is_none():
    from harness.models.blip2 import attention

    fine = torch.rand(2, 1 + 26 * 26)
    found = attention._picture(fine)
    blocks = fine[:, 1:].reshape(2, 13, 2, 13, 2).mean((2, 4))
    assert found.shape == (2, 13, 13)
    assert (found.float() - 255 * blocks / blocks.amax((1, 2), keepdim=True)).abs().max() <= 0.51
    assert attention._picture(torch.rand(2, 1 + 7)) is None


def split(loaded, folder, look: bool, progress=lambda done, total: None):
    folder.mkdir(exist_ok=True)
    config = PredictConfig(num_beams=2, max_new_tokens=8, batch_size=2)
    given = {IDS[1]: "a constant"}
    images = pixels(5, 64, 1)
    predict.predict_split(loaded, IDS, images, config, folder, progress, given, look=look)
    return (folder / "predictions.csv").read_bytes()


def test_captions_are_the_same_and_maps_survive_an_interruption(loaded, tmp_path):
    plain = split(loaded, tmp_path / "plain", look=False)
    assert not (tmp_path / "plain" / "attention.npy").exists()
    assert split(loaded, tmp_path / "whole", look=True) == plain
    whole = np.load(tmp_path / "whole" / "attention.npy")
    assert (len(whole), whole.dtype) == (len(IDS), np.uint8)
    assert not whole[1].any(), "an image that can't be read"
    assert (whole[[0, 2, 3, 4, 5]].max((1, 2)) == 255).all()

    class Cut(Exception):
        pass

    def cut(done: int, total: int) -> None:
        if done >= 4:
            raise Cut

    with pytest.raises(Cut):
        split(loaded, tmp_path / "cut", True, cut)
    assert split(loaded, tmp_path / "cut", look=True) == plain
    assert np.array_equal(np.load(tmp_path / "cut" / "attention.npy"), whole)


def run_with(tmp_path, maps: np.ndarray | None, count: int = 8):
    found = captions(count)
    write_data(tmp_path, found)
    run = record()
    folder = write_run(tmp_path, run, found)
    if maps is not None:
        np.save(tmp_path / "runs" / run["steps"]["predict-valid"] / "attention.npy", maps)
    return report.write(folder)


@pytest.mark.ci
def test_the_page_shows_the_maps_over_the_images_on_demand(tmp_path, browser):
    maps = np.random.default_rng(0).integers(1, 255, (8, 3, 4), dtype=np.uint8)
    maps[5] = 0
    page = run_with(tmp_path, maps)
    browser.open(page)
    seen = "[...document.querySelectorAll('{}')].filter((one) => one.getClientRects().length).length"
    assert browser.evaluate(seen.format("canvas")) == 0
    browser.click("document.getElementById('look')")
    assert browser.evaluate(seen.format(".openers canvas")) in (5, 6)
    assert browser.evaluate(seen.format("#list canvas")) == 7, "the image without a map has none"
    browser.choose("sort", "order")
    alpha = """[...document.querySelectorAll('#list canvas')].map((one) => {
      const all = [...one.getContext('2d').getImageData(0, 0, one.width, one.height).data];
      return [one.height, one.width, all.filter((_, at) => at % 4 === 3)];
    })"""
    for (height, width, values), wanted in zip(browser.evaluate(alpha), np.delete(maps, 5, 0), strict=True):
        assert (height, width) == (3, 4)
        assert values == pytest.approx(0.75 * wanted.ravel(), abs=1)
    boxes = """[...document.querySelectorAll('#list canvas')].map((one) => {
      const [a, b] = [one, one.previousElementSibling].map((node) => node.getBoundingClientRect());
      return Math.max(...['x', 'y', 'width', 'height'].map((key) => Math.abs(a[key] - b[key])));
    })"""
    browser.evaluate("Promise.all([...document.images].map((one) => (one.loading = 'eager', one.decode())))")
    assert max(browser.evaluate(boxes)) < 1, "the map covers the image"
    browser.click("document.getElementById('look')")
    assert browser.evaluate(seen.format("canvas")) == 0
    assert browser.problems == []


@pytest.mark.parametrize("maps", [None, np.ones((3, 2, 2), np.uint8), np.ones((8, 4), np.uint8)])
def test_without_maps_there_is_no_switch(maps, tmp_path, browser):
    page = run_with(tmp_path, maps)
    assert not any("attention" in row for row in data_of(page)["captions"]["rows"])
    browser.open(page)
    assert browser.evaluate("document.getElementById('look')") is None
    assert browser.problems == []
