"""The plain gradients of parameters that are not shared, such as those of heads, averaged over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Tensor, nn

from mtlfast import _grad
from mtlfast.distributed._all_reduced import AllReduced
from mtlfast.distributed._ranks import Ranks
from mtlfast.distributed._reached import kind_of, reached_on_a_rank
from mtlfast.jacobian._rows import StoredRows


class AveragedGradients(_grad.PlainGradients):
    """Takes the place of a rank's `PlainGradients` in a Jacobian of all ranks.

    Args:
        local: the Jacobian of this rank's losses.
        task_of: the task of each row of this rank.
        ranks: the ranks.
        parameters: some whose gradients are averaged, the same on all ranks; None: none are known. All parameters
            that the losses reach beside these are averaged as well, such as heads outside of a
            DistributedDataParallel module. Other leaves, such as an input that requires grad, keep what this rank
            computed.
    """

    def __init__(
        self, local: StoredRows, task_of: Sequence[int], ranks: Ranks, parameters: Sequence[Tensor] | None
    ) -> None:
        super().__init__([])
        self._local, self._task_of, self._ranks, self._parameters = local, task_of, ranks, parameters
        self._reached: list[Tensor] = []

    def leave_out(self, tasks: Sequence[int]) -> None:
        """Drops the gradients of these tasks."""
        self._local.leave_out_plain([row for row, task in enumerate(self._task_of) if task in tasks])

    def reached(self) -> list[Tensor]:
        """After `prepared`: the leaves that have a gradient."""
        return self._reached

    def prepared(self, loss_weights: Tensor | None = None) -> _grad.Pending:
        """The writes that add the averages to `.grad`, with each task's gradient multiplied by its loss weight."""
        leaves, sums = self._local.plain_sums(None if loss_weights is None else loss_weights[list(self._task_of)])
        of_leaf = {id(leaf): gradient for leaf, gradient in zip(leaves, sums, strict=True)}
        parameters = self._known(leaves)
        own = [of_leaf.pop(id(parameter), None) for parameter in parameters]
        beside = [leaf for leaf in leaves if of_leaf.get(id(leaf)) is not None]
        means = averaged(self._ranks, "the heads", parameters, own)
        self._reached = [p for p, mean in zip(parameters, means, strict=True) if mean is not None] + beside
        pending = _grad.prepared(parameters, means, [True] * len(parameters))
        own = [_placed_as(leaf, of_leaf[id(leaf)]) for leaf in beside]
        return pending + _grad.prepared(beside, own, [False] * len(beside))

    def _known(self, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
        """The parameters whose gradients are averaged. Beside the listed ones all ranks must have found the same."""
        listed = self._parameters or ()
        known = {id(parameter) for parameter in listed}
        found = [
            leaf
            for leaf in leaves
            if isinstance(leaf, nn.Parameter) and not hasattr(leaf, "placements") and id(leaf) not in known
        ]
        text = repr([(*parameter.shape, parameter.dtype) for parameter in found])
        where = self._ranks.host_device(self._local.device)
        own = torch.tensor([crc32(text.encode())], device=where)
        if len(set(self._ranks.gather("the comparison of the heads", own).flatten().tolist())) > 1:
            raise ValueError(
                "backward: the ranks' losses reach different parameters beside the shared ones, as where a task is "
                "absent on one of them; expected process_group= to be the DistributedDataParallel module, which knows "
                "all"
            )
        return [*listed, *found]


def _placed_as(leaf: Tensor, own: Tensor | None) -> Tensor | None:
    """This rank's part of a gradient as a DTensor if the leaf is one, whose gradients are reduced already."""
    if own is None or not hasattr(leaf, "placements"):
        return own
    from mtlfast.distributed._placed import as_placed  # takes a second to import

    return as_placed(own, leaf)


def averaged(
    ranks: Ranks, what: str, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The means over the ranks of some parameters' gradients, in new memory.

    Args:
        ranks: the ranks.
        what: what errors call the parameters.
        parameters: the same on all ranks.
        gradients: one for each of them. None counts as zeros; where all ranks have None, so is the mean.
    """
    if not parameters:
        return []
    (reached,) = reached_on_a_rank(
        ranks,
        f"the comparison of the gradients of {what}",
        [[kind_of(gradient) for gradient in gradients]],
        parameters[0].device,
        lambda place: f"a parameter of shape {list(parameters[place].shape)}",
    )
    places = [place for place, by_one in enumerate(reached) if by_one]
    means: list[Tensor | None] = [None] * len(parameters)
    if places:
        reduction = AllReduced(ranks, [parameters[place] for place in places])
        reduction.start(what, [gradients[place] for place in places])
        for place, mean in zip(places, reduction.rows()[0], strict=True):
            means[place] = mean
    return means
