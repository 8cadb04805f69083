"""The losses of training by name.

A loss is what one micro-batch adds to a weighted mean over a whole optimiser step. Its weights in each stage
are `train.stages`; its column in `losses.jsonl` is `<name>_loss`. The first paragraph of its docstring
describes its key in the reference.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from harness.models.base import Losses

Loss = Callable[["Losses", Mapping[str, int], float], "Tensor"]
"""(what the model computed of a micro-batch, tokens of the whole step by loss, weight) -> scalar."""


def caption(computed: "Losses", tokens: Mapping[str, int], weight: float) -> "Tensor":
    """Next token of the caption, by the language model or, without one, by the Q-Former.

    Mean over the tokens of captions, in nats.
    """
    return weight * computed.caption / max(tokens["caption"], 1)


def concept(computed: "Losses", tokens: Mapping[str, int], weight: float) -> "Tensor":
    """Next token of the sentence of concepts, by the Q-Former; without it, its text path is frozen.

    Mean over the tokens of sentences of concepts, in nats.
    """
    return weight * computed.concept / max(tokens["concept"], 1)


LOSSES: dict[str, Loss] = {
    "caption": caption,
    "concept": concept,
}
