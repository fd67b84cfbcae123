"""Registers the fake kernels of the compiled ops, which give traced graphs and meta tensors the results' shapes."""

from collections.abc import Callable
from typing import Any

import torch

from mtlfast import _native


def fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as the fake kernel of `mtlfast::op`. Without the extension it does nothing."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if _native.C is not None:
            torch.library.register_fake(f"mtlfast::{op}", function)
        return function

    return register


def example(rows: list[torch.Tensor | None]) -> torch.Tensor:
    """A tensor of the rows' dtype and device."""
    return next((row for row in rows if row is not None), torch.empty(0))


def like_gradients(
    rows: list[torch.Tensor | None], num_tasks: int, dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """New outputs of an op that gives one tensor for each tensor of the gradients, in `dtype` (None: theirs)."""
    firsts = (
        next((row for row in rows[t :: len(rows) // num_tasks] if row is not None), None)
        for t in range(len(rows) // num_tasks)
    )
    return [example(rows).new_empty(0, dtype=dtype) if x is None else torch.empty_like(x, dtype=dtype) for x in firsts]
