"""The check that `MTLFAST_CHECK=1` asks for: computed updates beside those of an ordinary backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mtlfast.jacobian._computed import ComputedJacobian, ComputedPart

# How far both may be apart, relative to the sum of |w_k g_k|, by the coarsest dtype in the graph: an ordinary pass
# multiplies and rounds in another order.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@torch.no_grad()
def certify(jacobian: ComputedJacobian, weights: Tensor, parts: Sequence[ComputedPart]) -> None:
    """Compares w J and w^T G w with an ordinary backward pass of the weighted losses.

    Args:
        jacobian: after its passes, which have kept the graph.
        weights: [K] or [G, K], those of the rows as they are in memory.
        parts: the columns that are computed.

    Raises:
        RuntimeError: they differ by more than rounding.

    Cost: one backward pass for each group, and one more copy of the layers' gradients.
    """
    for part in parts:
        places, groups = part.places(), jacobian.groups
        groups_of = [0] * len(places) if groups is None else groups.at(places)
        matrix = weights if weights.dim() == 2 else weights[None]
        combined = dict(zip(places, part.combined(weights, groups), strict=True))
        for group in sorted(set(groups_of)):
            columns = [place for place, of in zip(places, groups_of, strict=True) if of == group]
            ordinary = jacobian.weighted_pass(matrix[group], [jacobian.parameters[t] for t in columns])
            gram, w = part.at(columns).gram(None, None), matrix[group].double().to(part.device)
            scale = float((w.abs() * gram.diagonal().clamp(min=0).sqrt()).sum())
            got = square = 0.0
            for t, of_pass in zip(columns, ordinary, strict=True):
                ours = combined[t]
                x = 0.0 if ours is None else ours.double()
                y = 0.0 if of_pass is None else of_pass.double()
                difference = torch.as_tensor(x - y)
                got += float(difference.square().sum())
                square += float(torch.as_tensor(y).square().sum())
            predicted, limit = float(w @ gram @ w), TOLERANCE[jacobian.coarsest]
            names = ", ".join(jacobian.columns.names[t] for t in columns)
            if not got**0.5 <= limit * scale and scale == scale:
                raise RuntimeError(
                    f"backward: MTLFAST_CHECK found an update of {names} that is {got**0.5:.3g} from that of an "
                    f"ordinary backward pass, whose norm is {square**0.5:.3g}; expected at most {limit * scale:.3g}"
                )
            if not abs(predicted - square) <= limit * scale**2 and scale == scale:
                raise RuntimeError(
                    f"backward: MTLFAST_CHECK found w^T G w = {predicted:.6g} for {names}, expected {square:.6g}, the "
                    "squared norm of the update of an ordinary backward pass"
                )
