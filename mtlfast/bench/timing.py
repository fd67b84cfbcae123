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
    contestants: Mapping[str, Callable[[], object]], rounds: int, warmups: int = 1, device: str = "cpu"
) -> dict[str, Timing]:
    """Times each contestant once a round, in turn, after `warmups` rounds that do not count.

    Args:
        contestants: name -> what to run.
        rounds: how often.
        warmups: rounds before the first that counts.
        device: "cuda" takes the GPU's own time, between events before and after the run, all of it queued before
            the first event is reached: a training step queues its work as far ahead.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warmups + rounds):
        for name, run in contestants.items():
            took = _on_gpu(run) if device == "cuda" else _on_cpu(run)
            if turn >= warmups:
                seconds[name].append(took)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def _on_cpu(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _on_gpu(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000
