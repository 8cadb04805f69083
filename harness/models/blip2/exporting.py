"""BLIP-2 as a checkpoint folder for transformers and the harness, and the code that captions by it."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import BlipImageProcessor, PreTrainedTokenizerBase

from harness.models.base import Usage
from harness.models.blip2.loading import QFORMER_TOKENIZER
from harness.models.loading import Loaded
from harness.models.text import Codec

_IMAGE = "<image>"
"""The token in whose places transformers puts the image's features."""
_CLASS = "Blip2ForConditionalGeneration"
_SCRIPT = """
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, Blip2Processor
try:  # of transformers 5; torchvision would give slightly other pixels
    from transformers import BlipImageProcessorPil as BlipImageProcessor
except ImportError:
    from transformers import BlipImageProcessor

folder = Path(__file__).parent
images, words = BlipImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
processor = Blip2Processor(images, words, num_query_tokens={queries})
model = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
for file in sys.argv[1:]:
    inputs = processor(images=Image.open(file).convert("RGB"), text={words!r}, return_tensors="pt")
    # the language model does not know the model's generation_config.json unless it is given
    with torch.inference_mode():
        ids = model.generate(**inputs, generation_config=model.generation_config)
    caption = words.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(" ".join(caption.split()))
"""


def export(loaded: Loaded, folder: Path) -> None:
    """Write a checkpoint folder that `load` reads without further checkpoints; transformers' BLIP-2 too.

    Without a language model, only this harness reads it.
    """
    model, speaks = loaded.model, loaded.model.language_model is not None
    if speaks:
        model.config.text_config = model.language_model.config
        model.config.text_config.eos_token_id = loaded.caption.end
        words = _with_image_token(loaded)
        words.save_pretrained(folder)
    model.config.qformer_config.vocab_size = len(loaded.concept.tokenizer)
    model.save_pretrained(folder)
    loaded.concept.tokenizer.save_pretrained(folder / QFORMER_TOKENIZER)
    images = BlipImageProcessor(
        image_mean=list(loaded.mean),
        image_std=list(loaded.std),
        size={"height": (side := model.config.vision_config.image_size), "width": side},
    )
    if speaks:
        from transformers import Blip2Processor

        Blip2Processor(images, words, num_query_tokens=model.config.num_query_tokens).save_pretrained(folder)
        _as_theirs(folder / "config.json", model.config.text_config)
    images.save_pretrained(folder)


def usage(loaded: Loaded) -> Usage:
    """How the exported folder is used without the harness."""
    model = loaded.model
    if model.language_model is None:
        what = "This is a BLIP-2 whose Q-Former writes the captions, without a language model. transformers "
        return Usage(f"{what}has no such class, so only the harness captions with it.")
    what = f"transformers loads it as `{_CLASS}`. It reports weights that it does not use: those of the "
    what += "Q-Former's text path, which only the harness reads."
    queries = model.config.num_query_tokens
    script = _SCRIPT.replace("{queries}", str(queries)).replace("{words!r}", repr(loaded.caption.words))
    is_new = _IMAGE not in loaded.caption.tokenizer.get_vocab()
    never = {"suppress_tokens": [model.config.image_token_index]} if is_new else {}
    return Usage(what, script.strip() + "\n", never)


def _with_image_token(loaded: Loaded) -> PreTrainedTokenizerBase:
    """A tokenizer that begins a text as the codec does, and has a token for the image, as has the model."""
    model, words = loaded.model, copy.deepcopy(loaded.caption.tokenizer)
    words.add_tokens([AddedToken(_IMAGE, normalized=False, special=True)], special_tokens=True)
    model.config.image_token_index = image = words.convert_tokens_to_ids(_IMAGE)
    rows = model.language_model.get_input_embeddings().weight
    if image >= len(rows):
        mean = rows.detach().mean(0)
        model.language_model.resize_token_embeddings(image + 1, mean_resizing=False)
        with torch.no_grad():
            for table in (model.language_model.get_input_embeddings(), model.language_model.lm_head):
                table.weight[image] = mean if table.weight.shape[1] == len(mean) else 0
    if words(loaded.caption.words).input_ids != list(loaded.caption.prompt):
        _begin_as(words, loaded.caption)
    return words


def _begin_as(words: Any, codec: Codec) -> None:
    """Let a tokenizer put the codec's start token before a text."""
    start = words.convert_ids_to_tokens(codec.prompt[0])
    words.bos_token = start
    template = TemplateProcessing(single=f"{start} $A", special_tokens=[(start, codec.prompt[0])])
    words.backend_tokenizer.post_processor = template


def _as_theirs(file: Path, text: Any) -> None:
    """Name transformers' class in `config.json`, and say of the embeddings what the language model says."""
    values = json.loads(file.read_text(encoding="utf-8"))
    values |= {"architectures": [_CLASS], "tie_word_embeddings": bool(text.tie_word_embeddings)}
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
