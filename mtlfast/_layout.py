"""How tensors lie in memory. All comparisons of strides are here."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def strides_that_count(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The strides of the dimensions with more than one element. The other strides have no effect."""
    return [stride for size, stride in zip(shape, strides, strict=True) if size > 1]


def same_layout(tensor: Tensor, strides: Sequence[int]) -> bool:
    """Whether the tensor has these strides, as far as they have an effect."""
    own, shape = tensor.stride(), tensor.shape
    if own == tuple(strides) or tensor.numel() == 0:
        return True
    return strides_that_count(shape, own) == strides_that_count(shape, strides)


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements fill a range of memory, each place once, in any order."""
    waiting = [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    expected = 1
    while waiting:  # no sort: torch.compile cannot trace one of symbolic strides
        fitting = [i for i, (stride, _) in enumerate(waiting) if stride == expected]
        if not fitting:
            return False
        expected *= waiting.pop(fitting[0])[1]
    return True


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether the tensor is expanded, so that several elements share their memory."""
    return not tensor.is_contiguous() and 0 in strides_that_count(tensor.shape, tensor.stride())
