"""What the table of an experiment's runs shows, and what it does not: paired differences in words."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from harness.config.editions import EDITIONS
from harness.errors import UserError
from harness.program import spelled
from harness.records import full_name, name_of, task_of
from harness.store import RUNS

Record = Mapping[str, Any]
MOST = 8
"""The most pairs of runs; `harness compare` shows others."""
_SECOND = "rouge1"


def told(records: Sequence[Record]) -> Iterator[str]:
    """A line for each variant against the one before it, of the same seed; then what one seed means."""
    pairs = list(_pairs(records))
    if not pairs:
        return
    yield "Differences, paired by image, with 95 % intervals:"
    for one, other in pairs[:MOST]:
        yield f"  {name_of(one)} -> {name_of(other)}"
        yield from (f"    {line}" for line in _differences(one, other))
    if len(pairs) > MOST:
        runs = " ".join(f"runs/{full_name(record)}" for record in records[:2])
        yield spelled(f"  and {len(pairs) - MOST} more; for any two: harness compare {runs}")
    if len({record["seed"] for record in records}) == 1:
        yield _one_seed(records)


def _pairs(records: Sequence[Record]) -> Iterator[tuple[Record, Record]]:
    scored = [record for record in records if record["scores"].get("valid", {}).get("after")]
    for seed in dict.fromkeys(record["seed"] for record in scored):
        yield from pairwise(record for record in scored if record["seed"] == seed)


def _differences(one: Record, other: Record) -> list[str]:
    """The differences of two runs in the primary score and in ROUGE-1, and which of them are shown."""
    from harness.compare import compare, read_run

    try:
        systems = [read_run(RUNS / full_name(record), name_of(record)) for record in (one, other)]
        names = dict.fromkeys([EDITIONS[one["edition"]].primary, _SECOND])
        wanted = [name for name in names if all(name in system.scores for system in systems)]
        found = compare(systems, wanted, against=systems[0].label) if wanted else []
    except UserError as error:
        return [f"not compared: {'; '.join(map(str, error.problems))}"]
    return [*map(_words, found)] or ["no score in common"]


def _words(one: Any) -> str:
    if one.reason:
        return f"{one.metric} not compared ({one.reason})"
    interval = "" if one.low is None else f" [{one.low:+.4f}, {one.high:+.4f}]"
    verdict = "not shown" if not one.real else "higher" if one.difference > 0 else "lower"
    return f"{one.metric} {one.difference:+.4f}{interval} {verdict}"


def _one_seed(records: Sequence[Record]) -> str:
    seed = records[0]["seed"]
    if any(record["standin_model"] for record in records):
        return (
            f"All runs have seed {seed}. The intervals do not cover training: on another machine, or with "
            "another seed, small models such as these score up to 0.05 higher or lower."
        )
    return (
        f"All runs have seed {seed}. The intervals do not cover training: "
        "`seeds: [1, 2, 3]` in the experiment shows how much seeds differ."
    )


def best(records: Sequence[Record]) -> Record:
    """The run to look at first: the best by the edition's primary score, or else the last one."""
    primary = EDITIONS[records[0]["edition"]].primary
    captioned = [record for record in records if task_of(record) == "captions"]

    def value(record: Record) -> float:
        score = record["scores"].get("valid", {}).get("after", {}).get(primary)
        return -1.0 if score is None or score["value"] is None else score["value"]

    return max(captioned, key=value) if captioned else records[-1]
