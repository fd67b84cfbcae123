"""What TorchJD's functions and its users ask of aggregators and weightings, answered by mtlfast's aggregators."""

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
PARTS = ("weighting", "gramian_weighting")  # attributes that are made, not kept


@functools.cache
def join_torchjd() -> None:
    """Tells an installed TorchJD's base classes which faces are theirs: its functions ask with `isinstance`."""
    if importlib.util.find_spec("torchjd") is None:
        return
    import torchjd.aggregation

    from mtlfast.compat import _torchjd_names as names

    for name in names.__all__:
        for base in inspect.getmro(getattr(torchjd.aggregation, name, object)):
            if base.__name__ in BASES:
                base.register(getattr(names, name))  # type: ignore[attr-defined]  # an abstract class


def joining(face: T) -> T:
    """Has a face's constructor, whose signature it keeps, join TorchJD first."""
    constructor = face.__init__  # type: ignore[misc]  # the one that it inherits, where it has none

    @functools.wraps(constructor)
    def joined(self: Any, *arguments: Any, **settings: Any) -> None:
        join_torchjd()
        constructor(self, *arguments, **settings)

    setattr(face, "__init__", joined)  # noqa: B010  # as mypy allows
    return face


def refuse_parts(owner: nn.Module, name: str) -> None:
    """Raises AttributeError for what is made from the settings, where a module could be registered in vain."""
    if name in PARTS:
        raise AttributeError(f"{type(owner).__name__}: {name} cannot be set, expected another {type(owner).__name__}")


def is_hooked(module: nn.Module) -> bool:
    """Does it have hooks around its forward?"""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class Weighting(nn.Module):
    """The weights of an aggregator for a Gramian [m, m].

    The aggregator's constructor arguments are attributes here, to be read and set.
    """

    of: ClassVar[type[GramAggregator]]
    aggregator: GramAggregator

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__()
        join_torchjd()
        self.aggregator = self.of(*arguments, **settings)

    @classmethod
    def looking_at(cls, aggregator: GramAggregator) -> Weighting:
        """The weighting of an aggregator, which keeps its settings and state."""
        weighting = cls.__new__(cls)
        nn.Module.__init__(weighting)
        weighting.__dict__["aggregator"] = aggregator  # no submodule: the aggregator holds this one
        return weighting

    def forward(self, gramian: Tensor, *, rtol: float | None = None) -> Tensor:
        """[m], in the Gramian's dtype; `rtol` as in `GramAggregator.weights`."""
        if gramian.dim() < 2 or gramian.shape[-1] != gramian.shape[-2]:
            raise ValueError(f"{type(self).__name__}: gramian has shape {list(gramian.shape)}, expected [m, m]")
        return self.aggregator.weights(gramian.double(), rtol=rtol).to(gramian.dtype)

    def reset(self) -> None:
        self.aggregator.reset()

    def __lshift__(self, function: Callable[[Tensor], Tensor]) -> Composition:
        """The weights of what a function makes of its input, as TorchJD composes them."""
        return Composition(self, function)

    @classmethod
    @functools.cache
    def settings(cls) -> frozenset[str]:
        """The names of the aggregator's constructor arguments, but for what it is made of."""
        return frozenset(inspect.signature(cls.of).parameters) - {*PARTS, "weights", "initial_weights"}

    def __getattr__(self, name: str) -> Any:
        """A setting of the aggregator's, or a module's own attribute."""
        return getattr(self.aggregator, name) if name in self.settings() else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets the aggregator's setting, with its checks, or an attribute."""
        refuse_parts(self, name)
        if name in self.settings():
            setattr(self.aggregator, name, value)
        else:
            super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        join_torchjd()
        super().__setstate__(state)  # type: ignore[no-untyped-call]


