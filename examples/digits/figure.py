"""The picture: loss curves, gradient cosines, and canvases with their reconstructions."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import torch
from experiment import SINGLE, SUM
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea
from matplotlib.ticker import LogLocator, NullLocator
from tasks import TASKS, predicted_images, predicted_sum
from torch import Tensor
from train import Run

# Throughout the picture a task is a colour and a method is a line style.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a0409c")
STYLES = (":", "--", "-", "-.")
MARKS = {"--": "- -", "-": "\u2014", "-.": "-·-"}  # a line style in a note, where the method's name may not fit
INK, FAINT, CONFLICT = "#333333", "#bbbbbb", "#f6e9e9"
EXAMPLES = 8


def save(runs: dict[str, list[Run]], path: Path) -> None:
    """Draws the picture and saves it.

    Args:
        runs: method -> one Run for each seed.
        path: where to; its ending chooses the format.
    """
    figure = Figure(figsize=(11, 10.8), layout="constrained")
    losses, cosines, canvases = figure.subfigures(3, 1, height_ratios=(3.2, 2.7, 5.1), hspace=0.05)
    _draw_losses(losses, runs)
    _draw_cosines(cosines, runs)
    _draw_canvases(canvases, {method: of_seeds[0] for method, of_seeds in runs.items()})
    figure.savefig(path, dpi=90)


def _draw_losses(panel: SubFigure, runs: dict[str, list[Run]]) -> None:
    seeds = "1 seed" if len(runs[SUM]) == 1 else f"{len(runs[SUM])} seeds"
    panel.suptitle(f"Test loss of each task (mean of {seeds}, band: lowest to highest)")
    for k, ax in enumerate(panel.subplots(1, len(TASKS), sharey=True)):
        for style, (method, of_seeds) in zip(STYLES, runs.items(), strict=False):
            curves = torch.stack([torch.stack(run.losses)[:, k] for run in of_seeds])
            _curve(ax, curves, style, INK if method == SINGLE else COLOURS[k])
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
        _frame(ax, [k])
    handles = [
        Line2D([], [], color=INK, linestyle=style, label=method) for style, method in zip(STYLES, runs, strict=False)
    ]
    panel.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _draw_cosines(panel: SubFigure, runs: dict[str, list[Run]]) -> None:
    panel.suptitle("Cosine between two tasks' gradients of the trunk, mean of each epoch (red: conflict)")
    pairs = list(combinations(range(len(TASKS)), 2))
    for (i, j), ax in zip(pairs, panel.subplots(1, len(pairs), sharey=True), strict=True):
        ax.axhspan(-1, 0, color=CONFLICT, zorder=0)
        ax.set_ylim(-0.3, 1)
        notes = []
        for style, (method, of_seeds) in zip(STYLES, runs.items(), strict=False):
            if method == SINGLE:
                continue
            cosines = torch.stack([torch.stack(run.cosines)[:, i, j] for run in of_seeds])
            negative = torch.stack([torch.stack(run.conflicts)[:, i, j] for run in of_seeds]).mean()
            _curve(ax, cosines, style, INK, first=1)
            notes.append(f"{MARKS[style]} {negative:.0%} of steps < 0")
        corner = {"ha": "right", "va": "top", "transform": ax.transAxes}
        ax.text(1, 0.98, "\n".join(notes), color=INK, fontsize=8, **corner)
        _frame(ax, [i, j])


def _draw_canvases(panel: SubFigure, runs: dict[str, Run]) -> None:
    panel.suptitle(f"The first {EXAMPLES} test canvases of seed 0, and what the networks make of them")
    canvases = runs[SUM].canvases
    truth = (canvases.left, canvases.right, canvases.left + canvases.right)
    rows = {"canvas": canvases.canvas[:EXAMPLES, 0], "truth": _halves(canvases.clean)}
    captions = {"truth": truth}
    for method, run in runs.items():
        left, right, images, total = run.outputs
        rows[method] = _halves(predicted_images(images))
        captions[method] = (left.argmax(1), right.argmax(1), predicted_sum(total))
    axes = panel.subplots(len(rows), EXAMPLES, height_ratios=(1.5, *[1] * (len(rows) - 1)))
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for c, ax in enumerate(row):
            ax.imshow(images[c].cpu().numpy(), cmap="gray_r", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_color(FAINT)
            if name in captions:
                _caption(ax, [n[c].item() for n in captions[name]], [n[c].item() for n in truth])


def _caption(ax: Axes, predicted: list[float], truth: list[float]) -> None:
    """Left, sum and right below an image, in their tasks' colours; a wrong digit gets a cross."""
    left, right = (f"{p} ✗" if p != t else f"{p}" for p, t in zip(predicted[:2], truth[:2], strict=True))
    for x, text, k in ((0.17, left, 0), (0.5, f"Σ {round(predicted[2], 1):g}", 3), (0.83, right, 1)):
        below = {"ha": "center", "va": "top", "transform": ax.transAxes}
        ax.text(x, -0.06, text, color=COLOURS[k], fontsize=9, **below)


def _halves(images: Tensor) -> Tensor:
    """The first examples of [B, 2, 8, 8], left beside right with a line between them: [EXAMPLES, 8, 17]."""
    line = images.new_full((len(images), images.shape[2], 1), 0.3)
    return torch.cat([images[:, 0], line, images[:, 1]], dim=2)[:EXAMPLES]


def _curve(ax: Axes, curves: Tensor, style: str, colour: str, first: int = 0) -> None:
    """Mean and range of the seeds' curves, [seeds, epochs]."""
    epochs = range(first, first + curves.shape[1])
    ax.plot(epochs, curves.mean(0).numpy(), style, color=colour)
    low, high = curves.amin(0).numpy(), curves.amax(0).numpy()
    ax.fill_between(epochs, low, high, color=colour, alpha=0.12, linewidth=0)


def _frame(ax: Axes, tasks: list[int]) -> None:
    """Axis style, and the tasks' names as the title, each in its colour."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("epoch")
    names = [TextArea(TASKS[k].name, textprops={"color": COLOURS[k], "fontweight": "bold"}) for k in tasks]
    above = {"bbox_to_anchor": (0.5, 1), "bbox_transform": ax.transAxes, "frameon": False}
    ax.add_artist(AnchoredOffsetbox("lower center", child=HPacker(children=names, pad=0, sep=8), **above))
