"""Walks the autograd graph to find how each shared parameter is used, and whether its gradient is a product."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtlfast import _grad, _native
from mtlfast.jacobian._graph import AccumulateGrad
from mtlfast.jacobian._known_nodes import why_unreadable
from mtlfast.task_gradients import DTYPES

MOST_NODES = 20_000  # torch frees the nodes that Python looked at by recursion, which overflows the stack far above
# Fields that change what a node computes while its type and the shapes stay.
FLAGS = {
    "NativeBatchNormBackward0": "_saved_training",
    "CudnnBatchNormBackward0": "_saved_training",
    "MiopenBatchNormBackward0": "_saved_training",
    "NativeDropoutBackward0": "_saved_p",
}
ON_THE_WAY = ("TBackward0", "ToCopyBackward0", "TransposeBackward0", "PermuteBackward0")
# Functions whose output is a part of their input, or all of it, in some shape: each element comes from one.
PARTS = (
    "AliasBackward0",
    "CloneBackward0",
    "ReshapeAliasBackward0",
    "SelectBackward0",
    "SliceBackward0",
    "SplitBackward0",
    "SplitWithSizesBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "UnbindBackward0",
    "UnsafeSplitBackward0",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
)
EMBEDDING = "EmbeddingBackward0"
RECORDED = frozenset((*ON_THE_WAY, *PARTS, EMBEDDING))


class User(NamedTuple):
    """A function that computes with a parameter or a part of it.

    Attributes:
        node: the function.
        operand: the operand's number.
        transposed: whether that is the transposed parameter or part.
        part: the node whose output the part is, and the output's number; None for the parameter as a whole.
    """

    node: Any
    operand: int
    transposed: bool
    part: tuple[Any, int] | None


class Use(NamedTuple):
    """One use of a parameter whose gradient is a product: D_k^T X or X^T D_k for the output's gradient D_k of task k.

    Attributes:
        node: the function that uses the parameter.
        constant: the node's field that holds X, or an embedding's indices.
        turned: whether X and D_k are the transposes of what the node has.
        rows: N, the number of rows of X and D_k.
    """

    node: Any
    constant: str
    turned: bool
    rows: int


@dataclass(frozen=True)
class Layer:
    """A parameter all of whose uses are products.

    Attributes:
        column: its place among the shared parameters.
        kind: "linear" if the gradient is D_k^T X, "transposed" if it is X^T D_k, or "embedding".
        uses: its uses, at least one.
        dtype: that of D_k and X.
        constant_size: the number of columns of X; 1 for indices.
        delta_size: the number of columns of D_k.
        recomputed: whether X is not kept but packed by hooks, as activation checkpointing does.
    """

    column: int
    kind: str
    uses: tuple[Use, ...]
    dtype: torch.dtype
    constant_size: int
    delta_size: int
    recomputed: bool

    @property
    def rows(self) -> int:
        """N, the number of rows of all uses together."""
        return sum(use.rows for use in self.uses)


class Graph(NamedTuple):
    """What a walk found.

    Attributes:
        nodes: all nodes but those that accumulate a leaf's gradient; empty if there are too many.
        users: by the id of a leaf, or by a node that may pass a parameter or a part of it on: the nodes that use it,
            each with the operand's number.
        hooked: the nodes that have a hook.
        structure: what a cached plan is recognised by.
        leaves: the number of each leaf in the structure, by its id.
    """

    nodes: list[Any]
    users: dict[Any, list[tuple[Any, int]]]
    hooked: frozenset[Any]
    structure: tuple[object, ...]
    leaves: dict[int, int]

    def coarsest(self) -> torch.dtype:
        """The dtype of least precision that a function of the graph computed in."""
        outputs = (output for node in self.nodes for output in getattr(node, "_input_metadata", ()))
        dtypes: set[torch.dtype] = {output.dtype for output in outputs if output.dtype in DTYPES}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def without_nodes(self) -> Graph:
        """The same without the nodes, which would keep the graph alive."""
        return NO_GRAPH._replace(structure=self.structure)


NO_GRAPH = Graph([], {}, frozenset(), (), {})


def walk(losses: Sequence[Tensor]) -> Graph:
    """All nodes behind the losses, and the users of every leaf.

    Cost: one visit of each node on the host; nothing for a graph above `MOST_NODES` nodes.
    """
    native = _native.module()
    hooked = frozenset() if native is None else frozenset(native.hooked(list(losses)))
    nodes: list[Any] = []
    numbers: dict[Any, int] = {}
    users: dict[Any, list[tuple[Any, int]]] = {}
    leaves: dict[int, int] = {}  # by id their number in the order of discovery: an input is another leaf at each step
    structure: list[object] = []
    waiting = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in numbers:
            continue
        numbers[node] = len(nodes)
        nodes.append(node)
        if len(nodes) > MOST_NODES:
            return NO_GRAPH._replace(hooked=hooked)
        name = type(node).__name__
        structure.append(name if name not in FLAGS else (name, getattr(node, FLAGS[name], None)))
        for operand, (behind, output) in enumerate(node.next_functions):
            if behind is None:
                continue
            if type(behind) is AccumulateGrad:
                leaf = id(behind.variable)
                users.setdefault(leaf, []).append((node, operand))
                structure.append(("leaf", leaves.setdefault(leaf, len(leaves))))
                continue
            if type(behind).__name__ in RECORDED:
                users.setdefault(behind, []).append((node, operand))
            structure.append((operand, output) if output else operand)
            waiting.append(behind)
    return Graph(nodes, users, hooked, tuple(structure), leaves)


def layer_of(parameter: Tensor, column: int, graph: Graph) -> Layer | str:
    """The parameter's uses as products, or why it must take the ordinary way."""
    if (why := why_unreadable()) is not None:
        return why
    if not graph.nodes:
        return f"the graph has more than {MOST_NODES} nodes"
    if id(parameter) not in graph.users:
        return "no task reaches it"
    if parameter._backward_hooks:
        return "it has a tensor hook"
    if type(parameter) not in (Tensor, torch.nn.Parameter):
        return f"it is a {type(parameter).__name__}"
    if parameter.dim() != 2:
        return f"its shape {list(parameter.shape)} is no matrix"
    users = final_users(id(parameter), graph)
    if isinstance(users, str):
        return users
    found: list[tuple[str, Use]] = []
    for node, operand, transposed, _ in users:
        use = use_of(node, operand, transposed)
        if isinstance(use, str):
            return use
        found.append(use)
    kinds = {kind for kind, _ in found}
    if len(kinds) > 1:
        return f"it is used in two forms, {' and '.join(sorted(kinds))}"
    (kind,) = kinds
    uses = tuple(use for _, use in found)
    if kind == "embedding" and len({padding_of(use) for use in uses}) > 1:
        return "it is used with several padding indices"
    outputs = [use.node._input_metadata[0] for use in uses]
    dtype, own = outputs[0].dtype, _grad.dtype_of(parameter)
    if any(output.dtype != dtype for output in outputs) or dtype not in DTYPES or own not in DTYPES:
        return f"it is used in {' and '.join(sorted({str(output.dtype) for output in outputs}))}"
    if any(output.device != parameter.device for output in outputs):
        return "it is used on another device"
    size, delta_size = (1, parameter.shape[1]) if kind == "embedding" else (parameter.shape[1], parameter.shape[0])
    if kind == "transposed":
        size, delta_size = delta_size, size
    recomputed = any(packed(use.node, use.constant) for use in uses)
    return Layer(column, kind, uses, dtype, size, delta_size, recomputed)


