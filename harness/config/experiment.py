"""Reads an experiment file into its runs: base, variants, seeds, --set, and the place of every mistake."""

import copy
import difflib
import functools
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from harness.config.schema import Config, keys
from harness.config.words import allowed
from harness.config.yamlfile import KeyPath, Place, no_file, parse, parse_text, places_of
from harness.errors import AcrossKeys, Problem, UserError

EXPERIMENTS = Path("experiments")
"""Where an experiment is looked for by its name alone."""
_BASES, _RUNS = 20, 1_000
"""The most files in one chain of bases, and the most runs of one file."""
_OF_THE_FILE = {
    ("seeds",): "--set seed=7 gives one run of another seed",
    ("variants",): "--variant chooses among the variants",
    ("base",): "write another file for another base",
}
"""Keys that no run has, and what to do instead of setting them."""
_SHOWN, _LONGEST = 50, 80
"""The most mistakes of one run that are shown, and the most characters of a value."""


def load(
    file: Path | str,
    sets: Sequence[str] = (),
    amended: tuple[Mapping, Mapping[KeyPath, Place]] = ({}, {}),
    only: Sequence[str] = (),
) -> list[Config]:
    """Read an experiment file into its runs: variants x seeds, in the order written.

    `amended` is a pair of values and their places. These values override the file in every run, and `--set`
    overrides them. `only` are the names of variants to read, by default all. Raises `UserError` with all
    problems of the file, its bases, `amended` and `--set` at once.
    """
    values, places, problems = _read_with_bases(Path(file), ())
    if "space" in values:
        hint = f"Run it by: harness study {file}"
        raise UserError([Problem("a study, not an experiment", file, hint=hint)])
    overrides, set_problems = parse_sets(sets)
    problems += set_problems
    variants = _variants(values, places, file, problems)
    seeds = _seeds(values, variants, places, file, problems)
    if only:
        problems += _unknown_variants(variants, only, file)
        variants = {name: changes for name, changes in variants.items() if name in only}
    if "seed" in amended[0] or ("seed",) in dict(overrides):
        seeds = [None]
    if len(variants) * len(seeds) > _RUNS:
        what = f"{len(variants):,} variants and {len(seeds):,} seeds; at most {_RUNS:,} runs are allowed"
        raise UserError([*problems, Problem(what, file)])
    runs: dict[str, Config] = {}
    for variant, changes in variants.items():
        for seed in seeds:
            merged, where = _of_variant(values, places, variant, changes or {}, file)
            if seed is not None:
                merged["seed"] = seed
            merge(merged, amended[0])
            where = _overridden(where, amended[1])
            try:
                for path, value in overrides:
                    set_value(merged, path, value)
                    where = _placed(where, path, Place(f"--set {'.'.join(path)}"))
                run = Config.model_validate(merged)
            except UserError as error:
                problems += [p for p in error.problems if p not in problems]
                continue
            except ValidationError as error:
                problems += [p for p in explain(error, where, file) if p not in problems]
                continue
            name = f"{run.name}/{run.run_name}"
            if name in runs:
                problems.append(problem_at(f"two runs are called {name}", ("seeds",), places, file))
            runs[name] = run
    if problems:
        raise UserError(problems)
    return list(runs.values())


def _variants(
    values: dict, places: Mapping[KeyPath, Place], file: Path | str, problems: list[Problem]
) -> Mapping[str | None, Mapping | None]:
    """What each variant overrides, removed from `values`; a file without variants has one, named None."""
    variants = values.pop("variants", None) or {}
    if isinstance(variants, dict) and all(isinstance(v, dict | None) for v in variants.values()):
        return variants or {None: None}
    what = "variants: a mapping of names to overrides is allowed"
    problems.append(problem_at(what, ("variants",), places, file))
    return {None: None}


def _unknown_variants(
    variants: Mapping[str | None, Any], only: Sequence[str], file: Path | str
) -> list[Problem]:
    known = [name for name in variants if name is not None]
    hint = f"There: {', '.join(known)}" if known else "The file has no variants; leave --variant out."
    return [
        Problem(f"no variant {name}", file, key="--variant", hint=hint) for name in only if name not in known
    ]


def _seeds(
    values: dict,
    variants: Mapping[str | None, Mapping | None],
    places: Mapping[KeyPath, Place],
    file: Path | str,
    problems: list[Problem],
) -> list[Any]:
    """The seeds of every variant, removed from `values`; [None] means that the keys `seed` decide."""
    seeds = values.pop("seeds", None)
    if seeds is None:
        return [None]
    if not isinstance(seeds, list) or not seeds:
        what = f"got {_shown(seeds)}; a list of whole numbers is allowed, e.g. [42, 43]"
        problems.append(problem_at(what, ("seeds",), places, file))
        return [None]
    for variant, changes in variants.items():
        if "seed" in (changes or {}):
            what = "has no effect, since seeds sets the seeds of every variant; keep one of the two"
            problems.append(problem_at(what, ("variants", str(variant), "seed"), places, file))
    return seeds


