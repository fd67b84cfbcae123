"""Stand-ins: tensors without memory by which state that belongs to a part of a parameter knows that part again."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_known: MutableMapping[Tensor, dict[object, Tensor]] = WeakTensorKeyDictionary()


def stand_in(parameter: Tensor, shape: Sequence[int], where: object) -> Tensor:
    """The stand-in for a part of a parameter, the same object at each call.

    Args:
        parameter: the parameter.
        shape: the shape of the part.
        where: what tells the part from others of the same shape.
    """
    of_parameter = _known.setdefault(parameter, {})
    key = (tuple(shape), where)
    if key not in of_parameter:
        of_parameter[key] = torch.empty(tuple(shape), dtype=parameter.dtype, device="meta")
    return of_parameter[key]
