"""Vision-language models against transformers' own processors, forward passes and `generate`."""

import functools
import json
import re
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.commands import harness
from support.models import TEXTS
from support.training import Interrupted
from support.vlm_checkpoints import RUN, make
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BlipForConditionalGeneration,
    LogitsProcessor,
    Qwen2_5_VLProcessor,
    Qwen3VLProcessor,
)

from harness.config.sections import AugmentConfig, PredictConfig, SamplesConfig
from harness.data.augment import augment
from harness.data.images import Whole
from harness.data.listing import Example
from harness.decoding import search
from harness.errors import UserError
from harness.machine import device
from harness.models import adapters, checkpoints, family, needs, parts, problems
from harness.models.base import Samples, Work
from harness.models.loading import load_trained, save_trained
from harness.models.settings import ModelConfig
from harness.models.text import IGNORE, Text
from harness.models.vlm import loading as vlm_loading
from harness.models.vlm.architectures import ARCHITECTURES
from harness.training import train
from harness.training.settings import TrainConfig

device.probe("cpu")
PROMPT = "describe the image"
KINDS = tuple(ARCHITECTURES)
MANY = [
    pytest.param(kind, marks=() if kind in ("blip", "gemma3", "qwen3_vl") else pytest.mark.slow)
    for kind in ARCHITECTURES
]
"""All architectures; some only with the slow tests."""
CHATS = ("llava", "llava_next", "gemma3", "qwen2_5_vl", "qwen3_vl")
ANSWERS = ("axial ct of the lung showing a mass", "ct", "the knee")
TRAIN = TrainConfig(max_caption_tokens=30, train_vision=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The checkpoint of a model type, made once."""
    return functools.cache(lambda kind: make(kind, tmp_path_factory.mktemp("vlm") / kind))


def config(folder: Path, **changes) -> ModelConfig:
    return ModelConfig(family="vlm", checkpoint=str(folder), prompt=PROMPT, image_size=64, **changes)


def load(folder: Path, settings: TrainConfig = TRAIN, dtype=torch.float32, **changes):
    """The harness's model, in evaluation mode."""
    chosen = config(folder, **changes)
    loaded = family(chosen).load(chosen, settings, folder, dtype)
    loaded.model.eval()
    return loaded


def theirs(folder: Path):
    """transformers' model and processor of a checkpoint."""
    kind = AutoConfig.from_pretrained(folder).model_type
    cls = BlipForConditionalGeneration if kind == "blip" else AutoModelForImageTextToText
    return cls.from_pretrained(folder).eval(), processor(kind, folder)


def processor(kind: str, folder: Path):
    """transformers' processor; that of Qwen without one for videos, which needs torchvision."""
    if not kind.startswith("qwen"):
        return AutoProcessor.from_pretrained(folder)

    class ImagesAlone({"qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}[kind]):
        def check_argument_for_proper_class(self, name, argument):
            return object

    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    return ImagesAlone(images, tokenizer, None, chat_template=tokenizer.chat_template)


def images(count: int = 3) -> list[np.ndarray]:
    """Images of different shapes, of noise."""
    rng = np.random.default_rng(0)
    shapes = [(40, 60), (64, 33), (50, 50)]
    return [rng.integers(0, 256, (*shapes[i % 3], 3), np.uint8) for i in range(count)]


def tensors(count: int = 3) -> list[torch.Tensor]:
    return [torch.from_numpy(image) for image in images(count)]


def inputs(kind: str, own, answers: list[str] | None, pictures: list[np.ndarray], words: str = PROMPT):
    """What the processor gives for these images with the user turn, and with answers if there are."""
    pictures = [Image.fromarray(picture) for picture in pictures]
    given = {"images": pictures, "return_tensors": "pt", "padding": True}
    text = [words] * len(pictures)
    if kind == "paligemma":
        return own(text=[f"<image>{words}"] * len(pictures), suffix=answers, **given)
    if kind in CHATS:
        content = [{"type": "image"}, {"type": "text", "text": words}]
        turn = own.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        text = [turn] * len(pictures)
        given |= {"add_special_tokens": kind != "gemma3", "padding_side": "left"}
    if answers is not None:
        between = "" if kind in ("gemma3", "qwen2_5_vl", "qwen3_vl") else " "
        text = [turn + between + answer for turn, answer in zip(text, answers, strict=True)]
    if kind == "gemma3":
        given["images"] = [[picture] for picture in pictures]
    found = own(text=text, **given)
    if kind != "gemma3":  # Llama's tokenizer gives them, but its models do not take them
        found.pop("token_type_ids", None)
    return found


def texts(loaded, answers=ANSWERS):
    return loaded.caption.collate([loaded.caption.encode(answer) for answer in answers])


def expanded(loaded, ids: list[int], count: int) -> list[int]:
    """Ids with as many image tokens as the image has features."""
    image = getattr(loaded.model, "image", None)
    return [one for i in ids for one in ([i] * count if i == image else [i])]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_model_reads_what_the_processor_gives_and_the_loss_is_on_the_answer(folders, kind):
    loaded, own = load(folders(kind)), processor(kind, folders(kind))
    with torch.no_grad():
        counts = [len(one) for one in loaded.model.see(loaded.normalise(tensors())).images]
    for picture, count, answer in zip(images(), counts, ANSWERS, strict=True):
        text = loaded.caption.encode(answer)
        whole = expanded(loaded, text.ids, count)
        prompt = expanded(loaded, text.ids[: text.prompt], count)
        expected = inputs(kind, own, [answer], [picture]).input_ids[0].tolist()
        alone = inputs(kind, own, None, [picture]).input_ids[0].tolist()
        if kind == "blip":  # [DEC] in place of [CLS], and [SEP] ends the caption
            start = len(loaded.caption.tokenizer) - 1
            expected, alone = [start, *expected[1:-1]], [start, *alone[1:-1]]
        assert whole[: len(prompt)] == alone
        assert whole[:-1] == (expected[:-1] if kind == "paligemma" else expected)
        assert loaded.caption.decode(text.ids[text.prompt :]) == answer
        batch = loaded.caption.collate([text])
        kept = batch["ids"][0][batch["labels"][0] != IGNORE].tolist()
        assert kept == text.ids[text.prompt :]


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl", "qwen3_vl"])
def test_an_answer_ends_as_the_chat_template_ends_a_turn(folders, kind):
    loaded, own = load(folders(kind)), processor(kind, folders(kind))
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    chat = [{"role": "user", "content": content}]
    chat += [{"role": "assistant", "content": [{"type": "text", "text": ANSWERS[0]}]}]
    given = {"images": [Image.fromarray(images()[0])], "add_special_tokens": kind != "gemma3"}
    expected = own(text=[own.apply_chat_template(chat)], **given)["input_ids"][0]
    text = loaded.caption.encode(ANSWERS[0])
    with torch.no_grad():
        count = len(loaded.model.see(loaded.normalise(tensors(1))).images[0])
    ours = expanded(loaded, text.ids, count)
    assert ours == expected[: len(ours)]
    assert len(expected) - len(ours) <= 1  # a line break


@pytest.mark.parametrize("kind", ["instructblip", "llava", "paligemma"])
def test_other_answers_end_with_the_end_of_text(folders, kind):
    codec = load(folders(kind)).caption
    assert codec.end == codec.tokenizer.eos_token_id


@pytest.mark.parametrize("kind", MANY)
def test_loss_and_logits_are_those_of_the_model_on_the_processors_output(folders, kind):
    loaded, (model, own) = load(folders(kind)), theirs(folders(kind))
    batch, pixels = texts(loaded), loaded.normalise(tensors())
    with torch.no_grad():
        seen = loaded.model.see(pixels)
        found = loaded.model._say(seen, batch)
        loss = loaded.model(pixels, batch).caption
        losses = []
        for row, (picture, answer) in enumerate(zip(images(), ANSWERS, strict=True)):
            given = dict(inputs(kind, own, [answer], [picture]))
            if kind == "blip":
                given["input_ids"][0, 0] = len(loaded.caption.tokenizer) - 1
            elif kind != "paligemma":
                given = _ended(given, loaded.caption.end)
            if kind == "instructblip":  # its Q-Former reads the instruction alone
                alone = inputs(kind, own, None, [picture])
                given |= {name: alone[name] for name in given if name.startswith("qformer")}
            given.pop("labels", None)
            ids = given["input_ids"][0]
            answered = int((batch["labels"][row] != IGNORE).sum())
            labels = torch.where(torch.arange(len(ids)) >= len(ids) - answered, ids, IGNORE)
            output = model(**given, labels=labels[None])
            length = int(batch["mask"][row].sum())
            after = 1 if kind == "blip" else len(seen.images[row])
            want = torch.cat([output.logits[0, :0], output.logits[0, after - 1 + _before(loaded) :]])
            ours = found[row, _before(loaded) : length]
            torch.testing.assert_close(ours, want, atol=2e-4, rtol=1e-4)
            losses.append(output.loss * answered)
    torch.testing.assert_close(loss, torch.stack(losses).sum(), atol=1e-3, rtol=1e-5)


def _before(loaded) -> int:
    """The place of the image's token in the prompt."""
    image = getattr(loaded.model, "image", None)
    return loaded.caption.prompt.index(image) if image in loaded.caption.prompt else 0


def _ended(given: dict, end: int) -> dict:
    """The processor's output with the end token."""
    given["input_ids"] = torch.cat([given["input_ids"], torch.tensor([[end]])], 1)
    for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in given:
            last = (
                torch.ones(1, 1, dtype=torch.long) if name == "attention_mask" else torch.zeros(1, 1).long()
            )
            given[name] = torch.cat([given[name], last], 1)
    return given


class Drawn(LogitsProcessor):
    """Lets `generate` choose the tokens of `search.sample` for these draws."""

    def __init__(self, draws, settings):
        self.draws, self.settings, self.new = draws, settings, 0

    def __call__(self, ids, scores):
        chances = search.truncated(scores, self.settings)
        chosen = search._quantile(chances.exp(), self.draws[:, self.new])
        self.new += 1
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


def generated(kind: str, folder: Path, loaded, **options) -> list[list[int]]:
    """The new tokens that transformers' `generate` gives."""
    model, own = theirs(folder)
    given = dict(inputs(kind, own, None, images()))
    codec = loaded.caption
    options = {"max_new_tokens": 9, "do_sample": False} | options
    if kind != "blip":
        options |= {"eos_token_id": codec.end, "pad_token_id": codec.pad}
    with torch.no_grad():
        rows = model.generate(**given, **options)
    length = 0 if kind == "instructblip" and rows.shape[1] <= 9 else given["input_ids"].shape[1]
    length -= kind == "blip"
    return [codec_cut(row[length:].tolist(), codec.end) for row in rows]


def codec_cut(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


def ours(loaded, choose, width: int) -> list[list[int]]:
    """The new tokens of the harness's decoding, all rows of all images."""
    prompts = torch.tensor([loaded.caption.prompt] * 3)
    with loaded.model.decoder(width, 9) as begin, torch.inference_mode():
        found = choose(begin(loaded.normalise(tensors()), prompts), loaded.caption.end, loaded.caption.pad)
    return [codec_cut(row, loaded.caption.end) for rows in found.ids.tolist() for row in rows]


@pytest.mark.parametrize("kind", MANY)
def test_captions_are_those_of_generate(folders, kind):
    folder = folders(kind)
    loaded = load(folder)
    greedy = PredictConfig(num_beams=1, max_new_tokens=9, min_new_tokens=0)
    found = ours(loaded, lambda decoding, *ends: search.search(decoding, greedy, *ends), 1)
    assert found == generated(kind, folder, loaded)
    assert len({tuple(row) for row in found}) > 1
    beams = PredictConfig(num_beams=3, max_new_tokens=9, min_new_tokens=2, length_penalty=0.7)
    found = ours(loaded, lambda decoding, *ends: search.search(decoding, beams, *ends), 3)
    options = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.7, "min_new_tokens": 2}
    assert found == generated(kind, folder, loaded, **options, early_stopping=False)
    settings = SamplesConfig(count=1, temperature=0.9, top_k=20)
    draws = torch.rand(3, 9, generator=torch.Generator().manual_seed(1))
    take = functools.partial(search.sample, settings=settings, config=greedy, draws=draws)
    found = ours(loaded, lambda decoding, end, pad: take(decoding, end=end, pad=pad), 1)
    assert found == generated(kind, folder, loaded, logits_processor=[Drawn(draws, settings)])


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava_next"])
def test_captions_do_not_depend_on_the_other_images_of_a_batch(folders, kind):
    loaded = load(folders(kind))
    prompt = torch.tensor([loaded.caption.prompt])
    with loaded.model.decoder(2, 9) as begin, torch.inference_mode():
        pixels = loaded.normalise(tensors())
        together = begin(pixels, prompt.expand(3, -1))
        first = together.logits
        step = together.step(torch.arange(6) + 20)
        for row in range(3):
            alone = begin(pixels[[row]], prompt)
            torch.testing.assert_close(alone.logits[0], first[row], atol=1e-4, rtol=1e-4)
            one = alone.step(torch.arange(2) + 20 + 2 * row)
            torch.testing.assert_close(one, step[2 * row : 2 * row + 2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", MANY)
@pytest.mark.parametrize("vision", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_exactly_what_is_meant_to_train_has_gradients(folders, kind, vision):
    settings = TRAIN.model_copy(update={"train_vision": vision, "train_language": kind == "blip"})
    loaded = load(folders(kind), settings)
    model = loaded.model
    model.train().freeze(("caption",))
    model(loaded.normalise(tensors()), texts(loaded)).caption.backward()
    trained = {"connector"} | ({"vision"} if vision else set()) | ({"language"} if kind == "blip" else set())
    for name, weight in model.named_parameters():
        has = weight.grad is not None and bool(weight.grad.abs().sum() > 0)
        assert has == weight.requires_grad, name
        assert not has or model.part_of(name) in trained, name
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    unused = {name for name in frozen if model.part_of(name) in trained}
    assert all("vision_tower" in name or "qformer.encoder.layer.1." in name for name in unused)


LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["q_proj", "v_proj", "query"]}


@pytest.mark.parametrize("kind", [*MANY[:1], *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[1:])])
def test_adapters_are_trained_saved_loaded_and_merged(folders, kind, tmp_path):
    settings = TRAIN.model_copy(update={"train_vision": False})
    loaded = load(folders(kind), settings, lora=LORA)
    batch, pixels = texts(loaded), loaded.normalise(tensors())
    base = load(folders(kind), settings)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(pixels, batch).caption, base.model(pixels, batch).caption)
    model = loaded.model.train()
    model.freeze(("caption",))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        model(pixels, batch).caption.backward()
        optimiser.step()
    save_trained(model, tmp_path / "kept.safetensors")
    kept = load_file(tmp_path / "kept.safetensors")
    assert all(".lora_" in name or model.part_of(name) == "connector" for name in kept)
    assert any(".lora_" in name for name in kept)
    other = load(folders(kind), settings, lora=LORA)
    load_trained(other.model, tmp_path / "kept.safetensors")
    with torch.no_grad():
        before = base.model(pixels, batch).caption
        after, read = model.eval()(pixels, batch).caption, other.model(pixels, batch).caption
        adapters.merge(other.model)
        merged = other.model(pixels, batch).caption
        family(config(tmp_path)).export(other, tmp_path / "whole")
        exported = load(tmp_path / "whole").model(pixels, batch).caption
    theirs(tmp_path / "whole")  # transformers reads it too
    assert abs(after - before) > 0.1
    torch.testing.assert_close(read, after, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged, after, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(exported, after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3_vl", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[:-1])])
def test_trained_weights_are_fp32_and_the_others_half(folders, kind):
    settings = TRAIN.model_copy(update={"train_vision": False})
    loaded = load(folders(kind), settings, torch.bfloat16)
    full = load(folders(kind), settings)
    loaded.model.compute_in(torch.bfloat16, False)
    exact = dict(full.model.named_parameters())
    for name, weight in loaded.model.named_parameters():
        trained = loaded.model.part_of(name) == "connector"
        assert weight.dtype == (torch.float32 if trained else torch.bfloat16), name
        assert not trained or torch.equal(weight, exact[name]), name
    batch, pixels = texts(loaded), loaded.normalise(tensors())
    half, whole = loaded.model(pixels, batch).caption, full.model(pixels, batch).caption
    assert abs(half / whole - 1) < 0.05


@pytest.mark.parametrize("kind", ["blip", "instructblip", "gemma3"])
def test_dropout_is_that_of_the_settings(folders, kind):
    settings = TRAIN.model_copy(update={"dropout": 0.25, "language_dropout": 0.5})
    model = load(folders(kind), settings).model
    shares = {name: m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    former = {name: p for name, p in shares.items() if ".qformer." in name}
    assert set(former.values()) == ({0.25} if kind == "instructblip" else set())
    if kind == "blip":
        assert {p for name, p in shares.items() if "text_decoder" in name} == {0.5}
    else:
        assert model.model.config.get_text_config(decoder=True).attention_dropout == 0.5


@pytest.mark.parametrize("kind", ["qwen3_vl", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[:-1])])
def test_sizes_are_known_from_the_configs(folders, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    for file in folders(kind).glob("*config.json"):
        shutil.copy(file, tmp_path)
    loaded = load(folders(kind), lora=LORA)
    shape = family(config(tmp_path)).shape(config(tmp_path, lora=LORA), TRAIN)
    weights = dict(loaded.model.named_parameters())
    trained = {name for name in weights if parts.changes(loaded.model, name)}
    assert shape.trained(True) == sum(weights[name].numel() for name in trained)
    assert shape.trained(False) < shape.trained(True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_step_of_a_training_is_known_from_the_configs(folders, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    shape = family(config(tmp_path)).shape(config(folders(kind), lora=LORA), TRAIN)
    work = Work(batch=2, tokens=20, half=True, vision_half=True, accelerator=True)
    held = shape.activations(work)
    assert held.kept > held.kept_checkpointed > 0
    assert shape.flops(work) == 2 * shape.flops(replace(work, batch=1)) > 0


def test_a_sample_for_rewards_is_read_after_its_own_image(folders):
    loaded = load(folders("qwen3_vl"))
    pixels = loaded.normalise(tensors())
    answers = [answer for answer in ANSWERS for _ in range(2)]
    held = []
    samples = Samples(texts(loaded, answers), lambda logits: held.append(logits) or logits.sum())
    with torch.no_grad():
        loaded.model(pixels, samples=samples)
        once = loaded.model._say(loaded.model.see(pixels), texts(loaded))
    torch.testing.assert_close(held[0][::2], once, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(held[0][1::2], once, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_a_caption_may_hold_the_tokens_of_images(folders, kind):
    """A sampled caption may; the words before them are read as without them."""
    loaded = load(folders(kind))
    pixels, ids = loaded.normalise(tensors(1)), list(loaded.caption.prompt)
    odd = loaded.caption.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|vision_start|>"])
    found = []
    for last in ([30, 31], [*odd]):
        both = [*ids, 20, 21, *last]
        text = loaded.caption.collate([Text(both, len(ids))])
        with torch.no_grad():
            found.append(loaded.model._say(loaded.model.see(pixels), text)[0, :-2])
    torch.testing.assert_close(*found)


def test_prompts_of_their_own_stand_in_the_user_turn(folders):
    loaded = load(folders("gemma3"))
    codec = loaded.caption
    own = codec.tokenizer.decode(codec.prompt_after("Similar: ct of the lung.", 60))
    assert own == codec.tokenizer.decode(codec.prompt).replace(PROMPT, f"Similar: ct of the lung. {PROMPT}")
    text = codec.encode("ct", codec.prompt_after("Similar: ct of the lung.", 60))
    assert text.ids[text.prompt :] == codec.encode("ct").ids[len(codec.prompt) :]


def test_whole_images_are_augmented_one_by_one_in_their_shapes():
    draw = torch.Generator().manual_seed(0)
    flip = AugmentConfig(random_crop=1, horizontal_flip=True)
    found = augment(tensors(), flip, draw)
    assert [one.shape for one in found] == [one.shape for one in tensors()]
    for one, image in zip(found, tensors(), strict=True):
        assert torch.equal(one, image) or (one.float() - image.flip(1).float()).abs().max() <= 1
    assert any(not torch.equal(one, image) for one, image in zip(found, tensors(), strict=True))


def test_rotation_keeps_angles_in_images_that_are_not_square():
    """A line of 45 degrees in a wide image is level after a rotation by 45 degrees."""
    size = 101
    wide = torch.zeros(size, 3 * size, 3, dtype=torch.uint8)
    for i in range(-40, 41):
        wide[50 + i, 151 + i - 1 : 151 + i + 2] = 255
    from harness.data import augment as module

    turned = AugmentConfig(random_crop=1, rotate=45)
    half = torch.full((1,), 1.0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module.torch, "rand", lambda *shape, **_: half.expand(shape).clone())
        found = augment([wide], turned, torch.Generator())[0].float().mean(2)
    rows, columns = (found > 100).nonzero().unbind(1)
    spread = sorted([float(rows.float().std()), float(columns.float().std())])
    assert spread[0] < 2 < 20 < spread[1]


STAGES = [
    {"epochs": 1, "losses": {"caption": 1}},
    {"epochs": 1, "losses": {"caption": 1}, "learning_rate": 1e-3},
]


def training(folder: Path, place: Path, log, **changes) -> train.Training:
    """A training of two stages of three steps each, with adapters, dropout and augmentation."""
    settings = TrainConfig(
        **{"batch_size": 4, "micro_batch_size": 2, "learning_rate": 5e-3, "warmup_steps": 0},
        **{"precision": "fp32", "stages": STAGES, "train_vision": False, "gradient_checkpointing": True},
        learning_rates={"connector": 1e-3},
        **changes,
    )
    chosen = config(folder, lora=LORA | {"dropout": 0.1})
    load = functools.partial(family(chosen).load, chosen, settings, folder, torch.float32)
    codec, _ = family(chosen).codecs(chosen, folder, settings.max_caption_tokens)
    paths = []
    for number, picture in enumerate(images(12)):
        paths.append(place.parent / f"{number}.png")
        Image.fromarray(picture).save(paths[-1])
    examples = [
        Example(path.stem, path, text, (), None) for path, (_, text) in zip(paths, TEXTS, strict=False)
    ]
    captions = [codec.encode(example.caption) for example in examples]
    split = train.Split([e.id for e in examples], Whole(examples, 48), captions, [None] * len(examples))
    place.mkdir(exist_ok=True)
    augmentation, score = AugmentConfig(random_crop=0.5, rotate=10), {"valid_primary": 0.0}
    splits = {"train": split, "valid": split}
    return train.Training(settings, augmentation, load, splits, "cpu", 1, place, log, lambda loaded: score)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_an_interrupted_training_goes_on_to_the_same_bits(folders, tmp_path, kind):
    rows = []

    def stop(row):
        if row["step"] == 5 and "loss" in row:
            raise Interrupted

    whole = training(folders(kind), tmp_path / "whole", rows.append).run()
    with pytest.raises(Interrupted):
        training(folders(kind), tmp_path / "parts", stop).run()
    again = []
    resumed = training(folders(kind), tmp_path / "parts", again.append).run()
    assert 4 <= next(row["step"] for row in again if "loss" in row) <= 6
    losses = [row["valid_loss"] for row in rows if "valid_loss" in row]
    assert losses[1] < losses[0]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    kept = load_file(tmp_path / "whole" / train.BEST)
    before = load(folders(kind), whole_config(), lora=LORA).model.state_dict()
    changed = {
        name for name, weight in whole.model.state_dict().items() if not torch.equal(weight, before[name])
    }
    assert changed == set(kept)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [1, 3])
def test_zero_trains_as_plain_training_does(folders, tmp_path, kind, stage):
    plain, sharded = [], []
    for rows, zero in ((plain, 0), (sharded, stage)):
        training(folders(kind), tmp_path / str(zero), rows.append, zero_stage=zero).run()
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (plain, sharded)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def whole_config() -> TrainConfig:
    return TRAIN.model_copy(update={"train_vision": False})


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.ci if k == "llava" else pytest.mark.slow) for k in KINDS],
)
def test_a_run_trains_two_stages_captions_and_scores(folders, tmp_path, kind):
    (tmp_path / "vlm.yaml").write_text(RUN.format(folder=folders(kind)))
    done = harness(tmp_path, "run", "vlm.yaml")
    assert done.returncode == 0, done.stderr
    record = json.loads(next(tmp_path.glob("runs/vlm/*/run.json")).read_text())
    assert record["status"] == "FINISHED"
    found = next(tmp_path.glob("runs/steps/predict-*/candidates.csv")).read_text()
    assert {"beam1", "beam2", "sample1", "sample2"} <= set(re.findall(r"\b(?:beam|sample)\d", found))
    kept = load_file(next(tmp_path.glob("runs/steps/train-*/best.safetensors")))
    assert all(".lora_" in name or "multi_modal_projector" in name or kind != "llava" for name in kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "tiny"}, "the family vlm has no tiny model"),
        ({"checkpoint": "{blip2}"}, "holds a model of type blip-2"),
        ({"language_model": False}, "has a language model"),
        ({"text_checkpoint": "a/b"}, "loads all its parts from model.checkpoint"),
    ],
)
def test_what_the_family_cannot_load_is_a_problem(folders, tmp_path, changes, message):
    (tmp_path / "config.json").write_text('{"model_type": "blip-2"}')
    (tmp_path / "model.safetensors").touch()
    changes = {key: str(tmp_path) if value == "{blip2}" else value for key, value in changes.items()}
    chosen = config(folders("llava")).model_copy(update=changes)
    assert any(message in str(problem) for problem in problems(chosen, TRAIN))


def altered(folder: Path, place: Path, name: str, **values) -> Path:
    """A copy of a checkpoint with other values in a JSON file."""
    shutil.copytree(folder, place)
    file = place / name
    if name == "preprocessor_config.json":
        values = checkpoints.image_processor(place) | values
        (place / "processor_config.json").unlink(missing_ok=True)
    else:
        values = json.loads(file.read_text()) | values
    file.write_text(json.dumps(values))
    return place


def said(folder: Path, new_tokens: int = 0, max_caption_tokens: int = 30, **changes) -> list[str]:
    train = TrainConfig(max_caption_tokens=max_caption_tokens, stages=STAGES)
    return [f"{one} {one.hint}" for one in problems(config(folder, **changes), train, new_tokens)]


def test_a_processor_whose_needs_are_missing_is_told_before(folders, tmp_path):
    assert said(folders("llava")) == []
    only_fast = {"image_processor_type": "Llama4ImageProcessorFast"}  # there is none by PIL
    fast = altered(folders("llava"), tmp_path / "fast", "preprocessor_config.json", **only_fast)
    if find_spec("torchvision") is None:
        (found,) = said(fast)
        assert f"model.checkpoint: the image processor of {fast} can't be loaded: " in found
        assert found.endswith("pip install torchvision")
    unknown = {"image_processor_type": "NoImageProcessor"}
    (found,) = said(altered(folders("llava"), tmp_path / "a", "preprocessor_config.json", **unknown))
    assert "the image processor of" in found
    (tmp_path / "fast" / "preprocessor_config.json").unlink()
    (found,) = said(fast)
    assert "the image processor of" in found
    cut = altered(folders("llava"), tmp_path / "b", "config.json")
    (cut / "tokenizer.json").write_text("{")
    (found,) = said(cut)
    assert f"the tokenizer of {cut} can't be loaded" in found


def test_a_package_that_a_tokenizer_needs_is_named_with_its_command(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(needs, "_is_installed", lambda name: name != "sentencepiece")
    monkeypatch.setattr(vlm_loading.AutoTokenizer, "from_pretrained", missing)
    (found,) = said(folders("gemma3"))
    assert found.endswith(
        "LlamaConverter requires the SentencePiece library but it was not found in your "
        "environment. Install what it needs: pip install sentencepiece"
    )


def missing(*_, **__):
    raise ImportError(
        "\nLlamaConverter requires the SentencePiece library but it was not found in your environment."
    )


def test_lengths_prompts_and_adapters_are_checked_before_weights_are_read(folders, monkeypatch):
    monkeypatch.setattr(vlm_loading, "_weights", None)
    for kind in ("blip", "gemma3"):
        assert said(folders(kind), new_tokens=200) == []
        (found,) = said(folders(kind), new_tokens=256)
        assert "predict.max_new_tokens: a prompt and a caption may have" in found
        (found,) = said(folders(kind), max_caption_tokens=256)
        assert "train.max_caption_tokens: a prompt and a caption may have" in found
    (found,) = said(folders("blip"), lora={"rank": 2, "targets": ["q_proj"]})
    assert "model.lora.targets: no layer of language is named q_proj" in found
    chosen = config(folders("llava")).model_copy(update={"prompt": "what is <image>?"})
    assert "2 image tokens" in str(problems(chosen, TRAIN)[0])


def test_a_prompt_with_the_token_of_an_image_is_a_problem(folders):
    chosen = config(folders("llava")).model_copy(update={"prompt": "what is <image>?"})
    with pytest.raises(UserError, match="2 image tokens"):
        family(chosen).codecs(chosen, folders("llava"), 20)


def test_a_weight_that_the_checkpoint_lacks_is_a_problem(folders, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(folders("llava"), folder)
    weights = load_file(folder / "model.safetensors")
    cut = {name: weight for name, weight in weights.items() if "multi_modal_projector.linear_1" not in name}
    save_file(cut, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"can't stay random: .*linear_1"):
        load(folder)
