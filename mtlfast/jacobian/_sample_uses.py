"""How each parameter's gradient is a sum over rows that belong to samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mtlfast.jacobian._moves import numbers_of, shapes_of
from mtlfast.jacobian._uses import EMBEDDING, PARTS, Graph, Use, User, final_users, packed, use_of

MOST_OF_OUTPUT = 4  # the samples' gradients of a grouped convolution are in memory, beside the gradient at its output


class SampleUse(NamedTuple):
    """One use of a parameter, or of a part of it.

    Attributes:
        node: the function that uses it.
        form: "product", whose gradient is P^T Q of two matrices, one of which is the gradient at the output; "sum",
            whose gradient is the sum over rows of the gradient at the output times what the node has kept; or
            "convolution".
        use: for a product, its matrices.
        kind: for a product "linear", "transposed" or "embedding"; for a sum what the rows are multiplied by.
        shape: that of the parameter or its part.
        part: where the part is made, which is the same for all samples; None for the parameter as a whole.
    """

    node: Any
    form: str
    use: Use | None
    kind: str
    shape: tuple[int, ...]
    part: GradientEdge | None

    @property
    def numel(self) -> int:
        """The number of elements of the parameter or its part."""
        return math.prod(self.shape)

    @property
    def part_key(self) -> object:
        """The same for uses of the same part, also where several functions take it. Lookups are told apart."""
        if self.part is None:
            return None
        key: list[object] = []
        node: Any = self.part.node
        output = self.part.output_nr
        while node is not None and node.next_functions:
            key.append((numbers_of(node), shapes_of(node), output) if type(node).__name__ != EMBEDDING else node)
            node, output = node.next_functions[0]
        return tuple(key)

    def of_parameter(self, gradient: Tensor, parameter: Tensor) -> Tensor:
        """The parameter's gradient, for the part's gradient of any shape."""
        gradient = gradient.reshape(self.shape)
        if self.part is None:
            return gradient
        with torch.enable_grad():
            (found,) = torch.autograd.grad(self.part, parameter, gradient, retain_graph=True)
        return found.to(gradient.dtype)

    def of_parameters(self, gradients: Tensor, parameter: Tensor) -> Tensor:
        """[S, P] the parameter's gradients, for gradients [S, p] of the part."""
        if self.part is None:
            return gradients
        batch = gradients.reshape(-1, *self.shape)
        with torch.enable_grad():
            (found,) = torch.autograd.grad(self.part, parameter, batch, retain_graph=True, is_grads_batched=True)
        return found.to(gradients.dtype).reshape(len(gradients), -1)


def sample_uses(parameter: Tensor, graph: Graph, number: int) -> list[SampleUse] | str:
    """The uses of a parameter, or why its gradient is not known by each of S samples."""
    if parameter._backward_hooks:
        return "it has a tensor hook"
    users = final_users(id(parameter), graph, lambda node: _takes_part(node, graph, number))
    if isinstance(users, str):
        return users
    found: list[SampleUse] = []
    for user in users:
        use = _sample_use(tuple(parameter.shape), user)
        if isinstance(use, str):
            return use
        if use.numel == 0:
            return "a part of it without elements is used"
        found.append(use)
    return found


def _is_part(node: Any) -> bool:
    """Whether each element of a node's output comes from one of its input. Transposed matrices are followed as such."""
    name = type(node).__name__
    turns = name in ("TransposeBackward0", "PermuteBackward0") and len(node._input_metadata[0].shape) != 2
    return turns or name in PARTS


def _takes_part(node: Any, graph: Graph, number: int) -> bool:
    """Whether a node makes a part of a parameter, or an embedding's output, that is the same for all samples."""
    if type(node).__name__ != EMBEDDING or node._saved_scale_grad_by_freq or node._saved_sparse:
        return _is_part(node)
    users = final_users(node, graph, _is_part)
    own = tuple(node._input_metadata[0].shape)
    return (
        bool(users)
        and not isinstance(users, str)
        and all(_over_samples(_shape_of(own, user), user, number) for user in users)
    )


def widened(uses: Sequence[SampleUse]) -> bool:
    """Whether sums over parts have to be brought to the parameter's shape, to have products of samples' gradients."""
    parts = {use.part_key: use.part for use in uses}
    return len(parts) > 1 or not all(only_selects(part) for part in parts.values())


