"""From an experiment file to its runs: base, variants, seeds, --set, and the place of every mistake."""

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from harness.config import Config, keys
from harness.errors import Problem, UserError


@dataclass(frozen=True)
class Place:
    """Where a key of the experiment was written."""

    file: str
    line: int | None = None


Path_ = tuple[str, ...]


def load(
    file: Path | str, sets: Sequence[str] = (), amended: tuple[Mapping, Mapping[Path_, Place]] = ({}, {})
) -> list[Config]:
    """Read an experiment file into its runs, variants x seeds in the order written.

    `amended` values, and where they were written, override the file in every run; `--set` overrides those.
    Raises `UserError` with every problem of the file, its bases, what amends it and `--set` at once.
    """
    values, places, problems = _read_with_bases(Path(file), ())
    if "space" in values:
        hint = f"Run it by: python -m harness study {file}"
        raise UserError([Problem("a study, not an experiment", file, hint=hint)])
    overrides, set_problems = parse_sets(sets)
    problems += set_problems
    variants = values.pop("variants", None) or {}
    seeds = values.pop("seeds", None)
    if not isinstance(variants, dict) or not all(isinstance(v, dict | None) for v in variants.values()):
        problems.append(
            problem_at("variants: a mapping of names to overrides is allowed", ("variants",), places, file)
        )
        variants = {}
    if seeds is not None and (not isinstance(seeds, list) or not seeds):
        problems.append(
            problem_at(
                f"got {seeds!r}; a list of whole numbers is allowed, e.g. [42, 43]", ("seeds",), places, file
            )
        )
        seeds = None
    runs = []
    for variant, changes in (variants or {None: {}}).items():
        for seed in seeds or [None]:
            merged, where = copy.deepcopy(values), dict(places)
            if variant is not None:
                merge(merged, changes or {})
                merged["variant"] = variant
                prefix = ("variants", variant)
                where |= {k[2:]: v for k, v in places.items() if k[:2] == prefix and len(k) > 2}
                where[("variant",)] = places.get(prefix, Place(str(file)))
            if seed is not None:
                merged["seed"] = seed
            merge(merged, amended[0])
            where |= amended[1]
            for path, value in overrides:
                set_value(merged, path, value)
                place = Place(f"--set {'.'.join(path)}")
                where = {path[:n]: place for n in range(1, len(path))} | where | {path: place}
            try:
                runs.append(Config.model_validate(merged))
            except ValidationError as error:
                problems += [p for p in explain(error, where, file) if p not in problems]
    if problems:
        raise UserError(problems)
    return runs


def base_of(file: Path, variant: str) -> tuple[str, Config] | None:
    """The base that an experiment file names, and its run of that variant, else its first.

    None where the file names no base, or one that does not run alone.
    """
    _, values = parse(file)
    base = values.get("base") if isinstance(values, dict) else None
    if not base:
        return None
    try:
        runs = load(file.parent / base)
    except UserError:
        return None
    return base, next((run for run in runs if run.variant == variant), runs[0])


def variant_of(file: Path, variant: str) -> dict[str, Any]:
    """What a variant of an experiment file, or of the base that brings its variants, overrides."""
    values, _, _ = _read_with_bases(file, ())
    return copy.deepcopy((values.get("variants") or {}).get(variant) or {})


def _read_with_bases(file: Path, seen: tuple[Path, ...]) -> tuple[dict, dict[Path_, Place], list[Problem]]:
    if not file.is_file():
        near = sorted(str(p) for p in file.parent.glob("*.yaml")) if file.parent.is_dir() else []
        hint = f"There: {', '.join(near)}" if near else "Experiments lie in experiments/."
        what = "is not a regular file" if file.exists() else "no such file"  # it is read more than once
        raise UserError([Problem(what, file, hint=hint)])
    if file.resolve() in seen:
        raise UserError([Problem("is its own base", file, key="base")])
    node, values = parse(file)
    if not isinstance(node, yaml.MappingNode):
        raise UserError([Problem("an experiment is a mapping of keys to values", file, 1)])
    problems: list[Problem] = []
    places = dict(places_of(node, (), file, problems))
    base = values.pop("base", None)
    if base is None:
        return values, places, problems
    if not isinstance(base, str):
        raise UserError(
            [
                problem_at(
                    f"got {base!r}; the name of another experiment file is allowed", ("base",), places, file
                )
            ]
        )
    base_file = file.parent / base
    if not base_file.is_file():
        raise UserError([problem_at(f"no such file: {base_file}", ("base",), places, file)])
    base_values, base_places, base_problems = _read_with_bases(base_file, (*seen, file.resolve()))
    if values.get("variants"):
        base_values.pop("variants", None)
    return merge(base_values, values), base_places | places, base_problems + problems


