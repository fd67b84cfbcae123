"""The most memory that torch's allocator had given out at any time of a call."""

import gc
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object]) -> int:
    """What `run` allocates at most beyond what was there before, in bytes."""
    gc.collect()  # what earlier tests left in cycles would otherwise be given back during the call
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        run()
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
