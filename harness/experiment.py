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


def load(file: Path | str, sets: Sequence[str] = ()) -> list[Config]:
    """Read an experiment file into its runs, variants x seeds in the order written.

    Raises `UserError` with every problem of the file, its bases and the `--set` values at once.
    """
    values, places, problems = _read_with_bases(Path(file), ())
    overrides, set_problems = parse_sets(sets)
    problems += set_problems
    variants = values.pop("variants", None) or {}
    seeds = values.pop("seeds", None)
    if not isinstance(variants, dict) or not all(isinstance(v, dict | None) for v in variants.values()):
        problems.append(
            _problem("variants: a mapping of name to overrides is allowed here", ("variants",), places, file)
        )
        variants = {}
    if seeds is not None and (not isinstance(seeds, list) or not seeds):
        problems.append(
            _problem(
                f"got {seeds!r}; a list of whole numbers is allowed, e.g. [42, 43]", ("seeds",), places, file
            )
        )
        seeds = None
    runs = []
    for variant, changes in (variants or {None: {}}).items():
        for seed in seeds or [None]:
            merged, where = copy.deepcopy(values), dict(places)
            if variant is not None:
                _merge(merged, changes or {})
                merged["variant"] = variant
                prefix = ("variants", variant)
                where |= {k[2:]: v for k, v in places.items() if k[:2] == prefix and len(k) > 2}
                where[("variant",)] = places.get(prefix, Place(str(file)))
            if seed is not None:
                merged["seed"] = seed
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
    _, values = _parse(file)
    base = values.get("base") if isinstance(values, dict) else None
    if not base:
        return None
    try:
        runs = load(file.parent / base)
    except UserError:
        return None
    return base, next((run for run in runs if run.variant == variant), runs[0])


def _read_with_bases(file: Path, seen: tuple[Path, ...]) -> tuple[dict, dict[Path_, Place], list[Problem]]:
    if not file.is_file():
        near = sorted(str(p) for p in file.parent.glob("*.yaml")) if file.parent.is_dir() else []
        hint = f"There: {', '.join(near)}" if near else "Experiments lie in experiments/."
        raise UserError([Problem("no such file", file, hint=hint)])
    if file.resolve() in seen:
        raise UserError([Problem("is its own base", file, key="base")])
    node, values = _parse(file)
    if not isinstance(node, yaml.MappingNode):
        raise UserError([Problem("an experiment is a mapping of keys to values", file, 1)])
    problems: list[Problem] = []
    places = dict(_places(node, (), file, problems))
    base = values.pop("base", None)
    if base is None:
        return values, places, problems
    if not isinstance(base, str):
        raise UserError(
            [
                _problem(
                    f"got {base!r}; the name of another experiment file is allowed", ("base",), places, file
                )
            ]
        )
    base_file = file.parent / base
    if not base_file.is_file():
        raise UserError([_problem(f"no such file: {base_file}", ("base",), places, file)])
    base_values, base_places, base_problems = _read_with_bases(base_file, (*seen, file.resolve()))
    if values.get("variants"):
        base_values.pop("variants", None)
    return _merge(base_values, values), base_places | places, base_problems + problems


def _parse(file: Path) -> tuple[yaml.Node | None, Any]:
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


def _places(
    node: yaml.MappingNode, path: Path_, file: Path, problems: list[Problem]
) -> Iterator[tuple[Path_, Place]]:
    seen = set()
    for key, value in node.value:
        here = (*path, key.value)
        line = key.start_mark.line + 1
        if key.value in seen:
            problems.append(Problem("written twice", file, line, ".".join(here)))
        seen.add(key.value)
        yield here, Place(str(file), line)
        if isinstance(value, yaml.MappingNode):
            yield from _places(value, here, file, problems)


def _merge(into: dict, changes: Mapping) -> dict:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
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


def _problem(what: str, path: Path_, places: Mapping[Path_, Place], file: Path | str) -> Problem:
    place = next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), Place(str(file)))
    return Problem(what, place.file, place.line, ".".join(path) or None)


def explain(error: ValidationError, places: Mapping[Path_, Place], file: Path | str) -> list[Problem]:
    """What pydantic found, in the words of a person, at the places where the keys were written."""
    problems = []
    for item in error.errors():
        path = tuple(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            what = "unknown key." + _did_you_mean(path)
        elif item["type"] == "missing":
            what = "is missing"
        elif item["type"] == "value_error":
            what = str(item["ctx"]["error"])
        else:
            what = f"got {item['input']!r}; {item['msg'][0].lower()}{item['msg'][1:]}"
        problems.append(_problem(what, path, places, file))
    return problems


def _did_you_mean(path: Path_) -> str:
    known = [".".join(p) for p in keys()]
    here = [k for k in known if k.split(".")[:-1] == list(path[:-1])]
    near = difflib.get_close_matches(".".join(path), here, 1, 0.7) or [
        k for k in known if k.split(".")[-1] == path[-1]
    ]
    if near:
        return f" Did you mean {near[0]}?"
    return f" Allowed here: {', '.join(k.split('.')[-1] for k in here)}" if here else ""
