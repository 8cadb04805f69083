"""The images that open a page: the two best, the two worst and two at random."""

import random
from collections.abc import Iterator, Mapping, Sequence

EACH = 2
"""Images of each kind."""
_SEED = 0


def chosen(ids: Sequence[str], scores: Mapping[str, float | None]) -> list[tuple[str, str]]:
    """(kind, id) of each example, best and worst by `scores`, which may lack some; equal ones in order.

    An image is chosen once. Without scores there are only random ones. They are the same in every call.
    """
    scored = sorted((key for key in ids if scores.get(key) is not None), key=lambda key: -scores[key])
    best = scored[:EACH]
    worst = scored[EACH:][-EACH:][::-1]
    rest = [key for key in ids if key not in {*best, *worst}]
    wanted = min(EACH if scored else 3 * EACH, len(rest))
    return list(_kinds({"best": best, "worst": worst, "random": random.Random(_SEED).sample(rest, wanted)}))


def _kinds(found: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    for kind, ids in found.items():
        for key in ids:
            yield kind, key
