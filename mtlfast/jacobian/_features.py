"""Surgery at features: each task's gradient of the features that the heads share, and one backward pass below them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mtlfast import _grad, ops
from mtlfast._arguments import Columns, check_columns
from mtlfast._losses import Present
from mtlfast.aggregation import do_nothing
from mtlfast.jacobian._graph import dependent, reached_by
from mtlfast.jacobian._stored import StoredJacobian
from mtlfast.task_gradients import TaskGradients

Features = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def named_features(features: Features, argument: str) -> Columns:
    """The features with their names, from any form that the argument may have.

    Raises:
        ValueError, TypeError: there are none, or one is not a tensor that depends on parameters.
    """
    if isinstance(features, Tensor):
        named: dict[str, Tensor] = {argument: features}
    elif isinstance(features, Mapping):
        named = {f"{argument} {name}": feature for name, feature in features.items()}
    elif isinstance(features, Sequence):
        named = {f"{argument} {i}": feature for i, feature in enumerate(features)}
    else:
        got = type(features).__name__
        raise TypeError(f"backward: {argument} is a {got}, expected a Tensor, or a list or dict of them")
    if not named:
        raise ValueError(f"backward: {argument} is empty, expected at least one tensor")
    for name, feature in named.items():
        if not isinstance(feature, Tensor) or isinstance(feature, nn.Parameter):
            got = type(feature).__name__
            raise TypeError(f"backward: {name} is a {got}, expected a Tensor that the trunk computed")
        if not feature.requires_grad:
            raise ValueError(f"backward: {name} does not require grad, expected one that depends on parameters")
    seen: dict[tuple[object, int], str] = {}
    for name, feature in named.items():
        edge = (id(feature) if feature.grad_fn is None else feature.grad_fn, feature.output_nr)
        if (other := seen.setdefault(edge, name)) != name:
            raise ValueError(f"backward: {name} is the same tensor as {other}, expected each once")
    return Columns(list(named), list(named.values()))


class FeaturesJacobian(StoredJacobian):
    """A Jacobian of the losses with respect to features, in place of the parameters that computed them.

    The weights follow from the gradients of the features alone. `write` then sends the weighted sum of these gradients
    through the trunk in one ordinary backward pass, in which hooks, optimizers in backward and embedding tables that
    update themselves work as in `.backward()`. Tensor hooks of the features run in that pass, and `retain_grad` keeps
    what arrives there.

    Args:
        present: the K present tasks with their losses.
        features: the tensors between trunk and heads.
        retain_graph: keep the graph. Otherwise it is freed.
        loss_weights_later: as in `StoredJacobian`.

    Raises:
        ValueError, TypeError: the losses do not reach the features, one feature is computed from another, a parameter
            is reached both through the features and beside them, or a feature is of a dtype without kernels.

    A reentrant checkpoint below the features works. The parameters that it hides are not in the graph, so that an error
    in the last pass leaves in their `.grad` what had arrived.

    Memory: the K gradients of the features, and a copy of each `.grad` that a parameter below them already has. Cost: K
    backward passes through the heads, one through the trunk.
    """

    way = "features"
    columns_are = "the features"

    def __init__(
        self, present: Present, features: Columns, retain_graph: bool = False, loss_weights_later: bool = False
    ) -> None:
        check_columns(features)
        beside = reached_by(present.losses, features.parameters)
        if not any(beside.met):
            raise ValueError(
                f"backward: the losses reach none of the {len(beside.met)} features of at=, expected at least one"
            )
        if (pair := dependent(features.parameters)) is not None:
            one, other = (features.names[i] for i in pair)
            raise ValueError(f"backward: {one} is computed from {other}, expected one or the other in at=")
        below = reached_by(features.parameters)
        if retain_graph and (why := below.once(retain_graph)) is not None:
            raise ValueError(f"backward: {why}")
        behind = {id(leaf) for leaf in below.leaves}
        for leaf in beside.leaves:
            if id(leaf) in behind:
                beside.check_told_apart("backward")
                raise ValueError(
                    f"backward: a parameter of shape {list(leaf.shape)} is reached through the features of at= and "
                    "beside them, expected one or the other; leave out at= for such a graph"
                )
        super().__init__(present, features, retain_graph, loss_weights_later, walked=beside)
        self._below = below.leaves

    def obtain_into(
        self, receive: Callable[[int, Sequence[Tensor | None]], None], loss_weights: Tensor | None = None
    ) -> None:
        """Runs K backward passes through the heads, without the features' hooks."""
        with _grad.without_hooks(self.parameters):
            super().obtain_into(receive, loss_weights)

    def keep(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """One task's gradients of the features, dense as the backward pass below them takes them."""
        return tuple(g.to_dense() if g is not None and g.is_sparse else g for g in gradients)

    def rows(self) -> TaskGradients:
        """The task gradients. Their `parameters` are None, because features are new tensors at every step."""
        return TaskGradients.from_rows(super().rows().rows)

    @property
    def written(self) -> list[Tensor]:
        """The leaves beside the features. The trunk's backward pass calls the hooks of its own."""
        return self._others.reached()

    def write(self, weights: Tensor, loss_weights: Tensor | None = None) -> None:
        self.check_weights(weights)
        directions: list[Tensor | None] = [None] * len(self.parameters)
        for columns, grads in self._stored_parts():
            combined = ops.combine(grads, self._weighed(weights).to(grads.device))
            for t, direction in zip(range(len(combined)) if columns is None else columns, combined, strict=True):
                directions[t] = direction
        self.put(directions, loss_weights)

    @property
    def below(self) -> list[Tensor]:
        """The leaves that the features depend on."""
        return self._below

    def gradients_below(self, direction: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradients of the leaves below for a direction at the features, which `.grad` does not get."""
        features, gradients = self._arrived(direction)
        return torch.autograd.grad(features, self._below, gradients, retain_graph=self._retain_graph, allow_unused=True)

    def pass_below(self, direction: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> None:
        """One ordinary backward pass for a direction at the features, which adds to `.grad` of the leaves below."""
        features, gradients = self._arrived(direction)
        _grad.backward_pass(leaves, features, gradients, self._retain_graph)

    def _arrived(self, direction: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
        """The features that a direction has a gradient for, and these."""
        arrived = [(f, g) for f, g in zip(self.parameters, direction, strict=True) if g is not None]
        return [f for f, _ in arrived], [g for _, g in arrived]

    @property
    def no_state(self) -> str | None:
        return "the features of at= are new tensors at every step"

    def put(
        self,
        direction: Sequence[Tensor | None],
        loss_weights: Tensor | None = None,
        finish: Callable[[], None] = do_nothing,
    ) -> None:
        with torch.no_grad():
            pending = self._plain(loss_weights)
            finish()
        self.pass_below(direction, self._below)
        _grad.commit(pending)
