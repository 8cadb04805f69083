"""The time that is left of a command, beyond the step that it is at."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.steps.plan import Plan

Seconds = dict[str, float | None]


class Ahead:
    """The forecasts of the steps that a command has still to build.

    They are renewed with every run, because finished ones tell how fast this device is.
    """

    def __init__(self, plans: "Sequence[Plan]") -> None:
        from harness.steps import epochs

        self.plans, self.begun = plans, ""
        self.known = {plan.config.run_name for plan in epochs.check(plans)}
        """The runs whose steps are known; the others wait for what earlier ones find."""
        self.seconds: dict[str, Seconds] = {}

    def __call__(self, run: str, step: str) -> tuple[float, bool]:
        """Seconds of all that comes after a step of a run, and whether the time of each part is known."""
        if run != self.begun:
            self.begun = run
            self.known.add(run)
            self.seconds = {plan.config.run_name: _forecast(plan) for plan in self.plans}
        here = next(plan.steps[step].directory for plan in self.plans if plan.config.run_name == run)
        found = {}
        for plan in (plan for plan in self.plans if plan.config.run_name in self.known):
            for name, one in plan.steps.items():
                if one.shared and one.directory != here and not one.is_done() and not plan.spared(one):
                    found.setdefault(one.directory, self.seconds[plan.config.run_name].get(name))
        whole = None not in found.values() and len(self.known) == len(self.plans)
        return sum(filter(None, found.values())), whole


def _forecast(plan: "Plan") -> Seconds:
    from harness.machine import device
    from harness.training import forecast

    images = {split: len(plan.data.readable(split)) for split in plan.data.splits}
    return forecast.by_step(plan.config, images, plan.root, device.world_size())
