"""Timing on a noisy machine: all contestants take turns in one process; medians and their spread are kept."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

HEAD_START = 4_000_000  # GPU cycles, some 2 ms: longer than marshalling and launching take


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    quarter = (len(values) - 1) // 4
    return sorted(values)[quarter], sorted(values)[-1 - quarter]


def median_interval(values: Sequence[float], level: float = 0.95, draws: int = 10_000) -> list[float]:
    """[low, median, high]: the median with its bootstrap confidence interval.

    Args:
        values: one for each round.
        level: how often such an interval holds the true median.
        draws: how often the values are drawn again, with replacement and from a fixed seed.
    """
    x = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(x), (draws, len(x)), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = x[drawn].quantile(0.5, dim=1).quantile(ends).tolist()
    return [low, statistics.median(values), high]


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant over the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile of the seconds."""
        return _quartiles(self.seconds)

    def ratio_to(self, other: "Timing") -> tuple[float, float, float]:
        """(lowest quartile, median, highest quartile) of this one's time over the other's, round by round."""
        ratios = [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]
        low, high = _quartiles(ratios)
        return low, statistics.median(ratios), high


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    warmups: int = 1,
    device: str = "cpu",
    rotate: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times each contestant once a round, in turn, after `warmups` rounds that do not count.

    Args:
        contestants: name -> what to run.
        rounds: how often.
        warmups: rounds before the first that counts.
        device: "cuda" takes the GPU's own time, between events before and after the run, all of it queued before
            the first event is reached: a training step queues its work as far ahead.
        rotate: begin each round one contestant later than the round before, so that none keeps its place.
        clock: tells the time on the CPU. `time.process_time` does not count what other programs take.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(warmups + rounds):
        first = turn % len(names) if rotate else 0
        for name in names[first:] + names[:first]:
            run = contestants[name]
            took = _on_gpu(run) if device == "cuda" else _on_cpu(run, clock)
            if turn >= warmups:
                seconds[name].append(took)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def _on_cpu(run: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start


def _on_gpu(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000
