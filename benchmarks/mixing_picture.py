"""The picture of bench_mixing.py: a step's time against the number of tasks."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from jacobian_report import Cell
from matplotlib.axes import Axes
from mixing_report import ratio
from mixing_ways import AUTO, DISJOINT, STORED, TORCHJD
from step_picture import INK, STYLE, figure_of, save
from step_ways import PLAIN

WAYS = {  # the label, the colour, and how far above the last point its number stands
    TORCHJD: ("TorchJD", "#009e73", 6),
    STORED: ("K passes", "#56b4e9", -6),
    AUTO: ("mixing=, any A", "#d55e00", 6),
    DISJOINT: ("mixing=, each sample of one task", "#cc79a7", -6),
}
TRUNKS = {
    "transformer-8x16": "transformer, 8 x 16 tokens",
    "transformer-16x32": "transformer, 16 x 32 tokens",
    "mlp-256": "MLP, 256 samples",
}
PIXELS = (960, 330)
MULTIPLES = (1, 2, 5, 10, 20, 50, 100)


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Draws one panel for each trunk, with confidence intervals, and saves the picture.

    Args:
        cells: what was measured. Of trunks that are not in `TRUNKS` all are drawn if no others are.
        path: where to; its ending chooses the format.
    """
    of_tasks = [cell for cell in cells if not cell["each sample"]]
    measured = list(dict.fromkeys(cell["trunk"] for cell in of_tasks))
    drawn = [name for name in TRUNKS if name in measured] or measured
    with matplotlib.rc_context(STYLE):
        figure = figure_of(PIXELS)
        panels = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
        for panel, trunk in zip(panels, drawn, strict=True):
            _lines(panel, [cell for cell in of_tasks if cell["trunk"] == trunk])
            panel.set_title(TRUNKS.get(trunk, trunk), fontsize=13)
            panel.set_xlabel("tasks")
        panels[0].set_ylabel("step (plain = 1)")
        save(figure, panels[0], path)


def _lines(panel: Axes, cells: Sequence[Cell]) -> None:
    tasks = [cell["K"] for cell in cells]
    for way, (label, colour, above) in WAYS.items():
        low, middle, high = zip(*(ratio(cell, "step", way, PLAIN) or () for cell in cells), strict=True)
        panel.plot(tasks, middle, "o-", color=colour, label=label, markersize=4, linewidth=2)
        panel.fill_between(tasks, low, high, color=colour, alpha=0.25, linewidth=0)
        place, offset = (tasks[-1], middle[-1]), (6, above)
        panel.annotate(
            f"{middle[-1]:.1f}", place, offset, textcoords="offset points", va="center", color=colour, fontsize=11
        )
    panel.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(tasks, [str(K) for K in tasks])
    panel.set_yticks(MULTIPLES, [str(multiple) for multiple in MULTIPLES])
    panel.minorticks_off()
    panel.set_ylim(0.8, None)
    panel.set_xlim(None, 1.35 * tasks[-1])
    panel.spines[["top", "right"]].set_visible(False)
