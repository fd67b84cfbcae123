"""The products of the gradients of S samples, from rows that belong to samples.

A layer's gradient of sample s is the sum of p_n q_n^T over the rows n of that sample: p_n is the gradient at the output
and q_n the input, or the other way round. Its Gram matrix over the samples can be computed in two ways:

    over pairs of rows        G_st = sum over n of s and m of t of <p_n, p_m> <q_n, q_m>     N^2 (a + b)
    over samples' gradients   M_s = P_s^T Q_s, block by block, and G_st = <M_s, M_t>         N a b + S^2 a b

Where each sample belongs to one task, the same can be done with the tasks' gradients, for K in place of S.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from mtlfast import ops
from mtlfast.jacobian._products import BLOCK, squared_lengths, summed_by_entry
from mtlfast.jacobian._row_map import RowMap
from mtlfast.jacobian._sample_costs import takes_samples, takes_tasks
from mtlfast.jacobian._sample_uses import SampleUse, rows_of, terms_of_sum, unfolded, widened
from mtlfast.jacobian._samples import Samples
from mtlfast.task_gradients import TaskGradients


@dataclass
class SampleFactors:
    """One use of a parameter, or of a part of it, in a step: its rows, and which sample each belongs to.

    Attributes:
        use: what the walk found.
        rows: which row belongs to which sample.
        left: [N, r] the matrix P, or [N] indices of an embedding; None for a sum.
        right: [N, c] the matrix Q of a product, or [N, p] the terms of a sum.
    """

    use: SampleUse
    rows: RowMap
    left: Tensor | None
    right: Tensor

    def squares(self, known: dict[object, Tensor]) -> Tensor:
        """[S] float64: the sums over each sample's rows of |p_n|^2 |q_n|^2.

        Args:
            known: the squared lengths of the rows of tensors, which a layer's weight and its bias share.
        """
        square = _squared_lengths(self.right, known)
        if self.left is not None and self.left.is_floating_point():
            square = square * _squared_lengths(self.left, known)
        return self.rows.summed(square)

    def weighted(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """The weighted sum of the samples' gradients by this use, for weights [S] float64."""
        by_row, right = self.rows.spread(weights).to(dtype).unsqueeze(1), self.right.to(dtype)
        if self.left is None:
            return by_row.mT @ right
        if not self.left.is_floating_point():
            return summed_by_entry(right * by_row, self.left, self.use.shape[0], -1)
        left = self.left.to(dtype)
        if left.shape[1] < right.shape[1]:  # the smaller one is multiplied
            return (left * by_row).mT @ right
        return left.mT @ (right * by_row)


def _squared_lengths(rows: Tensor, known: dict[object, Tensor]) -> Tensor:
    key = (rows.data_ptr(), rows.shape, rows.stride(), rows.dtype)
    if key not in known:
        known[key] = squared_lengths(rows)
    return known[key]


