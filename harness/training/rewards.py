"""The self-critical gradient (REINFORCE with a baseline): pure functions of rewards and logits.

For each sample the loss is -(reward - baseline) x log p, where p is the probability that it was sampled with.
Its gradient is an unbiased estimate of the gradient of minus the expected reward, if the baseline does not
depend on the sample (Rennie et al. 2017; Kool et al. 2019 for the mean of the other samples).
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from harness.config.sections import Truncation
from harness.decoding.search import truncated
from harness.models.text import IGNORE


def mixed(
    values: Mapping[str, np.ndarray], weights: Mapping[str, float], like: np.ndarray | None = None
) -> np.ndarray:
    """Weighted sum of metrics, each (n,); each is standardised first over the rows `like`, if there are any.

    A metric that is the same in all of these rows adds 0.
    """
    total = np.zeros(len(next(iter(values.values()))))
    for name, weight in weights.items():
        value = values[name]
        if like is not None:
            deviation = value[like].std()
            value = (value - value[like].mean()) / deviation if deviation > 0 else np.zeros_like(value)
        total += weight * value
    return total


def baseline(rewards: np.ndarray) -> np.ndarray:
    """For each of an image's samples the mean reward of its others: (B, N) -> (B, N), N > 1."""
    count = rewards.shape[1]
    # as differences, so that equal rewards have exactly the advantage 0
    return rewards - (rewards[:, :, None] - rewards[:, None, :]).sum(2) / (count - 1)


def log_probabilities(logits: Tensor, tokens: Tensor, settings: Truncation) -> Tensor:
    """Log-probability (M,) of tokens (M,) in the truncated distributions of logits (M, V).

    A token counts as one of those that are kept: it was sampled, and only rounding can have cut it.
    """
    kept = truncated(logits, settings)
    own = kept.gather(1, tokens[:, None])[:, 0]
    # log p = scaled logit - log sum; the best token is never cut, so it tells the sum
    scaled, best = logits.float() / settings.temperature, kept.argmax(-1, keepdim=True)
    least = scaled.gather(1, tokens[:, None]) - scaled.gather(1, best) + kept.gather(1, best)
    joined = torch.nn.functional.logsigmoid(least[:, 0])  # x - log(1 + e^x): the sum has one term more
    return torch.where(torch.isneginf(own), joined, own)


def loss(logits: Tensor, labels: Tensor, advantages: Tensor, settings: Truncation) -> Tensor:
    """Minus the sum over samples (R,) of advantage x log p, not divided by length.

    logits (R, T, V) of the tokens after each of the ids; labels (R, T) are -100 for tokens that were not
    sampled; advantages (R,).
    """
    sampled = labels[:, 1:] != IGNORE
    chances = log_probabilities(logits[:, :-1][sampled], labels[:, 1:][sampled], settings)
    weights = advantages[:, None].expand(sampled.shape)[sampled]
    return -(weights * chances).sum()
