"""Partial sharing by layer: the first layers are shared, then each task has a branch."""

from __future__ import annotations

from collections.abc import Sequence

from layers import features
from layers import towers as make_towers
from sharing import MultiTaskNetwork
from torch import Tensor, nn


class PartialSharing(MultiTaskNetwork):
    """Some of the layers of features are shared, the others are in a branch for each task.

    Args:
        inputs: width of the input.
        outputs: how many numbers each of the K tasks predicts.
        width: of each layer.
        layers: of features, shared and not.
        shared_layers: how many of these, from the first on, are shared, at least 1. All: hard parameter sharing.
    """

    def __init__(
        self, inputs: int, outputs: Sequence[int], width: int, layers: int = 2, shared_layers: int = 1
    ) -> None:
        super().__init__()
        self.early = features(inputs, *[width] * shared_layers)
        late = [width] * (1 + layers - shared_layers)
        towers = make_towers(width, outputs)
        self.branches = nn.ModuleList(nn.Sequential(features(*late), tower) for tower in towers)

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """K outputs, [B, outputs of the task] each, from [B, inputs]."""
        shared = self.early(inputs)
        return [branch(shared) for branch in self.branches]

    def sharing(self) -> dict[str, tuple[int, ...]]:
        """All tasks share the early layers; each branch belongs to one."""
        tasks = tuple(range(len(self.branches)))
        return {"early": tasks, **{f"branches.{k}": (k,) for k in tasks}}
