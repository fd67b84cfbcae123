"""The picture of bench_step.py: stacked bars of a step's parts, by way and library."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from step_report import PARTS, Measured, seconds, with_faster_torchjd
from step_ways import CLOSURES, FEATURES, LOSSES, PLAIN, PYTORCH_PCGRAD, TORCHJD

from mtlfast.bench.timing import median_interval

WAYS = (PLAIN, FEATURES, LOSSES, CLOSURES, TORCHJD, PYTORCH_PCGRAD)  # from top to bottom
COLOURS = {"forward": "#56b4e9", "backward": "#0072b2", "surgery": "#d55e00"}
INK = "#808080"  # on white and on black
PIXELS = (800, 290)
STYLE = {
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "mtlfast",  # the same file for the same numbers
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 12,
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], INK),
}


def draw(tasks: dict[int, Measured], path: Path) -> None:
    """Draws one panel for each K and saves the picture, which is transparent.

    Args:
        tasks: K -> what was measured.
        path: where to; its ending chooses the format.
    """
    with matplotlib.rc_context(STYLE):
        figure = figure_of(PIXELS)
        panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
        for panel, (K, ways) in zip(panels, tasks.items(), strict=True):
            bars(panel, with_faster_torchjd(ways), WAYS, scale=1e-3, digits=0)
            panel.set_title(f"{K} tasks, ms", fontsize=13)
        panels[0].invert_yaxis()
        save(figure, panels[0], path)


def figure_of(pixels: tuple[int, int]) -> Figure:
    """An empty picture."""
    figure = Figure(figsize=(pixels[0] / 72, pixels[1] / 72), layout="constrained")  # SVG: 72 an inch
    figure.get_layout_engine().set(h_pad=0.08)
    return figure


def bars(panel: Axes, ways: Measured, names: Sequence[str], scale: float, digits: int) -> None:
    """Draws a step's parts beside each other.

    Args:
        panel: where to.
        ways: what was measured.
        names: the ways from top to bottom.
        scale: the seconds that are one.
        digits: of each sum, after the point.
    """
    ends = [0.0] * len(names)
    for part in PARTS:
        widths = [median_interval(seconds(ways[name], part))[1] / scale for name in names]
        panel.barh(names, widths, left=ends, color=COLOURS[part], label=part, height=0.65)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    finish(panel, names, ends, digits)


def finish(panel: Axes, names: Sequence[str], ends: Sequence[float], digits: int) -> None:
    """Writes each number at the end of its bar, instead of an axis."""
    for name, end in zip(names, ends, strict=True):
        panel.text(end, name, f" {end:.{digits}f}", va="center")
    panel.set_xlim(0, 1.25 * max(ends))
    panel.set_xticks([])
    panel.spines[["top", "right", "bottom"]].set_visible(False)
    panel.tick_params(length=0)


def save(figure: Figure, panel: Axes, path: Path) -> None:
    """Adds the legend of a panel and saves the picture, which is transparent."""
    drawn, names = panel.get_legend_handles_labels()
    figure.legend(drawn, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, transparent=True, metadata={"Date": None})
