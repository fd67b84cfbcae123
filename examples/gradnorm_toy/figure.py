"""The picture: each task's relative loss with both weights, and the weights that GradNorm learns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

INK, POINTS = "#333333", 100  # a curve has at most so many points, each the mean of the steps up to it


class Curves(Protocol):
    """What is drawn of a training: [steps, K] relative losses and loss weights."""

    rates: Tensor
    weights: Tensor


def save(runs: Mapping[str, Curves], sigmas: Tensor, path: Path) -> None:
    """Draws the picture and saves it.

    Args:
        runs: by the name of the weights; the last has the weights to draw.
        sigmas: [K] the tasks' scales.
        path: where to; its ending chooses the format.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    *of_losses, of_weights = figure.subplots(1, len(runs) + 1)
    low = min(float(_means(run.rates)[1].min()) for run in runs.values())
    high = max(float(_means(run.rates)[1].max()) for run in runs.values())
    for ax, (name, run) in zip(of_losses, runs.items(), strict=True):
        _draw(ax, run.rates, f"Loss / first loss, {name}")
        ax.set_ylim(0.9 * low, 1.1 * high)
    name, run = list(runs.items())[-1]
    _draw(of_weights, run.weights, f"Weights of {name}")
    labels = [rf"$\sigma$ = {sigma:.3g}" for sigma in sigmas.tolist()]
    figure.legend(of_weights.lines, labels, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=90)


def _draw(ax: Axes, numbers: Tensor, title: str) -> None:
    steps, means = _means(numbers)
    colours = colormaps["viridis"](torch.linspace(0, 0.92, numbers.shape[1]).numpy())
    for curve, colour in zip(means.unbind(dim=1), colours, strict=True):
        ax.plot(steps, curve.numpy(), color=colour)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, fontsize=10, color=INK)
    ax.set_xlabel("step")


def _means(numbers: Tensor) -> tuple[list[int], Tensor]:
    """The means of stretches of equal length, and the last step of each."""
    length = -(-len(numbers) // POINTS)
    stretches = numbers.split(length)
    ends = [min(len(numbers), length * (i + 1)) for i in range(len(stretches))]
    return ends, torch.stack([stretch.mean(dim=0) for stretch in stretches])
