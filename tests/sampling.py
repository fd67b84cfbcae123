"""Which cases of a large grid a run takes: a seeded sample, a tenth in turn beside it, or all.

MTLFAST_GRID is `sample` (the default), `all`, or a turn from 0 to 9: the sample and a tenth of the grid, another one
in each turn. MTLFAST_SEED chooses the sample.
"""

import os
import random
from collections.abc import Mapping, Sequence

MOST = (
    24  # cases of a test function: a smaller grid is taken whole, of a larger one so many, or more to keep its values
)
TURNS = 10

GRID = os.environ.get("MTLFAST_GRID", "sample")
SEED = os.environ.get("MTLFAST_SEED", "0")
if GRID not in ("sample", "all", *map(str, range(TURNS))):
    raise ValueError(f"MTLFAST_GRID is {GRID}, expected sample, all or a turn from 0 to {TURNS - 1}")


def sample(cases: Sequence[Mapping[str, object]], seed: str, together: Sequence[str] = ()) -> set[int]:
    """The indices of a seeded sample of a test function's cases.

    Args:
        cases: parameter -> value, for each case.
        seed: of the choice.
        together: parameters of which every combination stays; without them every value of every parameter stays.
    """
    order = random.Random(seed).sample(range(len(cases)), len(cases))
    marks = [{(name, repr(value)) for name, value in case.items()} for case in cases]
    for i, case in enumerate(cases):
        marks[i].add(("", repr([case[name] for name in together])))
    distinct: dict[str, set[str]] = {}
    for name, value in set().union(*marks):
        distinct.setdefault(name, set()).add(value)
    kept: set[int] = set()
    seen: set[tuple[str, str]] = set()
    # What has the most values first: the cases that keep those keep most values of the others as well.
    for wanted in sorted(distinct, key=lambda name: -len(distinct[name])):
        for i in order:
            if any(name == wanted and (name, value) not in seen for name, value in marks[i]):
                kept.add(i)
                seen |= marks[i]
    rest = [i for i in order if i not in kept]
    return kept | set(rest[: max(0, MOST - len(kept))])


def tenth(num_cases: int, turn: int, name: str) -> set[int]:
    """The indices of a tenth of a test function's cases; all turns together take each case once."""
    order = random.Random(name).sample(range(num_cases), num_cases)
    return set(order[turn::TURNS])


def chosen(
    cases: Sequence[Mapping[str, object]], name: str, together: Sequence[str] = (), grid: str = GRID, seed: str = SEED
) -> set[int]:
    """The indices of the cases of the test function `name` that a run takes."""
    if grid == "all" or len(cases) <= MOST:
        return set(range(len(cases)))
    kept = sample(cases, f"{seed} {name}", together)
    return kept if grid == "sample" else kept | tenth(len(cases), int(grid), name)


def takes_long(name: str, grid: str = GRID, seed: str = SEED) -> bool:
    """Whether a run takes the test function `name`, which is marked `long`: one in five by the seed, or in its turn."""
    if grid == "all" or random.Random(f"{seed} {name}").random() < 0.2:
        return True
    return grid != "sample" and random.Random(name).randrange(5) == int(grid) % 5
