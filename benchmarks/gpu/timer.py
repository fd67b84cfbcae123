"""Times work on the GPU with CUDA events."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any


def take_turns(
    contestants: dict[str, Callable[[], object]], event: Callable[[], Any], wait: Callable[[], None], rounds: int = 9
) -> dict[str, dict[str, float]]:
    """Microseconds on the GPU of each contestant, in turn, `rounds` times after two that do not count.

    Args:
        contestants: name -> what to run.
        event: makes an event with `record()` and `elapsed_time(later)` in milliseconds.
        wait: for all work to end.
        rounds: how often.

    Returns:
        name -> median, and the lower and upper quartile.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 2):
        for name, run in contestants.items():
            start, end = event(), event()
            start.record()
            run()
            end.record()
            wait()
            if turn >= 2:
                times[name].append(start.elapsed_time(end) * 1000)
    return {name: summary(values) for name, values in times.items()}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    ordered, quarter = sorted(values), (len(values) - 1) // 4
    return {"median": statistics.median(ordered), "low": ordered[quarter], "high": ordered[-1 - quarter]}


def on_cuda(contestants: dict[str, Callable[[], object]], rounds: int = 9) -> dict[str, dict[str, float]]:
    """`take_turns` on the current GPU."""
    import torch

    return take_turns(contestants, lambda: torch.cuda.Event(enable_timing=True), torch.cuda.synchronize, rounds)
