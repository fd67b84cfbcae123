"""The tables of bench_jacobian.py: multiples of bare passes and of a plain step, and the limits they are held to."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jacobian_ways import AUTO, BATCHED, STORED
from step_report import seconds, with_faster_torchjd
from step_ways import BARE, PLAIN

from mtlfast.bench.section import Section
from mtlfast.bench.timing import median_interval

# A cell is what was measured of one trunk with K tasks: "trunk", "K", "P", "ways" as in `step_report.Measured` with
# "flops" and "plan" besides, and "refused": the contestants that could not take part, with the reasons.
Cell = dict[str, Any]
NO_SLOWER = 1.05  # of auto over stored: "auto" may be the default if no interval lies above it


class Limit(NamedTuple):
    """A limit of the issue.

    Attributes:
        what: "passes": the time without the forward pass; "step": the time; "FLOPs"; "memory".
        of: the way that is held to it.
        over: the way by whose time or FLOPs it is divided.
        limit: the largest ratio.
        trunks: where it holds; empty: everywhere.
        tasks: the K at which it holds; empty: all.
    """

    what: str
    of: str
    over: str
    limit: float
    trunks: tuple[str, ...] = ()
    tasks: tuple[int, ...] = ()


FEW_ROWS, MORE_ROWS = ("transformer-1x32", "mlp-32"), ("transformer-2x64", "mlp-256")
LIMITS = [
    Limit("passes", BATCHED, BARE, 0.5, FEW_ROWS, (8,)),
    Limit("passes", BATCHED, BARE, 0.75, MORE_ROWS, (8,)),
    Limit("step", BATCHED, PLAIN, 2.5, FEW_ROWS + MORE_ROWS, (8,)),
    Limit("memory", BATCHED, "K P 4", 0.25, (*FEW_ROWS, "24-blocks-2x16"), (8,)),
    Limit("FLOPs", AUTO, STORED, 1.0),
]


def ratio(cell: Cell, what: str, of: str, over: str) -> list[float] | None:
    """[low, median, high] of a ratio of two ways in the same rounds; one number thrice where it was measured once.

    It is None where memory was not measured.
    """
    ways = with_faster_torchjd(cell["ways"])
    if what == "FLOPs":
        return [ways[of]["flops"] / ways[over]["flops"]] * 3
    if what == "memory":
        found = memory(ways[of]["peak"], cell)
        return None if found is None else [found] * 3
    part = "without forward" if what == "passes" else what
    pairs = zip(seconds(ways[of], part), seconds(ways[over], part), strict=True)
    return median_interval([mine / other for mine, other in pairs])


def memory(peak: int | None, cell: Cell) -> float | None:
    """A peak as a multiple of the memory that K float32 gradients take."""
    return None if peak is None else peak / (4 * cell["K"] * cell["P"])


def multiples(cells: Sequence[Cell]) -> Section:
    """The table of all ways."""
    section = Section(
        "multiples",
        "Ways and peers",
        "Passes / K bare: the time without the forward pass over that of K bare calls of torch.autograd.grad, in the "
        "same round. Step / plain: the time of forward pass, backward passes and PCGrad over that of a step without "
        "surgery. FLOPs / K bare: as FlopCounterMode counts those after the forward pass, which are the matrix "
        "products and convolutions of torch. Memory: what is held at most from the losses on, beside what is there "
        "then, over K P 4 bytes, measured in a process of its own; the update alone takes 1 / K. In brackets: 95 % "
        "confidence intervals. TorchJD is shown with the faster of its settings, all passes at once or one after the "
        "other, Pytorch-PCGrad as its algorithm on one device.",
    )
    for cell in cells:
        place = {"trunk": cell["trunk"], "K": cell["K"]}
        for name, way in with_faster_torchjd(cell["ways"]).items():
            section.rows.append(
                place
                | {
                    "way": name,
                    "passes / K bare": ratio(cell, "passes", name, BARE),
                    "step / plain": ratio(cell, "step", name, PLAIN),
                    "FLOPs / K bare": way["flops"] / cell["ways"][BARE]["flops"],
                    "memory / K P 4": memory(way["peak"], cell),
                    "plan": way["plan"],
                }
            )
        section.rows += [place | {"way": name, "plan": f"left out: {why}"} for name, why in cell["refused"].items()]
    return section


def auto_over_stored(cells: Sequence[Cell]) -> Section:
    """The table that decides whether "auto" may be the default."""
    section = Section("auto", "auto / stored", f"Above: the whole interval of the passes lies above {NO_SLOWER}.")
    for cell in cells:
        passes, step = (ratio(cell, what, AUTO, STORED) for what in ("passes", "step"))
        assert passes is not None
        section.rows.append(
            {
                "trunk": cell["trunk"],
                "K": cell["K"],
                "passes": passes,
                "step": step,
                f"above {NO_SLOWER}": "above" if passes[0] > NO_SLOWER else "",
                "plan of auto": cell["ways"][AUTO]["plan"],
            }
        )
    above = [f"{row['trunk']} at K = {row['K']}" for row in section.rows if row[f"above {NO_SLOWER}"]]
    section.caption += f" Rows above it: {', '.join(above) or 'none'}."
    return section


def limits(
    cells: Sequence[Cell],
    limits: Sequence[Limit] = LIMITS,
    ratio: Callable[[Cell, str, str, str], list[float] | None] = ratio,
) -> Section:
    """The table that says of each limit in each cell whether the better end of the interval meets it.

    Args:
        cells: what was measured.
        limits: the limits.
        ratio: gives what a limit holds, from a cell and the limit's `what`, `of` and `over`.
    """
    section = Section(
        "limits", "Limits", "A limit is missed if the better end of the interval misses it, by the difference of both."
    )
    for limit in limits:
        for cell in cells:
            if (limit.trunks and cell["trunk"] not in limit.trunks) or (limit.tasks and cell["K"] not in limit.tasks):
                continue
            found = ratio(cell, limit.what, limit.of, limit.over)
            if found is None:
                continue
            missed = found[0] - limit.limit
            section.rows.append(
                {
                    "trunk": cell["trunk"],
                    "K": cell["K"],
                    "of": f"{limit.what}, {limit.of} / {limit.over}",
                    "ratio": found,
                    "limit": f"<= {limit.limit:g}",
                    "": "met" if missed <= 0 else f"missed by {missed:.3f}",
                }
            )
    return section


def markdown(section: Section) -> str:
    """A section as a table in Markdown, with its title and caption."""
    columns = list(dict.fromkeys(column for row in section.rows for column in row))
    lines = [f"## {section.title}", "", _line(columns), _line(["---"] * len(columns))]
    lines += [_line([_written(row.get(column)) for column in columns]) for row in section.rows]
    return "\n".join([*lines, "", section.caption, ""])


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _written(value: Any) -> str:
    if isinstance(value, list):
        low, middle, high = value
        return f"{middle:.2f}" if low == high else f"{middle:.2f} ({low:.2f}-{high:.2f})"
    return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)