def _of_variant(
    values: dict, places: Mapping[KeyPath, Place], variant: str | None, changes: Mapping, file: Path | str
) -> tuple[dict, dict[KeyPath, Place]]:
    """A copy of `values` with the changes of a variant, and where each key was written."""
    merged, where = copy.deepcopy(values), dict(places)
    if variant is not None:
        merge(merged, changes)
        merged["variant"] = variant
        prefix = ("variants", variant)
        own = {k[2:]: v for k, v in places.items() if k[:2] == prefix and len(k) > 2}
        where = _overridden(where, own)
        where[("variant",)] = places.get(prefix, Place(str(file)))
    return merged, where


def _overridden(places: Mapping[KeyPath, Place], own: Mapping[KeyPath, Place]) -> dict[KeyPath, Place]:
    """The places of keys after `own` keys override them; a list is replaced with all its entries."""
    replaced = {path[:n] for path in own for n in range(1, len(path)) if path[n].isdigit()}
    kept = {
        path: place
        for path, place in places.items()
        if not any(path[:n] in replaced and path[n].isdigit() for n in range(1, len(path)))
    }
    return kept | dict(own)


def _placed(places: Mapping[KeyPath, Place], path: KeyPath, place: Place) -> dict[KeyPath, Place]:
    """The places of keys after the value at `path` was set from `place`, with everything below it."""
    kept = {known: where for known, where in places.items() if known[: len(path)] != path}
    return {path[:n]: place for n in range(1, len(path))} | kept | {path: place}


def base_of(file: Path, variant: str) -> tuple[str, Config] | None:
    """The base that an experiment file names, and the base's run of that variant, else its first run.

    None if the file names no base, or a base that can't run alone.
    """
    _, values = parse(file, [])
    base = values.get("base") if isinstance(values, dict) else None
    if not base:
        return None
    try:
        runs = load(file.parent / base)
    except UserError:
        return None
    return base, next((run for run in runs if run.variant == variant), runs[0])


def variant_of(file: Path, variant: str) -> dict[str, Any]:
    """What a variant of an experiment file overrides; the variants may come from its base."""
    values, _, _ = _read_with_bases(file, ())
    return copy.deepcopy((values.get("variants") or {}).get(variant) or {})


def near(file: Path) -> str:
    """The experiments that a name which is no file may mean, as a sentence; else all that there are."""
    there = sorted(file.parent.glob("*.yaml")) if file.parent.is_dir() else []
    there = there or sorted(EXPERIMENTS.glob("*.yaml"))
    if not there:
        return f"Experiments are in {EXPERIMENTS}/."
    named = {one.stem: one for one in there}
    if alike := difflib.get_close_matches(file.stem, named, 3, 0.6):
        return f"Did you mean {' or '.join(str(named[name]) for name in alike)}?"
    names = named if there[0].parent == EXPERIMENTS else [one.name for one in there]
    return f"In {there[0].parent}: {', '.join(names)}"


def _read_with_bases(file: Path, seen: tuple[Path, ...]) -> tuple[dict, dict[KeyPath, Place], list[Problem]]:
    if what := no_file(file):
        raise UserError([Problem(what, file, hint=near(file))])
    if file.resolve() in seen:
        raise UserError([Problem("is its own base", file, key="base")])
    if len(seen) >= _BASES:
        raise UserError([Problem(f"more than {_BASES} files in one chain of bases", file, key="base")])
    problems: list[Problem] = []
    node, values = parse(file, problems)
    if not isinstance(node, yaml.MappingNode):
        raise UserError([Problem("an experiment is a mapping of keys to values", file, 1)])
    places = dict(places_of(node, (), file))
    if "seed" in values and "seeds" in values:
        what = "can't be used with seeds; seed is for one run and seeds is for several. Keep one of the two"
        problems.append(problem_at(what, ("seed",), places, file))
    base = values.pop("base", None)
    if base is None:
        return values, places, problems
    if not isinstance(base, str):
        what = f"got {_shown(base)}; the name of another experiment file is allowed"
        raise UserError([*problems, problem_at(what, ("base",), places, file)])
    if what := no_file(file.parent / base):
        raise UserError([*problems, problem_at(f"{what}: {file.parent / base}", ("base",), places, file)])
    base_values, base_places, base_problems = _read_with_bases(file.parent / base, (*seen, file.resolve()))
    if values.get("variants"):
        base_values.pop("variants", None)
    for own, other in (("seed", "seeds"), ("seeds", "seed")):
        if values.get(own) is not None:
            base_values.pop(other, None)
    return merge(base_values, values), _overridden(base_places, places), base_problems + problems