class MatrixWeighting(Weighting):
    """The weights of an aggregator that looks at no products, for any matrix [m, ...]: it counts the rows."""

    def forward(self, matrix: Tensor, *, rtol: float | None = None) -> Tensor:
        """[m], in the matrix's dtype."""
        if matrix.dim() == 0:
            raise ValueError(f"{type(self).__name__}: matrix has shape [], expected [m, ...]")
        nothing = torch.empty(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
        return self.aggregator.weights(nothing).to(matrix.dtype)


class Composition(nn.Module):
    """A weighting of what a function makes of its input."""

    def __init__(self, weighting: Weighting, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weighting, self.fn = weighting, function

    def forward(self, stat: Tensor) -> Tensor:
        weights: Tensor = self.weighting(self.fn(stat))
        return weights


class OfMatrix(nn.Module):
    """A Gramian weighting for a Jacobian [m, n], of which it makes the Gramian."""

    def __init__(self, weighting: Weighting) -> None:
        super().__init__()
        self.weighting = weighting

    def forward(self, matrix: Tensor) -> Tensor:
        """[m], in the matrix's dtype; hooks on the weighting see a Gramian of that dtype."""
        jacobian = RowsJacobian(TaskGradients.from_matrix(matrix))
        precision = self.weighting.aggregator.reads.precision
        gram = jacobian.gram(precision)
        if is_hooked(self.weighting):
            gram = gram.to(matrix.dtype)
        weights: Tensor = self.weighting(gram, rtol=jacobian.num_tasks * jacobian.product_rtol(precision))
        return weights.to(matrix.dtype)


class Weighted(GramAggregator):
    """An aggregator whose weights TorchJD's functions and hooks can see: `weighting`, of a Jacobian [m, n].

    Hooks on it run when the aggregator is called on a matrix, as TorchJD does, not in `mtlfast.backward`.
    """

    weighting_class: ClassVar[type[Weighting]]

    def __setstate__(self, state: dict[str, Any]) -> None:
        join_torchjd()
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    @property
    def weighting(self) -> nn.Module:
        """What makes the weights of a Jacobian [m, n]."""
        return self._part("weighting", lambda: self.weighting_class.looking_at(self))

    def _part(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        """One that looks at this aggregator; a shallow copy has the parts of the one that was copied, and makes new."""
        whose, kept = self.__dict__.get(f"_made_{name}", (None, None))
        part: nn.Module = kept if whose is self else make()
        self.__dict__[f"_made_{name}"] = (self, part)
        return part

    def _watched(self) -> bool:
        return is_hooked(self.weighting)

    def forward(self, grads: TaskGradients | Tensor, **about: Any) -> list[Tensor | None] | Tensor:
        """Aggregates; see `Aggregator`."""
        if isinstance(grads, Tensor) and grads.dim() == 2 and not about and self._watched():
            return self._combine(grads, self.weighting(grads))
        return super().forward(grads, **about)

    @staticmethod
    def _combine(matrix: Tensor, weights: Tensor) -> Tensor:
        (vector,) = ops.combine(TaskGradients.from_matrix(matrix), weights.detach().double())
        assert vector is not None
        return vector

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_parts(self, name)
        super().__setattr__(name, value)


class GramianWeighted(Weighted):
    """One whose weights are those of a Gramian: `gramian_weighting`."""

    @property
    def gramian_weighting(self) -> nn.Module:
        """What makes the weights of a Gramian [m, m]."""
        return self._part("gramian_weighting", lambda: self.weighting_class.looking_at(self))

    @property
    def weighting(self) -> nn.Module:
        """What makes the weights of a Jacobian [m, n]."""
        inner = self.gramian_weighting
        assert isinstance(inner, Weighting)
        return self._part("weighting", lambda: OfMatrix(inner))

    def _watched(self) -> bool:
        return is_hooked(self.weighting) or is_hooked(self.gramian_weighting)


class Projector:
    """What TorchJD's QuadprogProjector says of itself; nothing is cut here, so that `norm_eps` is 0."""

    reg_eps = Real(0)
    norm_eps = property(lambda self: 0.0)

    def __init__(self, reg_eps: float = 1e-4) -> None:
        self.reg_eps = reg_eps

    def __repr__(self) -> str:
        return f"QuadprogProjector(norm_eps={self.norm_eps}, reg_eps={self.reg_eps})"


class Projecting(GramianWeighted):
    """One with TorchJD's `projector`, of which `reg_eps` is read at each step."""

    @property
    def projector(self) -> Any:
        """The one that was given, or one with TorchJD's default."""
        return self.__dict__["_projector"]

    @projector.setter
    def projector(self, value: Any) -> None:
        if value is not None and not hasattr(value, "reg_eps"):
            raise ValueError(f"projector is a {type(value).__name__}, expected one with reg_eps (a QuadprogProjector)")
        self.__dict__["_projector"] = Projector() if value is None else value

    @property
    def reg_eps(self) -> float:
        """The projector's."""
        return float(self.projector.reg_eps)

    @reg_eps.setter
    def reg_eps(self, value: float) -> None:
        self.projector.reg_eps = value
