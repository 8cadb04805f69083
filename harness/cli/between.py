"""What the table of an experiment's runs shows, and what it does not: paired differences in words."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from harness.config.editions import EDITIONS
from harness.data.halves import HELD
from harness.errors import UserError
from harness.output.program import spelled
from harness.records import full_name, name_of, task_of
from harness.store import RUNS

Record = Mapping[str, Any]
MOST = 8
"""The most pairs of runs; `harness compare` shows others."""
_SECOND, _OF_CONCEPTS = "rouge1", "f1"


def described(records: Sequence[Record]) -> Iterator[str]:
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
    scored = [record for record in records if _scores(record)]
    for kind in dict.fromkeys(map(_kind, scored)):
        yield from pairwise(record for record in scored if _kind(record) == kind)


def _kind(record: Record) -> tuple[str, int]:
    return task_of(record), record["seed"]


def _scores(record: Record) -> Mapping[str, Any]:
    """The scores on validation; those of concepts are on the half on which no threshold was chosen."""
    if task_of(record) == "concepts":
        return ((record.get("concepts") or {}).get("halves") or {}).get(HELD, {})
    return record["scores"].get("valid", {}).get("after", {})


def _differences(one: Record, other: Record) -> list[str]:
    """The differences of two runs in the primary score and in ROUGE-1, and which of them are shown.

    Runs of concepts are compared by F1 on the half that `_scores` takes.
    """
    from harness.scoring.compare import compare, on_half, read_run

    try:
        systems = [read_run(RUNS / full_name(record), name_of(record)) for record in (one, other)]
        names = dict.fromkeys([EDITIONS[one["edition"]].primary, _SECOND])
        if task_of(one) == "concepts":
            systems, names = [on_half(system, HELD) for system in systems], {_OF_CONCEPTS: None}
        wanted = [name for name in names if all(name in system.scores for system in systems)]
        found = compare(systems, wanted, against=systems[0].label) if wanted else []
    except UserError as error:
        return [f"not compared: {'; '.join(map(str, error.problems))}"]
    return [*map(_words, found)] or ["no score in common"]


def _words(one: Any) -> str:
    if one.reason:
        return f"{one.metric} not compared ({one.reason})"
    interval = "" if one.low is None else f" [{one.low:+.4f}, {one.high:+.4f}]"
    return f"{one.metric} {one.difference:+.4f}{interval} {one.side}"


def _one_seed(records: Sequence[Record]) -> str:
    seed = records[0]["seed"]
    if any(record["standin_model"] and task_of(record) == "captions" for record in records):
        return (
            f"All runs have seed {seed}. The intervals do not cover training: on another machine, or with "
            "another seed, small models such as these score up to 0.05 higher or lower."
        )
    return (
        f"All runs have seed {seed}. The intervals do not cover training: "
        "`seeds: [1, 2, 3]` in the experiment shows how much seeds differ."
    )


def best(records: Sequence[Record]) -> Record:
    """The run to look at first: the best one that captions, else the best of concepts, else the last."""

    def value(record: Record) -> float:
        names = (EDITIONS[record["edition"]].primary, _OF_CONCEPTS)
        found = [_scores(record)[name]["value"] for name in names if name in _scores(record)]
        return -1.0 if found in ([], [None]) else found[0]

    captioned = [record for record in records if task_of(record) == "captions"]
    scored = [record for record in captioned or records if _scores(record)]
    return max(scored, key=value, default=records[-1])
