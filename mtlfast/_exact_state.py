"""`ExactState`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

Self = TypeVar("Self", bound="ExactState")


class ExactState(nn.Module):
    """A module whose floating-point buffers keep their dtype, so that `.to(dtype)` and `.half()` do not round them."""

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        exact = {
            name: buffer for name, buffer in self._buffers.items() if buffer is not None and buffer.is_floating_point()
        }
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self
