"""The K x K solvers behind the Gram aggregators."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlfast import _native, reference
from mtlfast.ops._fake import fake

MOST_TASKS = 128  # beyond, a K x K factorisation is no longer small: the reference serves


def solve(
    gram: Tensor,
    method: str,
    params: Sequence[float] = (),
    inputs: Sequence[Tensor] = (),
    state: Tensor | None = None,
    tasks: Sequence[int] | None = None,
) -> Tensor:
    """Runs one method's solver on Gram matrices.

    Args:
        gram: [..., K, K] float64, symmetric; leading dimensions are groups, each solved alone.
        method: a name of the solver list (`csrc/solve/solvers.h`), such as "pcgrad".
        params: the method's host constants.
        inputs: the method's device inputs (random keys, losses, ...), with gram's leading dimensions.
        state: [..., S] float64, the method's state, changed in place unless the group's `gram` is not finite.
        tasks: the K present tasks' indices; None: all.

    Returns:
        [..., K] float64 weights, or [..., K, K] for a method of coefficients; NaN for a group that is not finite.

    Raises:
        ValueError: `gram` is not [..., K, K] float64, or no method has that name.

    Cost: none of K * P. Deterministic.
    """
    if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2] or gram.dtype != torch.float64:
        raise ValueError(f"solve: gram is {list(gram.shape)} {gram.dtype}, expected [..., K, K] torch.float64")
    if method not in reference.SOLVERS:
        raise ValueError(f"solve: method is '{method}', expected one of {', '.join(sorted(reference.SOLVERS))}")
    if gram.shape[-1] > MOST_TASKS or not _native.serves(gram.device):
        return reference.solve(gram, method, params, inputs, state, tasks)
    result: Tensor = torch.ops.mtlfast.solve.default(gram, method, params, inputs, state, tasks)
    return result


@fake("solve")
def _fake_solve(
    gram: Tensor,
    method: str,
    params: list[float],
    inputs: list[Tensor],
    state: Tensor | None,
    tasks: list[int] | None,
) -> Tensor:
    square = reference.SOLVERS[method].square
    return gram.new_empty(gram.shape if square else gram.shape[:-1])
