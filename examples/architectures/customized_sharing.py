"""Customized sharing: what is shared and what is a task's own are apart, and each tower sees both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from layers import features, towers
from sharing import MultiTaskNetwork
from torch import Tensor, nn


class CustomizedSharing(MultiTaskNetwork):
    """A shared expert, and one of each task's own, side by side at the task's tower.

    This is the customized sharing of the PLE paper (Tang et al., RecSys 2020). CGC is the same with gates.

    Args:
        inputs: width of the input.
        outputs: how many numbers each of the K tasks predicts.
        width: of each expert's features.
    """

    def __init__(self, inputs: int, outputs: Sequence[int], width: int) -> None:
        super().__init__()
        self.common = features(inputs, width, width)
        self.own = nn.ModuleList(features(inputs, width, width) for _ in outputs)
        self.towers = towers(2 * width, outputs)

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """K outputs, [B, outputs of the task] each, from [B, inputs]."""
        common = self.common(inputs)
        pairs = zip(self.own, self.towers, strict=True)
        return [tower(torch.cat([common, own(inputs)], 1)) for own, tower in pairs]

    def sharing(self) -> dict[str, tuple[int, ...]]:
        """All tasks share the common expert; the others belong to one task each."""
        tasks = tuple(range(len(self.towers)))
        own = {f"{part}.{k}": (k,) for part in ("own", "towers") for k in tasks}
        return {"common": tasks, **own}
