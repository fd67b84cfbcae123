"""What a user would want to know of the last steps, in words, and what to try."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest

from mtlfast.monitor._statistics import Statistics
from mtlfast.monitor._trends import LEAST_STEPS, Trends

# A pair conflicts persistently if its mean cosine is below `CONFLICT`, so that chance alone would have to be off by
# `ERRORS` standard errors, and the cosine was negative in most steps. Long random vectors have cosines near 0, half of
# them negative: they are no conflict. The more pairs and groups are looked at, the further off the worst of them is by
# chance alone, so that more standard errors are asked for.
CONFLICT, ERRORS = -0.05, 4
LONGER = 3  # gradients that differ this often in length are said to
GROUPS_SHOWN = 3
STARVED = 0.2  # a task with less than this part of an equal share of the update

PROJECT = (
    "Try PCGrad, which takes from each gradient what points against another one, or UPGrad, whose update conflicts "
    "with no task."
)
BALANCE_FIRST = (
    "Try Compose(NormBalance(), PCGrad()): PCGrad takes from each gradient what points against another one, but leaves "
    "a long one long, so they are brought to one length first. Or UPGrad, whose update conflicts with no task."
)
BALANCE = (
    "Try NormBalance, which brings all gradients to one length, IMTLG or NashMTL, whose updates give each task its "
    "share whatever the lengths, or the weighting GradNorm."
)
NO_GRADIENT = (
    "Look whether its loss reaches the shared parameters: a detach(), or units that are always 0, keep it from them."
)
NO_WEIGHT = "Try Sum, or IMTLG, whose updates give each task its share."
BY_WEIGHT = (
    "Its gradient is not long, its weight makes it so. Try Sum, or IMTLG, whose updates give each task its share."
)


@dataclass(frozen=True)
class Finding:
    """One thing that a user would want to know.

    Attributes:
        kind: "conflict", "dominates", "starves", "stalls" or "rises".
        tasks: the names of the tasks that it is about.
        text: what was seen, in a sentence.
        advice: what to try, by name, and why.
    """

    kind: str
    tasks: tuple[str, ...]
    text: str
    advice: str


def findings_of(seen: Statistics, trends: Trends, groups: Mapping[str, Statistics]) -> list[Finding]:
    """All findings, conflicts first.

    Args:
        seen: of all shared parameters.
        trends: of the losses.
        groups: of each group of parameters, by name.
    """
    return [*_conflicts(seen, groups), *_shares(seen), *_losses(seen, trends)]


def persistent(seen: Statistics, groups: int = 1) -> list[tuple[int, int]]:
    """The pairs of tasks that conflict persistently, the worst first; `seen` is of one of so many groups."""
    pairs = seen.pairs()
    errors = math.sqrt(ERRORS**2 + 2 * math.log(max(1, len(pairs) * groups)))
    found = [
        (i, j)
        for i, j in pairs
        if seen.together[i, j] >= LEAST_STEPS
        and seen.cosines[i, j] < min(CONFLICT, -errors * float(seen.errors[i, j]))
        and seen.conflict_rate[i, j] > 0.5
    ]
    return sorted(found, key=lambda pair: float(seen.cosines[pair]))


def _conflicts(seen: Statistics, groups: Mapping[str, Statistics]) -> Iterator[Finding]:
    within = {name: persistent(of_group, len(groups)) for name, of_group in groups.items()}
    overall = persistent(seen)
    for i, j in overall:
        names = (seen.names[i], seen.names[j])
        worst = _worst_groups((i, j), within, groups)
        longer = max(float(seen.ratios[i, j]), float(seen.ratios[j, i]))
        text = (
            f"{names[0]} against {names[1]}: cosine {seen.cosines[i, j]:.2f} over {seen.together[i, j]:.0f} steps, "
            f"negative in {100 * seen.conflict_rate[i, j]:.0f} % of them{_shown(worst)}"
        )
        if longer >= LONGER:
            text += f"; one gradient is {_times(longer)} as long as the other"
        advice = BALANCE_FIRST if longer >= LONGER else PROJECT
        if groups and 2 * len(worst) <= len(groups):
            advice += " Keep groups=, since few of the groups conflict."
        yield Finding("conflict", names, f"{text}.", advice)
    for pair in sorted({pair for pairs in within.values() for pair in pairs} - set(overall)):
        names = (seen.names[pair[0]], seen.names[pair[1]])
        worst = _worst_groups(pair, within, groups)
        yield Finding(
            "conflict",
            names,
            f"{names[0]} against {names[1]}: no conflict over all parameters, but in some groups{_shown(worst)}.",
            "Keep groups=: PCGrad and UPGrad then see the conflict where it is.",
        )


def _worst_groups(
    pair: tuple[int, int], within: Mapping[str, list[tuple[int, int]]], groups: Mapping[str, Statistics]
) -> dict[str, float]:
    """The groups in which a pair conflicts persistently, and its mean cosine there; the worst first."""
    found = {name: float(groups[name].cosines[pair]) for name, pairs in within.items() if pair in pairs}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _shown(groups: Mapping[str, float]) -> str:
    if not groups:
        return ""
    listed = ", ".join(f"{name} {cosine:.2f}" for name, cosine in list(groups.items())[:GROUPS_SHOWN])
    more = len(groups) - GROUPS_SHOWN
    return f" ({listed}{f' and {more} more groups' if more > 0 else ''})"


def _times(ratio: float) -> str:
    return f"{ratio:{'.0f' if ratio < 1e6 else '.0e'}} times"


def _shares(seen: Statistics) -> Iterator[Finding]:
    """The task that has more of the update than half the way from an equal share to all of it, or those with little."""
    if seen.steps < LEAST_STEPS:
        return
    for k in (seen.shares == 0).nonzero().flatten().tolist():
        zero, advice = ("gradient", NO_GRADIENT) if seen.norms[k].isnan() else ("weight", NO_WEIGHT)
        text = f"{seen.names[k]} has no part in the update: its {zero} is 0 in every step."
        yield Finding("starves", (seen.names[k],), text, advice)
    known = int((seen.shares > 0).sum())
    if known < 2:
        return
    update = "the update" if bool(seen.weights.isfinite().any()) else "the gradients"
    k = int(seen.shares.nan_to_num(0).argmax())
    if seen.shares[k] > (1 + 1 / known) / 2:
        longer = float(seen.ratios[k].nan_to_num(0).max())
        text = f"{seen.names[k]} dominates {update}: {100 * seen.shares[k]:.0f} % of the summed lengths are its own"
        if longer >= LONGER:
            text += f", and its gradient is {_times(longer)} as long as the shortest"
        yield Finding("dominates", (seen.names[k],), f"{text}.", BALANCE if longer >= LONGER else BY_WEIGHT)
        return
    for k in ((seen.shares > 0) & (seen.shares < STARVED / known)).nonzero().flatten().tolist():
        text = f"{seen.names[k]} has little of {update}: {100 * seen.shares[k]:.1f} % of the summed lengths are its own"
        yield Finding("starves", (seen.names[k],), f"{text}.", BALANCE)


def _losses(seen: Statistics, trends: Trends) -> Iterator[Finding]:
    for k in trends.rising():
        yield Finding(
            "rises",
            (seen.names[k],),
            f"{seen.names[k]}: its loss rises, {trends.lowest[k]:.4g} at its lowest since joint training began and "
            f"{trends.later[k]:.4g} now.",
            "Try a smaller learning rate; then UPGrad, whose update conflicts with no task, or "
            f"PCGrad(protected=[{k}]), which keeps its gradient whole.",
        )
    stalled = trends.stalled()
    if stalled and len(stalled) == len(seen.names):
        yield Finding(
            "stalls",
            seen.names,
            f"No loss has fallen over the last {seen.steps} steps.",
            "Training may be over, or the learning rate too large or too small.",
        )
        return
    for k in stalled:
        yield Finding(
            "stalls",
            (seen.names[k],),
            f"{seen.names[k]}: its loss has stalled, {trends.earlier[k]:.4g} and then {trends.later[k]:.4g} in the two "
            f"halves of the last {seen.steps} steps.",
            "It may be learned. If it does better by itself (see compare), try CAGrad, which helps the task that gains "
            "least, or the weighting FAMO, which lets all losses fall at one rate.",
        )


def in_words(seen: Statistics, findings: list[Finding], steps: int) -> str:
    """The report: what was seen of a run of so many steps, then the findings. An advice that some share comes once."""
    window = seen.steps + seen.not_finite
    tasks = f"{len(seen.names)} task{'s' * (len(seen.names) != 1)}"
    first = f"{tasks} over {'the last ' if steps > window else ''}{window} step{'s' * (window != 1)}"
    if seen.not_finite:
        first += f", {seen.not_finite} of which had something that is not finite and do not count"
    lines = [f"{first}."]
    absent = [name for name, loss in zip(seen.names, seen.losses, strict=True) if loss.isnan()]
    if seen.steps and absent:
        lines.append(f"Absent from every step that counts: {', '.join(absent)}.")
    if seen.steps < LEAST_STEPS:
        few = "1 step that counts is" if seen.steps == 1 else f"{seen.steps} steps that count are"
        lines.append(f"{few} too few to judge by, at least {LEAST_STEPS} are needed.")
    elif not findings:
        lines.append(
            "No pair conflicts persistently, each task has a share of the update, and no loss has stalled or rises."
        )
    for finding, after in zip_longest(findings, findings[1:]):
        lines.append(f"- {finding.text}")
        if after is None or after.advice != finding.advice:
            lines.append(f"  {finding.advice}")
    return "\n".join(lines)
