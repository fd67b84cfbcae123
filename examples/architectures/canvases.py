"""The four tasks of examples/digits, on its canvases as rows of pixels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from workload import Batch, Workload  # puts examples/digits on the path

from data import CANVAS, Canvases, epoch, split_digits  # isort: skip
from tasks import TASKS  # isort: skip

BATCH = 100
PARAMETERS = 100_000
TEST_ROUNDS = 4  # how often each test digit is shown on either side


@cache
def canvases(seed: int) -> Workload:
    """Reads two overlaid digits, shows them, and adds them.

    Args:
        seed: of the split into training and test digits, and of the test canvases.
    """
    train, test = split_digits(seed, torch.device("cpu"))
    rounds = torch.Generator().manual_seed(seed)
    tests = [batch for _ in range(TEST_ROUNDS) for batch in epoch(test, len(test.classes), rounds)]

    def batches(seed: int) -> Iterator[Batch[Canvases]]:
        pairs = torch.Generator().manual_seed(seed)
        while True:
            yield from map(_rows, epoch(train, BATCH, pairs))

    whole = Canvases(*(torch.cat(parts) for parts in zip(*tests, strict=True)))
    return Workload(TASKS, PARAMETERS, CANVAS**2, batches, _rows(whole))


def _rows(batch: Canvases) -> Batch[Canvases]:
    return Batch(batch.canvas.flatten(1), batch)
