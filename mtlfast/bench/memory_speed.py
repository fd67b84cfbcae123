"""Each op against this machine's memory and against the plain-PyTorch way."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from mtlfast.bench import baselines
from mtlfast.bench.contests import contests_on, many_outputs, with_state
from mtlfast.bench.section import Section
from mtlfast.bench.timing import take_turns
from mtlfast.bench.workload import scattered

# (K, dtype, beside the plain way?): at many tasks the plain way takes seconds a round.
CASES = [
    *((K, torch.float32, True) for K in (2, 4, 8)),
    *((K, torch.float32, False) for K in (16, 32)),
    *((K, dtype, False) for dtype in (torch.bfloat16, torch.float16) for K in (4, 8)),
]
QUICK = [(2, torch.float32, True), (8, torch.float32, True), (8, torch.bfloat16, False)]
FEW = ("gram", "combine", "combine in place", "PCGrad")  # the ops shown where there is no plain way beside


def measure(
    elements: int, rounds: int, quick: bool, progress: Callable[[Sequence[Any]], Iterable[Any]] = iter
) -> Section:
    """Times every op; see the caption.

    Args:
        elements: P.
        rounds: alternating rounds.
        quick: fewer rows.
        progress: gives the cases one after another, and may show how many are done.
    """
    section = Section(
        "ops",
        f"Each op on task gradients of {elements / 1e6:g}M elements in 150 tensors",
        "GB/s: the bytes that the op must read and write, over its time. % of one stream: that, over the speed at "
        "which each thread reads the same tensors one after another, as torch.sum does. % of four streams: the same "
        "with four tensors read side by side. Times faster: than plain PyTorch, a loop of its calls. R = K: with K "
        "update directions at once.",
    )
    for K, dtype, beside_plain in progress(QUICK if quick else CASES):
        grads = scattered(K, elements, dtype)
        contests = contests_on(grads)
        if not beside_plain:
            contests = {name: contests[name] for name in FEW}
        if K == 8 and dtype == torch.float32:
            contests |= many_outputs(grads) | with_state(grads)
        turns: dict[str, Callable[[], object]] = {
            "one stream": baselines.read_streams(grads, 1),
            "four streams": baselines.read_streams(grads, 4),
        }
        for name, contest in contests.items():
            turns[name] = contest.native
            if beside_plain and contest.plain is not contest.native:
                turns[f"plain {name}"] = contest.plain
        times = take_turns(turns, rounds)
        nbytes = K * elements * dtype.itemsize
        for name, contest in contests.items():
            plain = times.get(f"plain {name}")
            section.rows.append(
                {
                    "op": name,
                    "K": K,
                    "dtype": str(dtype).removeprefix("torch."),
                    "ms": times[name].median * 1e3,
                    "GB/s": contest.passes * nbytes / times[name].median / 1e9,
                    "% of one stream": _percent(times["one stream"].ratio_to(times[name]), contest.passes),
                    "% of four streams": _percent(times["four streams"].ratio_to(times[name]), contest.passes),
                    "plain PyTorch, ms": plain and plain.median * 1e3,
                    "times faster": plain and list(plain.ratio_to(times[name])),
                }
            )
    return section


def _percent(ratios: tuple[float, float, float], passes: float) -> list[float]:
    return [100 * passes * ratio for ratio in ratios]
