"""The tables of bench_mixing.py: multiples of a plain step, and the limits they are held to."""

from collections.abc import Sequence
from typing import Any

import jacobian_report
from jacobian_report import Cell, Limit
from mixing_ways import AUTO, DISJOINT, FORCED
from step_ways import PLAIN

from mtlfast.bench.section import Section
from mtlfast.bench.timing import median_interval

# Cells are those of `jacobian_report`, with "first": the first step of a new model over a plain one, for each that was
# timed. In a cell whose tasks are the samples K is S and "each sample" is true.
SMALL = ("transformer-8x16", "mlp-64", "mlp-256")
MIDDLE, LARGE = ("transformer-16x32",), ("transformer-32x64",)
LIMITS = [
    Limit("step", AUTO, PLAIN, 1.4, SMALL),
    Limit("step", AUTO, PLAIN, 1.5, MIDDLE),
    Limit("step", AUTO, PLAIN, 1.9, LARGE),
    Limit("step", DISJOINT, PLAIN, 1.65, LARGE),
    Limit("FLOPs", FORCED, PLAIN, 1.25, SMALL),
    Limit("FLOPs", FORCED, PLAIN, 1.4, MIDDLE),
    Limit("memory / P 4", AUTO, PLAIN, 0.5, SMALL),
    Limit("memory / K P 4", AUTO, PLAIN, 1.0),
]


def ratio(cell: Cell, what: str, of: str, over: str) -> list[float] | None:
    """[low, median, high] of what a limit holds; one number thrice where it was measured once, None where it was not.

    Memory is the difference of both peaks.
    """
    ways = cell["ways"]
    if what == "FLOPs":
        return [ways[of]["flops"] / ways[over]["flops"]] * 3
    if what == "step":
        return median_interval([a / b for a, b in zip(ways[of]["step"], ways[over]["step"], strict=True)])
    extra = _extra(cell, of, over)
    if extra is None:
        return None
    return [extra / (cell["K"] if what == "memory / K P 4" else 1)] * 3


def _extra(cell: Cell, of: str, over: str) -> float | None:
    """The peak of one way above that of another, as a multiple of the memory that one float32 gradient takes."""
    peaks = [cell["ways"][name]["peak"] for name in (of, over)]
    return None if None in peaks else (peaks[0] - peaks[1]) / (4 * cell["P"])


def multiples(cells: Sequence[Cell]) -> Section:
    """The table of all ways."""
    section = Section(
        "multiples",
        "Ways and peers",
        "Plain: the forward pass and losses.mean().backward(). Step / plain: the time of the forward pass, the "
        "backward passes and UPGrad, or MGDA, over that of a plain step in the same round. First / plain: the same of "
        "a new model's first step, which plans and probes. FLOPs / plain: of whole steps, as FlopCounterMode counts "
        "the matrix products of torch, and the products of gradients besides. Memory: how much more is held at most "
        "from the losses on than in a plain step, over P 4 bytes, each in a process of its own. In brackets: 95 % "
        "confidence intervals.",
    )
    for cell in cells:
        place = {"trunk": cell["trunk"], "K": cell["K"]}
        for name, way in cell["ways"].items():
            section.rows.append(
                place
                | {
                    "way": name,
                    "ms": median_interval(way["step"])[1] * 1e3,
                    "step / plain": ratio(cell, "step", name, PLAIN),
                    "first / plain": median_interval(way["first"]) if way["first"] else None,
                    "FLOPs / plain": way["flops"] / cell["ways"][PLAIN]["flops"],
                    "memory / P 4": _extra(cell, name, PLAIN),
                    "plan": way["plan"],
                }
            )
        section.rows += [place | {"way": name, "plan": f"left out: {why}"} for name, why in cell["refused"].items()]
    return section


def limits(cells: Sequence[Cell]) -> Section:
    """The table of limits, which are for mixtures."""
    of_tasks = [cell for cell in cells if not cell["each sample"]]
    section = jacobian_report.limits(of_tasks, LIMITS, ratio)
    section.rows += [_ordinary(cell) for cell in of_tasks if cell["trunk"] in LARGE and cell["K"] == 2]
    return section


def _ordinary(cell: Cell) -> dict[str, Any]:
    """Whether two tasks with many rows take two ordinary passes."""
    plan = cell["ways"][AUTO]["plan"]
    return {
        "trunk": cell["trunk"],
        "K": cell["K"],
        "of": f"plan of {AUTO}: {plan}",
        "limit": "not mixing",
        "": "missed" if plan == "mixing" else "met",
    }
