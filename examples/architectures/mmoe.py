"""MMoE: shared experts, which each task mixes in its own way."""

from __future__ import annotations

from collections.abc import Sequence

from layers import Gate, features, towers
from sharing import MultiTaskNetwork
from torch import Tensor, nn


class MMoE(MultiTaskNetwork):
    """Multi-gate mixture of experts (Ma et al., KDD 2018).

    Args:
        inputs: width of the input.
        outputs: how many numbers each of the K tasks predicts.
        width: of each expert's features.
        experts: how many there are.
    """

    def __init__(self, inputs: int, outputs: Sequence[int], width: int, experts: int = 4) -> None:
        super().__init__()
        self.experts = nn.ModuleList(features(inputs, width, width) for _ in range(experts))
        self.gates = nn.ModuleList(Gate(inputs, experts) for _ in outputs)
        self.towers = towers(width, outputs)

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """K outputs, [B, outputs of the task] each, from [B, inputs]."""
        experts = [expert(inputs) for expert in self.experts]
        return [tower(gate(inputs, experts)) for gate, tower in zip(self.gates, self.towers, strict=True)]

    def sharing(self) -> dict[str, tuple[int, ...]]:
        """All tasks share all experts; gates and towers belong to one task each."""
        tasks = tuple(range(len(self.towers)))
        own = {f"{part}.{k}": (k,) for part in ("gates", "towers") for k in tasks}
        return {"experts": tasks, **own}