@dataclass
class SampleLayer:
    """A parameter's uses in a step, which are all sums or all products."""

    parameter: Tensor
    column: int
    uses: Sequence[SampleFactors]

    @property
    def dtype(self) -> torch.dtype:
        """That of the factors."""
        return self.uses[0].right.dtype

    def gram(self, samples: Samples, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[K, K] float64 of the tasks, with products in `dtype`, and [S] the samples' squared norms."""
        if self.uses[0].left is None:
            return self._gram_of_sums(samples, dtype)
        if all(takes_tasks(use.use, samples) for use in self.uses) and len(self._by_part()) == 1:
            return self._gram_by_task(samples, dtype)
        total = torch.zeros((), dtype=torch.float64, device=self.parameter.device)
        for uses in self._by_part():
            if not takes_samples(uses):
                total = total + _over_pairs(uses, dtype)
                continue
            for block in _gradients(uses, dtype):
                total = total + _gram(block)
        return samples.gram(total), total.diagonal()

    def _gram_by_task(self, samples: Samples, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same where each sample belongs to one task. A task's squared norm is shared out among its samples."""
        total = torch.zeros((), dtype=torch.float64, device=self.parameter.device)
        for block in _gradients_by_task(self.uses, samples, dtype):
            total = total + _gram(block)
        return total * samples.factors.outer(samples.factors), samples.shared_out(total.diagonal())

    def gram_of_tasks(self, samples: Samples) -> Tensor:
        """[K, K] float64 from the gradients of all tasks, which are in memory for this layer."""
        unit = torch.eye(samples.num_tasks, dtype=torch.float64, device=self.parameter.device)
        rows = [self.gradient(weights, torch.float64).flatten() for weights in samples.weights(unit)]
        return ops.gram(TaskGradients.from_rows([[row] for row in rows]))

    def _gram_of_sums(self, samples: Samples, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same for sums, whose few elements are mixed first if there are fewer tasks than samples."""
        sums = self._sums(dtype)
        if samples.num_tasks < samples.number:
            return _gram(samples.mixed(sums)), squared_lengths(sums)
        gram = _gram(sums)
        return samples.gram(gram), gram.diagonal()

    def _by_part(self) -> list[list[SampleFactors]]:
        """The uses of each part of the parameter. Different parts have no element in common."""
        parts: dict[object, list[SampleFactors]] = {}
        for use in self.uses:
            parts.setdefault(use.use.part_key, []).append(use)
        return list(parts.values())

    def _sums(self, dtype: torch.dtype) -> Tensor:
        """[S, P] the gradients of the samples by sums, or [S, p] those of the one part that is used."""
        sums = ((use, use.rows.summed(use.right.to(dtype))) for use in self.uses)
        if not widened([use.use for use in self.uses]):
            return reduce(torch.add, (x for _, x in sums))
        return reduce(torch.add, (use.use.of_parameters(x, self.parameter) for use, x in sums))

    def gradient(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """The weighted sum of the samples' gradients, for weights [S] float64."""
        of_uses = (use.use.of_parameter(use.weighted(weights, dtype), self.parameter) for use in self.uses)
        total: Tensor = reduce(torch.add, of_uses)
        return total.data if total._is_view() else total  # so that to set `.grad` to it makes no other tensor


def _gram(rows: Tensor) -> Tensor:
    """[n, n] float64 of rows [n, p]."""
    return ops.gram(TaskGradients.from_rows([[row] for row in rows.unbind(0)]))


def _gradients(uses: Sequence[SampleFactors], dtype: torch.dtype) -> Iterator[Tensor]:
    """The gradients of the samples, [S, p], block by block of the parameter's rows."""
    left = torch.cat([use.rows.by_sample(_dense(use.left).to(dtype)) for use in uses], dim=1)
    right = torch.cat([use.rows.by_sample(use.right.to(dtype)) for use in uses], dim=1)
    each = max(1, BLOCK // (left.shape[0] * right.shape[2] * right.element_size()))
    for start in range(0, left.shape[2], each):
        yield (left[:, :, start : start + each].mT @ right).flatten(1)


def _gradients_by_task(uses: Sequence[SampleFactors], samples: Samples, dtype: torch.dtype) -> Iterator[Tensor]:
    """The gradients of the tasks, [K, p], block by block of the parameter's rows, for samples of one task each."""
    assert samples.task is not None
    assert samples.sizes is not None
    of_tasks: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(samples.num_tasks)]
    for use in uses:
        order = use.rows.spread(samples.task).argsort(stable=True)
        rows = [size * use.rows.outer * use.rows.inner for size in samples.sizes]
        both = (torch.split_with_sizes(x[order].to(dtype), rows) for x in (_dense(use.left), use.right))
        for task, pair in zip(of_tasks, zip(*both, strict=True), strict=False):  # without the samples of no task
            task.append(pair)
    r, c = _dense(uses[0].left).shape[1], uses[0].right.shape[1]
    each = max(1, BLOCK // (samples.num_tasks * c * dtype.itemsize))
    for start in range(0, r, each):
        place = slice(start, start + each)
        products = ((left[:, place].mT @ right for left, right in task) for task in of_tasks)
        yield torch.stack([reduce(torch.add, of_uses).flatten() for of_uses in products])


def _dense(left: Tensor | None) -> Tensor:
    assert left is not None
    return left


def _over_pairs(uses: Sequence[SampleFactors], dtype: torch.dtype) -> Tensor:
    """The Gram matrix over pairs of rows, a block of rows at a time."""
    S = uses[0].rows.number
    total = torch.zeros(S, S, dtype=torch.float64, device=uses[0].right.device)
    for i, one in enumerate(uses):
        for j, other in enumerate(uses[: i + 1]):
            cross = _cross(one, other, dtype)
            total += cross if i == j else cross + cross.mT
    return (total + total.mT) / 2


def _cross(one: SampleFactors, other: SampleFactors, dtype: torch.dtype) -> Tensor:
    """[S, S] the products of each sample's rows in one use with each sample's in another.

    Of the symmetric products of a use with itself only the lower triangle is computed, by blocks, and those below the
    diagonal blocks count twice: the symmetric part of the result is that of all products.
    """
    itself, N, M = one is other, len(one.right), len(other.right)
    other_left, other_right = _dense(other.left), other.right.to(dtype)
    by_row = torch.empty(N, one.rows.number, dtype=torch.float64, device=one.right.device)
    each = max(1, BLOCK // (2 * M * other_right.element_size()))
    if itself:
        each = min(each, max(64, -(-N // 8)))
    for start in range(0, N, each):
        rows, end = slice(start, start + each), min(N, start + each) if itself else M
        products = _inner(_dense(one.left)[rows], other_left[:end], dtype)
        products *= one.right[rows].to(dtype) @ other_right[:end].mT
        if itself:
            products[:, :start] *= 2
            products = torch.nn.functional.pad(products, (0, M - end))
        by_row[rows] = other.rows.summed(products, 1).double()
    return one.rows.summed(by_row)


def _inner(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, M] the products of rows, where a row is given or is that of the unit matrix that an index names."""
    if x.is_floating_point() and y.is_floating_point():
        return x.to(dtype) @ y.to(dtype).mT
    if x.is_floating_point():
        return x.to(dtype)[:, y]
    if y.is_floating_point():
        return y.to(dtype)[:, x].mT.contiguous()
    return (x.unsqueeze(1) == y).to(dtype)


def factors_of(use: SampleUse, rows: RowMap, kept: Sequence[Tensor], delta: Tensor) -> SampleFactors:
    """The rows of a use.

    Args:
        use: what the walk found.
        rows: which row belongs to which sample.
        kept: what `kept_by` returned.
        delta: the gradient at the use's output.
    """
    if use.form == "sum":
        return SampleFactors(use, rows, None, terms_of_sum(use, kept, delta))
    if use.form == "convolution":
        left, right = (x.mT.flatten(0, 1) for x in (delta.flatten(2), unfolded(use, kept[0])))
        return SampleFactors(use, rows._replace(inner=rows.inner * delta[0, 0].numel()), left, right)
    assert use.use is not None
    (constant,) = kept
    if use.kind == "embedding":
        indices, delta = constant.reshape(-1), delta.reshape(-1, use.shape[1])
        padding = use.node._saved_padding_idx
        if 0 <= padding < use.shape[0]:
            delta = delta.masked_fill((indices == padding).unsqueeze(1), 0)
        return SampleFactors(use, rows, indices, delta)
    delta, constant = (delta.mT, constant.mT) if use.use.turned else (delta, constant)
    left, right = (delta, constant) if use.kind == "linear" else (constant, delta)
    return SampleFactors(use, rows, left, right)


def rows_of_delta(use: SampleUse, delta: Tensor) -> Tensor:
    """[N, ...] the gradient at the output, with a row for each row of `factors_of`, but for the places of an image."""
    if use.form == "product":
        assert use.use is not None
        return delta.mT if use.use.turned else delta.reshape(-1, delta.shape[-1])
    return rows_of(use, delta) if use.form == "sum" else delta.reshape(len(delta), -1)
