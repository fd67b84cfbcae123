"""Base classes that give mtlfast's aggregators the attributes and methods of TorchJD's.

A class that stands for one of TorchJD's is called a face here.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from mtlfast import ops
from mtlfast._settings import Real
from mtlfast.aggregation import GramAggregator, RowsJacobian
from mtlfast.task_gradients import TaskGradients

BASES = ("Aggregator", "WeightedAggregator", "GramianWeightedAggregator", "Weighting", "Stateful")
T = TypeVar("T", bound=type)
PARTS = ("weighting", "gramian_weighting")  # attributes that are computed from the settings


@functools.cache
def join_torchjd() -> None:
    """Registers the faces with the base classes of an installed TorchJD, whose functions check with `isinstance`."""
    if importlib.util.find_spec("torchjd") is None:
        return
    import torchjd.aggregation

    from mtlfast.compat import _torchjd_names as names

    for name in names.__all__:
        for base in inspect.getmro(getattr(torchjd.aggregation, name, object)):
            if base.__name__ in BASES:
                base.register(getattr(names, name))  # type: ignore[attr-defined]  # an abstract class


def joining(face: T) -> T:
    """Decorates a face, so that its constructor registers the faces with TorchJD first and keeps its signature."""
    constructor = face.__init__  # type: ignore[misc]  # it may be inherited

    @functools.wraps(constructor)
    def joined(self: Any, *arguments: Any, **settings: Any) -> None:
        join_torchjd()
        constructor(self, *arguments, **settings)

    setattr(face, "__init__", joined)  # noqa: B010  # as mypy allows
    return face


def refuse_parts(owner: nn.Module, name: str) -> None:
    """Raises AttributeError for an attribute that is computed from the settings, so that it cannot be set."""
    if name in PARTS:
        raise AttributeError(f"{type(owner).__name__}: {name} cannot be set, expected another {type(owner).__name__}")


def is_hooked(module: nn.Module) -> bool:
    """Whether the module has forward hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def rounded(exact: Tensor, dtype: torch.dtype, rtol: float | None = None) -> Tensor:
    """A float64 Gram matrix or weights in the dtype in which hooks see them.

    Solvers and weighted sums get back what was rounded, by `unrounded`.

    Args:
        exact: [m, m] or [m] float64.
        dtype: the Jacobian's.
        rtol: of a Gram matrix m times the relative precision of a product of two gradients.
    """
    given = exact.to(dtype)
    if given is not exact and not given.is_inference():
        given.__dict__["_rounded_from"] = exact, rtol, given._version
    return given


def unrounded(given: Tensor) -> tuple[Tensor, float | None]:
    """What `rounded` was called with; for another tensor, or one that was written to since, itself in float64."""
    exact, rtol, version = given.__dict__.get("_rounded_from", (None, None, None))
    return (given.double(), None) if exact is None or given._version != version else (exact, rtol)


