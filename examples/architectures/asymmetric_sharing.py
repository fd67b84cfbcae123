"""Asymmetric sharing: a task's features feed later tasks, and theirs do not feed it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from layers import features
from layers import towers as make_towers
from sharing import MultiTaskNetwork
from torch import Tensor, nn


class AsymmetricSharing(MultiTaskNetwork):
    """A bottom for each task, whose features go to the towers of this task and of all that come after it.

    With two tasks it is the asymmetric sharing of the PLE paper (Tang et al., RecSys 2020): the second task's tower
    sees both bottoms, and the first task's tower sees its own alone. Each bottom is shared by other tasks.

    Args:
        inputs: width of the input.
        outputs: how many numbers each of the K tasks predicts; what later tasks can use comes first.
        width: of each bottom's features.
    """

    def __init__(self, inputs: int, outputs: Sequence[int], width: int) -> None:
        super().__init__()
        self.bottoms = nn.ModuleList(features(inputs, width, width) for _ in outputs)
        self.towers = nn.ModuleList(make_towers((k + 1) * width, [n])[0] for k, n in enumerate(outputs))

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """K outputs, [B, outputs of the task] each, from [B, inputs]."""
        of_tasks = [bottom(inputs) for bottom in self.bottoms]
        return [tower(torch.cat(of_tasks[: k + 1], 1)) for k, tower in enumerate(self.towers)]

    def sharing(self) -> dict[str, tuple[int, ...]]:
        """Bottom k is shared by the tasks from k on; the last belongs to the last task alone."""
        tasks = tuple(range(len(self.towers)))
        return {f"bottoms.{k}": tasks[k:] for k in tasks} | {f"towers.{k}": (k,) for k in tasks}
