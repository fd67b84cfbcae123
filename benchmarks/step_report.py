"""The tables of bench_step.py: times and memory, and ratios with their limits."""

from typing import Any, NamedTuple

import torch
from step_ways import (
    ACCUMULATOR,
    AT_ONCE,
    BARE,
    BARE_EACH,
    BARE_MICRO,
    CLOSURES,
    FEATURES,
    HELD,
    LOSSES,
    LOSSES_UPGRAD,
    PLAIN,
    PYTORCH_PCGRAD,
    TORCHJD,
    TORCHJD_UPGRAD,
    UNION,
)

from mtlfast.bench.section import Section
from mtlfast.bench.timing import median_interval

PARTS = ("forward", "backward", "surgery")
Measured = dict[str, dict[str, Any]]  # way -> "step", "forward", "backward": seconds by round; "peak": bytes


class Ratio(NamedTuple):
    """Two contestants to compare, and the limit of their ratio.

    Attributes:
        of: whose time is divided.
        over: by whose.
        without_forward: whether the forward passes are taken off both.
        limit: the largest or smallest ratio; None: it is reported alone.
        at_least: whether the limit is the smallest ratio.
        tasks: the K at which the limit holds; empty: all.
    """

    of: str
    over: str
    without_forward: bool = False
    limit: float | None = None
    at_least: bool = False
    tasks: tuple[int, ...] = ()


RATIOS = [
    Ratio(LOSSES, BARE, without_forward=True, limit=1.03),
    Ratio(HELD, BARE, without_forward=True),
    Ratio(LOSSES, HELD, without_forward=True),
    Ratio(LOSSES, PLAIN),
    Ratio(TORCHJD, LOSSES, limit=1.0, at_least=True),
    Ratio(TORCHJD_UPGRAD, LOSSES_UPGRAD, limit=1.0, at_least=True),
    Ratio(PYTORCH_PCGRAD, LOSSES, limit=2.5, at_least=True, tasks=(8,)),
    Ratio(CLOSURES, BARE_EACH, limit=1.05),
    Ratio(CLOSURES, UNION),
    Ratio(ACCUMULATOR, BARE_MICRO),
    Ratio(FEATURES, PLAIN, without_forward=True, limit=1.25, tasks=(8,)),
]


def with_faster_torchjd(ways: Measured) -> Measured:
    """The same with one entry for each method of TorchJD, at the setting whose median is lower."""
    found = dict(ways)
    for name in {TORCHJD, TORCHJD_UPGRAD} & set(ways):
        other = found.pop(name + AT_ONCE)
        if median_interval(other["step"])[1] < median_interval(found[name]["step"])[1]:
            found[name] = other
    return found


def seconds(way: dict[str, Any], part: str) -> list[float]:
    """The seconds of a part of the step, one for each round."""
    if part == "surgery":
        return [s - f - b for s, f, b in zip(way["step"], way["forward"], way["backward"], strict=True)]
    if part == "without forward":
        return [s - f for s, f in zip(way["step"], way["forward"], strict=True)]
    return list(way[part])


def times(tasks: dict[int, Measured]) -> Section:
    """The table of times and memory."""
    section = Section(
        "times",
        "A training step without the optimizer's",
        "Plain sum: one backward pass of the summed loss. Bare: K calls of torch.autograd.grad, whose results are "
        "dropped at once or all held. Surgery: all that is neither a forward pass nor a call of autograd. Peak: what "
        "a step holds at most beside the model, its data and an empty .grad, measured in a process of its own. TorchJD "
        "is shown with the faster of its settings, Pytorch-PCGrad as its algorithm on one device.",
    )
    for K, ways in tasks.items():
        for name, way in with_faster_torchjd(ways).items():
            parts = {f"{part}, ms": median_interval(seconds(way, part))[1] * 1e3 for part in PARTS}
            peak = None if way["peak"] is None else way["peak"] / 2**20
            step = [s * 1e3 for s in median_interval(way["step"])]
            section.rows.append({"K": K, "way": name, "step, ms": step, **parts, "peak, MiB": peak})
    return section


def ratios(tasks: dict[int, Measured]) -> Section:
    """The table of ratios, which says of each limit whether the better end of the interval meets it."""
    section = Section(
        "ratios",
        "Ratios of paired rounds",
        "The time of one way over that of another in the same round. A limit is met if the better end of the 95 % "
        "confidence interval of the median ratio meets it. Passes: the step without its forward passes.",
    )
    for K, ways in tasks.items():
        ways = with_faster_torchjd(ways)
        for ratio in RATIOS:
            part = "without forward" if ratio.without_forward else "step"
            of, over = (torch.tensor(seconds(ways[name], part)) for name in (ratio.of, ratio.over))
            interval = median_interval((of / over).tolist())
            limited = ratio.limit is not None and (not ratio.tasks or K in ratio.tasks)
            section.rows.append(
                {
                    "K": K,
                    "time of": ratio.of,
                    "over": ratio.over,
                    "in": "passes" if ratio.without_forward else "step",
                    "ratio": interval,
                    "limit": f"{'>=' if ratio.at_least else '<='} {ratio.limit:g}" if limited else "",
                    "": _verdict(ratio, interval) if limited else "",
                }
            )
    return section


def _verdict(ratio: Ratio, interval: list[float]) -> str:
    assert ratio.limit is not None
    low, _, high = interval
    return "met" if (high >= ratio.limit if ratio.at_least else low <= ratio.limit) else "missed"
