"""The plots of a study: how its scores went, what each key did to them, and the Pareto front."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from harness.store import write
from harness.study.spec import Study

FEWEST = 30
"""Finished trials that a plot of importance needs.

Optuna compares the best tenth of the trials with all of them (PED-ANOVA). With fewer, that is one or two
trials, and the shares add up to 100 % even if no key has an effect.
"""
_OURS, _BEST, _SOFT, _INK, _LINE = "#0b62a8", "#a2470b", "#5b6b7a", "#16202b", "#c6ced6"  # as on the pages


def draw(study: optuna.Study, spec: Study, folder: Path) -> tuple[list[str], list[str]]:
    """Write the plots as PNG -> the names of the files, and why others are absent.

    Each objective has a history, and an importance from `FEWEST` finished trials on. Two or three objectives
    have a Pareto front for each pair.
    """
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not done:
        return [], []
    names, several = spec.objective, len(spec.objective) > 1
    folder.mkdir(exist_ok=True)
    drawn, absent = [], []
    if len(done) < FEWEST:
        absent.append(f"no plot of importance: it needs {FEWEST} finished trials, and {len(done)} finished")
    for i, name in enumerate(names):
        mark = f"_{name}" if several else ""
        drawn.append(_history(study, spec, i, folder / f"history{mark}.png"))
        if len(done) >= FEWEST and len({trial.values[i] for trial in done}) > 1:
            drawn.append(_importance(study, spec, i, folder / f"importance{mark}.png"))
    if several and len(names) <= 3:
        drawn.append(_front(study, spec, done, folder / "pareto.png"))
    return drawn, absent


def _history(study: optuna.Study, spec: Study, i: int, path: Path) -> str:
    """Each trial's score by its number, the best so far, the base, and the trials without a score."""
    figure, axes = _figure()
    every = study.get_trials(deepcopy=False)
    done = [trial for trial in every if trial.state is TrialState.COMPLETE]
    best = [max(one.values[i] for one in done[: n + 1]) for n in range(len(done))]
    numbers = [trial.number for trial in done]
    axes.step([*numbers, every[-1].number], [*best, best[-1]], where="post", color=_BEST, label="best so far")
    axes.plot(numbers, [trial.values[i] for trial in done], "o", color=_OURS, label="trial", markersize=5)
    if done[0].number == 0:
        base = done[0].values[i]
        axes.axhline(base, color=_SOFT, linestyle="--", linewidth=1, label=f"base (trial 0): {base:.4f}")
    if ended := [trial.number for trial in every if trial.state in (TrialState.FAIL, TrialState.PRUNED)]:
        floor = axes.get_ylim()[0]
        axes.plot(ended, [floor] * len(ended), "x", color=_SOFT, label="failed or pruned", clip_on=False)
    axes.set(title=f"{spec.name}: {_scored(spec, i, done)}", xlabel="trial", ylabel=_scored(spec, i, done))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, loc="lower right")
    return _save(figure, path)


def _importance(study: optuna.Study, spec: Study, i: int, path: Path) -> str:
    """Each key's share of what tells the best tenth of the trials from all of them."""
    with warnings.catch_warnings():  # Optuna warns that low values are good, which is why they are negated
        warnings.filterwarnings("ignore", message="PedAnovaImportanceEvaluator computes")
        found = optuna.importance.get_param_importances(study, target=lambda trial: -trial.values[i])
    figure, axes = _figure()
    keys, shares = list(found), [100 * share for share in found.values()]
    axes.barh(range(len(keys)), shares, color=_OURS)
    for place, share in enumerate(shares):
        axes.text(share, place, f" {share:.0f} %", va="center", color=_INK)
    axes.set_yticks(range(len(keys)), keys)
    axes.invert_yaxis()
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    axes.set(
        title=f"{spec.name}: what sets the best tenth of {len(done)} trials apart, by {spec.objective[i]}"
    )
    axes.set(xlabel="share, %", xlim=(0, 1.12 * max(shares)))
    return _save(figure, path)


def _front(study: optuna.Study, spec: Study, done: Sequence[FrozenTrial], path: Path) -> str:
    """All trials and those of the Pareto front, with their numbers, for each pair of objectives."""
    best = study.best_trials
    pairs = [(i, j) for i in range(len(spec.objective)) for j in range(i + 1, len(spec.objective))]
    figure, axes = _figure(len(pairs))
    for panel, (i, j) in zip(axes if len(pairs) > 1 else [axes], pairs, strict=True):
        panel.plot(*_values(done, i, j), "o", color=_OURS, markersize=5, label="trial")
        panel.plot(*_values(best, i, j), "o", color=_BEST, markersize=7, label="Pareto front")
        for trial in best:
            at = (trial.values[i], trial.values[j])
            panel.annotate(trial.number, at, xytext=(5, 5), textcoords="offset points", color=_INK)
        panel.set(xlabel=_scored(spec, i, done), ylabel=_scored(spec, j, done))
        panel.margins(0.1)
        panel.legend(frameon=False)
    figure.suptitle(f"{spec.name}: no trial is better than these in every score", color=_INK)
    return _save(figure, path)


def _values(trials: Sequence[FrozenTrial], i: int, j: int) -> tuple[list[float], list[float]]:
    return [trial.values[i] for trial in trials], [trial.values[j] for trial in trials]


def _scored(spec: Study, i: int, done: Sequence[FrozenTrial]) -> str:
    """The name of an objective, with a star if it is not official, and on which images it is."""
    star = "" if all(trial.user_attrs.get("official", True) for trial in done) else "*"
    where = f" on the half {spec.config.half}" if spec.config.half else " on validation"
    return f"{spec.objective[i]}{star}{where}"


def _figure(panels: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8 * panels, 4.5), layout="constrained")
    axes = figure.subplots(1, panels)
    for one in [axes] if panels == 1 else axes:
        one.spines[["top", "right"]].set_visible(False)
        one.spines[["left", "bottom"]].set_color(_LINE)
        one.tick_params(colors=_INK)
        one.grid(color=_LINE, alpha=0.5)
        one.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path) -> str:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    write(path, image.getvalue())
    return path.name
