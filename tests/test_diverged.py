"""Numbers that are not finite never become weights, scores, records or pages, and the reason is given."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import SIZES, batch, load_tiny, pixels, stages
from support.training import config, run, splits

from harness import store
from harness.config.sections import AugmentConfig, PredictConfig
from harness.decoding import predict, retrieval
from harness.errors import UserError
from harness.machine import device
from harness.models.blip2 import loading
from harness.models.loading import load_trained, save_trained
from harness.models.settings import ModelConfig
from harness.pages import filled
from harness.training import losses, plots, schedule, train

device.probe("cpu")
LAST_STEP = {
    "learning_rate": 1e18,
    "max_grad_norm": 0,
    "warmup_steps": 1,
    "batch_size": 12,
    "stages": stages(1, 0),
}


@pytest.fixture(scope="module")
def folder(tiny_folder):
    return tiny_folder


def failure(*arguments, **options) -> UserError:
    with pytest.raises(UserError) as caught:
        run(*arguments, **options)
    assert caught.value.exit_code == 1
    assert "train.learning_rate" in str(caught.value)
    return caught.value


@pytest.mark.parametrize("zero_stage", [0, 1, pytest.param(3, marks=pytest.mark.slow)])
def test_divergence_in_the_last_step_fails_with_its_place_however_often_it_is_tried(
    folder, tmp_path, zero_stage
):
    for _ in range(2):
        error = failure(folder, tmp_path / "run", config(**LAST_STEP, zero_stage=zero_stage))
        assert "step 2 (stage 1, epoch 1)" in str(error)
        assert not (tmp_path / "run" / train.BEST).exists()
        assert not (tmp_path / "run" / "finished.json").exists()
    rows = [json.loads(line) for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())


@pytest.mark.parametrize(("call", "step"), [(2, 2), (5, 3), (9, 5)])
def test_a_loss_is_read_one_step_later_and_named_by_its_own_step(folder, tmp_path, monkeypatch, call, step):
    """An epoch has 3 steps of 2 micro-batches. Step 3 ends one, and a checkpoint follows step 4."""
    calls, seen = iter(range(100)), []
    count = [0]

    def caption(computed, tokens, weight):
        count[0] = next(calls) + 1
        return computed.caption * (math.nan if count[0] == call + 1 else weight) / tokens["caption"]

    monkeypatch.setitem(losses.LOSSES, "caption", caption)
    settings = config(stages=stages(2, 0), checkpoint_every_steps=4)
    log = lambda row: seen.append((row["step"], count[0])) if "loss" in row else None  # noqa: E731
    with pytest.raises(UserError) as caught:
        run(folder, tmp_path / "run", settings, log=log)
    split = splits(load_tiny(folder))["train"]
    lengths = np.array([len(text.ids) for text in split.captions])
    epoch, number = divmod(step - 1, 3)
    images = np.split(schedule.epoch_batches(lengths, 8, 42, 1, epoch)[number], 2)[call % 2]
    what = f"caption_loss became nan at step {step}; images of that batch: "
    assert what + ", ".join(split.ids[i] for i in images) + "\n" in str(caught.value)
    assert seen == [(1, 4), (2, 6), (3, 6), (4, 8)][: step - 1]
    done = [path.name for path in sorted((tmp_path / "run" / "checkpoints").glob("step*"))]
    assert done == ["step00000003", "step00000004"][: max(0, step - 3)]
    assert (tmp_path / "run" / train.BEST).exists() == (step > 3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_in_no_checkpoint(folder, tmp_path, value):
    """Set between the last step of an epoch and the checkpoint after it, where no loss tells of it."""
    seen = []

    def log(row):
        if row["step"] == 6 and "loss" in row:  # the epochs have 3 steps each
            (model,) = [m for m in seen if m.query_tokens.requires_grad]
            with torch.no_grad():
                model.query_tokens[0, 0, 0] = value

    training = _training(folder, tmp_path, config(stages=stages(2, 0)), log, seen)
    with pytest.raises(UserError, match=r"after step 6 \(stage 1, epoch 2\) are not finite") as caught:
        training.run()
    assert caught.value.exit_code == 1
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("step*"))] == ["step00000003"]
    best = load_file(tmp_path / train.BEST)
    assert all(torch.isfinite(weight).all() for weight in best.values())


def _training(folder, directory, settings, log, seen):
    def load():
        loaded = load_tiny(folder)
        seen.append(loaded.model)
        return loaded

    data = splits(load_tiny(folder))
    scores = {"valid_primary": 0.0}
    return train.Training(
        settings, AugmentConfig(), load, data, "cpu", 42, directory, log, lambda loaded: dict(scores)
    )


def test_a_validation_score_that_is_no_number_chooses_nothing(folder, tmp_path):
    settings = config(stages=stages(1, 0))
    scores = {"valid_rouge1": 0.5, "valid_primary": math.nan}
    error = failure(folder, tmp_path / "run", settings, evaluate=lambda: scores)
    assert "valid_primary became nan in the validation after step 3 (stage 1, epoch 1)" in str(error)
    assert not (tmp_path / "run" / train.BEST).exists()


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(folder, tmp_path):
    model = load_tiny(folder).model
    save_trained(model, tmp_path / "good.safetensors")
    weights = load_file(tmp_path / "good.safetensors")
    weights["query_tokens"][0, 0, 0] = math.nan
    save_file(weights, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=r"bad\.safetensors: query_tokens is not finite") as caught:
        load_trained(model, tmp_path / "bad.safetensors")
    assert caught.value.exit_code == 1
    assert f"delete {tmp_path}" in str(caught.value)
    with torch.no_grad():
        model.query_tokens[0, 0, 0] = math.inf
    with pytest.raises(UserError, match="1 weights are not finite and are not saved; the first is query"):
        save_trained(model, tmp_path / "new.safetensors")
    assert not list(tmp_path.glob("new*"))


def test_what_older_versions_wrote_is_read_as_absent_and_drawn(tmp_path):
    old = '{"a": NaN, "b": [Infinity, 1.5], "c": {"d": -Infinity, "e": 1e999}}'
    assert store.parsed(old) == {"a": None, "b": [None, 1.5], "c": {"d": None, "e": None}}
    assert '{"gap":null}' in filled("report.html", {"gap": math.nan})
    rows = [{"step": 1, "loss": 2.0, "learning_rate": 1.0}, {"step": 1, "valid_loss": math.nan}]
    (tmp_path / "losses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plots.curves(tmp_path / "losses.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize(("share", "same"), [(None, False), (0.0, True), (0.5, False)])
def test_the_language_models_dropout_has_its_own_key(folder, share, same):
    """Nothing else is left out at random: the Q-Former's dropout is 0."""
    model = ModelConfig(checkpoint=str(folder), image_size=64, tiny=SIZES)
    loaded = loading.load(model, folder, 32, 0.0, language_dropout=share)
    images, captions, _ = batch(loaded)
    loaded.model.train()
    torch.manual_seed(0)
    losses = {loaded.model(images, captions).caption.item() for _ in range(3)}
    assert (len(losses) == 1) == same
    assert loaded.model.config.text_config.dropout == (0.1 if share is None else share)


@pytest.mark.parametrize("given", [{}, {"num_beams": 3}, {"samples": {"count": 2}}])
def test_finite_weights_that_give_no_numbers_give_no_captions(folder, tmp_path, given):
    """Where no validation tells: a training on all images, a checkpoint from elsewhere, half precision."""
    loaded = load_tiny(folder)
    with torch.no_grad():
        loaded.model.query_tokens.fill_(1e30)
    ids, settings = (
        [f"image_{i}" for i in range(8)],
        PredictConfig(max_new_tokens=6, **{"num_beams": 1} | given),
    )
    for _ in range(2):  # nothing of the first attempt is taken for done
        with pytest.raises(UserError, match=r"nan in the captions of image_0, .* and 3 more") as caught:
            predict.predict_split(loaded, ids, pixels(8, 64), settings, tmp_path, lambda done, total: None)
        assert caught.value.exit_code == 1
    with pytest.raises(UserError, match="the features of 8 of 8 images are not finite"):
        retrieval.features(loaded, pixels(8, 64), 8, lambda done, total: None)
