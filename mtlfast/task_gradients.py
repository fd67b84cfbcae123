"""`TaskGradients`: the gradients of K tasks of T tensors, checked once and read where they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mtlfast import _native
from mtlfast._layout import is_dense, same_layout
from mtlfast._shards import Shards

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Rows = tuple[tuple[Tensor | None, ...], ...]
LISTS = (tuple, list, Sequence)  # in this order: isinstance takes microseconds for the abstract class


class TaskGradients:
    """The gradients of K tasks of T tensors, which together are the Jacobian J [K, P] of the task losses.

    Make one with `from_rows`, `from_stacked` or `from_matrix`. An entry of None means that the task does not depend on
    the tensor; it counts as zeros and is never read. The tensors are those that autograd made. A tensor is copied only
    if no kernel can read it where it lies: if it overlaps itself (stride 0), is not dense, or has other strides than
    the other tasks' gradients of the same tensor.

    The gradients are constants: the ops on them are not differentiable.

    Ops run on the current CUDA stream, and torch's rule for memory holds: of gradients that another stream allocated,
    as it does in the backward pass of a loss computed there, call `record_stream` before they are dropped, or that
    stream may write over them while an op still reads.

    Attributes:
        rows: the K x T tensors, `rows[k][t]`.
        parameters: the T parameters that the tensors are gradients of; None if they are not known. From
            `mtlfast.backward` they are all shared parameters that require grad. A parameter that no task reaches in a
            step keeps its place and has None in every row. They are None if a gradient is sparse, because its tensors
            then hold the places that a task touches and not the whole parameter, and for gradients of features, which
            are new tensors at every step.
        shapes: the T shapes; None for a tensor that no task reaches.
        dtype: the dtype of all gradients.
        device: the device of all gradients.
        shards: says which part of each parameter's elements the tensors hold, where `mtlfast.backward` works on several
            ranks and each holds a part; otherwise None.

    Example:
        >>> import torch, mtlfast
        >>> w, b = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> losses = [(w * torch.tensor([1.0, 2.0])).sum(), 3 * w[0] + 4 * b[0]]
        >>> rows = [torch.autograd.grad(loss, [w, b], allow_unused=True) for loss in losses]
        >>> grads = mtlfast.TaskGradients.from_rows(rows)
        >>> grads
        TaskGradients(2 tasks x 2 tensors, 3 elements, torch.float32, cpu)
        >>> mtlfast.ops.flatten(grads)
        tensor([[1., 2., 0.],
                [3., 0., 4.]])
    """

    __slots__ = ("_table", "device", "dtype", "parameters", "rows", "shapes", "shards")

    rows: Rows
    parameters: tuple[Tensor, ...] | None
    shapes: tuple[torch.Size | None, ...]
    dtype: torch.dtype
    device: torch.device
    shards: Shards | None
    _table: Any

    def __init__(self, rows: Sequence[Sequence[Tensor | None]], parameters: Sequence[Tensor] | None = None) -> None:
        """Use `from_rows` instead, which also checks that `rows` are lists."""
        self.rows = tuple(tuple(row) for row in rows)
        self.parameters = None if parameters is None else tuple(parameters)
        self.shards = None
        native = None if _is_traced(self.rows) else _native.module()
        self._table = native.marshal(self.rows) if native is not None else None
        if self._table is None:
            self.rows = _regular(self.rows)
            self._table = native.marshal(self.rows) if native is not None else None
        firsts = self.examples()
        if self.parameters is not None:
            _check_parameters(self.parameters, firsts)
        self.shapes = tuple(None if first is None else first.shape for first in firsts)
        example = _first(firsts)
        self.dtype = torch.get_default_dtype() if example is None else example.dtype
        self.device = torch.device("cpu") if example is None else example.device

    @classmethod
    def from_rows(
        cls, rows: Sequence[Sequence[Tensor | None]], parameters: Sequence[Tensor] | None = None
    ) -> TaskGradients:
        """Makes task gradients of K rows of T tensors, as K calls of `torch.autograd.grad` return them.

        Args:
            rows: K sequences of T entries. `rows[k][t]` is task k's gradient of tensor t, or None if the task does not
                depend on it. All tensors share one device and one dtype, which is float32, float64, bfloat16 or
                float16. The K gradients of a tensor share one shape.
            parameters: the T parameters that the tensors are gradients of, for methods that keep state for each
                parameter. None: they are not known.

        Raises:
            ValueError, TypeError: a row or a tensor does not fit the others (the message names task and tensor), there
                are not T parameters, or a parameter differs from its gradients in shape.
        """
        if not isinstance(rows, LISTS) or not all(isinstance(row, LISTS) for row in rows):
            got = type(rows).__name__ if not isinstance(rows, Sequence) else "list with another entry"
            raise TypeError(f"TaskGradients.from_rows: rows is a {got}, expected K lists of T tensors or None")
        return cls(rows, parameters)

    @classmethod
    def from_stacked(cls, jac: Sequence[Tensor]) -> TaskGradients:
        """Makes task gradients of T stacked tensors, as vmap returns them and TorchJD keeps them in `.jac`.

        Args:
            jac: T tensors; `jac[t]` has the shape [K, *shape of tensor t].

        Raises:
            ValueError, TypeError: there is no tensor, one has no leading dimension, or two differ in K.
        """
        if not isinstance(jac, Sequence) or not all(isinstance(stacked, Tensor) for stacked in jac):
            got = type(jac).__name__ if not isinstance(jac, Sequence) else "list with another entry"
            raise TypeError(f"TaskGradients.from_stacked: jac is a {got}, expected T tensors [K, ...]")
        if len(jac) == 0:
            raise ValueError("TaskGradients.from_stacked: got no tensor, expected at least one")
        for t, stacked in enumerate(jac):
            if stacked.dim() == 0 or len(stacked) != len(jac[0]):
                raise ValueError(
                    f"TaskGradients.from_stacked: tensor {t} has shape {list(stacked.shape)}, "
                    f"expected [{len(jac[0]) if jac[0].dim() else 'K'}, ...]"
                )
        return cls(list(zip(*(stacked.unbind(0) for stacked in jac), strict=True)))

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> TaskGradients:
        """Makes task gradients of a Jacobian matrix: K tasks, one tensor of P elements.

        Args:
            matrix: [K, P].

        Raises:
            ValueError: `matrix` does not have two dimensions.
            TypeError: `matrix` is not a tensor.
        """
        if not isinstance(matrix, Tensor):
            raise TypeError(f"TaskGradients.from_matrix: matrix is a {type(matrix).__name__}, expected a Tensor [K, P]")
        if matrix.dim() != 2:
            raise ValueError(f"TaskGradients.from_matrix: matrix has shape {list(matrix.shape)}, expected [K, P]")
        return cls([(row,) for row in matrix.unbind(0)])

    @property
    def num_tasks(self) -> int:
        """K, the number of tasks."""
        return len(self.rows)

    def numel(self) -> int:
        """P, the number of elements of one task's gradient, without tensors that no task reaches."""
        if self._table is not None:
            return int(self._table.numel)
        return sum(shape.numel() for shape in self.shapes if shape is not None)

    def whole_numel(self) -> int:
        """P of all ranks together, where each holds a part; otherwise `numel()`."""
        return self.numel() if self.shards is None else self.shards.numel

    def total(self, values: Tensor) -> Tensor:
        """What `values`, computed from these elements, add up to over all ranks, where each holds a part."""
        return values if self.shards is None else self.shards.total(values)

    def with_rows(self, rows: Sequence[Sequence[Tensor | None]]) -> TaskGradients:
        """Other tasks' gradients of the same tensors."""
        made = TaskGradients.from_rows(rows, self.parameters)
        made.shards = self.shards
        return made

    def column(self, t: int) -> tuple[Tensor | None, ...]:
        """The K tasks' gradients of tensor t."""
        return tuple(row[t] for row in self.rows)

    def examples(self) -> list[Tensor | None]:
        """For each tensor the gradient of the first task that reaches it, as an example of shape and strides."""
        return [_first(self.column(t)) if first is None else first for t, first in enumerate(self.rows[0])]

    def flat(self) -> list[Tensor | None]:
        """All K * T entries, task after task, as the registered ops take them."""
        return [gradient for row in self.rows for gradient in row]

    def contiguous(self) -> TaskGradients:
        """The same task gradients with every tensor contiguous; only the tensors that are not contiguous are copied."""
        if all(gradient is None or gradient.is_contiguous() for gradient in self.flat()):
            return self
        rows = [[None if g is None else g.contiguous() for g in row] for row in self.rows]
        return TaskGradients(rows, self.parameters)

    def separate(self) -> None:
        """Copies entries until no two share memory, so that each can be written in place."""
        if _is_traced(self.rows):
            return
        if self._table is not None and self._table.separate:  # native code's quick answer; below is the closer look
            return
        T, reach, shared = len(self.shapes), 0, set()
        for begin, end, i in memory_spans(self.flat()):
            if begin < reach:
                shared.add(divmod(i, T))
            reach = max(reach, end)
        if shared:
            self.rows = tuple(
                tuple(g.clone() if g is not None and (k, t) in shared else g for t, g in enumerate(row))
                for k, row in enumerate(self.rows)
            )
        self.marshal_again()

    def marshal_again(self) -> None:
        """Finds the addresses anew, as after a look at them gave copy-on-write entries memory of their own."""
        native = _native.module()
        if native is not None and self._table is not None:
            self._table = native.marshal(self.rows)

    def accepts(self, out: Sequence[Tensor | None], leading: tuple[int, ...], dtype: torch.dtype | None) -> bool:
        """Whether `out` certainly fits results of the shapes [*leading, *shape] in `dtype` (None: its own dtype).

        Native code answers this quickly. On False the caller must look closer, because `out` may fit all the same.
        """
        native = _native.module()
        if native is None or self._table is None:
            return False
        answer: bool = native.accepts(self._table, out, leading[0] if leading else None, dtype)
        return answer

    def looks_like(self, other: TaskGradients) -> bool:
        """Whether `other` certainly has as many tasks and tensors, and the device, shape and strides of each.

        Tensors that no task reaches in either do not count. On False the caller must look closer.
        """
        native = _native.module()
        if native is None or self._table is None or other._table is None:
            return False
        answer: bool = native.same_tensors(self._table, other._table)
        return answer

    def apart_from(self, state: TaskGradients, out: Sequence[Tensor | None]) -> bool:
        """Whether the entries of `state` certainly share no memory with one another, with these gradients or `out`.

        On False the caller must look closer.
        """
        native = _native.module()
        if native is None or self._table is None or state._table is None:
            return False
        answer: bool = native.apart_from(self._table, state._table, out)
        return answer

    def run(
        self, on_table: Callable[..., Any], on_rows: Callable[[Any], Any], other: TaskGradients | None = None
    ) -> Any:
        """Runs an op in native code: `on_table(C, table)` if there is a table, else `on_rows(torch.ops.mtlfast)`.

        For an op on two task gradients, `on_table(C, table, other's table)` if both have one.
        """
        native = _native.module()
        tables = [self._table] if other is None else [self._table, other._table]
        if native is not None and all(table is not None for table in tables):
            return on_table(native, *tables)
        return on_rows(torch.ops.mtlfast)

    def __reduce__(self) -> tuple[type[TaskGradients], tuple[Rows, tuple[Tensor, ...] | None]]:
        """Copies and pickles make the table anew, because it holds addresses."""
        return type(self), (self.rows, self.parameters)

    def __repr__(self) -> str:
        return (
            f"TaskGradients({self.num_tasks} tasks x {len(self.shapes)} tensors, {self.numel()} elements, "
            f"{self.dtype}, {self.device})"
        )


