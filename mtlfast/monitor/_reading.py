"""Brings rings to the host without making the training wait."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast.monitor._rings import Rings


class Reading:
    """A copy of rings on its way from a GPU to the host. Rings in host memory are not copied.

    Attributes:
        rings: on the host. They hold what they should once `ready()`, or after `wait()`.
    """

    def __init__(self, rings: Rings) -> None:
        device = rings.scales.device
        self._arrived: torch.cuda.Event | None = None
        if device.type != "cuda":
            self.rings = rings.each(Tensor.cpu)
            return
        with torch.cuda.device(device):
            self.rings = rings.each(_to_pinned)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def ready(self) -> bool:
        """Whether the copy has arrived. It does not wait."""
        return self._arrived is None or bool(self._arrived.query())  # type: ignore[no-untyped-call]

    def wait(self) -> Rings:
        """The rings on the host, once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self.rings


def _to_pinned(values: Tensor) -> Tensor:
    # From pinned memory alone a copy does not wait.
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
