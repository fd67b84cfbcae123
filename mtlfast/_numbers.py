"""Python's, numpy's and torch's numbers as Python numbers."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def plain(value: Any) -> Any:
    """A scalar of numpy's or torch's as Python's number or string. Any other value is returned as it is."""
    if type(value) in (bool, int, float, str) or getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
        return value
    return value.detach().item() if isinstance(value, Tensor) else value.item()  # host: a setting, once


def is_finite(value: Any) -> bool:
    """Whether the value is a finite Python number. A bool is not."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def shown(value: Any) -> str:
    """A value as errors show it, on one line."""
    value = plain(value)
    shape = getattr(value, "shape", None)
    if shape is None:
        return repr(value)
    if len(shape) == 1 and shape[0] <= 16:
        return repr(value.tolist())  # host: an error
    return f"a {type(value).__name__} of shape {list(shape)}"
