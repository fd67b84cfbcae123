"""Shared parameters of unusual kinds, and the truth about a step in plain PyTorch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import mtlfast
from mtlfast import TaskGradients
from mtlfast.aggregation import MGDA, Aggregator, GramAggregator, NormBalance, PCGrad, Sum, UPGrad

METHODS: dict[str, Callable[[], GramAggregator]] = {
    "Sum": Sum,
    "PCGrad": lambda: PCGrad(order="fixed"),
    "MGDA": MGDA,
    "UPGrad": UPGrad,
    "NormBalance": NormBalance,
}


def dense_rows(losses: Sequence[Tensor], shared: Sequence[Tensor]) -> list[list[Tensor]]:
    """The K x T gradients as dense tensors of float64 on the CPU, zeros where a task does not reach a parameter."""
    rows = [torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True) for loss in losses]
    return [
        [(torch.zeros_like(p) if g is None else g).to_dense().double().cpu() for g, p in zip(row, shared, strict=True)]
        for row in rows
    ]


def matrix_of(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """J [K, P]."""
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def check_step(
    make: Callable[[], Aggregator], losses: Sequence[Tensor], shared: Sequence[Tensor], rtol: float, **settings: object
) -> mtlfast.StepResult:
    """Runs `mtlfast.backward` and compares what it adds to `.grad` with the truth of dense gradients in float64."""
    rows = dense_rows(losses, shared)
    before = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense().clone() for p in shared]
    result = mtlfast.backward(losses, make(), shared=shared, retain_graph=True, **settings)
    aggregator = make()
    if isinstance(aggregator, GramAggregator):
        J = matrix_of(rows)
        gram = J @ J.T
        if result.gram is not None:
            assert torch.allclose(result.gram.cpu(), gram, rtol=rtol, atol=rtol * gram.abs().max().item())
        weights = aggregator.weights(gram)
        assert torch.allclose(result.weights.cpu(), weights, rtol=rtol, atol=rtol)
        wanted = [torch.einsum("k,k...->...", weights, torch.stack(column)) for column in zip(*rows, strict=True)]
    else:
        wanted = aggregator(TaskGradients.from_rows(rows))
    for p, x, b in zip(shared, wanted, before, strict=True):
        got = (p.grad.to_dense() - b).double().cpu()
        assert p.grad.dtype == p.dtype
        assert torch.allclose(got, x, rtol=rtol, atol=rtol * max(1e-30, x.abs().max().item()))
    return result