def _first(gradients: Sequence[Tensor | None]) -> Tensor | None:
    return next((gradient for gradient in gradients if gradient is not None), None)


def _is_traced(rows: Rows) -> bool:
    """Whether the tensors have no memory, because torch.compile, export or FakeTensorMode traces them."""
    if torch.compiler.is_compiling():
        return True
    example = _first([_first(row) for row in rows])
    return example is not None and (example.is_meta or type(example) not in (Tensor, torch.nn.Parameter))


def _regular(rows: Rows) -> Rows:
    """`rows` in which every tensor that kernels cannot read where it lies is copied.

    Raises if a tensor does not fit.
    """
    if len(rows) == 0:
        raise ValueError("TaskGradients: got 0 tasks, expected at least one")
    firsts: list[Tensor | None] = [None] * len(rows[0])
    example: Tensor | None = None
    dense = []
    for k, row in enumerate(rows):
        if len(row) != len(firsts):
            raise ValueError(f"TaskGradients: task {k} has {len(row)} tensors, expected {len(firsts)} as task 0")
        entries: list[Tensor | None] = []
        for t, gradient in enumerate(row):
            if gradient is not None:
                _check(gradient, f"task {k}, tensor {t}", example, firsts[t])
                gradient = _made_dense(gradient, firsts[t])
                firsts[t] = gradient if firsts[t] is None else firsts[t]
                example = gradient if example is None else example
            entries.append(gradient)
        dense.append(tuple(entries))
    return tuple(dense)


