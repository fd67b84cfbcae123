"""The factor by which losses were multiplied, as users give it."""

from __future__ import annotations

import math

from torch import Tensor


def plain_number(loss_scale: float | Tensor | None) -> float | Tensor | None:
    """A loss scale as a float or a tensor without dimensions. What is not a number stays as it is, for the check."""
    if loss_scale is None or type(loss_scale) in (float, int):
        return loss_scale
    if isinstance(loss_scale, Tensor):
        return loss_scale.reshape(()) if loss_scale.numel() == 1 and loss_scale.dim() else loss_scale
    try:
        return loss_scale if isinstance(loss_scale, str | bool) else float(loss_scale)
    except (TypeError, ValueError, OverflowError):
        return loss_scale


def check_loss_scale(caller: str, loss_scale: float | Tensor) -> None:
    """Raises unless `loss_scale` is one number above 0. The value of a tensor on a GPU is not checked."""
    if isinstance(loss_scale, Tensor):
        if loss_scale.numel() != 1:
            raise ValueError(f"{caller}: loss_scale has shape {list(loss_scale.shape)}, expected a number")
        if loss_scale.device.type != "cpu":
            return
    try:
        value = math.nan if isinstance(loss_scale, str | bool) else float(loss_scale)  # host: a CPU tensor at most
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{caller}: loss_scale is {loss_scale!r}, expected a number above 0")
