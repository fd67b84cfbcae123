"""The picture: how well each reward is served over the training, the trade-off at its end, and the time of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from data import REWARDS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from train import Run

from mtlfast.bench.timing import Timing

# A reward is a colour and a method is a line style, as in examples/digits.
COLOURS, STYLES, INK = ("#0072b2", "#d55e00", "#009e73"), (":", "--", "-"), "#333333"


def save(runs: Mapping[str, Sequence[Run]], times: Mapping[str, Timing], path: Path) -> None:
    """Draws the picture and saves it.

    Args:
        runs: method -> one Run for each seed.
        times: way -> the seconds of its steps.
        path: where to; its ending chooses the format.
    """
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    curves, ends, bars = figure.subplots(1, 3, width_ratios=(4, 3, 3))
    _draw_curves(curves, runs)
    _draw_ends(ends, runs)
    ms = {way: timing.median * 1e3 for way, timing in times.items()}
    bars.barh(list(ms), list(ms.values()), color="#999999", height=0.6)
    for way, value in ms.items():
        bars.text(value, way, f" {value:.1f}", va="center")
    bars.set_xlim(0, 1.2 * max(ms.values()))
    bars.invert_yaxis()
    bars.set_xticks([])
    _frame(bars, "Time of a step, ms")
    rewards = [Line2D([], [], color=colour, label=name) for colour, name in zip(COLOURS, REWARDS, strict=True)]
    methods = [Line2D([], [], color=INK, linestyle=s, label=name) for s, name in zip(STYLES, runs, strict=True)]
    figure.legend(handles=rewards + methods, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=90)


def _draw_curves(ax: Axes, runs: Mapping[str, Sequence[Run]]) -> None:
    for style, of_seeds in zip(STYLES, runs.values(), strict=True):
        means = torch.stack([torch.stack(run.accuracies) for run in of_seeds]).mean(0)
        for curve, colour in zip(means.unbind(1), COLOURS, strict=True):
            ax.plot(of_seeds[0].steps, curve.numpy(), style, color=colour)
    _frame(ax, "Pairs ordered as a reward does, %")
    ax.set_xlabel("step")


def _draw_ends(ax: Axes, runs: Mapping[str, Sequence[Run]]) -> None:
    for place, of_seeds in enumerate(runs.values()):
        ends = torch.stack([run.accuracies[-1] for run in of_seeds])
        for k, (colour, values) in enumerate(zip(COLOURS, ends.unbind(1), strict=True)):
            x = place + 0.12 * (k - 1)
            ax.plot([x] * len(values), values.numpy(), "o", color=colour, alpha=0.4, markersize=4)
            ax.plot([x - 0.06, x + 0.06], [values.mean()] * 2, color=colour, linewidth=2.5)
    ax.set_xticks(range(len(runs)), list(runs))
    _frame(ax, "After the last step: mean, and each seed")


def _frame(ax: Axes, title: str) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, fontsize=10, color=INK)
