"""The trunks of bench_jacobian.py, from those with few rows and many parameters to those with the opposite."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from readme_table import Trunk
from torch import Tensor, nn


class TrunkSize(NamedTuple):
    """A trunk and the shape of its batch.

    Attributes:
        make: makes the trunk.
        width: the number of features of an example.
        shape: the shape of a batch.
    """

    make: Callable[[], nn.Module]
    width: int
    shape: tuple[int, ...]

    def trunk(self) -> nn.Module:
        """A new trunk."""
        return self.make()


class Block(nn.Module):
    """Two convolutions with batch normalization and a shortcut, as in arXiv 1512.03385."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        return (self.branch(x) + self.shortcut(x)).relu()


def resnet(widths: tuple[int, ...]) -> nn.Module:
    """One block for each width; all but the first halve the image. The features are the means over the image."""
    blocks = [Block(*pair, stride=2) for pair in pairwise(widths)]
    stem = [nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    return nn.Sequential(*stem, Block(widths[0], widths[0], stride=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def mlp(width: int, layers: int) -> nn.Module:
    """Linear layers, each followed by a ReLU."""
    return nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.ReLU())))


def transformer_size(width: int, layers: int, batch: int, length: int) -> TrunkSize:
    """The main README's transformer, and a batch for it."""
    return TrunkSize(partial(Trunk, width, layers), width, (batch, length, width))


def mlp_size(width: int, layers: int, batch: int) -> TrunkSize:
    """Linear layers with ReLU, and a batch for them."""
    return TrunkSize(partial(mlp, width, layers), width, (batch, width))


TRUNKS = {
    "transformer-1x32": transformer_size(512, 4, batch=1, length=32),
    "transformer-2x64": transformer_size(512, 4, batch=2, length=64),
    "transformer-8x64": transformer_size(512, 4, batch=8, length=64),
    "mlp-32": mlp_size(1024, 6, batch=32),
    "mlp-256": mlp_size(1024, 6, batch=256),
    "mlp-2048": mlp_size(1024, 6, batch=2048),
    "resnet-32": TrunkSize(partial(resnet, (32, 64, 128, 256)), 256, (32, 3, 32, 32)),
    "24-blocks-2x16": transformer_size(416, 24, batch=2, length=16),  # 50M parameters, 8 heads of 52
}
QUICK = {
    "tiny-transformer": transformer_size(48, 1, batch=2, length=4),
    "tiny-resnet": TrunkSize(partial(resnet, (4, 8)), 8, (2, 3, 8, 8)),
}
