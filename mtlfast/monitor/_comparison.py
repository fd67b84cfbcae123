"""`Comparison`: each task's metric after training by itself and after joint training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, variance
from typing import Any, TypeAlias

from mtlfast._numbers import plain, shown
from mtlfast._vectors import vector
from mtlfast.monitor._names import shown_names
from mtlfast.monitor._statistics import Statistics

Metrics: TypeAlias = Mapping[str, Any] | Sequence[Any]  # a number or a list of numbers for each task
Better: TypeAlias = bool | Mapping[str, bool] | Sequence[bool]
ERRORS = 2  # a difference of so many standard errors is more than the seeds' spread explains


@dataclass(frozen=True)
class Comparison:
    """Each task by itself and in joint training. `print` shows it in words.

    Attributes:
        names: the n tasks' names.
        single: [n], the mean metric of each task after training by itself.
        joint: [n], the same after joint training.
        gains: [n], how much better joint training is, in the metric's unit; below 0: worse, a negative transfer.
        errors: [n], the standard error of the gain over the seeds; NaN with one number for each.
        delta: the mean over the tasks of 100 * gain / |single|, known as Delta-m %. NaN if a `single` is 0.
        conflicts: for some tasks, the one with which their gradients conflict most and in which share of the steps.
    """

    names: tuple[str, ...]
    single: tuple[float, ...]
    joint: tuple[float, ...]
    gains: tuple[float, ...]
    errors: tuple[float, ...]
    conflicts: Mapping[str, tuple[str, float]]

    @property
    def delta(self) -> float:
        """The mean over the tasks of the gain in percent."""
        if 0 in self.single:
            return math.nan
        return mean(100 * gain / abs(alone) for gain, alone in zip(self.gains, self.single, strict=True))

    @property
    def signs(self) -> tuple[int, ...]:
        """[n] the sign of the transfer: 1 where joint training helps, -1 where it harms, 0 where it cannot be told.

        With several seeds, a gain within two standard errors of 0 cannot be told from it.
        """
        return tuple(
            0 if gain == 0 or abs(gain) <= ERRORS * error else int(math.copysign(1, gain))
            for gain, error in zip(self.gains, self.errors, strict=True)
        )

    @property
    def negative_transfer(self) -> tuple[str, ...]:
        """The tasks that joint training harms."""
        return tuple(name for name, sign in zip(self.names, self.signs, strict=True) if sign < 0)

    def beside(self, statistics: Statistics) -> Comparison:
        """The same, with what was seen of the gradients of the tasks that joint training harms."""
        conflicts = {}
        for i, name in enumerate(statistics.names):
            rates = {
                other: float(statistics.conflict_rate[i, j])
                for j, other in enumerate(statistics.names)
                if j != i and statistics.together[i, j] > 0
            }
            if name in self.negative_transfer and rates:
                worst = max(rates, key=lambda other: rates[other])
                conflicts[name] = (worst, rates[worst])
        return replace(self, conflicts=conflicts)

    def __str__(self) -> str:
        words = {1: "better jointly", -1: "worse jointly, a negative transfer", 0: "no clear difference"}
        lines = []
        for name, single, joint, error, sign in zip(
            self.names, self.single, self.joint, self.errors, self.signs, strict=True
        ):
            spread = "" if math.isnan(error) else f", standard error of the difference {error:.2g}"
            line = f"{name}: {single:.4g} alone, {joint:.4g} jointly{spread}: {words[sign]}."
            if name in self.conflicts:
                other, rate = self.conflicts[name]
                line += f" Its gradient conflicts most with that of {other}, in {100 * rate:.0f} % of the steps."
            lines.append(line)
        if not math.isnan(self.delta):
            lines.append(f"Delta-m: {self.delta:+.2f} %, the mean gain of joint training.")
        if any(math.isnan(error) for error in self.errors):
            lines.append("With one run each, a difference may be chance: give a list with one number for each seed.")
        return "\n".join(lines)


def compared(
    caller: str, names: tuple[str, ...], single: Metrics, joint: Metrics, higher_is_better: Better
) -> Comparison:
    """The comparison. Without `names` the tasks are those of `single`.

    Raises:
        ValueError: the arguments do not fit each other or the names.
    """
    if not names and hasattr(single, "__len__"):
        names = tuple(single) if isinstance(single, Mapping) else shown_names([None] * len(single))
    if not names:
        raise ValueError(f"{caller}: single is {shown(single)}, expected each task's metric")
    alone = _by_task(caller, "single", single, names)
    together = _by_task(caller, "joint", joint, names)
    better = [plain(higher_is_better)] * len(names)
    if not isinstance(better[0], bool):
        better = _by_task(caller, "higher_is_better", higher_is_better, names)
    gains, errors, means = [], [], []
    for k, name in enumerate(names):
        if not isinstance(plain(better[k]), bool):
            raise ValueError(f"{caller}: higher_is_better of {name} is {shown(better[k])}, expected True or False")
        xs, ys = (_seeds(caller, f"{what} of {name}", x[k]) for what, x in (("single", alone), ("joint", together)))
        means.append((mean(xs), mean(ys)))
        gains.append((mean(ys) - mean(xs)) * (1 if better[k] else -1))
        several = len(xs) > 1 and len(ys) > 1
        errors.append(math.sqrt(variance(xs) / len(xs) + variance(ys) / len(ys)) if several else math.nan)
    of_single, of_joint = zip(*means, strict=True)
    return Comparison(names, of_single, of_joint, tuple(gains), tuple(errors), {})


def _by_task(caller: str, what: str, given: Any, names: tuple[str, ...]) -> list[Any]:
    """The entry of each task, in order."""
    if isinstance(given, Mapping):
        if set(given) != set(names):
            raise ValueError(f"{caller}: {what} has {', '.join(map(str, given))}, expected {', '.join(names)}")
        return [given[name] for name in names]
    if isinstance(given, str) or not hasattr(given, "__len__") or len(given) != len(names):
        raise ValueError(f"{caller}: {what} is {shown(given)}, expected an entry for each of {', '.join(names)}")
    return list(given)


def _seeds(caller: str, what: str, given: Any) -> list[float]:
    """The numbers of the seeds, from one number or several."""
    number = plain(given)
    return list(vector(caller, what, [number] if isinstance(number, (int, float)) else given).tolist())
