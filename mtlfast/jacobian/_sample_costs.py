"""What the products of samples' gradients are predicted to take, by which the cheapest way is chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mtlfast.jacobian._sample_uses import SampleUse
from mtlfast.jacobian._samples import Samples

if TYPE_CHECKING:
    from mtlfast.jacobian._sample_products import SampleFactors

BY_TASK = 1.3  # how much longer than one weight gradient those of all tasks take, for samples of one task each
SLOWER = 2.5  # how much longer than one weight gradient the samples' gradients take for one product (docs/mixing.md)


def rows_in(use: SampleUse) -> int:
    """N, the number of rows of a product."""
    if use.form == "convolution":
        shape = use.node._input_metadata[0].shape
        return int(shape[0] * math.prod(shape[2:]))
    assert use.use is not None
    return use.use.rows


def takes_samples(uses: Sequence[SampleFactors]) -> bool:
    """Whether the samples' gradients are cheaper than pairs of rows."""
    N, S = sum(len(use.right) for use in uses), uses[0].rows.number
    if any(use.left is None or not use.left.is_floating_point() for use in uses):
        return False
    assert uses[0].left is not None
    r, c = uses[0].left.shape[1], uses[0].right.shape[1]
    return _by_sample(N, S, r * c) < N**2 * (r + c)


def takes_tasks(use: SampleUse, samples: Samples) -> bool:
    """Whether the tasks' gradients are cheaper than products of samples."""
    if samples.sizes is None or use.kind == "embedding" or use.form == "sum":
        return False
    if 2 * samples.num_tasks > samples.number:  # many small products take longer than one of all samples
        return False
    return _over_tasks(samples, use) < _over_samples(samples.number, use)


def cost_of_gram(samples: Samples, use: SampleUse) -> float:
    """The multiplications that the Gram matrix of a product is predicted to take, or as long as these."""
    if takes_tasks(use, samples):
        return _over_tasks(samples, use)
    return _over_samples(samples.number, use)


def _over_tasks(samples: Samples, use: SampleUse) -> float:
    return (BY_TASK * rows_in(use) + samples.num_tasks**2) * use.numel


def _over_samples(number: int, use: SampleUse) -> float:
    N, r = rows_in(use), use.shape[0]
    c = use.numel // r
    over_pairs = float(N**2 * ((0 if use.kind == "embedding" else r) + c))
    return over_pairs if use.kind == "embedding" else min(over_pairs, _by_sample(N, number, r * c))


def _by_sample(N: int, number: int, elements: int) -> float:
    return (SLOWER * N + number**2) * elements
