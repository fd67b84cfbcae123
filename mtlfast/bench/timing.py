"""Timing on a noisy machine: all contestants take turns in one process; medians and their spread are kept."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant over the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    def ratio_to(self, other: "Timing") -> tuple[float, float, float]:
        """(lowest quartile, median, highest quartile) of this one's time over the other's, round by round."""
        ratios = sorted(a / b for a, b in zip(self.seconds, other.seconds, strict=True))
        quarter = (len(ratios) - 1) // 4
        return ratios[quarter], statistics.median(ratios), ratios[-1 - quarter]


def take_turns(
    contestants: Mapping[str, Callable[[], object]], rounds: int, warmups: int = 1, device: str = "cpu"
) -> dict[str, Timing]:
    """Times each contestant once a round, in turn, after `warmups` rounds that do not count.

    Args:
        contestants: name -> what to run.
        rounds: how often.
        warmups: rounds before the first that counts.
        device: "cuda" waits for the device before and after each run.
    """

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warmups + rounds):
        for name, run in contestants.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            if turn >= warmups:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}
