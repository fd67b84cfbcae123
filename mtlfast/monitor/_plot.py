"""The picture of a monitor: mean cosines as heat maps, and cosines, losses and shares over the run."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations, pairwise

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mtlfast.monitor._history import Means
from mtlfast.monitor._statistics import Statistics
from mtlfast.monitor._steps import Steps

POINTS = 20  # of the time lines, in a run of one window; later windows leave the last one fewer
READABLE = 10  # so many tasks, pairs or lines have names; those of more would not fit
LINES = 6  # pairs of tasks in the time lines, those that conflict most
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a0409c", "#e69f00", "#56b4e9", "#333333", "#999999")


def nothing(text: str) -> Figure:
    """A picture with a text alone."""
    figure = Figure(figsize=(5, 2), layout="constrained")
    figure.text(0.5, 0.5, text, ha="center", va="center")
    return figure


def drawn(seen: Statistics, steps: Steps, last: int, past: Means, window: int, groups: Mapping[str, Tensor]) -> Figure:
    """The picture.

    Args:
        seen: the statistics of the last steps.
        steps: these steps, on the host.
        last: the number of the last of them.
        past: the means of whole windows of the run, on the host.
        window: the number of steps in a window.
        groups: the mean cosines in each group, by its name.
    """
    pairs = sorted(combinations(range(len(seen.names)), 2), key=lambda pair: float(seen.cosines[pair].nan_to_num(2)))
    figure = Figure(figsize=(11, 10 if groups else 7), layout="constrained")
    grid = figure.add_gridspec(3 if groups else 2, 2)
    matrix, cosines, losses, shares = (figure.add_subplot(grid[place]) for place in ((0, 0), (0, 1), (1, 0), (1, 1)))
    _matrix(figure, matrix, seen)
    before = [i for i in range(len(past.losses)) if (i + 1) * window <= last - len(steps.losses)]
    x, recent = _timeline(steps, last, max(1, POINTS // (1 + len(before))))
    x = [(i + 0.5) * window for i in before] + x
    lines = Means(*(torch.cat([old[before], new]) for old, new in zip(past, recent, strict=True)))
    worst = {f"{seen.names[i]} against {seen.names[j]}": lines.cosines[:, i, j] for i, j in pairs[:LINES]}
    _lines(cosines, x, worst, "cosine" + (f", {LINES} lowest pairs" if len(pairs) > LINES else ""))
    cosines.axhline(0, color="black", linewidth=0.8)
    _lines(losses, x, dict(zip(seen.names, lines.losses.unbind(1), strict=True)), "loss")
    if float(lines.losses.nan_to_num(1).min()) > 0:
        losses.set_yscale("log")
    _lines(shares, x, dict(zip(seen.names, lines.shares.unbind(1), strict=True)), "share of the update's lengths")
    shares.set_ylim(0, 1)
    if groups:
        _groups(figure, figure.add_subplot(grid[2, :]), seen.names, pairs, groups)
    return figure


def _timeline(steps: Steps, last: int, points: int) -> tuple[list[float], Means]:
    """The middles of at most so many parts of the steps, and the means over each part."""
    number = len(steps.losses)
    ends = [number * i // points for i in range(points + 1)]
    parts = [slice(a, b) for a, b in pairwise(ends) if a < b]
    values = (steps.losses, steps.cosines, steps.shares)
    middles = [last - number + (part.start + part.stop) / 2 for part in parts]
    return middles, Means(*(torch.stack([x[part].nanmean(0) for part in parts]) for x in values))


def _matrix(figure: Figure, panel: Axes, seen: Statistics) -> None:
    n = len(seen.names)
    image = panel.imshow(seen.cosines.tolist(), cmap="RdBu", vmin=-1, vmax=1)
    if n > READABLE:
        panel.set(xlabel="task", ylabel="task")
    else:
        panel.set_xticks(range(n), seen.names, rotation=30, ha="right")
        panel.set_yticks(range(n), seen.names)
    for i, j in seen.pairs() if n <= READABLE else ():
        text = f"{seen.cosines[i, j]:.2f}\n{100 * seen.conflict_rate[i, j]:.0f} %"
        for place in ((i, j), (j, i)):
            colour = "white" if abs(float(seen.cosines[i, j])) > 0.6 else "black"
            panel.text(place[1], place[0], text, ha="center", va="center", color=colour, fontsize=9 if n < 9 else 6)
    panel.set_title(f"mean cosine and steps in conflict, last {seen.steps} steps")
    figure.colorbar(image, ax=panel)


def _lines(panel: Axes, x: list[float], lines: Mapping[str, Tensor], title: str) -> None:
    for k, (name, values) in enumerate(lines.items()):
        style = "-" if k < len(COLOURS) else "--"
        marker = "o" if len(x) == 1 else ""
        panel.plot(x, values.tolist(), style, marker=marker, color=COLOURS[k % len(COLOURS)], label=name)
    panel.set_title(title)
    panel.set_xlabel("step")
    panel.spines[["top", "right"]].set_visible(False)
    if 0 < len(lines) <= READABLE:
        panel.legend(fontsize=8, framealpha=0.6, edgecolor="none")


def _groups(
    figure: Figure, panel: Axes, names: tuple[str, ...], pairs: list[tuple[int, int]], groups: Mapping[str, Tensor]
) -> None:
    """A heat map of pairs and groups."""
    shown = pairs[:READABLE]
    values = [[float(cosines[pair]) for cosines in groups.values()] for pair in shown]
    image = panel.imshow(values, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    panel.set_yticks(range(len(shown)), [f"{names[i]} against {names[j]}" for i, j in shown])
    if len(groups) > 2 * READABLE:
        panel.set_xlabel("group")
    else:
        panel.set_xticks(range(len(groups)), list(groups), rotation=30, ha="right")
    panel.set_title("mean cosine in each group" + (f", {READABLE} lowest pairs" if len(pairs) > READABLE else ""))
    figure.colorbar(image, ax=panel)
