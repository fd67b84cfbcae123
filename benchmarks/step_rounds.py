"""Measures contestants of training steps: their time in alternating rounds, and their memory in fresh processes."""

import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from readme_table import commit, processor
from step_report import Measured
from step_ways import Passes

from mtlfast.bench.peak_memory import CLEAR
from mtlfast.bench.run import facts_of_run
from mtlfast.bench.timing import take_turns

WARMUPS = 2


def measure(
    contestants: Mapping[str, Callable[[], object]],
    parameters: Sequence[torch.nn.Parameter],
    passes: Passes,
    rounds: int,
    warmups: int = WARMUPS,
) -> Measured:
    """The seconds of each contestant's rounds, as a whole and of its forward and backward passes.

    Args:
        contestants: name -> what to run.
        parameters: those whose gradients are dropped after each step.
        passes: where the contestants count their forward passes.
        rounds: how often each runs.
        warmups: rounds before these, which do not count.
    """
    parts: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}

    def run(name: str) -> None:
        with passes.watch():
            without_gradients(contestants[name], parameters)
        parts[name].append((passes.forward, passes.backward))

    turns = {name: partial(run, name) for name in contestants}
    seconds = take_turns(turns, rounds, warmups, rotate=True)
    return {
        name: {
            "step": list(timing.seconds),
            "forward": [forward for forward, _ in parts[name][warmups:]],
            "backward": [backward for _, backward in parts[name][warmups:]],
            "peak": None,
        }
        for name, timing in seconds.items()
    }


def without_gradients(contestant: Callable[[], object], parameters: Sequence[torch.nn.Parameter]) -> None:
    """One step, which ends without gradients, so that every contestant begins without."""
    contestant()
    for parameter in parameters:
        parameter.grad = None


@contextmanager
def fresh_process() -> Iterator[Callable[..., Any]]:
    """Gives a function that runs its first argument with the others, each time in a process of its own.

    It returns None where the peak of memory cannot be read, which is everywhere but on Linux.
    """
    if not CLEAR.exists():
        yield lambda *_: None
        return
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload(["torch", "torchjd", "mtlfast.bench.faces"])  # imported once, and nothing else is done
    with fresh.Pool(1, maxtasksperchild=1) as pool:
        yield lambda run, *arguments: pool.apply(_quietly, (run, arguments))


def _quietly(run: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    warnings.simplefilter("ignore")  # torch.vmap's, which TorchJD uses
    return run(*arguments)


def run_facts(rounds: int) -> dict[str, Any]:
    """What holds for all figures of a run."""
    return facts_of_run(rounds) | {"processor": processor(), "commit": commit()}
