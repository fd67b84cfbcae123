"""Measures which row of a gradient belongs to which sample, by samples whose losses are multiplied by powers of two.

Powers of two multiply exactly, but for numbers near the end of the dtype's range. So a row that one sample owns comes
back multiplied by that sample's factor, bit for bit, and a row that several samples reach does not.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mtlfast.jacobian._plan import MOST_PLANS
from mtlfast.jacobian._products import Wide
from mtlfast.jacobian._row_map import RowMap
from mtlfast.jacobian._sample_products import rows_of_delta
from mtlfast.jacobian._sample_uses import SampleUse, overlap

AGAIN = 100  # steps after which a plan is probed again
PROBES = 2  # with different factors, so that two samples with one factor in the first have others in the second

REACH = {torch.float16: 3}  # the largest exponent for a dtype of small range
MOST = 20  # for the others
SMALL = 2.0**-60  # of the largest element: what is smaller changes no product in float64 by more than rounding


def factors_for(number: int, dtypes: Sequence[torch.dtype], seed: int) -> Tensor:
    """[S] float64 powers of two, as different as there are exponents for."""
    reach = min((REACH.get(dtype, MOST) for dtype in dtypes), default=MOST)
    exponents = list(range(-reach, reach + 1))
    generator = random.Random(seed)
    drawn: list[int] = []
    while len(drawn) < number:
        drawn += generator.sample(exponents, len(exponents))
    return torch.tensor([2.0**exponent for exponent in drawn[:number]], dtype=torch.float64)


def row_map(before: Tensor, after: Sequence[tuple[Tensor, Tensor]], number: int) -> tuple[RowMap | None, bool]:
    """Which row belongs to which sample.

    A row that is zero, as behind a matrix that starts at zero, or that is not finite does not say whose it is. It can
    leave several maps that fit, which are equally good for these gradients and not for those of a later step.

    Args:
        before: [N, ...] the gradient for losses that are all multiplied by 1.
        after: the same for losses multiplied by factors, and these factors [S].
        number: S.

    Returns:
        A map that fits, None if the rows are not in turn or if one belongs to several samples; and whether it holds for
        later steps as well.
    """
    N = len(before)
    if N == 0 or N % number:
        return None, True
    each = N // number
    maps = [RowMap(each // inner, number, inner) for inner in range(each, 0, -1) if each % inner == 0]
    least = _least(before)
    fitting = [rows for rows in maps if all(_fits(before, x, factors, rows, least) for x, factors in after)]
    if not fitting:
        return None, True
    known = number == 1 or (len(fitting) == 1 and bool(before.isfinite().all()))  # host: once a plan
    return fitting[0], known


def _least(before: Tensor) -> float:
    """The size up to which elements are not compared, because powers of two may have multiplied them inexactly.

    Below the smallest normal number of a dtype products are rounded, as they are in the tail of a softmax. A factor of
    2**-MOST brings numbers there that are larger by as much, and sums carry their rounding on to somewhat larger ones.
    An element that is far smaller than the largest one does not matter. float16 has none that are so small.
    """
    largest = torch.where(before.isfinite(), before.abs(), 0).flatten().amax() if before.numel() else 0.0
    return min(torch.finfo(before.dtype).tiny * 2.0 ** (MOST + 14), SMALL * float(largest))  # host: once a plan


def _fits(before: Tensor, after: Tensor, factors: Tensor, rows: RowMap, least: float) -> bool:
    by_row = rows.spread(factors.to(before.device, before.dtype)).reshape(-1, *[1] * (before.dim() - 1))
    expected = before * by_row
    same = torch.eq(expected, after) | (expected.isnan() & after.isnan())
    same |= (before.abs() <= least) & (after.abs() <= least * by_row)
    return bool(same.all())  # host: once a plan


Maps = list[list[RowMap]]  # for each parameter, for each of its uses, which row belongs to which sample


class NotMixed(Exception):
    """The tasks' gradients cannot be had from one pass, and why."""


def probed(
    used: Sequence[tuple[str, Tensor, Sequence[SampleUse]]],
    sweep: Callable[[Tensor], Sequence[Tensor | None]],
    number: int,
    seed: int,
) -> tuple[Maps, bool]:
    """Which row belongs to which sample, for every use, and whether that holds for later steps as well.

    Args:
        used: the parameters, with their names and uses.
        sweep: runs a backward pass of the samples' losses times factors [S], and returns the gradients at all uses.
        number: S.
        seed: of the factors.

    Raises:
        NotMixed: a row belongs to several samples, or the rows are not in turn.
    """
    before = sweep(torch.ones(number))
    dtypes = [delta.dtype for delta in before if delta is not None]
    after = []
    for i in range(PROBES if number > 1 else 0):
        factors = factors_for(number, dtypes, seed + random.Random(i).randrange(2**30))
        after.append((factors, sweep(factors)))
    maps: Maps = []
    all_known = True
    place = 0
    for name, parameter, uses in used:
        if overlap(uses, parameter):
            raise NotMixed(f"{name}: parts of it are used that have elements in common")
        maps.append([])
        for use in uses:
            delta = before[place]
            if delta is None:
                raise NotMixed(f"{name}: no sample reaches one of its uses")
            rows = rows_of_delta(use, delta)
            others = [(rows_of_delta(use, x), f) for f, all_of in after if (x := all_of[place]) is not None]
            found, known = row_map(rows, others, number)
            all_known = all_known and known
            if found is None:
                node = type(use.node).__name__
                raise NotMixed(f"{name}: samples meet in {node}, or its rows are not in their order")
            maps[-1].append(found)
            place += 1
    return maps, all_known


@dataclass
class Remembered:
    """What a probe found for a structure of the graph.

    Attributes:
        maps: which row belongs to which sample.
        known: whether the maps hold for later steps as well.
        why_not: why there are no maps; "" if there are.
        wide: the parameters whose products are computed in float64, by K and whether A is a matrix.
        steps: how many steps have used it.
    """

    maps: Maps = field(default_factory=list)
    known: bool = False
    why_not: str = ""
    wide: defaultdict[tuple[int, bool], Wide] = field(default_factory=lambda: defaultdict(Wide))
    steps: int = 0


_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by the first shared parameter


def recall(
    first: Tensor,
    key: object,
    probe: Callable[[int], tuple[Maps, bool]],
    even_if_refused: bool,
    always: bool,
) -> Remembered:
    """What is known of a graph: from the cache, or by a probe.

    Args:
        first: the first shared parameter.
        key: what the graph is recognised by.
        probe: does what `probed` does, for a seed.
        even_if_refused: probe again where an earlier probe found that samples meet.
        always: probe at each step.

    Raises:
        NotMixed: a probe of this step or an earlier one found so.
    """
    if first not in _cache:
        _cache[first] = {}
    known: dict[object, Remembered] = _cache[first]
    remembered = known.get(key)
    if remembered is None:
        if len(known) >= MOST_PLANS:
            known.clear()
        remembered = known[key] = Remembered()
    if always or not remembered.known or remembered.steps % AGAIN == 0 or (remembered.why_not and even_if_refused):
        remembered.known = False  # until the probe has ended
        try:
            remembered.maps, remembered.known = probe(remembered.steps)
            remembered.why_not = ""
        except NotMixed as error:
            remembered.known, remembered.why_not = True, str(error)
    remembered.steps += 1
    if remembered.why_not:
        raise NotMixed(remembered.why_not)
    return remembered
