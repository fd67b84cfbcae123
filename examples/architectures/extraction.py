"""One level of extraction, of which CGC has one and PLE several."""

from __future__ import annotations

from collections.abc import Sequence

from layers import Gate, features
from torch import Tensor, nn


class Extraction(nn.Module):
    """Shared experts and experts of each task, with a gate for each task and, below another level, a common gate.

    A task's gate mixes the task's own experts and the shared ones. The common gate mixes all experts.

    Args:
        tasks: how many, K.
        widths: of the input and of each layer of an expert.
        experts: how many experts are shared, and how many each task has.
        last: there is no level above, so no common gate.
    """

    def __init__(self, tasks: int, widths: Sequence[int], experts: int, last: bool) -> None:
        super().__init__()
        self.common = nn.ModuleList(features(*widths) for _ in range(experts))
        self.own = nn.ModuleList(nn.ModuleList(features(*widths) for _ in range(experts)) for _ in range(tasks))
        self.gates = nn.ModuleList(Gate(widths[0], 2 * experts) for _ in range(tasks))
        self.common_gate = None if last else Gate(widths[0], (tasks + 1) * experts)

    def forward(self, of_tasks: Sequence[Tensor], common: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Extracts features.

        Args:
            of_tasks: K inputs of the tasks' own experts and gates, [B, width of the input] each.
            common: input of the shared experts and of the common gate, of the same shape.

        Returns:
            The same of the level above: K features, [B, width] each, and the common ones, or None in the last level.
        """
        shared = [expert(common) for expert in self.common]
        own = [[expert(x) for expert in experts] for x, experts in zip(of_tasks, self.own, strict=True)]
        mixed = [gate(x, [*mine, *shared]) for x, mine, gate in zip(of_tasks, own, self.gates, strict=True)]
        if self.common_gate is None:
            return mixed, None
        return mixed, self.common_gate(common, [*(expert for mine in own for expert in mine), *shared])