def _check_parameters(parameters: Sequence[Tensor], firsts: Sequence[Tensor | None]) -> None:
    """Raises unless `parameters` have the shapes of their gradients `firsts`."""
    if len(parameters) != len(firsts):
        raise ValueError(
            f"TaskGradients: got {len(parameters)} parameters, expected {len(firsts)} as there are tensors"
        )
    for t, (parameter, first) in enumerate(zip(parameters, firsts, strict=True)):
        if first is not None and parameter.shape != first.shape:
            raise ValueError(
                f"TaskGradients: parameter {t} has shape {list(parameter.shape)}, expected {list(first.shape)} as its "
                "gradients"
            )


def _check(gradient: Tensor, where: str, example: Tensor | None, first: Tensor | None) -> None:
    """Raises unless `gradient` fits the kernels, `example` of any tensor, and `first` of its own tensor."""
    if not isinstance(gradient, Tensor):
        raise TypeError(f"TaskGradients: {where} is a {type(gradient).__name__}, expected a Tensor or None")
    if gradient.layout != torch.strided:
        raise TypeError(f"TaskGradients: {where} has layout {gradient.layout}, expected torch.strided (dense)")
    if gradient.dtype not in DTYPES:
        expected = "float32, float64, bfloat16 or float16"
        raise TypeError(f"TaskGradients: {where} has dtype {gradient.dtype}, expected {expected}")
    if example is not None and gradient.dtype != example.dtype:
        raise TypeError(f"TaskGradients: {where} has dtype {gradient.dtype}, expected {example.dtype} as the others")
    if example is not None and gradient.device != example.device:
        raise ValueError(f"TaskGradients: {where} is on {gradient.device}, expected {example.device} as the others")
    if first is not None and gradient.shape != first.shape:
        raise ValueError(
            f"TaskGradients: {where} has shape {list(gradient.shape)}, expected {list(first.shape)} as its other tasks"
        )


def _made_dense(gradient: Tensor, first: Tensor | None) -> Tensor:
    """`gradient` itself if it is dense and has the strides of `first` (None: any strides), else a copy that has."""
    if gradient.numel() == 0:
        return gradient
    if not torch.compiler.is_compiling() and gradient.is_neg():
        gradient = gradient.resolve_neg()
    if first is None:
        return gradient if is_dense(gradient) else gradient.contiguous()
    if same_layout(gradient, first.stride()):
        return gradient
    return torch.empty_strided(first.shape, first.stride(), dtype=first.dtype, device=first.device).copy_(gradient)


def memory_spans(tensors: Sequence[Tensor | None]) -> Iterator[tuple[int, int, int]]:
    """The first byte, the end and the index of each tensor that has memory, in order of address."""
    spans = [
        (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size(), i)
        for i, tensor in enumerate(tensors)
        if tensor is not None and tensor.numel() > 0
    ]
    return iter(sorted(spans))
