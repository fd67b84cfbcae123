"""How a tensor lies in memory: the one place that compares strides."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def strides_that_count(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The strides of the dimensions that have more than one element; the others may be any number."""
    return [stride for size, stride in zip(shape, strides, strict=True) if size > 1]


def same_layout(tensor: Tensor, strides: Sequence[int]) -> bool:
    """Does the tensor lie in memory as these strides of its shape say?"""
    own, shape = tensor.stride(), tensor.shape
    if own == tuple(strides) or tensor.numel() == 0:
        return True
    return strides_that_count(shape, own) == strides_that_count(shape, strides)


def is_dense(tensor: Tensor) -> bool:
    """Does the tensor fill its memory, each element once, in whatever order?"""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def overlaps_itself(tensor: Tensor) -> bool:
    """Is it expanded, so that several elements share their memory?"""
    return not tensor.is_contiguous() and 0 in strides_that_count(tensor.shape, tensor.stride())
