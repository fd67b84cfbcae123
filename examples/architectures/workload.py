"""What a network can be trained on. The kind of task, and later the canvases, are those of examples/digits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "digits"))  # last, so that this example's modules come first
from tasks import Task

Targets = TypeVar("Targets")


class Batch(NamedTuple, Generic[Targets]):
    """B samples.

    Attributes:
        inputs: [B, inputs].
        targets: what the tasks' losses and metrics take beside the outputs.
    """

    inputs: Tensor
    targets: Targets


class Workload(NamedTuple):
    """K tasks over the same inputs.

    Attributes:
        tasks: K of them.
        parameters: how many a network for them has, at most.
        inputs: width of the input.
        batches: seed of the batches -> batches without end.
        test: what the trained network is judged on.
    """

    tasks: tuple[Task, ...]
    parameters: int
    inputs: int
    batches: Callable[[int], Iterator[Batch]]
    test: Batch
