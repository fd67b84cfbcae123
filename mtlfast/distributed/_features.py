"""Surgery at features over several ranks, each of which has features of its own examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from mtlfast import _grad
from mtlfast._losses import Present
from mtlfast._shards import Shards
from mtlfast.aggregation import do_nothing
from mtlfast.distributed._jacobian import RankedJacobian
from mtlfast.distributed._plain_gradients import averaged
from mtlfast.distributed._ranks import Ranks
from mtlfast.distributed._reduction import Kind
from mtlfast.jacobian import FeaturesJacobian


class GatheredFeatures:
    """The features of all ranks' examples, as those of one batch. Each rank holds the gradients at its own ones.

    A task's gradient at a rank's features is that of the mean of the ranks' losses, a fraction 1 / N of what the rank
    computed.

    Args:
        ranks: N ranks.
        features: those of this rank.
    """

    def __init__(self, ranks: Ranks, features: Sequence[Tensor]) -> None:
        self._ranks, self._features = ranks, features
        self._rows: list[list[Tensor | None]] = []

    def start(self, label: str, gradients: Sequence[Tensor | None]) -> None:
        zeros = (torch.zeros_like(feature, requires_grad=False) for feature in self._features)
        self._rows.append([z if g is None else g / self._ranks.size for z, g in zip(zeros, gradients, strict=True)])

    def rows(self) -> list[list[Tensor | None]]:
        rows, self._rows = self._rows, []
        return rows

    def stand_ins(self) -> list[Tensor]:
        return list(self._features)

    def kinds(self) -> list[Kind]:
        return [Kind(range(len(self._features)), self._ranks.sum)]

    def shards(self, reached: Sequence[bool]) -> Shards:
        return Examples(self._ranks, self._features, reached)

    def whole(self, direction: Sequence[Tensor | None]) -> list[Tensor | None]:
        return list(direction)


class Examples(Shards):
    """This rank's examples among those of all ranks, as if the features of one batch came rank after rank."""

    def __init__(self, ranks: Ranks, features: Sequence[Tensor], reached: Sequence[bool]) -> None:
        self._ranks, self._features = ranks, features
        own = [f.numel() if there else 0 for f, there in zip(features, reached, strict=True)]
        where = ranks.host_device(features[0].device)
        counts = ranks.gather("the comparison of the features", torch.tensor(own, device=where))
        totals = counts.sum(dim=0).tolist()
        before_rank = counts[: ranks.rank].sum(dim=0).tolist()
        *starts, last = accumulate(totals, initial=0)
        self._numel = int(last)
        self._first = [start + before for start, before in zip(starts, before_rank, strict=True)]

    @property
    def numel(self) -> int:
        return self._numel

    def total(self, values: Tensor) -> Tensor:
        return self._ranks.sum("the sum of the products", values.contiguous())

    def indices(self, t: int) -> Tensor:
        feature = self._features[t]
        first = self._first[t]
        return torch.arange(first, first + feature.numel(), device=feature.device).as_strided(
            feature.shape, torch.empty_like(feature, device="meta").stride()
        )

    def own(self, t: int, whole: Tensor) -> Tensor | None:
        return None

    def saved(self, t: int, own: Tensor) -> Tensor:
        return own


class FeaturesOfRanks(RankedJacobian):
    """A Jacobian at features over several ranks. The trunk's gradients are summed over the ranks below them.

    Args:
        local: the Jacobian at this rank's features.
        ranks: the ranks.
        present: the tasks that are present on at least one rank.
        others: the parameters beside the features whose plain gradients are averaged; None: those that are found.
        loss_dtype: the dtype of the mean losses.
        sharded: the sharded parameters by the ids of what the graph shows of them. Where the trunk is under
            `fully_shard`, the backward pass below the features reduces its gradients.
    """

    columns_are = "the features"

    def __init__(
        self,
        local: FeaturesJacobian,
        ranks: Ranks,
        present: Present,
        others: Sequence[Tensor] | None,
        loss_dtype: torch.dtype | None,
        sharded: Mapping[int, Tensor],
    ) -> None:
        if any(id(leaf) in sharded for leaf in local.below):
            for leaf in local.below:
                if isinstance(leaf, nn.Parameter) and id(leaf) not in sharded:
                    raise ValueError(
                        f"backward: a parameter of shape {list(leaf.shape)} below at= is whole on every rank beside "
                        "sharded ones, expected all to be DTensors"
                    )
        super().__init__(local, ranks, present, GatheredFeatures(ranks, local.parameters), others, None, loss_dtype)
        self._at_features, self._sharded = local, sharded

    def _summed(self, precision: str | None) -> str:
        """Exact, because the ranks' numbers of examples may differ."""
        return precision or "exact"

    @property
    def written(self) -> list[Tensor]:
        below = [] if self._sharded else self._at_features.below  # whose hooks run in an ordinary backward pass
        return [*below, *self._others.reached()]

    def put(
        self,
        direction: Sequence[Tensor | None],
        loss_weights: Tensor | None = None,
        finish: Callable[[], None] = do_nothing,
    ) -> None:
        with torch.no_grad():
            pending = self._plain(loss_weights)
            finish()
            times = [
                None if x is None else x * self._ranks.size for x in direction
            ]  # their sum is wanted, not the mean
        below = self._at_features.below
        if any(id(leaf) in self._sharded for leaf in below):
            self._at_features.pass_below(times, [self._sharded.get(id(leaf), leaf) for leaf in below])
            _grad.commit(pending)
            return
        gradients = self._at_features.gradients_below(times)
        with torch.no_grad():
            shared = [t for t, leaf in enumerate(below) if isinstance(leaf, nn.Parameter)]
            sums = list(gradients)  # another leaf, such as an input, keeps what this rank computed
            of_trunk = averaged(self._ranks, "the trunk", [below[t] for t in shared], [gradients[t] for t in shared])
            for t, total in zip(shared, of_trunk, strict=True):
                sums[t] = total
            pending += _grad.prepared(below, sums, [t in shared for t in range(len(below))])
            _grad.commit(pending)
