"""The Jacobians of two independent batches, for methods whose weights come from the products of both."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mtlfast._arguments import Columns
from mtlfast._losses import Present
from mtlfast.aggregation import Groups
from mtlfast.jacobian._base import Jacobian
from mtlfast.jacobian._rows import StoredRows


def both(first: Present, second: Present) -> Present:
    """The tasks of both batches as 2 K tasks, those of the first batch before those of the second.

    Raises:
        ValueError: the batches have different tasks or names.
    """
    if second.number != first.number or second.tasks != first.tasks:
        got, expected = (f"tasks {list(batch.tasks)} of {batch.number}" for batch in (second, first))
        raise ValueError(f"backward: second has {got}, expected {expected} as losses")
    if first.names is not None and second.names is not None and second.names != first.names:
        got, expected = (", ".join(names) for names in (second.names, first.names))
        raise ValueError(f"backward: second has the entries {got}, expected {expected} as losses")
    if bool(first.closures) != bool(second.closures):
        kinds = ("functions", "tensors") if second.closures else ("tensors", "functions")
        raise TypeError("backward: the entries of second are {}, expected {} as those of losses".format(*kinds))
    return Present(
        2 * first.number,
        first.tasks + tuple(first.number + task for task in second.tasks),
        None,
        first.labels + second.labels,
        first.losses + second.losses,
        first.closures + second.closures,
    )


class TwoBatchesJacobian(Jacobian):
    """A Jacobian J_1 of one batch and J_2 of another one, in place of one Jacobian.

    The update is w on their mean, (J_1 + J_2) / 2, and all other leaves get the mean of their plain gradients.

    Args:
        joint: the Jacobian [2 K, P] of both, one above the other, whose plain gradients are kept apart by task.
        present: the K present tasks.
    """

    way = "two batches"

    def __init__(self, joint: StoredRows, present: Present) -> None:
        self._joint, self.present = joint, present
        self.cross_gram = partial(joint.products, self.num_tasks)
        self._look()

    def _look(self) -> None:
        """Takes over what the joint Jacobian knows by now."""
        self.parameters = self._joint.parameters
        losses = self._joint.losses
        self.losses = None if losses is None else losses.view(2, -1).mean(dim=0)

    @property
    def groups(self) -> Groups | None:
        return self._joint.groups

    @groups.setter
    def groups(self, groups: Groups | None) -> None:
        self._joint.groups = groups

    @property
    def columns(self) -> Columns:
        return self._joint.columns

    def obtain(self, loss_weights: Tensor | None = None) -> None:
        self._joint.obtain(None if loss_weights is None else loss_weights.repeat(2))
        self._look()

    def weigh(self, loss_weights: Tensor) -> None:
        self._joint.weigh(loss_weights.repeat(2))

    @property
    def no_rows(self) -> str | None:
        return "they are those of two batches"

    @property
    def device(self) -> torch.device:
        return self._joint.device

    def product_rtol(self, precision: str | None = None) -> float:
        return self._joint.product_rtol(precision)

    @property
    def taking_part(self) -> list[int] | None:
        """The tasks that take part in both batches."""
        places = self._joint.taking_part
        return None if places is None else [k for k in range(self.num_tasks) if {k, k + self.num_tasks} <= {*places}]

    @property
    def mask(self) -> Tensor | None:
        mask = self._joint.mask
        return None if mask is None else self._halves(mask).all(dim=-2)

    def gram(self, precision: str | None = None) -> Tensor:
        """That of the mean of the two batches' gradients."""
        return self._halves(self._halves(self._joint.gram(precision)).mean(dim=-2).mT.contiguous()).mean(dim=-2)

    def norms(self) -> Tensor:
        """The mean of the norms in the two batches."""
        return self._halves(self._joint.norms()).mean(dim=-2)

    def norms_at(self, layers: Sequence[Tensor] | None = None, order: int = 2) -> Tensor:
        """The mean of the norms in the two batches."""
        return self._halves(self._joint.norms_at(layers, order)).mean(dim=-2)

    def _halves(self, values: Tensor) -> Tensor:
        """What has an entry [..., 2 K] for each row as [..., 2, K]."""
        return values.view(*values.shape[:-1], 2, self.num_tasks)

    @property
    def written(self) -> list[Tensor]:
        return self._joint.written

    def write(self, weights: Tensor, loss_weights: Tensor | None = None) -> None:
        self.check_weights(weights)
        ones = weights.new_ones(self.num_tasks)
        self._joint.write(
            torch.cat([weights, weights], dim=-1) / 2, ((ones if loss_weights is None else loss_weights) / 2).repeat(2)
        )