class Weighting(nn.Module):
    """A module that computes the weights of an aggregator from a Gramian [m, m].

    The aggregator's constructor arguments are attributes of it, which can be read and set.
    """

    of: ClassVar[type[GramAggregator]]
    aggregator: GramAggregator

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__()
        join_torchjd()
        self.aggregator = self.of(*arguments, **settings)

    @classmethod
    def looking_at(cls, aggregator: GramAggregator) -> Weighting:
        """The weighting of an existing aggregator, which keeps the settings and the state."""
        weighting = cls.__new__(cls)
        nn.Module.__init__(weighting)
        weighting.__dict__["aggregator"] = aggregator  # no submodule: the aggregator holds this one
        return weighting

    def forward(self, gramian: Tensor, *, rtol: float | None = None) -> Tensor:
        """The weights [m] in the Gramian's dtype. `rtol` is that of `GramAggregator.weights`."""
        if gramian.dim() < 2 or gramian.shape[-1] != gramian.shape[-2]:
            raise ValueError(f"{type(self).__name__}: gramian has shape {list(gramian.shape)}, expected [m, m]")
        gram, known = unrounded(gramian)
        return rounded(self.aggregator.weights(gram, rtol=rtol if known is None else known), gramian.dtype)

    def reset(self) -> None:
        self.aggregator.reset()

    def __lshift__(self, function: Callable[[Tensor], Tensor]) -> Composition:
        """The composition of the weighting with a function of its input, as in TorchJD."""
        return Composition(self, function)

    @classmethod
    @functools.cache
    def settings(cls) -> frozenset[str]:
        """The names of the aggregator's constructor arguments, except for modules and vectors of weights."""
        return frozenset(inspect.signature(cls.of).parameters) - {*PARTS, "weights", "initial_weights"}

    def __getattr__(self, name: str) -> Any:
        """A setting of the aggregator, or an attribute of the module."""
        return getattr(self.aggregator, name) if name in self.settings() else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets a setting of the aggregator, which checks it, or an attribute of the module."""
        refuse_parts(self, name)
        if name in self.settings():
            setattr(self.aggregator, name, value)
        else:
            super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        join_torchjd()
        super().__setstate__(state)  # type: ignore[no-untyped-call]


class MatrixWeighting(Weighting):
    """A module that computes the weights of an aggregator that needs only the number of rows of a matrix [m, ...]."""

    def forward(self, matrix: Tensor, *, rtol: float | None = None) -> Tensor:
        """The weights [m] in the matrix's dtype."""
        if matrix.dim() == 0:
            raise ValueError(f"{type(self).__name__}: matrix has shape [], expected [m, ...]")
        nothing = torch.empty(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
        return self.aggregator.weights(nothing).to(matrix.dtype)


class Composition(nn.Module):
    """The composition of a weighting with a function of its input."""

    def __init__(self, weighting: Weighting, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weighting, self.fn = weighting, function

    def forward(self, stat: Tensor) -> Tensor:
        weights: Tensor = self.weighting(self.fn(stat))
        return weights


class OfMatrix(nn.Module):
    """A module that computes the Gramian of a Jacobian [m, n] and then a weighting's weights."""

    def __init__(self, weighting: Weighting) -> None:
        super().__init__()
        self.weighting = weighting

    def forward(self, matrix: Tensor) -> Tensor:
        """The weights [m] in the matrix's dtype. Hooks on the weighting see a Gramian of that dtype."""
        jacobian = RowsJacobian(TaskGradients.from_matrix(matrix))
        precision = self.weighting.aggregator.reads.precision
        gram, rtol = jacobian.gram(precision), jacobian.num_tasks * jacobian.product_rtol(precision)
        if is_hooked(self.weighting):
            gram = rounded(gram, matrix.dtype, rtol)
        weights: Tensor = self.weighting(gram, rtol=rtol)
        return weights if weights.dtype == matrix.dtype else rounded(weights, matrix.dtype)


class Weighted(GramAggregator):
    """An aggregator with TorchJD's attribute `weighting`, a module that computes its weights from a Jacobian [m, n].

    Hooks on that module run when the aggregator is called on a matrix, as in TorchJD. They do not run in
    `mtlfast.backward`.
    """

    weighting_class: ClassVar[type[Weighting]]

    def __setstate__(self, state: dict[str, Any]) -> None:
        join_torchjd()
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    @property
    def weighting(self) -> nn.Module:
        """The module that computes the weights from a Jacobian [m, n]."""
        return self._part("weighting", lambda: self.weighting_class.looking_at(self))

    def _part(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        """A module that belongs to this aggregator. A shallow copy of the aggregator makes new ones of its own."""
        whose, kept = self.__dict__.get(f"_made_{name}", (None, None))
        part: nn.Module = kept if whose is self else make()
        self.__dict__[f"_made_{name}"] = (self, part)
        return part

    def _watched(self) -> bool:
        return is_hooked(self.weighting)

    def forward(self, grads: TaskGradients | Tensor, **about: Any) -> list[Tensor | None] | Tensor:
        """The update direction, as `Aggregator` computes it.

        Hooks on `weighting` see a matrix and may change the weights.
        """
        if isinstance(grads, Tensor) and grads.dim() == 2 and not about and self._watched():
            return self._combine(grads, self.weighting(grads))
        return super().forward(grads, **about)

    @staticmethod
    def _combine(matrix: Tensor, weights: Tensor) -> Tensor:
        (vector,) = ops.combine(TaskGradients.from_matrix(matrix), unrounded(weights)[0].detach())
        assert vector is not None
        return vector

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_parts(self, name)
        super().__setattr__(name, value)


class GramianWeighted(Weighted):
    """An aggregator with TorchJD's attribute `gramian_weighting`, a module that computes its weights from a Gramian."""

    @property
    def gramian_weighting(self) -> nn.Module:
        """The module that computes the weights from a Gramian [m, m]."""
        return self._part("gramian_weighting", lambda: self.weighting_class.looking_at(self))

    @property
    def weighting(self) -> nn.Module:
        """The module that computes the weights from a Jacobian [m, n]."""
        inner = self.gramian_weighting
        assert isinstance(inner, Weighting)
        return self._part("weighting", lambda: OfMatrix(inner))

    def _watched(self) -> bool:
        return is_hooked(self.weighting) or is_hooked(self.gramian_weighting)


class Projector:
    """Has the settings of TorchJD's QuadprogProjector. `norm_eps` is 0, because mtlfast has no absolute epsilon."""

    reg_eps = Real(0)
    norm_eps = property(lambda self: 0.0)

    def __init__(self, reg_eps: float = 1e-4) -> None:
        self.reg_eps = reg_eps

    def __repr__(self) -> str:
        return f"QuadprogProjector(norm_eps={self.norm_eps}, reg_eps={self.reg_eps})"


class Projecting(GramianWeighted):
    """An aggregator with TorchJD's attribute `projector`, whose `reg_eps` is read at each step."""

    @property
    def projector(self) -> Any:
        """The projector that was given, or one with TorchJD's default."""
        return self.__dict__["_projector"]

    @projector.setter
    def projector(self, value: Any) -> None:
        if value is not None and not hasattr(value, "reg_eps"):
            raise ValueError(f"projector is a {type(value).__name__}, expected one with reg_eps (a QuadprogProjector)")
        self.__dict__["_projector"] = Projector() if value is None else value

    @property
    def reg_eps(self) -> float:
        """`reg_eps` of the projector."""
        return float(self.projector.reg_eps)

    @reg_eps.setter
    def reg_eps(self, value: float) -> None:
        self.projector.reg_eps = value
