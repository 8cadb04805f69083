"""The captioning models by family, and the small checkpoints that stand in where no weights are at hand."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.models.base import Family
    from harness.models.settings import ModelConfig

FAMILIES = {
    "blip2": "harness.models.blip2",
}
"""The module of each `model.family`; what it holds is stated by `base.Family`."""


def family(model: "ModelConfig") -> "Family":
    """The family of the configured model. Its module is imported here, without torch."""
    return importlib.import_module(FAMILIES[model.family])