def merge(into: dict, changes: Mapping) -> dict:
    """Override nested mappings in place, key by key; a list is replaced as a whole."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)
    return into


def set_value(values: dict, path: KeyPath, value: Any, defaults: Mapping | None = None) -> None:
    """Set a key of nested mappings and create missing mappings; a number in `path` is a list entry, from 0.

    A missing list is copied from `defaults`, by default the schema's. Raises `UserError` for an entry that
    does not exist.
    """
    inner: Any = values
    for n, key in enumerate(path[:-1]):
        at = _entry(inner, path, n)
        found = inner[at] if isinstance(inner, list) else inner.get(key)
        if not isinstance(found, dict | list):
            default = value_at(_defaults() if defaults is None else defaults, path[: n + 1])
            found = copy.deepcopy(default) if isinstance(default, list) else {}
        inner[at] = copy.copy(found)  # an alias may share it
        inner = inner[at]
    inner[_entry(inner, path, len(path) - 1)] = value


def _entry(inner: dict | list, path: KeyPath, n: int) -> str | int:
    """Name `n` of a path as a key of the mapping `inner`, or as the number of an entry of the list."""
    if isinstance(inner, dict):
        return path[n]
    if path[n] in map(str, range(len(inner))):
        return int(path[n])
    key, noun = ".".join(path), "entry" if len(inner) == 1 else "entries"
    what = f"{'.'.join(path[:n])} has {len(inner)} {noun}, numbered from 0; got {path[n]}"
    raise UserError([Problem(what, f"--set {key}", key=key)])


def value_at(values: Any, path: KeyPath) -> Any:
    """The value of a key of nested mappings and lists; None if it does not exist."""
    for name in path:
        if isinstance(values, list):
            values = {str(number): value for number, value in enumerate(values)}
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


@functools.cache
def _defaults() -> dict[str, Any]:
    return Config.model_validate({"name": "any", "data": {"root": "."}}).model_dump(mode="json")


def parse_sets(sets: Sequence[str]) -> tuple[list[tuple[KeyPath, Any]], list[Problem]]:
    """The keys and values of `--set key=value`, with values read as YAML, and what is wrong with them."""
    overrides: list[tuple[KeyPath, Any]] = []
    problems: list[Problem] = []
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not all(part.isprintable() and part for part in key.split(".")):
            what = f"got --set {text!r}; write --set key=value, e.g. --set train.batch_size=32"
            problems.append(Problem(what))
            continue
        try:
            overrides.append((tuple(key.split(".")), parse_text(value, f"--set {key}", problems)[1]))
        except UserError as error:
            problems += error.problems
    return overrides, problems


def problem_at(what: str, path: KeyPath, places: Mapping[KeyPath, Place], file: Path | str) -> Problem:
    """A problem with a key, at the line of the key or of the nearest key above it."""
    place = next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), Place(str(file)))
    return Problem(what, place.file, place.line, ".".join(path) or None)


def explain(
    error: ValidationError,
    places: Mapping[KeyPath, Place],
    file: Path | str,
    known: Sequence[KeyPath] | None = None,
) -> list[Problem]:
    """The errors of pydantic as problems in plain words, at the places where the keys were written.

    `known` are the valid keys, by default the keys of an experiment.
    """
    problems = []
    found = [item for item in error.errors() if item["type"] != "invalid_key"]  # `yamlfile` reports those
    for item in found[:_SHOWN]:
        path = tuple(str(part) for part in item["loc"] if part != "[key]")  # pydantic's mark of a wrong key
        what = _wrong(item, known)
        if isinstance(across := item.get("ctx", {}).get("error"), AcrossKeys):
            path = _culprit([(*path, *key.split(".")) for key in across.keys], places)
        problems.append(problem_at(what, path, places, file))
    if len(found) > _SHOWN:
        problems.append(Problem(f"and {len(found) - _SHOWN:,} more mistakes", file))
    return problems


def _wrong(item: ErrorDetails, known: Sequence[KeyPath] | None) -> str:
    path = tuple(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden" and known is None and path in _OF_THE_FILE:
        return f"only the top of an experiment file has this key; {_OF_THE_FILE[path]}"
    if item["type"] == "extra_forbidden":
        return "unknown key." + did_you_mean(path, known)
    if item["type"] == "missing":
        return "is missing"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    return f"got {_shown(item['input'])}; {allowed(item, Config if known is None else None)} is allowed"


def _shown(value: Any) -> str:
    """A value as a message shows it, cut if it is long."""
    words = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
    text = f"the date {value}" if isinstance(value, date) else words
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _culprit(keys: Sequence[KeyPath], places: Mapping[KeyPath, Place]) -> KeyPath:
    """The key to blame among conflicting keys: one from `--set`, else one that was written."""
    written = [key for key in keys if key in places]
    by_set = [key for key in written if places[key].line is None]
    return (by_set or written or list(keys))[0]


def did_you_mean(path: KeyPath, known: Sequence[KeyPath] | None = None) -> str:
    """A sentence with the key that was probably meant, or with the keys allowed there; else empty."""
    known = known or list(keys())
    above = tuple("0" if name.isdecimal() else name for name in path[:-1])
    here = [".".join((*path[:-1], key[-1])) for key in known if key[:-1] == above]
    near = difflib.get_close_matches(".".join(path), here, 1, 0.7) or [
        ".".join(key) for key in known if key[-1] == path[-1]
    ]
    if near:
        return f" Did you mean {near[0]}?"
    allowed = [key[-1] for key in known if key[:-1] == above]
    return f" Allowed here: {', '.join(allowed)}" if allowed else ""
