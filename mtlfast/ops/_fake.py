"""Registers the fake kernels of the compiled ops: what shapes come out, for traced graphs and meta tensors."""

from collections.abc import Callable
from typing import Any

import torch

from mtlfast import _native


def fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the fake kernel of `mtlfast::op`; without the extension there is no such op, and nothing to do."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if _native.C is not None:
            torch.library.register_fake(f"mtlfast::{op}", function)
        return function

    return register


def example(rows: list[torch.Tensor | None]) -> torch.Tensor:
    """A tensor of the rows' dtype and device."""
    return next((row for row in rows if row is not None), torch.empty(0))
