"""What the ranks tell each other before a step: that they take the same step, and which tasks each of them has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

import torch

from mtlfast.distributed._ranks import Ranks, step_number

FAILED, FITS = 0, 1
ABSENT, LOSS, CLOSURE = 0, 1, 2
COMPARED = (
    "number of losses",
    "names of the losses",
    "shared parameters",
    "set of other parameters that require grad",
    "aggregator or weighting",
    "value of diagnostics, groups, loss_scale, precision or storage_dtype",
)


class Offer(NamedTuple):
    """What a rank is about to do. Two ranks whose offers differ cannot take a step together.

    Attributes:
        present: for each task `LOSS`, `CLOSURE` or `ABSENT`, as this rank has it.
        names: the tasks' names, if they have any.
        columns: a description of the shared parameters.
        others: one of the other parameters whose gradients are averaged, as far as they are known.
        methods: one of the aggregator and the weighting.
        options: one of other arguments on which collectives and weights depend.
        beside: the number of parameters that the losses reach beside the shared ones, if nothing else says which these
            are; otherwise 0. It may differ.
    """

    present: Sequence[int]
    names: Sequence[str] | None
    columns: str
    others: str
    methods: str
    options: str
    beside: int

    def numbers(self) -> list[int]:
        """The number of tasks, and a number for each description, which is the same for the same one."""
        texts = [repr(self.names), self.columns, self.others, self.methods, self.options]
        return [len(self.present), *(crc32(text.encode()) for text in texts), self.beside]


def agree(ranks: Ranks, offer: Offer | None, device: torch.device) -> list[list[int]]:
    """How each rank has each task, [N][number of tasks].

    Args:
        ranks: the ranks, all of which call it.
        offer: what this rank is about to do; None if it cannot, because an argument does not fit.
        device: that of the shared parameters.

    Raises:
        ValueError: another rank failed, or is about to take another step.

    Cost: two small all-gathers, through the CPU if the process group has a backend for it.
    """
    where = ranks.host_device(device)
    own = [FAILED] * (len(COMPARED) + 2) if offer is None else [FITS, *offer.numbers()]
    everyone = ranks.gather("the comparison of the ranks' arguments", torch.tensor(own, device=where)).tolist()
    failed = [rank for rank, numbers in enumerate(everyone) if numbers[0] == FAILED]
    if offer is None:
        return []  # the caller raises its own error
    if failed:
        raise ValueError(
            f"backward: rank {failed[0]} has an error in step {step_number()}, expected all ranks to take it"
        )
    for rank, numbers in enumerate(everyone):
        for what, got, expected in zip(COMPARED, numbers[1:], everyone[0][1:], strict=False):
            if got != expected:
                raise ValueError(
                    f"backward: rank {rank} has another {what} than rank 0 in step {step_number()}, expected the same "
                    "on all"
                )
    present = torch.tensor(offer.present, dtype=torch.uint8, device=where)
    of_ranks = ranks.gather("the comparison of the present tasks", present).tolist()
    if {LOSS, CLOSURE} <= {kind for row in of_ranks for kind in row}:
        raise ValueError(
            f"backward: some ranks have functions in step {step_number()} and others tensors, expected one kind for all"
        )
    if any(row != of_ranks[0] for row in of_ranks) and any(numbers[-1] for numbers in everyone):
        raise ValueError(
            f"backward: the ranks have losses of different tasks in step {step_number()}, expected process_group= to "
            "be the DistributedDataParallel module, which knows the heads of tasks that are absent"
        )
    return list(of_ranks)