def _shape_of(whole: tuple[int, ...], user: User) -> tuple[int, ...]:
    """The shape of what a function uses of a whole."""
    if user.part is None:
        return whole
    node, output = user.part
    return tuple(node._input_metadata[output].shape)


def _sample_use(whole: tuple[int, ...], user: User) -> SampleUse | str:
    node, operand, name, shape = user.node, user.operand, type(user.node).__name__, _shape_of(whole, user)
    rest = (shape, None if user.part is None else GradientEdge(*user.part))
    if len(shape) == 2 and not isinstance(product := use_of(node, operand, user.transposed), str):
        if not only_selects(rest[1]):
            return "an embedding of it is a matrix"
        return SampleUse(node, "product", product[1], product[0], *rest)
    if user.transposed:
        return f"{name} uses it"
    output: Sequence[int] = node._input_metadata[0].shape
    if name == "AddmmBackward0" and operand == 0 and node._saved_beta == 1 and shape == (output[1],):
        return SampleUse(node, "sum", None, "rows", *rest)
    if name == "NativeLayerNormBackward0" and operand in (1, 2):
        return SampleUse(node, "sum", None, "layer norm" if operand == 1 else "last", *rest)
    if name == "NativeGroupNormBackward0" and operand in (1, 2):
        return SampleUse(node, "sum", None, "group norm" if operand == 1 else "channels", *rest)
    if name == "NativeBatchNormBackward0" and operand in (1, 2):
        if node._saved_training:
            return "BatchNorm in training, in which samples meet, uses it"
        return SampleUse(node, "sum", None, "batch norm" if operand == 1 else "channels", *rest)
    if name == "ConvolutionBackward0" and operand == 2:
        return SampleUse(node, "sum", None, "channels", *rest)
    if name == "ConvolutionBackward0" and operand == 1:
        if node._saved_transposed or any(node._saved_output_padding) or len(output) not in (3, 4):
            return "a transposed convolution or one over volumes uses it"
        if node._saved_groups != 1:
            if math.prod(shape) > MOST_OF_OUTPUT * math.prod(output[1:]):
                return f"a convolution with {node._saved_groups} groups, which is larger than its output, uses it"
            return SampleUse(node, "sum", None, "grouped", *rest)
        if not only_selects(rest[1]):
            return "an embedding of it is the kernel of a convolution"
        return SampleUse(node, "convolution", None, "", *rest)
    if name == "AddBackward0" and operand == 1 and node._saved_alpha != 1:
        return f"AddBackward0 multiplies by {node._saved_alpha}"
    if (kind := _kind_of_broadcast(shape, user)) is not None:
        return SampleUse(node, "sum", None, kind, *rest)
    return f"{name} uses it"


def only_selects(part: GradientEdge | None) -> bool:
    """Whether no element of a parameter can come twice in its part, as it can in an embedding."""
    waiting = [] if part is None else [part.node]
    while waiting:
        node = waiting.pop()
        if type(node).__name__ == EMBEDDING:
            return False
        waiting += [behind for behind, _ in node.next_functions if behind is not None]
    return True


def overlap(uses: Sequence[SampleUse], parameter: Tensor) -> bool:
    """Whether an element of a parameter is in several of the parts that products take."""
    parts = {use.part_key: use for use in uses if use.form != "sum"}
    if len(parts) < 2:
        return False
    times = torch.zeros_like(parameter)
    for use in parts.values():
        times += use.of_parameter(times.new_ones(use.numel), parameter)
    return bool((times > 1).any())  # host: once a plan


BROADCASTS = {
    "AddBackward0": ("add", "add"),
    "MulBackward0": ("other", "self"),  # the field that holds the other factor, by the operand
    "ExpandBackward0": ("add",),
    "RepeatBackward0": ("add",),
}


def _kind_of_broadcast(shape: tuple[int, ...], user: User) -> str | None:
    """The kind of a sum in which something of this shape is broadcast to a larger one; None if it is no such sum."""
    kinds = BROADCASTS.get(type(user.node).__name__)
    output = tuple(user.node._input_metadata[0].shape)
    if kinds is None or user.transposed or len(shape) > len(output):
        return None
    inner = (1,) * (len(output) - len(shape)) + shape
    broadcast = all(size in (1, of_output) for size, of_output in zip(inner, output, strict=True))
    return kinds[user.operand] if broadcast and (1 in inner) else None


