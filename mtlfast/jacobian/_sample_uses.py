"""How each parameter's gradient is a sum over rows that belong to samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtlfast.jacobian._uses import Graph, Use, final_users, packed, use_of


class SampleUse(NamedTuple):
    """One use of a parameter.

    Attributes:
        node: the function that uses it.
        form: "product", whose gradient is P^T Q of two matrices, one of which is the gradient at the output; "sum",
            whose gradient is the sum over rows of the gradient at the output times what the node has kept; or
            "convolution".
        use: for a product, its matrices.
        kind: for a product "linear", "transposed" or "embedding"; for a sum what the rows are multiplied by.
    """

    node: Any
    form: str
    use: Use | None
    kind: str


def sample_uses(parameter: Tensor, graph: Graph) -> list[SampleUse] | str:
    """The uses of a parameter, or why its gradient is not known by sample."""
    if parameter._backward_hooks:
        return "it has a tensor hook"
    users = final_users(parameter, graph)
    if isinstance(users, str):
        return users
    found: list[SampleUse] = []
    for node, operand, transposed in users:
        use = _sample_use(parameter, node, operand, transposed)
        if isinstance(use, str):
            return use
        found.append(use)
    return found


def _sample_use(parameter: Tensor, node: Any, operand: int, transposed: bool) -> SampleUse | str:
    name = type(node).__name__
    if parameter.dim() == 2 and not isinstance(product := use_of(node, operand, transposed), str):
        return SampleUse(node, "product", product[1], product[0])
    if transposed:
        return f"{name} uses it"
    output: Sequence[int] = node._input_metadata[0].shape
    shape = tuple(parameter.shape)
    if name == "AddmmBackward0" and operand == 0 and node._saved_beta == 1 and shape == (output[1],):
        return SampleUse(node, "sum", None, "rows")
    if name == "NativeLayerNormBackward0" and operand in (1, 2):
        return SampleUse(node, "sum", None, "layer norm" if operand == 1 else "last")
    if name == "NativeGroupNormBackward0" and operand in (1, 2):
        return SampleUse(node, "sum", None, "group norm" if operand == 1 else "channels")
    if name == "ConvolutionBackward0" and operand == 2:
        return SampleUse(node, "sum", None, "channels")
    if name == "ConvolutionBackward0" and operand == 1:
        if node._saved_transposed or any(node._saved_output_padding) or len(output) not in (3, 4):
            return "a transposed convolution or one over volumes uses it"
        if node._saved_groups != 1:
            return f"a convolution with {node._saved_groups} groups uses it"
        return SampleUse(node, "convolution", None, "")
    if name in ("AddBackward0", "MulBackward0") and _broadcast(shape, output):
        if name == "AddBackward0" and operand == 1 and node._saved_alpha != 1:
            return f"AddBackward0 multiplies by {node._saved_alpha}"
        return SampleUse(node, "sum", None, "add" if name == "AddBackward0" else ("other" if operand == 0 else "self"))
    return f"{name} uses it"


def _broadcast(shape: tuple[int, ...], output: Sequence[int]) -> bool:
    """Whether a parameter is broadcast over the first dimension of the output."""
    return len(output) > 0 and (len(shape) < len(output) or (len(shape) == len(output) and shape[0] == 1))


def by_row(use: SampleUse, shape: Sequence[int]) -> bool:
    """Whether a parameter of this shape has a term in every row of a sum's output, taken as a matrix.

    If not, only the output's first dimension tells samples apart.
    """
    if use.kind in ("rows", "layer norm", "last"):
        return True
    if use.kind not in ("add", "other", "self"):
        return False
    inner = list(shape)
    while inner and inner[0] == 1:
        inner.pop(0)
    output = list(use.node._input_metadata[0].shape)
    return len(inner) < len(output) and inner == output[len(output) - len(inner) :]


# What a sum needs of a node beside the gradient at its output.
KEPT = {
    "layer norm": ("_saved_input", "_saved_result1", "_saved_result2"),
    "group norm": ("_saved_input", "_saved_result1", "_saved_result2"),
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


def rows_of_sum(use: SampleUse, kept: Sequence[Tensor], delta: Tensor, shape: torch.Size) -> Tensor:
    """[R, p]: the terms whose sums over a sample's rows are its gradient, in the order of the output's rows."""
    node, kind = use.node, use.kind
    if kind == "rows":
        return delta
    if kind in ("layer norm", "last"):
        normalized = delta
        if kind == "layer norm":
            given, mean, rstd = kept
            normalized = delta * (given - mean) * rstd
        return normalized.reshape(-1, shape.numel())
    if kind in ("group norm", "channels"):
        value = delta
        if kind == "group norm":
            given, mean, rstd = kept
            N, groups = node._saved_N, node._saved_group
            normalized = (given.reshape(N, groups, -1) - mean.reshape(N, groups, 1)) * rstd.reshape(N, groups, 1)
            value = delta * normalized.reshape(delta.shape)
        return value.flatten(2).sum(2) if value.dim() > 2 else value
    if kind in ("other", "self"):
        delta = delta * kept[0]
    if by_row(use, shape):
        return delta.reshape(-1, shape.numel())
    inner = torch.Size([1] * (delta.dim() - len(shape))) + shape
    keep = [i for i in range(1, delta.dim()) if inner[i] == 1]
    return (delta.sum(dim=keep, keepdim=True) if keep else delta).reshape(len(delta), -1)
