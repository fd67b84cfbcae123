"""The base classes of loss weightings whose weights follow the norms of the task gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mtlfast._settings import Real
from mtlfast.weighting._base import Weighted
from mtlfast.weighting._losses import Feedback, present_numbers
from mtlfast.weighting._step import write

# Where norms are taken: a module, a parameter or several parameters.
Layers = nn.Module | Tensor | Iterable[Tensor]


class Fed(NamedTuple):
    """What `update` was given, for the tasks that it has norms of.

    Attributes:
        losses: [K] float64, or None.
        norms: [K] float64.
        tasks: the tasks' indices.
    """

    losses: Tensor | None
    norms: Tensor
    tasks: tuple[int, ...]


class ReadsNorms(Weighted):
    """A method whose weights follow the norms of the task gradients, before any weight.

    `mtlfast.backward` gives it the norms of each step. A direct call of the weighting has none: it takes the weights as
    they stand, and `update(losses=, norms=)` moves them.
    """

    reads_norms = True

    def _read_at(self, layers: Layers | None) -> None:
        """Has the norms taken at these shared parameters; None: at all of them."""
        self.layers = None if layers is None else _parameters(type(self).__name__, layers)

    def _fed(self, losses: Feedback | None, norms: Tensor | None) -> Fed | None:
        """The feedback of `update` on the state's device; None without norms."""
        if norms is None:
            return None
        name = type(self).__name__
        sizes, places, number = present_numbers(name, "norms", norms)
        device = next(self.buffers()).device
        if losses is None:
            return Fed(None, sizes.to(device), self._fitting_places("norms", places, number))
        values, tasks = self._feedback("losses", losses)
        if len(sizes) != len(tasks):
            raise ValueError(f"{name}: got {len(sizes)} norms and {len(tasks)} losses, expected equal numbers")
        return Fed(values.to(device), sizes.to(device), tasks)


class FollowsNorms(ReadsNorms):
    """A method that keeps, for each task, a running mean of a number that follows from the norms.

    A step's weights come from the means after the step's norms.
    """

    decay = Real(0, 1, most_itself=False)
    means: Tensor

    def __init__(self, num_tasks: int, decay: float, layers: Layers | None, first: float = torch.nan) -> None:
        super().__init__(num_tasks)
        self._read_at(layers)
        self.decay = decay
        self._first = first  # NaN: the first number starts the mean
        self._keep_state("means", fill=first)

    @property
    def current_weights(self) -> Tensor:
        """[n] float64, the weights as they stand."""
        return self._weights_of(self.means, tuple(range(self._known_tasks()))).clone()

    @abstractmethod
    def _numbers_of(self, norms: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The present tasks' numbers [K] that enter their means. One that is not finite leaves its mean as it was."""

    @abstractmethod
    def _weights_of(self, means: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The present tasks' weights [K] by their means [K]. A mean is NaN before the first number."""

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        means = self._of(self.means, tasks)
        if self._norms is not None:
            means = self._advanced(self._norms, tasks, values)
            self._move(self.means, tasks, means)
        return self._weights_of(means, tasks).clamp(max=self._largest_weight)

    def _advanced(self, norms: Tensor, tasks: tuple[int, ...], values: Tensor | None) -> Tensor:
        """The present tasks' means [K] after these norms. A task whose norm or loss is not finite keeps its mean."""
        finite = norms.isfinite() if values is None else norms.isfinite() & values.isfinite()
        old, new = self._of(self.means, tasks), self._numbers_of(torch.where(finite, norms, torch.nan), tasks)
        mean = torch.where(old.isnan(), new, self.decay * old + (1 - self.decay) * new)
        return torch.where(mean.isfinite(), mean, old)

    @torch.no_grad()
    def update(
        self, *, losses: Feedback | None = None, norms: Tensor | None = None, metrics: Feedback | None = None
    ) -> None:
        """Takes norms from elsewhere than `mtlfast.backward`. Without norms it changes nothing."""
        fed = self._fed(losses, norms)
        if fed is not None:
            write(self.means, fed.tasks, self._advanced(fed.norms, fed.tasks, fed.losses))

    def reset(self) -> None:
        self.means.fill_(self._first)


def _parameters(who: str, layers: Layers) -> tuple[Tensor, ...]:
    """The parameters of `layers`. They are held in a tuple, so that the weighting does not own them."""
    if isinstance(layers, Tensor):
        return (layers,)
    if not isinstance(layers, Iterable) or isinstance(layers, nn.Module):
        found: tuple[object, ...] = tuple(layers.parameters()) if isinstance(layers, nn.Module) else (layers,)
    else:
        found = tuple(layers)
    parameters = tuple(entry for entry in found if isinstance(entry, Tensor))
    if len(parameters) < len(found):
        wrong = next(entry for entry in found if not isinstance(entry, Tensor))
        raise ValueError(
            f"{who}: layers has a {type(wrong).__name__}, expected a module, a parameter or a list of parameters"
        )
    if not parameters:
        raise ValueError(f"{who}: layers has no parameters, expected at least one")
    return parameters