def _over_samples(shape: tuple[int, ...], user: User, number: int) -> bool:
    """Whether something is broadcast, and not one for each of S samples in the first dimension, as labels are."""
    output = tuple(user.node._input_metadata[0].shape)
    of_labels = len(shape) == len(output) and shape[0] == output[0] == number > 1
    return _kind_of_broadcast(shape, user) is not None and not of_labels


# What a sum needs of a node beside the gradient at its output.
KEPT = {
    "layer norm": ("_saved_input", "_saved_result1", "_saved_result2"),
    "group norm": ("_saved_input", "_saved_result1", "_saved_result2"),
    "batch norm": ("_saved_input", "_saved_running_mean", "_saved_running_var"),
    "grouped": ("_saved_input",),
    "other": ("_saved_other",),
    "self": ("_saved_self",),
}


def kept_by(use: SampleUse) -> list[Tensor]:
    """The tensors that a node has kept for its backward pass, which frees them."""
    return [getattr(use.node, name).detach() for name in _names(use)]


def is_packed(use: SampleUse) -> bool:
    """Whether hooks have packed what the node keeps, so that to read it may compute it again."""
    return any(packed(use.node, name) for name in _names(use))


def _names(use: SampleUse) -> Sequence[str]:
    if use.use is not None:
        return (use.use.constant,)
    return ("_saved_input",) if use.form == "convolution" else KEPT.get(use.kind, ())


def rows_of(use: SampleUse, delta: Tensor) -> Tensor:
    """[R, ...]: the gradient at a sum's output by rows, each of which belongs to a sample."""
    if use.kind in ("rows", "layer norm", "last"):
        return delta.reshape(-1, use.numel)
    if use.kind not in ("add", "other", "self"):
        return delta.reshape(len(delta), -1)
    inner = (1,) * (delta.dim() - len(use.shape)) + use.shape
    broadcast = [i for i, size in enumerate(inner) if size == 1]
    return delta.permute(*broadcast, *(i for i, size in enumerate(inner) if size > 1)).reshape(-1, use.numel)


def unfolded(use: SampleUse, given: Tensor) -> Tensor:
    """[N, C * kernel, places] the elements of a convolution's input that each place of its output sees."""
    node = use.node
    flat = given.dim() == 3  # over one dimension
    if flat:
        given = given.unsqueeze(2)
    stride, padding, dilation = (
        (neutral, *values) if flat else tuple(values)
        for values, neutral in ((node._saved_stride, 1), (node._saved_padding, 0), (node._saved_dilation, 1))
    )
    kernel = (1, *use.shape[2:]) if flat else tuple(use.shape[2:])
    return torch.nn.functional.unfold(given, kernel, dilation, padding, stride)


def terms_of_sum(use: SampleUse, kept: Sequence[Tensor], delta: Tensor) -> Tensor:
    """[R, p]: the terms whose sums over a sample's rows are its gradient, in the order of `rows_of`."""
    node, kind = use.node, use.kind
    if kind == "layer norm":
        given, mean, rstd = kept
        delta = delta * (given - mean) * rstd
    if kind in ("other", "self"):
        delta = delta * kept[0]
    if kind == "grouped":
        delta, columns = delta.flatten(2), unfolded(use, kept[0])
        apart = (x.reshape(len(x), node._saved_groups, -1, x.shape[-1]) for x in (delta, columns))
        return torch.einsum("sgop,sgip->sgoi", *apart).flatten(1)
    if kind in ("group norm", "batch norm", "channels"):
        value = delta
        if kind == "batch norm":
            given, mean, variance = kept
            shape = (1, -1, *[1] * (delta.dim() - 2))
            value = delta * (given - mean.view(shape)) * (variance + node._saved_eps).rsqrt().view(shape)
        if kind == "group norm":
            given, mean, rstd = kept
            N, groups = node._saved_N, node._saved_group
            normalized = (given.reshape(N, groups, -1) - mean.reshape(N, groups, 1)) * rstd.reshape(N, groups, 1)
            value = delta * normalized.reshape(delta.shape)
        return value.flatten(2).sum(2) if value.dim() > 2 else value
    return rows_of(use, delta)
