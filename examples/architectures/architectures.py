"""All architectures by name, each as wide as a number of parameters allows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch
from asymmetric_sharing import AsymmetricSharing
from cgc import CGC
from customized_sharing import CustomizedSharing
from hard_sharing import HardSharing
from mmoe import MMoE
from partial_sharing import PartialSharing
from ple import PLE
from sharing import MultiTaskNetwork

ARCHITECTURES: dict[str, type[MultiTaskNetwork]] = {
    "hard sharing": HardSharing,
    "partial sharing": PartialSharing,
    "asymmetric sharing": AsymmetricSharing,
    "customized sharing": CustomizedSharing,
    "MMoE": MMoE,
    "CGC": CGC,
    "PLE": PLE,
}
WIDEST = 4096


def width_of(architecture: type[MultiTaskNetwork], inputs: int, outputs: Sequence[int], parameters: int) -> int:
    """The largest width with which an architecture has no more than so many parameters.

    Args:
        architecture: which.
        inputs: width of the input.
        outputs: how many numbers each of the K tasks predicts.
        parameters: how many parameters the network may have.
    """

    def size(width: int) -> int:
        with torch.device("meta"):  # nothing is allocated
            return sum(parameter.numel() for parameter in architecture(inputs, outputs, width).parameters())

    return bisect_right(range(WIDEST), parameters, lo=1, key=size) - 1
