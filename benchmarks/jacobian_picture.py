"""The picture of bench_jacobian.py: a step's time and the memory of its backward passes, by way and peer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from jacobian_report import memory
from jacobian_ways import AUTO, AUTOGRAM, STORED
from step_picture import STYLE, bars, figure_of, finish, save
from step_report import with_faster_torchjd
from step_ways import PLAIN, PYTORCH_PCGRAD, TORCHJD

from mtlfast.bench.timing import median_interval

# From top to bottom. In both implicit ways `auto` is shown alone, since it is what a user would ask for.
WAYS = {
    PLAIN: "plain sum",
    AUTO: "mtlfast auto",
    STORED: "mtlfast stored",
    TORCHJD: "TorchJD",
    AUTOGRAM: "TorchJD autogram",
    PYTORCH_PCGRAD: "Pytorch-PCGrad",
}
TRUNKS = {
    "transformer-1x32": "transformer, 32 tokens",
    "24-blocks-2x16": "24 blocks, 32 tokens",
    "mlp-256": "MLP, batch 256",
    "transformer-8x64": "transformer, 512 tokens",
}  # the last shows where the implicit way gains nothing
PIXELS = (960, 400)
MEMORY = "#009e73"


def draw(cells: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws two panels for each trunk, at the largest K that was measured, and saves the picture.

    Args:
        cells: what was measured, by trunk and K. Of trunks that are not in `TRUNKS` all are drawn if no others are.
        path: where to; its ending chooses the format.
    """
    K = max(cell["K"] for cell in cells)
    of_trunks = {cell["trunk"]: cell for cell in cells if cell["K"] == K}
    drawn = [of_trunks[name] for name in TRUNKS if name in of_trunks] or list(of_trunks.values())
    weighed = all(way["peak"] is not None for cell in drawn for way in cell["ways"].values())
    titles = (f"step, K = {K}\n(plain = 1)", "memory\n(K P 4 bytes = 1)")[: 1 + weighed]
    with matplotlib.rc_context(STYLE):
        figure = figure_of(PIXELS if weighed else (PIXELS[0], PIXELS[1] // 2))
        panels = figure.subplots(len(titles), len(drawn), sharey="row", squeeze=False)
        for column, cell in zip(panels.T, drawn, strict=True):
            found = with_faster_torchjd(cell["ways"])
            ways = {WAYS[name]: found[name] for name in WAYS if name in found}
            column[0].set_title(TRUNKS.get(cell["trunk"], cell["trunk"]), fontsize=13)
            bars(column[0], ways, list(ways), scale=median_interval(found[PLAIN]["step"])[1], digits=1)
            if weighed:
                sizes = [memory(way["peak"], cell) for way in ways.values()]
                column[1].barh(list(ways), sizes, color=MEMORY, height=0.65)
                finish(column[1], list(ways), sizes, digits=2)
        for row, title in zip(panels, titles, strict=True):
            row[0].set_ylabel(title)
            row[0].invert_yaxis()
        save(figure, panels[0][0], path)
