"""Measures which row of a gradient belongs to which sample, by samples whose losses are multiplied by powers of two.

Powers of two multiply exactly. So a row that one sample owns comes back multiplied by that sample's factor, bit for
bit, and a row that several samples reach does not.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from mtlfast.jacobian._sample_products import RowMap

REACH = {torch.float16: 3}  # the largest exponent for a dtype of small range
MOST = 20  # for the others


def factors_for(number: int, dtypes: Sequence[torch.dtype], seed: int) -> Tensor:
    """[S] float64 powers of two, as different as there are exponents for."""
    reach = min((REACH.get(dtype, MOST) for dtype in dtypes), default=MOST)
    exponents = list(range(-reach, reach + 1))
    generator = random.Random(seed)
    drawn: list[int] = []
    while len(drawn) < number:
        drawn += generator.sample(exponents, len(exponents))
    return torch.tensor([2.0**exponent for exponent in drawn[:number]], dtype=torch.float64)


def row_map(before: Tensor, after: Sequence[tuple[Tensor, Tensor]], number: int) -> RowMap | None:
    """Which row belongs to which sample; None if the rows are not in turn, or if one belongs to several samples.

    Args:
        before: [N, ...] the gradient for losses that are all multiplied by 1.
        after: the same for losses multiplied by factors, and these factors [S].
        number: S.
    """
    N = len(before)
    if N == 0 or N % number:
        return None
    each = N // number
    inner = each
    while inner > 0:
        if each % inner == 0:
            rows = RowMap(each // inner, number, inner)
            if all(_fits(before, of_factors, factors, rows) for of_factors, factors in after):
                return rows
        inner -= 1
    return None


def _fits(before: Tensor, after: Tensor, factors: Tensor, rows: RowMap) -> bool:
    by_row = rows.spread(factors.to(before.device, before.dtype)).reshape(-1, *[1] * (before.dim() - 1))
    return bool(torch.eq(before * by_row, after).all())  # host: once a plan
