"""Canvases: two of scikit-learn's 8 x 8 digits overlaid at opposite corners of 12 x 12 pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

TRAIN_DIGITS = 1300  # of 1797; the rest are for testing
SIDE, CANVAS = 8, 12


class Digits(NamedTuple):
    """Digit images [N, 8, 8] in 0..1 and their classes [N]."""

    images: Tensor
    classes: Tensor


class Canvases(NamedTuple):
    """B canvases [B, 1, 12, 12] and their targets: left and right classes [B], clean images [B, 2, 8, 8]."""

    canvas: Tensor
    left: Tensor
    right: Tensor
    clean: Tensor


def split_digits(seed: int, device: torch.device) -> tuple[Digits, Digits]:
    """Splits the digit images before any canvas is made: no image is in training and in test canvases.

    Args:
        seed: of the split.
        device: where the digits shall live.

    Returns:
        The training digits and the test digits.
    """
    images, classes = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32, device=device).reshape(-1, SIDE, SIDE) / 16
    classes = torch.tensor(classes, dtype=torch.int64, device=device)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed)).to(device)
    train, test = order[:TRAIN_DIGITS], order[TRAIN_DIGITS:]
    return Digits(images[train], classes[train]), Digits(images[test], classes[test])


def overlay(digits: Digits, left: Tensor, right: Tensor) -> Canvases:
    """Lays one digit top left and one bottom right; in the 4 x 4 overlap the brighter pixel wins.

    Args:
        digits: the images to choose from.
        left: [B] indices of the left digits.
        right: [B] indices of the right digits.

    Returns:
        B canvases.
    """
    clean = torch.stack([digits.images[left], digits.images[right]], dim=1)
    layers = clean.new_zeros(len(left), 2, CANVAS, CANVAS)
    layers[:, 0, :SIDE, :SIDE] = clean[:, 0]
    layers[:, 1, -SIDE:, -SIDE:] = clean[:, 1]
    return Canvases(layers.amax(1, keepdim=True), digits.classes[left], digits.classes[right], clean)


def epoch(digits: Digits, batch_size: int, generator: torch.Generator) -> Iterator[Canvases]:
    """Fresh random pairs, in which every digit is the left one once and the right one once.

    Args:
        digits: N of them.
        batch_size: canvases a batch (the last may have fewer).
        generator: draws the pairs, on the CPU, so that they are the same on every device.

    Yields:
        ceil(N / batch_size) batches.
    """
    lefts, rights = (torch.randperm(len(digits.classes), generator=generator) for _ in range(2))
    for left, right in zip(lefts.split(batch_size), rights.split(batch_size), strict=True):
        yield overlay(digits, left.to(digits.images.device), right.to(digits.images.device))
