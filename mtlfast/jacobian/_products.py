"""The products of one layer's gradients, from its input and the gradients at its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mtlfast import ops
from mtlfast.jacobian._uses import Layer
from mtlfast.task_gradients import TaskGradients

# float32 products have errors of up to 6e-7 of the sum of |x_n|^2 |d_n|^2 over the rows, and float64 products of 1e-15.
# Below this share of that sum, because terms have cancelled, they would be above 5e-6 or 1e-14 of the squared norm.
CANCELLED = 1e-1
# Tasks whose unit gradients have a Gram matrix with an eigenvalue below this nearly depend on each other. The errors of
# float32 products, of 5e-7, would then change the weights of a method that decides about ranks by 5e-4 and more.
NEAR = 1e-3
NOTHING = 1e-12  # of the largest eigenvalue: what is below it is rounding
SAFE = 1e-15, 1e15  # lengths whose squares float32 holds with full precision
BLOCK = 8 * 2**20  # bytes of products that are kept at once


@dataclass
class Factors:
    """One layer's X and D_k.

    Attributes:
        layer: what the walk found.
        parameter: the weight.
        constant: X [N, a], or an embedding's indices [N].
        deltas: the K matrices D_k [N, b], or None for a task that does not reach the layer.
        padding: the index of an embedding whose rows have no gradient; negative: none.
    """

    layer: Layer
    parameter: Tensor
    constant: Tensor
    deltas: list[Tensor | None]
    padding: int = -1

    def without(self, tasks: Sequence[int]) -> Factors:
        """The same without these tasks."""
        return replace(self, deltas=[None if k in tasks else delta for k, delta in enumerate(self.deltas)])

    def gradient(self, delta: Tensor) -> Tensor:
        """The weight's gradient for a gradient at the output [..., N, b], in that one's dtype."""
        if self.layer.kind == "embedding":
            entries = self.parameter.shape[0]
            return summed_by_entry(delta, self.constant, entries, self.padding)
        constant = self.constant.to(delta.dtype)
        return delta.mT @ constant if self.layer.kind == "linear" else constant.mT @ delta


class Wide:
    """Which layers need products in float64, as steps have found.

    On the CPU a step knows at once what it needs. On a GPU the host does not wait for the answer, and a later step
    takes it into account.

    Attributes:
        columns: the places of the layers in which terms cancel, among the shared parameters.
        everything: whether the gradients of the tasks nearly depend on each other, so that a method which decides about
            ranks needs exact products of all layers.
    """

    def __init__(self) -> None:
        self.columns: set[int] = set()
        self.everything = False
        self._waiting: list[tuple[torch.Event, Tensor, Callable[[Tensor], object]]] = []

    def note(self, shares: Tensor, places: Sequence[int]) -> list[int]:
        """Adds the layers in which terms have cancelled, and returns their indices if this step can still use them.

        Args:
            shares: [L, K], as `products` returns them.
            places: the L layers' places.
        """
        cancelled = (shares < CANCELLED).any(dim=-1)
        if cancelled.device.type == "cpu":
            return self._add(cancelled, places)
        self._ask(cancelled, partial(self._add, places=places))
        return []

    def note_gram(self, gram: Tensor, without_cross: Tensor | None = None) -> bool:
        """Looks at the Gram matrix of the tasks, and says whether this step needs it again from exact products.

        Args:
            gram: [..., K, K] float64.
            without_cross: what it would be if the vectors whose products were computed were orthogonal, for tasks that
                are mixtures of such vectors. The errors of the products are relative to it. None: its diagonal.
        """
        scale = torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)) if without_cross is None else without_cross
        lengths = scale.diagonal(dim1=-2, dim2=-1).sqrt()
        there = (lengths > 0) & lengths.isfinite()  # a task without a gradient is in no one's way
        inverse = torch.where(there, 1 / lengths, 0)
        inverse = inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
        gram, scale = (
            torch.where(x.isfinite(), x * inverse, 0) + torch.diag_embed((~there).double()) for x in (gram, scale)
        )
        ratios = gram if without_cross is None else _beside(gram, scale)
        near = (torch.linalg.eigvalsh(ratios)[..., 0] < NEAR).any()
        if near.device.type == "cpu":
            before = self.everything
            self._set(near)
            return self.everything and not before
        self._ask(near, self._set)
        return False

    def settle(self) -> None:
        """Takes into account what earlier steps found on a GPU, as far as it has arrived."""
        self._waiting, waiting = [], self._waiting
        for event, answer, take in waiting:
            if event.query():
                take(answer)
            else:
                self._waiting.append((event, answer, take))

    def _ask(self, value: Tensor, take: Callable[[Tensor], object]) -> None:
        """Copies a value from a GPU without waiting for it."""
        if not torch.cuda.is_current_stream_capturing():
            answer = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            answer.copy_(value, non_blocking=True)
            event = torch.Event(value.device)
            event.record()
            self._waiting.append((event, answer, take))

    def _add(self, cancelled: Tensor, places: Sequence[int]) -> list[int]:
        new = [i for i, has in enumerate(cancelled.tolist()) if has and places[i] not in self.columns]  # host: CPU
        self.columns.update(places[i] for i in new)
        return new

    def _set(self, near: Tensor) -> None:
        self.everything = bool(near)  # host: a CPU tensor


def _beside(gram: Tensor, scale: Tensor) -> Tensor:
    """A matrix [..., K, K] in coordinates in which another one is the unit matrix.

    Directions in which the scale is zero are those in which tasks cancel whatever the vectors are, as where there are
    more tasks than samples. The matrix is zero there too, and the result has ones.
    """
    values, vectors = torch.linalg.eigh(scale)
    inside = values > NOTHING * values[..., -1:]
    factors = torch.where(inside, values, 1.0).rsqrt() * inside
    rotated = vectors.mT @ gram @ vectors
    ratios: Tensor = rotated * factors.unsqueeze(-1) * factors.unsqueeze(-2)
    return ratios + torch.diag_embed((~inside).double())


def dtype_of_products(dtype: torch.dtype, wide: bool = False) -> torch.dtype:
    """The dtype in which products of factors are computed."""
    return torch.float64 if wide or dtype == torch.float64 else torch.float32


def products(factors: Sequence[Factors], wide: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """The Gram matrices of layers of one dtype on one device.

    Args:
        factors: L layers.
        wide: the layers in which terms cancel. Their products are computed in float64, or if their factors are float64
            already, from the weight gradients of all tasks.

    Returns:
        [L, K, K] float64, and [L, K] for each squared norm its share of the sum of |x_n|^2 |d_n|^2 over the rows: 1
        where that is not known, and below `CANCELLED` where it says that terms have cancelled.
    """
    num_tasks, device = len(factors[0].deltas), factors[0].parameter.device
    grams = torch.zeros(len(factors), num_tasks, num_tasks, dtype=torch.float64, device=device)
    sums = grams.new_zeros(len(factors), num_tasks)
    squares: dict[object, Tensor] = {}
    block: list[_Pair] = []
    for i, (factor, is_wide) in enumerate(zip(factors, wide, strict=True)):
        reaching = [k for k, delta in enumerate(factor.deltas) if delta is not None]
        if not reaching:
            continue
        dtype = dtype_of_products(factor.layer.dtype, is_wide)
        deltas = torch.stack([delta.to(dtype) for delta in factor.deltas if delta is not None])
        if factor.layer.kind == "embedding":
            left = right = _summed_by_index(factor, deltas)
        elif is_wide and factor.layer.dtype == torch.float64:
            left = right = factor.gradient(deltas)
        else:
            square = _square(factor.constant, dtype, squares)
            left, right = deltas, square @ deltas
            if not is_wide:
                sums[i, reaching] = squared_lengths(deltas) @ squared_lengths(factor.constant)
        block.append(_Pair(i, reaching, left, right))
        if sum(pair.left.nbytes + pair.right.nbytes for pair in block) > BLOCK:
            _contract(block, grams)
            block = []
    _contract(block, grams)
    return grams, share_left(grams.diagonal(dim1=-2, dim2=-1), sums)


def squared_lengths(rows: Tensor) -> Tensor:
    """[..., N] float64, the squared lengths of rows [..., N, b], also where float32 could not hold them."""
    if rows.device.type == "cpu" and rows.dtype == torch.float32:  # which takes a third of the time
        lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1)
        if bool(((lengths > SAFE[0]) & (lengths < SAFE[1])).all()):  # host: a CPU tensor
            return lengths.double().square()
    lengths = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
    return lengths.square()


def share_left(squares: Tensor, sums: Tensor) -> Tensor:
    """The share of sums of squares that is left in squared norms; 1 where there are no terms or they are not finite.

    It is 0 where a squared norm is not finite although its terms are, because float32 could not hold a product.
    """
    share = torch.where(squares.isfinite(), squares / sums, 0.0)
    return torch.where((sums > 0) & sums.isfinite(), share, 1.0)


class _Pair(NamedTuple):
    """Two matrices for each task that reaches layer `place`, [K', N, b], whose products are the layer's Gram matrix."""

    place: int
    tasks: Sequence[int]
    left: Tensor
    right: Tensor


def _contract(block: Sequence[_Pair], grams: Tensor) -> None:
    """Sets the Gram matrices of a block of layers, in one launch for those of one dtype."""
    for dtype in dict.fromkeys(pair.left.dtype for pair in block):
        pairs = [pair for pair in block if pair.left.dtype == dtype]
        left = _task_gradients([(pair.tasks, pair.left) for pair in pairs], grams.shape[-1])
        right = _task_gradients([(pair.tasks, pair.right) for pair in pairs], grams.shape[-1])
        cross = ops.gram(left, other=right, groups=range(len(pairs)), num_groups=len(pairs))
        grams[[pair.place for pair in pairs]] = (cross + cross.mT) / 2


def _task_gradients(columns: Sequence[tuple[Sequence[int], Tensor]], num_tasks: int) -> TaskGradients:
    """Tensors as columns, each stacked [K', ...] over some of the tasks."""
    rows: list[list[Tensor | None]] = [[None] * len(columns) for _ in range(num_tasks)]
    for t, (tasks, stacked) in enumerate(columns):
        for k, x in zip(tasks, stacked.unbind(0), strict=True):
            rows[k][t] = x
    return TaskGradients.from_rows(rows)


def _square(constant: Tensor, dtype: torch.dtype, known: dict[object, Tensor]) -> Tensor:
    """X X^T, which layers with one input share."""
    key = (constant.data_ptr(), constant.shape, constant.stride(), dtype)
    if key not in known:
        wide = constant.to(dtype)
        known[key] = wide @ wide.mT
    return known[key]


def _summed_by_index(factor: Factors, deltas: Tensor) -> Tensor:
    """For each task the sums of the rows [N, b] with one index, and zeros in the places that are left over.

    No value is read on the host, which therefore does not know how many indices there are.
    """
    indices, order = factor.constant.sort()
    places = torch.zeros_like(order)
    places[order[1:]] = (indices[1:] != indices[:-1]).cumsum(0)
    places[factor.constant == factor.padding] = len(places)
    return torch.stack([summed_by_entry(delta, places, len(places) + 1, len(places)) for delta in deltas])


def summed_by_entry(delta: Tensor, indices: Tensor, entries: int, padding: int) -> Tensor:
    """[entries, b], the sums of the rows of `delta` with one index, in a fixed order; without those of `padding`."""
    gradient: Tensor = torch.ops.aten.embedding_dense_backward(delta, indices, entries, padding, False)
    return gradient
