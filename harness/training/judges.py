"""The metrics of self-critical stages: which ones, and the memory that their models need; no torch."""

from typing import TYPE_CHECKING, Any

from harness.config.editions import EDITIONS
from harness.metrics import METRICS
from harness.metrics.base import STANDIN
from harness.models import checkpoints
from harness.training.settings import IMAGE_GAP, TrainConfig

if TYPE_CHECKING:
    from harness.config.schema import Config


def rewarding(config: "Config | Any") -> tuple[str, ...]:
    """The metrics that reward captions in self-critical stages."""
    names = [name for reward in config.train.rewards for name in reward.metrics]
    parts = [part for name in names for part in EDITIONS[config.edition].parts(name)]
    return tuple(dict.fromkeys(parts))


def watched(config: TrainConfig) -> tuple[str, ...]:
    """The validation scores that may end a self-critical stage."""
    return tuple(dict.fromkeys(name for reward in config.rewards for name in reward.stop_when))


def needed(config: "Config | Any") -> tuple[str, ...]:
    """The metrics that reward captions or may end a stage."""
    names = [*rewarding(config), *watched(config.train)]
    return tuple(dict.fromkeys(name for name in names if name != IMAGE_GAP))


def size(config: "Config") -> int:
    """Bytes of the models of rewarding metrics, by their files; those that are not at hand count nothing."""
    weights = {METRICS[name].weights for name in rewarding(config) if name in METRICS}
    named = {one.named(config.score) for one in weights if one is not None} - {None, STANDIN}
    found = filter(None, map(checkpoints.find, sorted(map(str, named))))
    return sum(checkpoints.size(one.folder) for one in found)
