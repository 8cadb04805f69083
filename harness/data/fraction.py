"""A share of a data set for quick looks: which images `data.fraction` chooses, and how results say so.

The choice depends on the id of an image only. So it is the same on every machine and in any order, and the
images of a smaller share are among those of a larger one.
"""

from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any

from harness.config.sections import FractionConfig
from harness.data.listing import Listing, Row


def chosen(image: str, share: float) -> bool:
    """Whether the image with this id is in a share from 0 to 1 of its split; independent of `halves.half`."""
    place = sha256(image.encode("utf-8", "surrogatepass")).digest()[1:9]  # the first byte gives the half
    return int.from_bytes(place) < share * 2**64


def keep(listing: Listing, fraction: FractionConfig) -> Listing:
    """The listing without the rows that are not chosen; nothing more is found out about those."""
    shares = {"train": fraction.train, "valid": fraction.valid}
    if min(shares.values()) == 1:
        return listing

    def kept(row: Row | None) -> bool:
        return row is None or chosen(row[1], shares.get(row[0], 1.0))

    return replace(
        listing,
        splits={
            split: [example for example in examples if kept((split, example.id))]
            for split, examples in listing.splits.items()
        },
        files={row: file for row, file in listing.files.items() if kept(row)},
        lacking={row: why for row, why in listing.lacking.items() if kept(row)},
        manual={
            split: {image: cuis for image, cuis in found.items() if kept((split, image))}
            for split, found in listing.manual.items()
        },
        findings=[finding for finding in listing.findings if kept(finding.row)],
    )


def worded(fraction: Any) -> str:
    """The shares below 1 of `data.fraction` in a config or record, such as `10% of train`; else empty."""
    if isinstance(fraction, FractionConfig):
        fraction = fraction.model_dump()
    if not isinstance(fraction, Mapping):
        return ""
    shares = {split: fraction.get(split) for split in ("train", "valid")}
    return " and ".join(
        f"{100 * share:.4g}% of {split}"
        for split, share in shares.items()
        if isinstance(share, int | float) and share < 1
    )


def looked(record: Mapping[str, Any]) -> str:
    """What a run is a quick look at, by its own data or by those of runs that it uses; else empty."""
    own = worded(record["config"].get("data", {}).get("fraction"))
    return own or "; ".join(f"{share} in {run}" for run, share in record.get("looks", {}).items())
