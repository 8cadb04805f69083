"""BLIP-2 against transformers' own classes: forward passes, losses, decoding."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import python
from support.models import TEXTS, batch, build_tiny, load_tiny, pixels
from transformers import Blip2ForConditionalGeneration

from harness.config.sections import PredictConfig
from harness.decoding.search import search
from harness.errors import UserError
from harness.models import loading, tiny
from harness.models.blip2 import small
from harness.models.text import IGNORE


def test_random_weights_are_the_same_with_each_version_of_transformers():
    """Committed sums of absolute values, equal with 4.57.6 and 5.24.0: else a tiny model would be another."""
    sums = {
        name: sum(weight.double().abs().sum().item() for weight in part.parameters())
        for name, part in small.make().model.named_children()
    }
    assert sums == pytest.approx(
        {
            "vision_model": 14011.923,
            "qformer": 18493.982,
            "embeddings": 643.182,
            "cls": 253.238,
            "language_projection": 66.456,
            "language_model": 24026.025,
        },
        rel=1e-6,
        abs=1e-3,
    )


def test_language_model_path_equals_transformers(loaded, tiny_folder):
    """The oracle puts image tokens into input_ids; we put the projected queries before the ids."""
    theirs = Blip2ForConditionalGeneration.from_pretrained(tiny_folder).eval()
    images, captions, _ = batch(loaded)
    queries = loaded.model.config.num_query_tokens
    image_tokens = torch.full((len(images), queries), theirs.config.image_token_index)
    with torch.no_grad():
        expected = theirs(
            pixel_values=images,
            input_ids=torch.cat([image_tokens, captions["ids"]], dim=1),
            attention_mask=torch.cat([torch.ones_like(image_tokens), captions["mask"]], dim=1),
        ).logits[:, queries:]
        found = loaded.model._speak(loaded.model.see(images)[0], captions["ids"], captions["mask"])
    kept = captions["mask"].bool()
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-5, rtol=1e-5)


def test_query_and_text_path_equal_one_masked_pass(loaded):
    """The oracle: transformers' Q-Former on [queries; text] under a mask; text sees queries and its past."""
    model = loaded.model
    images, _, concepts = batch(loaded)
    ids, queries = concepts["ids"], model.config.num_query_tokens
    length = queries + ids.shape[1]
    mask = torch.full((length, length), -1e4).triu(1)
    mask[:queries, :queries] = 0
    mask[:queries, queries:] = -1e4
    with torch.no_grad():
        image = model.vision_model(pixel_values=images).last_hidden_state
        both = torch.cat([model.query_tokens.expand(len(ids), -1, -1), model.embeddings(ids)], dim=1)
        joint = model.qformer.encoder(
            model.qformer.layernorm(both),
            query_length=queries,
            attention_mask=mask.expand(len(ids), 1, -1, -1),
            encoder_hidden_states=image,
        ).last_hidden_state
        found, states = model.see(images)
        logits = model.read(ids, states)
    torch.testing.assert_close(found, joint[:, :queries], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, model.cls(joint[:, queries:]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("language_model", [True, False])
def test_greedy_decoding_equals_the_argmax_of_the_training_path(tiny_folder, language_model):
    loaded = load_tiny(tiny_folder, language_model=language_model)
    model = loaded.model.eval()
    images, _, _ = batch(loaded)
    prompt = torch.tensor(loaded.caption.prompt)
    # no token ends the sequence, so that every row has all its steps
    options = PredictConfig(num_beams=1, max_new_tokens=7)
    with model.decoder(1, 7) as begin:
        ids = search(begin(images, prompt.expand(len(images), -1)), options, -1, loaded.caption.pad).ids[:, 0]
    sequence = prompt.expand(len(images), -1)
    with torch.no_grad():
        queries, states = model.see(images)
        for _ in range(7):
            ones = torch.ones_like(sequence)
            logits = model._speak(queries, sequence, ones) if language_model else model.read(sequence, states)
            sequence = torch.cat([sequence, logits[:, -1:].argmax(-1)], dim=1)
    assert ids.tolist() == sequence[:, len(prompt) :].tolist()


@pytest.mark.parametrize("language_model", [True, False])
def test_beam_search_finds_the_best_of_all_short_sequences(tiny_folder, language_model):
    """With as many beams as words, the first two tokens are searched exhaustively."""
    loaded = load_tiny(tiny_folder, language_model=language_model)
    model = loaded.model.eval()
    image = loaded.normalise(torch.from_numpy(pixels(1, seed=3)))
    prompt = torch.tensor(loaded.caption.prompt)
    with torch.no_grad():
        queries, states = model.see(image)

        def log_probabilities(ids):
            count = len(ids)
            if language_model:
                logits = model._speak(queries.expand(count, -1, -1), ids, torch.ones_like(ids))
            else:
                logits = model.read(
                    ids, [(k.expand(count, -1, -1, -1), v.expand(count, -1, -1, -1)) for k, v in states]
                )
            return logits[:, -1].log_softmax(-1)

        first = log_probabilities(prompt[None])[0]
        vocabulary = len(first)
        pairs = torch.cat([prompt.expand(vocabulary, -1), torch.arange(vocabulary)[:, None]], dim=1)
        total = first[:, None] + log_probabilities(pairs)
    best = divmod(int(total.argmax()), vocabulary)
    options = PredictConfig(num_beams=vocabulary, max_new_tokens=2)
    with model.decoder(vocabulary, 2) as begin:
        ids = search(begin(image, prompt[None]), options, -1, loaded.caption.pad).ids[:, 0]
    assert tuple(ids[0].tolist()) == best


def test_losses_are_sums_that_do_not_depend_on_the_split_of_a_batch(loaded):
    images, captions, concepts = batch(loaded)
    whole = loaded.model(images, captions, concepts, 0.1)

    def row(part, i):
        return {key: value[i : i + 1] for key, value in part.items()}

    parts = [
        loaded.model(images[i : i + 1], row(captions, i), row(concepts, i), 0.1) for i in range(len(images))
    ]
    torch.testing.assert_close(sum(p.caption for p in parts), whole.caption)
    torch.testing.assert_close(sum(p.concept for p in parts), whole.concept)
    assert (captions["labels"] != IGNORE).sum() == sum(
        loaded.caption.encode(TEXTS[i][1]).predicted for i in range(len(images))
    )


@pytest.mark.parametrize("size", [104, 64, 40])
def test_position_table_resized_once_equals_interpolation_at_each_pass(tiny_folder, size):
    theirs = Blip2ForConditionalGeneration.from_pretrained(tiny_folder).eval()
    ours = load_tiny(tiny_folder, image_size=size).model.eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = theirs.vision_model(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state
        found = ours.vision_model(pixel_values=images).last_hidden_state
    assert torch.equal(found, expected)


def test_both_losses_see_the_image(loaded):
    images, captions, concepts = batch(loaded)
    losses = loaded.model(images.requires_grad_(), captions, concepts)
    for loss in (losses.caption, losses.concept):
        (gradient,) = torch.autograd.grad(loss, images, retain_graph=True)
        assert (gradient.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("language_model", [True, False])
def test_every_trained_parameter_takes_part_and_no_frozen_one(tiny_folder, language_model):
    loaded = load_tiny(tiny_folder, language_model=language_model)
    images, captions, concepts = batch(loaded)
    for text_path in (True, False) if language_model else (True,):
        loaded.model.freeze(["caption", "concept"] if text_path else ["caption"])
        loaded.model.zero_grad()
        losses = loaded.model(images, captions, concepts if text_path else None, 0.1)
        sum(loss for loss in (losses.caption, losses.concept) if loss is not None).backward()
        for name, parameter in loaded.model.named_parameters():
            assert parameter.requires_grad == (parameter.grad is not None), name
            if name.startswith("language_model."):
                assert not parameter.requires_grad


def test_trained_weights_travel_without_the_frozen_language_model(tiny_folder, tmp_path):
    loaded = load_tiny(tiny_folder)
    with torch.no_grad():
        loaded.model.query_tokens += 1
    loading.save_trained(loaded.model, tmp_path / "best.safetensors")
    assert not any(n.startswith("language_model.") for n in load_file(tmp_path / "best.safetensors"))
    other = load_tiny(tiny_folder)
    loading.load_trained(other.model, tmp_path / "best.safetensors")
    for name, weight in loaded.model.state_dict().items():
        assert torch.equal(weight, other.model.state_dict()[name]), name


@pytest.mark.parametrize("change", ["one weight less", "another shape"])
def test_weights_of_another_model_are_refused(loaded, tmp_path, change):
    loading.save_trained(loaded.model, tmp_path / "best.safetensors")
    weights = load_file(tmp_path / "best.safetensors")
    tokens = weights.pop("query_tokens")
    if change == "another shape":
        weights["query_tokens"] = tokens[:, :1]  # which would broadcast
    save_file(weights, tmp_path / "best.safetensors")
    with pytest.raises((UserError, ValueError), match="query_tokens"):
        loading.load_trained(loaded.model, tmp_path / "best.safetensors")


@pytest.mark.parametrize("steps", [9, 10, 11])
def test_the_tiny_model_is_built_in_any_number_of_steps(steps):
    """Ten are those of the defaults with up to 32 images."""
    layer = torch.nn.Linear(2, 1)
    update = tiny._optimiser(layer, steps, 1e-3)
    before = layer.bias.item()
    for _ in range(steps):
        update(layer(torch.ones(2)).sum())
    assert layer.bias.item() < before


def test_another_process_builds_the_same_tiny_model_to_the_bit(tiny_folder, tmp_path):
    """tokenizers' WordPiece trainer alone does not: in every process its ties break another way."""
    code = "import sys, pathlib; from support import models; models.build_tiny(pathlib.Path(sys.argv[1]))"
    again = tmp_path / tiny_folder.name
    python(code, again)
    files = [file.relative_to(tiny_folder) for file in sorted(tiny_folder.rglob("*")) if file.is_file()]
    assert len(files) > 8
    assert [name for name in files if (again / name).read_bytes() != (tiny_folder / name).read_bytes()] == []


@pytest.mark.ci
@pytest.mark.parametrize("sentences", [True, False], ids=["with concepts", "without"])
def test_a_pretrained_connector_writes_captions_and_leaves_the_language_model_as_it_is(tmp_path, sentences):
    texts = TEXTS if sentences else [("", caption) for _, caption in TEXTS]
    images = (
        np.zeros((len(TEXTS), 64, 64, 3), np.uint8)
        + np.linspace(0, 255, len(TEXTS), dtype=np.uint8)[:, None, None, None]
    )
    folders = [
        build_tiny(tmp_path / str(epochs) / "tiny", texts, images, text_epochs=300, connector_epochs=epochs)
        for epochs in (0, 60)
    ]
    loaded = [load_tiny(folder) for folder in folders]
    before, after = [dict(one.model.named_parameters()) for one in loaded]
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    trained = {"vision_model", "query_tokens", "qformer", "language_projection"}
    assert changed == trained | ({"embeddings", "cls"} if sentences else set())

    losses = []
    for one in loaded:
        one.model.eval()
        captions = one.caption.collate([one.caption.encode(caption) for _, caption in TEXTS])
        losses.append(one.model(one.normalise(torch.from_numpy(images)), captions).caption.item())
    assert losses[1] < 0.8 * losses[0]
