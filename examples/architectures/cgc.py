"""CGC: shared experts and each task's own, which the task's gate mixes."""

from __future__ import annotations

from collections.abc import Sequence

from extraction import Extraction
from layers import towers
from sharing import MultiTaskNetwork
from torch import Tensor


class CGC(MultiTaskNetwork):
    """Customized gate control (Tang et al., RecSys 2020).

    Args:
        inputs: width of the input.
        outputs: how many numbers each of the K tasks predicts.
        width: of each expert's features.
        experts: how many are shared, and how many each task has.
    """

    def __init__(self, inputs: int, outputs: Sequence[int], width: int, experts: int = 1) -> None:
        super().__init__()
        self.extraction = Extraction(len(outputs), [inputs, width, width], experts, last=True)
        self.towers = towers(width, outputs)

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """K outputs, [B, outputs of the task] each, from [B, inputs]."""
        mixed, _ = self.extraction([inputs] * len(self.towers), inputs)
        return [tower(x) for tower, x in zip(self.towers, mixed, strict=True)]

    def sharing(self) -> dict[str, tuple[int, ...]]:
        """All tasks share the common experts; everything else belongs to one task each."""
        tasks = tuple(range(len(self.towers)))
        own = {f"{part}.{k}": (k,) for part in ("extraction.own", "extraction.gates", "towers") for k in tasks}
        return {"extraction.common": tasks, **own}
