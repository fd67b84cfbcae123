"""What in an autograd graph says which row goes where: by numbers that nodes keep, or by indices, which are values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtlfast.jacobian._graph import AccumulateGrad
from mtlfast.jacobian._uses import EMBEDDING, PARTS

# Functions that move rows by numbers, which their nodes keep.
BY_NUMBERS = frozenset(
    {
        *PARTS,
        "AsStridedBackward0",
        "CatBackward0",
        "DiagonalBackward0",
        "ExpandBackward0",
        "FlipBackward0",
        "MeanBackward1",
        "PermuteBackward0",
        "RepeatBackward0",
        "RollBackward0",
        "Rot90Backward0",
        "StackBackward0",
        "SumBackward1",
        "TransposeBackward0",
        "UnfoldBackward0",
    }
)
# Functions that move elements by values: another step may move them in another way.
BY_VALUES = frozenset(
    {
        "IndexBackward0",
        "IndexPutBackward0",
        "IndexPutImplBackward0",
        "MaskedScatterBackward0",
        "MaskedSelectBackward0",
        "PutBackward0",
        "TakeBackward0",
    }
)
# The same along one dimension.
ALONG = frozenset(
    {
        "GatherBackward0",
        "IndexAddBackward0",
        "IndexCopyBackward0",
        "IndexFillBackward0",
        "IndexReduceBackward0",
        "IndexSelectBackward0",
        "KthvalueBackward0",
        "ScatterAddBackward0",
        "ScatterBackward0",
        "ScatterBackward1",
        "ScatterReduceBackward0",
        "SortBackward0",
        "SortBackward1",
        "TopkBackward0",
    }
)

_fields: dict[str, list[str]] = {}  # by the type of a node, those it keeps


def numbers_of(node: Any) -> tuple[object, ...]:
    """The numbers that a node of a function of `BY_NUMBERS` keeps, such as the dimension and the start of a slice."""
    name = type(node).__name__
    if name not in _fields:
        _fields[name] = sorted(field for field in dir(node) if field.startswith("_saved_"))
    return (name, *(x for field in _fields[name] if isinstance(x := getattr(node, field), int | tuple)))


def arrangement(nodes: Sequence[Any]) -> tuple[object, ...]:
    """What tells apart two graphs of one structure that move rows by other numbers."""
    return tuple(numbers_of(node) for node in nodes if type(node).__name__ in BY_NUMBERS)


def moves_by_values(nodes: Sequence[Any], number: int) -> bool:
    """Whether a graph may move rows of one sample to another by values, so that each step has to be probed.

    Along one dimension only a multiple of S elements can be those of samples.

    Args:
        nodes: those of the graph.
        number: S.
    """
    return number > 1 and any(_moves(node, number) for node in nodes)


def _moves(node: Any, number: int) -> bool:
    name = type(node).__name__
    if name == EMBEDDING:  # of anything but a parameter it looks up rows
        return type(node.next_functions[0][0]) is not AccumulateGrad
    if name not in ALONG:
        return name in BY_VALUES
    behind, output = node.next_functions[0]
    if behind is None or type(behind) is AccumulateGrad:
        return True
    shape = tuple(behind._input_metadata[output].shape)
    dim = getattr(node, "_saved_dim", 0)
    dim = dim - 2**64 if dim >= 2**63 else dim
    return not shape or shape[dim] % number == 0
