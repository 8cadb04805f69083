"""Python that captions by an exported vision-language model, by transformers alone."""

import json
from pathlib import Path
from typing import Any

from harness.models.base import Usage
from harness.models.settings import ModelConfig
from harness.models.vlm.architectures import ARCHITECTURES

_BEGINNING = '''
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import {classes}

folder, side = Path(__file__).parent, {side}
processor = AutoProcessor.from_pretrained(folder)
try:  # transformers 4: by PIL, as in training; another one would give slightly other pixels
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
except ImportError:
    pass
model = {model}.from_pretrained(folder, dtype=torch.float32).eval()


def shrunk(image):
    """The image with its longer side at most `side` pixels."""
    longest = max(image.size)
    if longest <= side:
        return image
    sides = [max(1, round(length * side / longest)) for length in image.size]
    return image.resize(sides, Image.Resampling.BICUBIC)


'''
_CHAT = """template = processor.chat_template or processor.tokenizer.chat_template
said = [{"type": "image"}, {"type": "text", "text": {words}}]
turn = [{"role": "user", "content": said}]
how = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
text = processor.tokenizer.apply_chat_template(turn, **how)
begun = bool(processor.tokenizer.bos_token) and text.startswith(processor.tokenizer.bos_token)
options = {"add_special_tokens": not begun}
"""
_PLAIN = "text, options = {words}, {}\n"
_END = """for file in sys.argv[1:]:
    image = shrunk(Image.open(file).convert("RGB"))
    inputs = processor(images=image, text=text, return_tensors="pt", **options)
{drop}    with torch.inference_mode():
        ids = model.generate(**inputs, generation_config=model.generation_config)
    caption = processor.tokenizer.decode(ids[0, {start}], skip_special_tokens=True)
    print(" ".join(caption.split()))
"""


def usage(model: ModelConfig, loaded: Any) -> Usage:
    """How the exported model is used without the harness; `loaded` is a `WholeLoaded`."""
    config, words = loaded.model.model.config, loaded.caption.words
    kind, name = config.model_type, type(loaded.model.model).__name__
    blip = kind == "blip"
    own = {"paligemma": f"<image>{words}", "blip": words, "instructblip": words}
    chats = kind not in own and _has_template(loaded.folder)
    plain = own.get(kind, ARCHITECTURES[kind].plain.format(prompt=words))
    read_by = "BlipForConditionalGeneration" if blip else "AutoModelForImageTextToText"
    filled = {
        "{classes}": f"AutoImageProcessor, AutoProcessor, {read_by}",
        "{model}": read_by,
        "{drop}": "" if "gemma" in kind else '    inputs.pop("token_type_ids", None)\n',
        "{side}": str(model.image_size),
        "{words}": repr(words if chats else plain),
        "{start}": 'inputs["input_ids"].shape[1] - 1 :' if blip else 'inputs["input_ids"].shape[1] :',
    }
    script = _BEGINNING.strip() + "\n\n\n" + (_CHAT if chats else _PLAIN) + _END
    for place, text in filled.items():
        script = script.replace(place, text)
    return Usage(f"transformers loads it as `{name}`, with its processor.", script)


def _has_template(folder: Path) -> bool:
    """Whether a checkpoint has a chat template."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    file = folder / "tokenizer_config.json"
    return file.is_file() and "chat_template" in json.loads(file.read_text(encoding="utf-8"))
