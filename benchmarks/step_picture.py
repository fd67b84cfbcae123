"""The picture of bench_step.py: stacked bars of a step's parts, by way and library."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from step_report import PARTS, Measured, seconds, with_faster_torchjd
from step_ways import CLOSURES, FEATURES, LOSSES, PLAIN, PYTORCH_PCGRAD, TORCHJD

from mtlfast.bench.timing import median_interval

WAYS = (PLAIN, FEATURES, LOSSES, CLOSURES, TORCHJD, PYTORCH_PCGRAD)  # from top to bottom
COLOURS = {"forward": "#56b4e9", "backward": "#0072b2", "surgery": "#d55e00"}
INK = "#808080"  # on white and on black
PIXELS = (800, 290)


def draw(tasks: dict[int, Measured], path: Path) -> None:
    """Draws one panel for each K and saves the picture, which is transparent.

    Args:
        tasks: K -> what was measured.
        path: where to; its ending chooses the format.
    """
    settings = {
        "svg.fonttype": "none",  # letters stay letters
        "svg.hashsalt": "mtlfast",  # the same file for the same numbers
        "font.family": "sans-serif",
        "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
        "font.size": 12,
        **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], INK),
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(PIXELS[0] / 72, PIXELS[1] / 72), layout="constrained")  # SVG: 72 an inch
        figure.get_layout_engine().set(h_pad=0.08)
        panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
        for panel, (K, ways) in zip(panels, tasks.items(), strict=True):
            ways = with_faster_torchjd(ways)
            ends = [0.0] * len(WAYS)
            for part in PARTS:
                widths = [median_interval(seconds(ways[way], part))[1] * 1e3 for way in WAYS]
                panel.barh(WAYS, widths, left=ends, color=COLOURS[part], label=part, height=0.65)
                ends = [end + width for end, width in zip(ends, widths, strict=True)]
            for row, end in enumerate(ends):
                panel.text(end, row, f" {end:.0f}", va="center")
            panel.set_title(f"{K} tasks, ms", fontsize=13)
            panel.set_xlim(0, 1.25 * max(ends))
            panel.set_xticks([])
            panel.spines[["top", "right", "bottom"]].set_visible(False)
            panel.tick_params(length=0)
        panels[0].invert_yaxis()
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PARTS), frameon=False
        )
        figure.savefig(path, transparent=True, metadata={"Date": None})
