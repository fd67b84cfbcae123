"""Hard parameter sharing: all tasks share all features."""

from __future__ import annotations

from collections.abc import Sequence

from layers import features, towers
from sharing import MultiTaskNetwork
from torch import Tensor


class HardSharing(MultiTaskNetwork):
    """One bottom for all tasks, and a tower for each (Caruana, ICML 1993). With one task it is a single-task network.

    Args:
        inputs: width of the input.
        outputs: how many numbers each of the K tasks predicts.
        width: of the features.
    """

    def __init__(self, inputs: int, outputs: Sequence[int], width: int) -> None:
        super().__init__()
        self.bottom = features(inputs, width, width)
        self.towers = towers(width, outputs)

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """K outputs, [B, outputs of the task] each, from [B, inputs]."""
        shared = self.bottom(inputs)
        return [tower(shared) for tower in self.towers]

    def sharing(self) -> dict[str, tuple[int, ...]]:
        """All tasks share the bottom."""
        tasks = tuple(range(len(self.towers)))
        return {"bottom": tasks, **{f"towers.{k}": (k,) for k in tasks}}