def final_users(of: Any, graph: Graph, takes_part: Callable[[Any], bool] = lambda node: False) -> list[User] | str:
    """The functions that compute with a parameter, behind those that only transpose or cast it.

    Args:
        of: the id of the parameter, or a node in its place.
        graph: what the walk found.
        takes_part: whether a node takes a part of the parameter, whose users are then found in place of the node.

    Returns:
        The functions, or why they are not known.
    """
    found: list[User] = []
    waiting = [User(node, operand, False, None) for node, operand in graph.users.get(of, ())]
    while waiting:
        user = waiting.pop()
        node, name = user.node, type(user.node).__name__
        if node in graph.hooked:
            return f"{name} has a hook"
        behind = graph.users.get(node, ())
        if takes_part(node):
            waiting += [User(x, place, False, (node, x.next_functions[place][1])) for x, place in behind]
        elif name not in ON_THE_WAY:
            found.append(user)
        elif name != "ToCopyBackward0" and not _transposes(node, name):
            return f"{name} uses it"
        else:
            turn = user.transposed != (name != "ToCopyBackward0")
            waiting += [User(x, place, turn, user.part) for x, place in behind]
    return found


def _transposes(node: Any, name: str) -> bool:
    """Whether a node on the way from a matrix is its transposition."""
    if name == "TransposeBackward0":
        return sorted(x % 2 for x in (_signed(node._saved_dim0), _signed(node._saved_dim1))) == [0, 1]
    return name == "TBackward0" or [_signed(x) % 2 for x in node._saved_dims] == [1, 0]


def _signed(number: int) -> int:
    """A dimension that a node saved, which is unsigned there: -1 is 2**64 - 1."""
    return number - 2**64 if number >= 2**63 else number


def use_of(node: Any, operand: int, transposed: bool) -> tuple[str, Use] | str:
    """The form and the use of a parameter by a node, or why it is no product."""
    name = type(node).__name__
    if name == EMBEDDING and not transposed:
        if node._saved_scale_grad_by_freq:
            return "the embedding scales gradients by frequency"
        if node._saved_sparse:
            return "the embedding's gradient is sparse"
        return "embedding", Use(node, "_saved_indices", False, math.prod(node._input_metadata[0].shape[:-1]))
    if name == "AddmmBackward0":
        if operand == 0:
            return "it is a bias"
        if node._saved_alpha != 1:
            return f"AddmmBackward0 multiplies by {node._saved_alpha}"
        right, first = operand == 2, "_saved_mat1"
    elif name == "MmBackward0":
        right, first = operand == 1, "_saved_self"
    else:
        return f"{name} uses it"
    # y = A B has the gradients dB = A^T dY and dA = dY B^T. The second is (D^T X) with D = dY^T and X = B^T.
    constant, rows = (first, 0) if right else ("_saved_mat2", 1)
    form = "linear" if right == transposed else "transposed"
    return form, Use(node, constant, not right, node._input_metadata[0].shape[rows])


def padding_of(use: Use) -> int:
    """The index of an embedding whose rows have no gradient; negative: none."""
    return _signed(use.node._saved_padding_idx)


def packed(node: Any, field: str) -> bool:
    """Whether the hooks of `saved_tensors_hooks` packed a tensor, so that to read it may compute it again."""
    return getattr(getattr(node, f"_raw{field}"), "unpack_hook", None) is not None
