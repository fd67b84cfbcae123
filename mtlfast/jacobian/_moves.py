"""What in an autograd graph says which row goes where: by numbers that nodes keep, or by indices, which are values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtlfast.jacobian._graph import AccumulateGrad
from mtlfast.jacobian._uses import EMBEDDING, Graph

# Functions that move elements by values, or by numbers that their nodes do not show: another step may move them in
# another way.
BY_VALUES = frozenset(
    {
        "CopySlices",
        "GatherBackward0",
        "GridSampler2DBackward0",
        "GridSampler3DBackward0",
        "IndexAddBackward0",
        "IndexBackward0",
        "IndexCopyBackward0",
        "IndexFillBackward0",
        "IndexPutBackward0",
        "IndexPutImplBackward0",
        "IndexReduceBackward0",
        "IndexSelectBackward0",
        "KthvalueBackward0",
        "MaskedScatterBackward0",
        "MaskedSelectBackward0",
        "MaxUnpool2DBackward0",
        "MaxUnpool3DBackward0",
        "PutBackward0",
        "ScatterAddBackward0",
        "ScatterBackward0",
        "ScatterBackward1",
        "ScatterReduceBackward0",
        "SegmentReduceBackward0",
        "SortBackward0",
        "SortBackward1",
        "SparseAddmmBackward0",
        "TakeBackward0",
        "TopkBackward0",
    }
)
LOOKUPS = (EMBEDDING, "EmbeddingBagBackward0")  # of anything but a parameter they look up rows

_fields: dict[str, list[str]] = {}  # by the type of a node, the numbers that it keeps


def numbers_of(node: Any) -> tuple[object, ...]:
    """The type of a node and the numbers that it keeps, such as the dimension and the start of a slice."""
    name = type(node).__name__
    if name not in _fields:
        names = set(dir(node))
        saved = (field for field in names if field.startswith("_saved_"))
        _fields[name] = sorted(field for field in saved if f"_raw{field}" not in names)  # those are tensors
    return (name, *(x for field in _fields[name] if isinstance(x := getattr(node, field), int | tuple)))


def shapes_of(node: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes of a function's outputs."""
    return tuple(tuple(output.shape) for output in node._input_metadata)


def fingerprint(graph: Graph) -> tuple[object, ...]:
    """What tells apart two graphs that may move rows in different ways: all of a graph but its values."""
    places: dict[Any, int] = {node: i for i, node in enumerate(graph.nodes)}
    found: list[object] = []
    for node in graph.nodes:
        behind = (
            (-1 - graph.leaves[id(other.variable)] if type(other) is AccumulateGrad else places[other], output)
            for other, output in node.next_functions
            if other is not None
        )
        found.append((numbers_of(node), shapes_of(node), *behind))
    return tuple(found)


def moves_by_values(nodes: Sequence[Any], number: int) -> bool:
    """Whether a graph may move rows of one of S samples to another by values, so that each step has to be probed."""
    return number > 1 and any(_moves(node, number) for node in nodes)


def _moves(node: Any, number: int) -> bool:
    name = type(node).__name__
    if name in LOOKUPS:
        return type(node.next_functions[0][0]) is not AccumulateGrad
    return name in BY_VALUES and not _takes_labels(node, number)


def _takes_labels(node: Any, number: int) -> bool:
    """Whether a node takes one element of each row, and samples are in another dimension, as where labels are read."""
    if type(node).__name__ != "GatherBackward0":
        return False
    (shape,) = shapes_of(node)
    last = node._saved_dim in (len(shape) - 1, 2**64 - 1)
    return len(shape) > 1 and last and shape[-1] == 1 and any(size % number == 0 for size in shape[:-1])
