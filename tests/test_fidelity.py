"""The behaviour of LAVIS, taken from its source at 506965b and computed here by other means.

If the harness differs from LAVIS on purpose, the test says how.
"""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.models import TEXTS, batch, load_tiny, pixels
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from tokenizers import trainers as token_trainers
from transformers import Blip2ForConditionalGeneration, BlipImageProcessor, PreTrainedTokenizerFast

from harness.config.experiment import load
from harness.config.sections import AugmentConfig
from harness.data.augment import augment, crops
from harness.data.images import decode, resize
from harness.machine import device
from harness.models.blip2 import loading
from harness.models.blip2.text import language_codec
from harness.models.text import IGNORE, clean_caption, concept_sentence, summed_loss
from harness.training import memory, schedule
from harness.training.settings import TrainConfig

device.probe("cpu")
EXPERIMENTS = Path(__file__).parents[1] / "experiments"


# the recipe


def test_the_recipe_is_the_papers_and_otherwise_that_of_caption_coco_ft():
    (config,) = load(EXPERIMENTS / "ablation_364.yaml", [])
    train, crop = config.train, config.data.augment
    assert (config.model.image_size, config.model.prompt, config.predict.num_beams) == (364, "a photo of", 5)
    assert [stage.epochs for stage in train.stages] == [50, 20]
    assert train.batch_size == 8 * 16
    assert {setup.micro_batch for setup in memory.choices(train, 8, "npu")} == {1, 2, 4, 8, 16}
    assert (train.learning_rate, train.min_learning_rate) == (1e-5, 0)
    assert (train.warmup_steps, train.warmup_learning_rate) == (1000, 1e-8)
    assert (train.weight_decay, train.betas) == (0.05, (0.9, 0.999))
    assert (train.label_smoothing, train.max_words) == (0.1, 50)
    assert train.max_caption_tokens == config.predict.max_new_tokens == 128
    assert (train.train_vision, train.gradient_checkpointing, config.seed) == (True, "auto", 42)
    assert train.caption_cleaning == "lavis"
    assert (crop.random_crop, crop.horizontal_flip) == (0.5, False)


# captions


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ('Axial CT (arrow): a "Mass"; 2.5 cm!', "axial ct arrow a mass 2 5 cm"),
        ("*T1* ~3 #1", "t1 3 1"),
        ("X-ray, T1/T2? it's 50 % [a] {b} <c> = d_e & f", "x-ray, t1/t2? it's 50 % [a] {b} <c> = d_e & f"),
        ("  two\n lines\tand   gaps .", "two lines and gaps"),
        ("(.)", ""),
    ],
)
def test_captions_are_lower_case_without_ten_characters(caption, expected):
    assert clean_caption(caption, "lavis", 50) == expected


def test_captions_are_cut_after_fifty_words():
    words = [f"word{n}" for n in range(60)]
    assert clean_caption(". ".join(words), "lavis", 50).split(" ") == words[:50]
    assert clean_caption("As  it Is.", "none", 50) == "As it Is."
    assert concept_sentence(["CT", "Chest"]) == "The image shows CT, Chest."


# the language model's tokens


