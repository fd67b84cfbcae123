"""How `gram` takes many small tensors, one large one, and more and more elements."""

import math
import statistics

import torch

from mtlfast import ops
from mtlfast.bench.section import Section
from mtlfast.bench.timing import Timing, take_turns
from mtlfast.bench.workload import scattered
from mtlfast.task_gradients import TaskGradients


def measure(rounds: int, largest: int = 200_000_000) -> list[Section]:
    """Times `gram` on extreme shapes and over a range of sizes.

    Args:
        rounds: alternating rounds.
        largest: elements of the largest case.
    """
    return [_shapes(rounds, largest // 2), _growth(rounds, largest)]


def _shapes(rounds: int, elements: int) -> Section:
    section = Section(
        "shapes", "gram on extreme shapes", "Marshalling: making TaskGradients of the rows, before any kernel runs."
    )
    rows = [[torch.randn(100) for _ in range(10_000)] for _ in range(8)]
    small = TaskGradients.from_rows(rows)
    times = take_turns(
        {"marshal": lambda: TaskGradients.from_rows(small.rows), "gram": lambda: ops.gram(small)}, 3 * rounds
    )
    section.rows.append(_shape_row("10,000 tensors of 100 elements", 8, 8e6, times["gram"], times["marshal"]))
    many, one = scattered(2, elements), scattered(2, elements, num_tensors=1)
    times = take_turns({"many": lambda: ops.gram(many), "one": lambda: ops.gram(one)}, rounds)
    section.rows.append(_shape_row(f"150 tensors, {elements / 1e6:g}M elements", 2, 8 * elements, times["many"]))
    section.rows.append(_shape_row(f"1 tensor of {elements / 1e6:g}M elements", 2, 8 * elements, times["one"]))
    return section


def _shape_row(name: str, K: int, nbytes: float, gram: Timing, marshal: Timing | None = None) -> dict[str, object]:
    low, high = gram.quartiles
    return {
        "shape": name,
        "K": K,
        "gram, ms": [1e3 * seconds for seconds in (low, gram.median, high)],
        "GB/s": nbytes / gram.median / 1e9,
        "marshalling, ms": None if marshal is None else marshal.median * 1e3,
    }


def _growth(rounds: int, largest: int) -> Section:
    sizes = [n for n in (100_000, 1_000_000, 10_000_000, 50_000_000, 100_000_000, 200_000_000) if n <= largest]
    cases = {n: scattered(2, n) for n in sizes}
    # A small case is repeated, or starting threads would be all that is timed; beyond the caches growth is linear.
    repeats = {n: max(1, 10_000_000 // n) for n in sizes}

    def repeat(n: int) -> None:
        for _ in range(repeats[n]):
            ops.gram(cases[n])

    times = take_turns({str(n): lambda n=n: repeat(n) for n in sizes}, rounds)  # type: ignore[misc]
    seconds = {n: times[str(n)].median / repeats[n] for n in sizes}
    outside = [n for n in sizes if n >= 10_000_000] or sizes
    exponent = _slope([math.log(n) for n in outside], [math.log(seconds[n]) for n in outside])
    section = Section(
        "growth",
        "gram as P grows, K = 2",
        f"From {outside[0] / 1e6:g}M elements on (beyond the caches) time grows as P to the power {exponent:.3f}.",
    )
    section.rows = [{"P": n, "ms": seconds[n] * 1e3, "ns an element": seconds[n] / n * 1e9} for n in sizes]
    return section


def _slope(x: list[float], y: list[float]) -> float:
    return statistics.linear_regression(x, y).slope if len(x) > 1 else math.nan
