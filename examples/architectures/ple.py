"""PLE: several levels of shared experts and each task's own."""

from __future__ import annotations

from collections.abc import Sequence

from extraction import Extraction
from layers import towers
from sharing import MultiTaskNetwork
from torch import Tensor, nn


class PLE(MultiTaskNetwork):
    """Progressive layered extraction (Tang et al., RecSys 2020).

    Args:
        inputs: width of the input.
        outputs: how many numbers each of the K tasks predicts.
        width: of each expert's features.
        experts: how many are shared, and how many each task has, in each level.
        levels: how many, with one layer an expert.
    """

    def __init__(self, inputs: int, outputs: Sequence[int], width: int, experts: int = 1, levels: int = 2) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            Extraction(len(outputs), [width if level else inputs, width], experts, last=level == levels - 1)
            for level in range(levels)
        )
        self.towers = towers(width, outputs)

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """K outputs, [B, outputs of the task] each, from [B, inputs]."""
        mixed, common = [inputs] * len(self.towers), inputs
        for level in self.levels:
            mixed, common = level(mixed, common)
        return [tower(x) for tower, x in zip(self.towers, mixed, strict=True)]

    def sharing(self) -> dict[str, tuple[int, ...]]:
        """What all tasks share is more than the common experts.

        Below the last level the common gate hands the features of a task's own experts to all tasks. A task's gate
        feeds its own experts in the level above, so that all tasks reach it too, unless that level is the last.
        """
        tasks = tuple(range(len(self.towers)))
        sharing = {f"towers.{k}": (k,) for k in tasks}
        for i in range(len(self.levels)):
            above = len(self.levels) - 1 - i
            sharing[f"levels.{i}.common"] = tasks
            if above:
                sharing[f"levels.{i}.common_gate"] = tasks
            for k in tasks:
                sharing[f"levels.{i}.own.{k}"] = tasks if above else (k,)
                sharing[f"levels.{i}.gates.{k}"] = tasks if above > 1 else (k,)
        return sharing