@pytest.fixture(scope="module")
def opt_codec():
    """A byte-level tokenizer like OPT's, in which a line break is a token that ends a caption."""
    pieces = Tokenizer(token_models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    texts = [f"a photo of {caption}\n" for _, caption in TEXTS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = {"vocab_size": 400, "special_tokens": ["<pad>", "</s>"]}
    pieces.train_from_iterator(texts, token_trainers.BpeTrainer(initial_alphabet=alphabet, **special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="</s>", pad_token="<pad>")
    (line_break,) = tokenizer("\n", add_special_tokens=False).input_ids
    text_config = SimpleNamespace(bos_token_id=1, pad_token_id=0, eos_token_id=line_break)
    return language_codec(tokenizer, text_config, "a photo of", 32), tokenizer


def test_the_language_model_reads_start_prompt_caption_and_line_break(opt_codec):
    """LAVIS tokenises prompt, caption and line break as one string, after the start token."""
    codec, tokenizer = opt_codec
    for _, caption in TEXTS:
        whole = tokenizer(f"a photo of {caption}\n", add_special_tokens=False).input_ids
        assert codec.encode(caption).ids == [tokenizer.bos_token_id, *whole]


def test_start_prompt_and_padding_carry_no_loss_and_the_line_break_does(opt_codec):
    """LAVIS masks as many tokens as start and prompt have, and all padding."""
    codec, tokenizer = opt_codec
    captions = ["ct of the lung", "axial ct of the brain showing a mass"]
    collated = codec.collate([codec.encode(caption) for caption in captions])
    masked = 1 + len(tokenizer("a photo of", add_special_tokens=False).input_ids)
    for row, caption in enumerate(captions):
        spoken = tokenizer(f" {caption}\n", add_special_tokens=False).input_ids
        length = masked + len(spoken)
        labels = collated["labels"][row].tolist()
        assert labels[:masked] == [IGNORE] * masked
        assert labels[masked:length] == spoken
        assert set(labels[length:]) <= {IGNORE}
        assert collated["mask"][row].tolist() == [1] * length + [0] * (len(labels) - length)
    assert (collated["labels"][0] == IGNORE).sum() > masked  # the shorter one is padded


def test_long_captions_keep_the_line_break_that_lavis_cuts_off(opt_codec):
    codec, tokenizer = opt_codec
    long = " ".join(["nodule"] * 60)
    ids = codec.encode(long).ids[len(codec.prompt) :]
    lavis = tokenizer(f"a photo of {long}\n", add_special_tokens=False).input_ids[:32]
    assert codec.end not in lavis
    assert (len(ids), ids[-1], ids.count(codec.end)) == (32, codec.end, 1)
    assert ids[:-1] == tokenizer(f" {long}", add_special_tokens=False).input_ids[:31]
    assert codec.decode(ids) == codec.decode(ids[:-1])


def test_the_caption_loss_is_transformers_own_and_never_smoothed(loaded, tiny_folder):
    """The oracle shifts and averages by itself; LAVIS smooths the Q-Former's losses only."""
    theirs = Blip2ForConditionalGeneration.from_pretrained(tiny_folder).eval()
    images, captions, _ = batch(loaded)
    tokens = torch.full((len(images), theirs.config.num_query_tokens), theirs.config.image_token_index)
    with torch.no_grad():
        expected = theirs(
            pixel_values=images,
            input_ids=torch.cat([tokens, captions["ids"]], dim=1),
            attention_mask=torch.cat([torch.ones_like(tokens), captions["mask"]], dim=1),
            labels=torch.cat([torch.full_like(tokens, IGNORE), captions["labels"]], dim=1),
        ).loss
        found = [loaded.model(images, captions, None, smoothing).caption for smoothing in (0.0, 0.1)]
    predicted = sum(loaded.caption.encode(TEXTS[i][1]).predicted for i in range(len(images)))
    assert predicted == (captions["labels"] != IGNORE).sum()
    for loss in found:
        torch.testing.assert_close(loss / predicted, expected, rtol=1e-5, atol=1e-6)


# the Q-Former's language model


def test_the_qformer_reads_dec_for_cls_and_ends_with_sep(loaded):
    """LAVIS takes what BERT's tokenizer gives and puts [DEC] in the place of [CLS]."""
    tokenizer = loaded.concept.tokenizer
    for text in (TEXTS[0][0], " ".join(["lung"] * 50)):
        bert = tokenizer(text, truncation=True, max_length=loaded.concept.max_tokens + 1).input_ids
        words = tokenizer.convert_ids_to_tokens(bert)
        assert (words[0], words[-1]) == ("[CLS]", "[SEP]")
        dec = tokenizer.convert_tokens_to_ids("[DEC]")
        assert loaded.concept.encode(text).ids == [dec, *bert[1:]]


def test_the_qformers_loss_is_shifted_by_one_and_smoothed(loaded):
    """By the formula: (1 - e) of the right word's cost and e of the mean cost of all words, after [DEC]."""
    images, _, concepts = batch(loaded)
    with torch.no_grad():
        _, states = loaded.model.see(images)
        logits = loaded.model.read(concepts["ids"], states).double()
        found = loaded.model(images, None, concepts, 0.1).concept
    cost = (torch.logsumexp(logits, -1, keepdim=True) - logits).numpy()
    total = 0.0
    for row in range(len(images)):
        ids = loaded.concept.encode(TEXTS[row][0]).ids
        for place, word in enumerate(ids[1:]):
            total += 0.9 * cost[row, place, word] + 0.1 * cost[row, place].mean()
    assert float(found) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_on_logits_by_hand(smoothing):
    logits = torch.tensor([[[2.0, 0.0, -1.0], [0.5, 0.5, 3.0], [9.0, 9.0, 9.0]]])
    labels = torch.tensor([[IGNORE, 0, IGNORE]])
    chances = np.exp([2.0, 0.0, -1.0]) / np.exp([2.0, 0.0, -1.0]).sum()
    expected = -(1 - smoothing) * math.log(chances[0]) - smoothing * np.log(chances).mean()
    assert float(summed_loss(logits, labels, smoothing)) == pytest.approx(expected, rel=1e-6)


# the schedule


def lavis_rates(epochs, per_epoch, warmup):
    """LAVIS's scheduler: by steps in epoch 0, capped at the peak; then by whole epochs."""
    start, peak = 1e-8, 1e-5
    rates = []
    for epoch in range(epochs):
        for step in range(per_epoch):
            if epoch == 0:
                rates.append(min(peak, start + (peak - start) * step / warmup))
            else:
                rates.append(peak * 0.5 * (1 + math.cos(math.pi * epoch / epochs)))
    return rates


@pytest.mark.parametrize(("epochs", "per_epoch"), [(5, 476), (3, 1500), (1, 2000)])
def test_lavis_schedule_on_demand(epochs, per_epoch):
    """476 steps an epoch, as the competition has on eight devices, cut the warm-up at 47.5 % of the peak."""
    config = TrainConfig(warmup_first_epoch_only=True)
    expected = lavis_rates(epochs, per_epoch, 1000)
    found = [
        schedule.learning_rate(config, 1e-5, step, epochs * per_epoch, per_epoch)
        for step in range(epochs * per_epoch)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    if per_epoch == 476:
        assert found[475] / 1e-5 == pytest.approx(0.475, abs=1e-3)


def test_our_schedule_warms_up_to_the_peak_whatever_an_epoch_is():
    """The same ramp and the same half cosine as LAVIS's, each by optimiser steps and in full."""
    config, steps = TrainConfig(), 5 * 476
    rates = [schedule.learning_rate(config, 1e-5, step, steps, 476) for step in range(steps)]
    ramp = np.linspace(1e-8, 1e-5, 1001)
    fall = 1e-5 * 0.5 * (1 + np.cos(np.pi * np.arange(steps - 1000) / (steps - 1000)))
    np.testing.assert_allclose(rates, [*ramp[:1000], *fall], rtol=1e-9)
    assert rates[1000] == max(rates) == 1e-5


# images


def test_images_are_squashed_by_a_bicubic_filter_and_normalised_with_clips_numbers(tmp_path):
    """The oracle is transformers' processor of the published checkpoints, at the paper's size."""
    grey = np.add.outer(np.arange(300), np.arange(500)).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 60, (300, 500, 3), np.uint8)
    Image.fromarray(np.clip(grey[..., None] // 2 + noise, 0, 255).astype(np.uint8)).save(tmp_path / "i.png")
    processor = BlipImageProcessor(size={"height": 364, "width": 364})
    assert processor.resample == Image.Resampling.BICUBIC
    expected = processor(Image.open(tmp_path / "i.png"), return_tensors="pt")["pixel_values"]
    mean, std = loading._pixel_units(tmp_path)  # a folder that says nothing of its own
    assert mean == (0.48145466, 0.4578275, 0.40821073)
    assert std == (0.26862954, 0.26130258, 0.27577711)
    ours = loading.Loaded(SimpleNamespace(device=torch.device("cpu")), None, None, mean, std)
    found = ours.normalise(torch.from_numpy(resize(decode(tmp_path / "i.png"), 364).copy())[None])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fp32", [True, False])
def test_the_vit_stays_out_of_autocast_where_asked_to(tiny_folder, fp32):
    """Its weights are fp32 in any case, as LAVIS has them in fine-tuning; this is its arithmetic, too."""
    model = load_tiny(tiny_folder).model.eval()
    images = torch.randn(2, 3, 64, 64)
    seen = {}
    for name in ("vision_model.encoder.layers.0.mlp.fc1", "qformer.encoder.layer.0.intermediate_query.dense"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out.dtype}))
    with torch.no_grad():
        exact = model.vision_model(pixel_values=images).last_hidden_state
        model.autocast_dtype, model.vision_in_fp32 = torch.bfloat16, fp32
        outputs = []
        model.vision_model.register_forward_hook(lambda m, i, out: outputs.append(out.last_hidden_state))
        with model.autocast():
            model.see(images)
    assert list(seen.values()) == [torch.float32 if fp32 else torch.bfloat16, torch.bfloat16]
    assert torch.equal(outputs[0], exact) == fp32


# augmentation


def lavis_crop(size, smallest, random):
    """RandomResizedCrop's published algorithm, one image at a time; left, top, width, height."""
    for _ in range(10):
        area = size * size * random.uniform(smallest, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= size and 0 < height <= size:
            left, top = random.integers(0, size - width + 1), random.integers(0, size - height + 1)
            return left, top, width, height
    return 0, 0, size, size


@pytest.mark.parametrize(("size", "smallest"), [(364, 0.5), (64, 0.05), (224, 0.97)])
def test_crops_are_distributed_as_lavis_draws_them(size, smallest):
    """From 0.97 on, ten tries often find nothing, and the whole image is taken."""
    from scipy.stats import ks_2samp

    count, random = 20_000, np.random.default_rng(1)
    theirs = np.array([lavis_crop(size, smallest, random) for _ in range(count)], float).T
    ours = crops(count, size, smallest, torch.Generator().manual_seed(0)).double().numpy()
    assert (ours == ours.round()).all()
    assert (ours[:2] >= 0).all()
    assert (ours[:2] + ours[2:] <= size).all()

    def traits(left, top, width, height):
        return {
            "area": width * height,
            "ratio": width / height,
            "left": left,
            "top": top,
            "sum": left + width - top,
        }

    for name, values in traits(*ours).items():
        assert ks_2samp(values, traits(*theirs)[name]).pvalue > 1e-3, name
    whole = [(sides[2:] == size).all(0).mean() for sides in (ours, theirs)]
    assert whole[0] == pytest.approx(whole[1], abs=4 * math.sqrt(0.25 / count))


def test_a_crop_is_shown_at_full_size():
    """The oracle is torch's own bilinear enlargement of the same box; its edges see nothing outside it."""
    size, count = 64, 8
    images = torch.from_numpy(pixels(count, size, seed=5))
    found = augment(images, AugmentConfig(random_crop=0.5), torch.Generator().manual_seed(3))
    boxes = crops(count, size, 0.5, torch.Generator().manual_seed(3)).T.int().tolist()
    for image, shown, (left, top, width, height) in zip(images, found, boxes, strict=True):
        box = image[top : top + height, left : left + width].permute(2, 0, 1).float()
        expected = F.interpolate(box[None], (size, size), mode="bilinear")[0].permute(1, 2, 0)
        inner = slice(2, -2)
        assert (shown[inner, inner].float() - expected[inner, inner]).abs().max() <= 0.51


def test_nothing_is_mirrored_unless_asked_for():
    """LAVIS mirrors half of the images; in a radiograph that swaps left and right."""
    assert AugmentConfig().horizontal_flip is False
    assert "swaps left and right" in AugmentConfig.model_fields["horizontal_flip"].description
    ramp = torch.arange(64, dtype=torch.uint8).expand(64, 64)[None, ..., None].expand(50, -1, -1, 3)
    for settings, some in (({}, False), ({"horizontal_flip": True}, True)):
        config = AugmentConfig(random_crop=0.5, **settings)
        shown = augment(ramp, config, torch.Generator().manual_seed(0)).float()
        falling = shown[:, 32, 0, 0] > shown[:, 32, -1, 0]
        assert bool(falling.any()) == some
        assert not falling.all()
