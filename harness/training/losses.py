"""The losses of training by name.

A loss function gives one micro-batch's share of a weighted mean over a whole optimiser step. Its weights are
in `train.stages`; its column in `losses.jsonl` is `<name>_loss`. The first paragraph of its docstring
describes its key in the reference.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from harness.models.base import Losses

Loss = Callable[["Losses", Mapping[str, int], float], "Tensor"]
"""(the model's losses of a micro-batch, by loss the tokens, samples or images of the whole step, weight)
-> scalar."""


def caption(computed: "Losses", tokens: Mapping[str, int], weight: float) -> "Tensor":
    """Next token of the caption, from the language model or, without one, from the Q-Former.

    Mean over the tokens of captions, in nats.
    """
    return weight * computed.caption / max(tokens["caption"], 1)


def concept(computed: "Losses", tokens: Mapping[str, int], weight: float) -> "Tensor":
    """Next token of the concept sentence, from the Q-Former; without this loss its text path is frozen.

    Mean over the tokens of concept sentences, in nats.
    """
    return weight * computed.concept / max(tokens["concept"], 1)


def reward(computed: "Losses", tokens: Mapping[str, int], weight: float) -> "Tensor":
    """Self-critical loss of sampled captions, by the metrics of the stage's section `reward`.

    Mean over samples of minus the reward above its baseline times the log-probability of the caption.
    """
    return weight * computed.reward / max(tokens["reward"], 1)


def concepts(computed: "Losses", tokens: Mapping[str, int], weight: float) -> "Tensor":
    """The concepts of an image, predicted from its features by a classifier (`concepts.head`).

    Mean over images of the loss of an image; see `models.head`. An image without concepts has only negatives.
    """
    return weight * computed.concepts / max(tokens["concepts"], 1)


LOSSES: dict[str, Loss] = {
    "caption": caption,
    "concept": concept,
    "reward": reward,
    "concepts": concepts,
}
