"""How the GPU kit takes times: contestants in turn, by CUDA events, on data that have left the second-level cache."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from workloads import Setting

from mtlfast import TaskGradients
from mtlfast.bench.timing import take_turns
from mtlfast.bench.workload import scattered

Row = dict[str, Any]
Run = Callable[[], object]


def microseconds(setting: Setting, contestants: Mapping[str, Run], rounds: int = 9) -> dict[str, dict[str, float]]:
    """Of each contestant, in turn: median and quartiles."""
    return {
        name: {"median": t.median * 1e6, "low": t.quartiles[0] * 1e6, "high": t.quartiles[1] * 1e6}
        for name, t in take_turns(contestants, rounds, warmups=2, device=setting.device).items()
    }


def copy_bandwidth(setting: Setting) -> float:
    """GB/s, read and written, of copying one tensor to another: what percentages refer to."""
    source = torch.randn(setting.copied, device=setting.device)
    target = torch.empty_like(source)
    return 8 * setting.copied / microseconds(setting, {"copy": lambda: target.copy_(source)})["copy"]["median"] / 1000


def spread(setting: Setting, num_tasks: int, elements: int, dtype: torch.dtype) -> TaskGradients:
    """150 tensors a task."""
    return scattered(num_tasks, elements, dtype, setting.device)


def copies_beyond_cache(setting: Setting, nbytes: int) -> int:
    """How many copies of a workload take turns, so that each has left the second-level cache when it comes again."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size if setting.device == "cuda" else 2 * nbytes
    return 1 if nbytes > 8 * cache else 1 + -(-4 * cache // nbytes)


def rotating(runs: list[Run]) -> Run:
    """Each call is the next one's turn."""
    turns = itertools.cycle(runs)
    return lambda: next(turns)()