def parse(file: Path) -> tuple[yaml.Node | None, Any]:
    """The YAML of a file, as nodes that know their lines and as values."""
    try:
        text = file.read_text(encoding="utf-8")
        return yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise UserError([Problem(f"not UTF-8 at byte {error.start}", file)]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        raise UserError([Problem(f"not YAML: {error.problem}", file, line)]) from None
    except (yaml.YAMLError, ValueError) as error:  # control characters; 2024-99-99, which looks like a date
        raise UserError([Problem(f"not YAML: {str(error).splitlines()[0]}", file)]) from None


def places_of(
    node: yaml.MappingNode, path: Path_, file: Path, problems: list[Problem]
) -> Iterator[tuple[Path_, Place]]:
    """Where each key below `path` was written; keys that were written twice are added to `problems`."""
    seen = set()
    for key, value in node.value:
        here = (*path, key.value)
        line = key.start_mark.line + 1
        if key.value in seen:
            problems.append(Problem("written twice", file, line, ".".join(here)))
        seen.add(key.value)
        yield here, Place(str(file), line)
        if isinstance(value, yaml.MappingNode):
            yield from places_of(value, here, file, problems)


def merge(into: dict, changes: Mapping) -> dict:
    """Override nested mappings in place, key by key; a list is replaced as a whole."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)
    return into


def set_value(values: dict, path: Path_, value: Any) -> None:
    """Set a key of nested mappings, making those that are not there."""
    for key in path[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[path[-1]] = value


def parse_sets(sets: Sequence[str]) -> tuple[list[tuple[Path_, Any]], list[Problem]]:
    """The keys and values of `--set key=value`, values read as YAML, and what is wrong with them."""
    overrides, problems = [], []
    for text in sets:
        key, equals, value = text.partition("=")
        try:
            if not equals or not key:
                raise ValueError
            overrides.append((tuple(key.split(".")), yaml.safe_load(value)))
        except (ValueError, yaml.YAMLError):
            problems.append(
                Problem(f"got --set {text}; write --set key=value, e.g. --set train.batch_size=32")
            )
    return overrides, problems


def problem_at(what: str, path: Path_, places: Mapping[Path_, Place], file: Path | str) -> Problem:
    """A problem with a key, at the line of it or of what it is part of."""
    place = next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), Place(str(file)))
    return Problem(what, place.file, place.line, ".".join(path) or None)


def explain(
    error: ValidationError,
    places: Mapping[Path_, Place],
    file: Path | str,
    known: Sequence[Path_] | None = None,
) -> list[Problem]:
    """What pydantic found, in the words of a person, at the places where the keys were written.

    `known` are the keys that there are, by default those of an experiment.
    """
    problems = []
    for item in error.errors():
        path = tuple(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            what = "unknown key." + did_you_mean(path, known)
        elif item["type"] == "missing":
            what = "is missing"
        elif item["type"] == "value_error":
            what = str(item["ctx"]["error"])
        else:
            what = f"got {item['input']!r}; {item['msg'][0].lower()}{item['msg'][1:]}"
        problems.append(problem_at(what, path, places, file))
    return problems


def did_you_mean(path: Path_, known: Sequence[Path_] | None = None) -> str:
    """The key that was meant, or those that are allowed there; empty where there is no telling."""
    known = known or list(keys())
    here = [".".join(key) for key in known if key[:-1] == path[:-1]]
    near = difflib.get_close_matches(".".join(path), here, 1, 0.7) or [
        ".".join(key) for key in known if key[-1] == path[-1]
    ]
    if near:
        return f" Did you mean {near[0]}?"
    allowed = [key[-1] for key in known if key[:-1] == path[:-1]]
    return f" Allowed here: {', '.join(allowed)}" if allowed else ""
