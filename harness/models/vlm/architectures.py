"""What the harness knows of each model type of transformers that this family loads; it needs no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Architecture:
    """The modules of a model by part, and how it reads a user turn.

    `vision`, `connector` and `language` are names of modules; a connector may lie inside another part. `body`
    is the module that reads embeddings and makes the attention masks from what it gets. `plain` is the user
    turn where there is no chat template, and `separator` stands between it and an answer. `marked`: which
    tokens get the token type 1, those of the image or those of the answer; the model attends to the others
    in both directions, or to the image's. `first` is the position of the first token. `rotated`: positions
    have three axes, which the model makes from the grid of image patches.
    """

    vision: tuple[str, ...]
    connector: tuple[str, ...]
    language: tuple[str, ...]
    body: str
    plain: str
    separator: str = ""
    marked: Literal["image", "answer"] | None = None
    first: int = 0
    rotated: bool = False

    def part_of(self, name: str) -> str:
        """The part of a weight with this name."""
        modules = set(name.split("."))
        for part in ("connector", "vision", "language"):
            if modules & set(getattr(self, part)):
                return part
        raise ValueError(f"{name} is in no part of the model")

    def modules(self, parts: "set[str] | frozenset[str]") -> list[str]:
        """The names of the modules of these parts."""
        return [name for part in sorted(parts) for name in getattr(self, part)]


_LLAVA = Architecture(
    vision=("vision_tower",),
    connector=("multi_modal_projector", "image_newline"),
    language=("language_model", "lm_head"),
    body="model.language_model",
    plain="USER: <image>\n{prompt} ASSISTANT:",
    separator=" ",
)
_QWEN = Architecture(
    vision=("visual",),
    connector=("merger", "deepstack_merger_list"),
    language=("language_model", "lm_head"),
    body="model.language_model",
    plain="<|vision_start|><|image_pad|><|vision_end|>{prompt}\n",
    rotated=True,
)
ARCHITECTURES = {
    "blip": Architecture(
        vision=("vision_model",),
        connector=("crossattention",),
        language=("text_decoder",),
        body="text_decoder.bert",
        plain="{prompt}",
        separator=" ",
    ),
    "instructblip": Architecture(
        vision=("vision_model",),
        connector=("query_tokens", "qformer", "language_projection"),
        language=("language_model",),
        body="language_model.model",
        plain="{prompt}",
        separator=" ",
    ),
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "paligemma": Architecture(
        vision=("vision_tower",),
        connector=("multi_modal_projector",),
        language=("language_model", "lm_head"),
        body="model",
        plain="{prompt}",
        marked="answer",
        first=1,
    ),
    "gemma3": Architecture(
        vision=("vision_tower",),
        connector=("multi_modal_projector",),
        language=("language_model", "lm_head"),
        body="model",
        plain="<start_of_image>{prompt}\n",
        marked="image",
    ),
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
}
"""By `model_type` in `config.json`."""
