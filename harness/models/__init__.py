"""The captioning models by family, and small checkpoints that replace weights that are not at hand."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.models.base import Family
    from harness.models.settings import ModelConfig

FAMILIES = {
    "blip2": "harness.models.blip2",
    "vlm": "harness.models.vlm",
}
"""The module of each `model.family`; `base.Family` describes its functions."""


def family(model: "ModelConfig") -> "Family":
    """The family of the configured model; imports its module, without torch."""
    return importlib.import_module(FAMILIES[model.family])
