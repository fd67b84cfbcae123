"""The picture: each architecture's error against the correlation of the tasks, and Delta-m on the canvases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean

import torch
from architectures import ARCHITECTURES
from experiment import METHODS, SINGLE, Outcome
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# A method is a colour, a line style and a marker; what is drawn first is larger, so that it shows where lines coincide.
LOOKS = {
    "Sum": {"color": "#0072b2", "linestyle": "--", "marker": "o", "linewidth": 3.5, "markersize": 8},
    "PCGrad": {"color": "#d55e00", "linestyle": "-", "marker": "s", "linewidth": 2, "markersize": 5.5},
    "UPGrad": {"color": "#2fd0a0", "linestyle": "-.", "marker": "^", "linewidth": 1, "markersize": 3},
}
ALONE = {"color": "#333333", "linestyle": ":"}
COLUMNS = 4


def save(outcomes: Mapping[float | None, Outcome], path: Path) -> None:
    """Draws the picture and saves it.

    Args:
        outcomes: correlation, or None for the canvases -> its outcome.
        path: where to; its ending chooses the format.
    """
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(4, 1.8))
    synthetic = {correlation: outcome for correlation, outcome in outcomes.items() if correlation is not None}
    left.suptitle("Synthetic regression: RMS error, mean of both tasks (band: lowest to highest seed)", fontsize=11)
    axes = left.subplots(2, COLUMNS, sharex=True, sharey=True)
    for name, ax in zip(ARCHITECTURES, axes.flat, strict=False):
        _draw_errors(ax, name, synthetic)
    for ax in axes[:, 0]:
        ax.set_ylabel("% of the label's deviation")
    for ax in (*axes[1], axes[0, -1]):  # the lowest of each column
        ax.set(xlabel="correlation", xticks=sorted(synthetic))
        ax.tick_params(labelbottom=True)
    handles = [Line2D([], [], label=name, **look) for name, look in {"single-task": ALONE, **LOOKS}.items()]
    axes.flat[-1].legend(handles=handles, loc="center", frameon=False)
    axes.flat[-1].axis("off")
    right.suptitle("Canvases: Δm (right: better than single-task)", fontsize=11)
    _draw_canvases(right.subplots(), outcomes[None])
    figure.savefig(path, dpi=90)


def _draw_errors(ax: Axes, name: str, outcomes: Mapping[float, Outcome]) -> None:
    """Mean error of the two tasks against their correlation: mean of the seeds, and from lowest to highest."""
    correlations = sorted(outcomes)
    for row, look in ((SINGLE, ALONE), *(((name, method), LOOKS[method]) for method in METHODS)):
        errors = torch.tensor([outcomes[p].metrics[row] for p in correlations]).mean(2)  # [correlations, seeds]
        ax.plot(correlations, errors.mean(1), **look)
        ax.fill_between(correlations, errors.amin(1), errors.amax(1), color=look["color"], alpha=0.07, linewidth=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(name, fontsize=10)


def _draw_canvases(ax: Axes, outcome: Outcome) -> None:
    """Delta-m of every architecture and method: each seed faint, and their mean."""
    for place, name in enumerate(ARCHITECTURES):
        for y, (method, look) in zip((place - 0.22, place, place + 0.22), LOOKS.items(), strict=True):
            values = outcome.delta_m((name, method))
            marks = {"color": look["color"], "marker": look["marker"], "linestyle": ""}
            ax.plot(values, [y] * len(values), alpha=0.35, markersize=3, **marks)
            ax.plot([mean(values)], [y], markersize=6, **marks)
    ax.axvline(0, **ALONE)
    ax.set_yticks(range(len(ARCHITECTURES)), list(ARCHITECTURES))
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("%")
