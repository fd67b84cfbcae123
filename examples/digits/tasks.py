"""The four tasks: what each one minimises in training and what it is judged by in testing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from data import SIDE, Canvases
from torch import Tensor
from torch.nn import functional as F

# Both regressions are measured in units of their target's variance, so that no loss dwarfs the others: always
# guessing the mean scores 1, as guessing a digit scores log(10) = 2.3.
PIXEL_VARIANCE = 0.0733  # of the digits' images around the mean image
SUM_MEAN, SUM_VARIANCE = 9.0, 16.5  # of two independent, uniform digits


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: what it is called.
        outputs: how many numbers its head predicts.
        loss: (output [B, outputs], canvases) -> scalar, the mean over the batch.
        metric: (output [B, outputs], canvases) -> scalar, what the table shows.
        metric_name: what that is.
        higher_is_better: of the metric.
    """

    name: str
    outputs: int
    loss: Callable[[Tensor, Canvases], Tensor]
    metric: Callable[[Tensor, Canvases], Tensor]
    metric_name: str
    higher_is_better: bool = False


def predicted_images(output: Tensor) -> Tensor:
    """The reconstruct head's output [B, 2 * 8 * 8] as the left and the right image [B, 2, 8, 8]."""
    return output.unflatten(1, (2, SIDE, SIDE))


def predicted_sum(output: Tensor) -> Tensor:
    """The sum head's standardised output [B, 1] in digits [B]."""
    return SUM_MEAN + SUM_VARIANCE**0.5 * output.squeeze(1)


def _accuracy(output: Tensor, target: Tensor) -> Tensor:
    return 100 * (output.argmax(1) == target).float().mean()


def _pixel_error(output: Tensor, canvases: Canvases) -> Tensor:
    return F.mse_loss(predicted_images(output), canvases.clean)


def _sum_error(output: Tensor, canvases: Canvases) -> Tensor:
    return predicted_sum(output) - (canvases.left + canvases.right)


TASKS = (
    Task(
        "left",
        outputs=10,
        loss=lambda output, canvases: F.cross_entropy(output, canvases.left),
        metric=lambda output, canvases: _accuracy(output, canvases.left),
        metric_name="% correct",
        higher_is_better=True,
    ),
    Task(
        "right",
        outputs=10,
        loss=lambda output, canvases: F.cross_entropy(output, canvases.right),
        metric=lambda output, canvases: _accuracy(output, canvases.right),
        metric_name="% correct",
        higher_is_better=True,
    ),
    Task(
        "reconstruct",
        outputs=2 * SIDE * SIDE,
        loss=lambda output, canvases: _pixel_error(output, canvases) / PIXEL_VARIANCE,
        metric=lambda output, canvases: 100 * _pixel_error(output, canvases).sqrt(),
        metric_name="RMS error of a pixel, % of full brightness",
    ),
    Task(
        "sum",
        outputs=1,
        loss=lambda output, canvases: _sum_error(output, canvases).square().mean() / SUM_VARIANCE,
        metric=lambda output, canvases: _sum_error(output, canvases).abs().mean(),
        metric_name="mean absolute error",
    ),
)
