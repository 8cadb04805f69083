"""Table 3 of the paper next to our runs: the score of each row, and the change from the row above."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, product
from typing import Any

from harness.errors import UserError
from harness.leaderboard.entries import Board, Entry
from harness.scoring.compare import Difference, adjust, compare, holm, read_run

TABLE_3: Sequence[tuple[str, tuple[bool, int, bool], Mapping[str, float]]] = (
    ("Q-Former only, 224 pixels", (False, 224, False), {"bertscore": 0.541, "rouge1": 0.160}),
    ("with OPT-2.7B, 224 pixels", (True, 224, False), {"bertscore": 0.593, "rouge1": 0.249}),
    ("with OPT-2.7B, 364 pixels", (True, 364, False), {"bertscore": 0.608, "rouge1": 0.255}),
    ("with OPT-2.7B, 364 pixels, de-duplicated", (True, 364, True), {"bertscore": 0.628, "rouge1": 0.253}),
)
"""Table 3 of closeAI2023's working notes (validation), by (language model, image size, de-duplicated)."""

_KIND = ("model.language_model", "model.image_size", "postprocess.deduplicate")


def table_3(board: Board) -> list[dict[str, Any]]:
    """The rows of the paper's Table 3 with our runs of the same kind on validation, and their differences.

    A difference is significant if the paper's value, which has no interval, lies outside our 95 % interval. A
    run that is `apart` has no difference. A board of a half has no such table.
    """
    if board.edition != 2023 or board.half:
        return []
    rows: list[dict[str, Any]] = []
    for name, kind, paper in TABLE_3:
        ours = [e for e in board.entries if e.split == "valid" and e.scores and _kind(e) == kind]
        for entry in ours or [None]:
            cells = {metric: _beside(value, entry, metric) for metric, value in paper.items()}
            run = f"{entry.record['name']}/{entry.run}" if entry else None
            experiment = entry.record["name"] if entry else None
            apart = entry.apart if entry else None
            rows.append({"row": name, "run": run, "experiment": experiment, "apart": apart, "scores": cells})
    return rows


def _kind(entry: Entry) -> tuple[bool | int | None, ...]:
    return tuple(entry.record["parameters"].get(key) for key in _KIND)


def _beside(paper: float, entry: Entry | None, metric: str) -> dict[str, Any]:
    score = entry.score(metric) if entry else None
    cell: dict[str, Any] = {"paper": paper, "ours": score}
    if entry and score and score["value"] is not None and score["official"] and not entry.apart:
        cell["difference"] = score["value"] - paper
        if score["low"] is not None:
            cell["significant"] = not score["low"] <= paper <= score["high"]
    return cell


def steps(board: Board) -> list[dict[str, Any]]:
    """The change of each row of Table 3 from the row above: the paper's difference and ours.

    `scoring.compare` compares runs of one experiment and seed that differ only in this step, ranked or not.
    It gives `difference`, its interval, `p` and `adjusted_p` (Holm's, over the steps of that experiment and
    seed), or a `reason`. A step without such runs appears once, without names.
    """
    if board.edition != 2023 or board.half:
        return []
    families = [list(_family(entries)) for entries in _by_experiment_and_seed(board)]
    found = []
    for at, (above, below) in enumerate(pairwise(TABLE_3)):
        paper = {metric: below[2][metric] - value for metric, value in above[2].items()}
        ours = [row for family in families for place, row in family if place == at]
        found += [
            {"from": above[0], "to": below[0], "paper": paper} | row
            for row in ours or [{"experiment": None, "a": None, "b": None, "scores": {}}]
        ]
    return found


def _by_experiment_and_seed(board: Board) -> Iterator[list[Entry]]:
    entries = [e for e in board.entries if e.split == "valid" and e.scores]
    for key in dict.fromkeys((e.folder.parent, e.record["seed"]) for e in entries):
        yield [e for e in entries if (e.folder.parent, e.record["seed"]) == key]


def _family(entries: Sequence[Entry]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The index and content of each step of the table for one experiment and seed."""
    pairs = [
        (at, a, b)
        for at, kinds in enumerate(pairwise(kind for _, kind, _ in TABLE_3))
        for a, b in product(*([e for e in entries if _kind(e) == kind] for kind in kinds))
        if _rest(a) == _rest(b)
    ]
    compared = [_compared(a, b) for _, a, b in pairs]
    for metric in TABLE_3[0][2]:
        tested = [one for one in compared if one[metric].p is not None]
        for one, p in zip(tested, holm([one[metric].p for one in tested]), strict=True):
            one[metric] = _adjusted(one[metric], p)
    for (at, a, b), differences in zip(pairs, compared, strict=True):
        scores = {metric: _shown(one, (a, b)) for metric, one in differences.items()}
        yield at, {"experiment": a.record["name"], "a": a.run, "b": b.run, "scores": scores}


def _shown(one: Difference, entries: Sequence[Entry]) -> dict[str, Any]:
    official = all((entry.score(one.metric) or {}).get("official") for entry in entries)
    return vars(one) | {"verdict": one.verdict, "official": official}


def _rest(entry: Entry) -> dict[str, Any]:
    """The config without the keys in which the rows of Table 3 differ."""
    return {key: value for key, value in entry.record["parameters"].items() if key not in ("variant", *_KIND)}


def _compared(a: Entry, b: Entry) -> dict[str, Difference]:
    metrics = list(TABLE_3[0][2])
    try:
        return {one.metric: one for one in compare([read_run(e.folder, e.run) for e in (a, b)], metrics)}
    except UserError as error:
        reason = "; ".join(problem.what for problem in error.problems)
        return {metric: Difference(metric, a.run, b.run, reason=reason) for metric in metrics}


def _adjusted(one: Difference, p: float) -> Difference:
    return adjust(one, p)
