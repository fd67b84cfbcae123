"""What the ranks tell each other before a step: that they take the same step, and which tasks each of them has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn

from mtlfast.distributed._ranks import Ranks, step_number
from mtlfast.task_gradients import DTYPES

FAILED, FITS = 0, 1
COMPARED = (
    "number of losses",
    "names of the losses",
    "shared parameters",
    "set of other parameters that require grad",
    "aggregator or weighting",
)
SETTINGS = ("loss_scale", "precision", "diagnostics", "storage_dtype", "groups")


class Offer(NamedTuple):
    """What a rank is about to do. Two ranks whose offers differ cannot take a step together.

    Attributes:
        present: for each task, whether this rank has a loss of it.
        names: the tasks' names, if they have any.
        columns: a description of the shared parameters.
        others: one of the other parameters whose gradients are averaged, as far as they are known.
        methods: one of the aggregator and the weighting.
        closures: whether the losses are closures; None if this rank has no loss at all.
        loss_dtype: the dtype of the losses; None if there are none, or none yet.
        beside: the number of parameters that the losses reach beside the shared ones, if nothing else says which these
            are; otherwise 0. It may differ.
    """

    present: Sequence[bool]
    names: Sequence[str] | None
    columns: str
    others: str
    methods: str
    closures: bool | None
    loss_dtype: torch.dtype | None
    beside: int


class Agreed(NamedTuple):
    """What all ranks know about a step before they take it.

    Attributes:
        of_ranks: which tasks are present on which rank, [N][number of tasks].
        loss_dtype: the dtype of the mean losses. None: it is known only after the backward passes, as the losses are
            closures.
    """

    of_ranks: list[list[bool]]
    loss_dtype: torch.dtype | None


def dtype_number(dtype: torch.dtype | None) -> int:
    """A number for the dtype of a rank's losses, to be sent to the others; None: it has none."""
    return 0 if dtype is None else 1 + DTYPES.index(dtype)


def common_dtype(numbers: Iterable[int]) -> torch.dtype | None:
    """The dtype of the losses of all ranks together, from each one's `dtype_number`; None if no rank has losses."""
    there = [DTYPES[number - 1] for number in numbers if number]
    return reduce(torch.promote_types, there) if there else None


def description(methods: Sequence[nn.Module | None]) -> str:
    """The classes of the methods, and the settings of those of this package."""
    parts = []
    for method in methods:
        for module in [] if method is None else method.modules():
            ours = type(module).__module__.startswith("mtlfast.")  # others may show what differs from rank to rank
            parts.append(f"{type(module).__name__}({module.extra_repr() if ours else ''})")
        parts.append(";")
    return " ".join(parts)


def agree(ranks: Ranks, offer: Offer | None, device: torch.device) -> Agreed:
    """Compares what the ranks are about to do.

    Args:
        ranks: the ranks, all of which call it.
        offer: what this rank is about to do; None if it cannot, because an argument does not fit. The caller then
            raises its own error.
        device: that of the shared parameters.

    Raises:
        ValueError: another rank failed, or is about to take another step.

    Cost: two small all-gathers, through the CPU if the process group has a backend for it.
    """
    own = None
    if offer is not None:
        texts = [repr(offer.names), offer.columns, offer.others, offer.methods]
        forms = {None: 0, False: 1, True: 2}
        own = [len(offer.present), *(crc32(text.encode()) for text in texts)]
        own += [forms[offer.closures], dtype_number(offer.loss_dtype), offer.beside]
    everyone = _compared(ranks, own, COMPARED, len(COMPARED) + 3, device)
    if offer is None:
        return Agreed([], None)
    *_, of_forms, of_dtypes, beside = zip(*everyone, strict=True)
    if {1, 2} <= set(of_forms):
        raise ValueError(
            f"backward: some ranks have closures and others have losses in step {step_number()}, expected one form"
        )
    present = torch.tensor(offer.present, dtype=torch.uint8, device=ranks.host_device(device))
    of_ranks = ranks.gather("the comparison of the present tasks", present).bool().tolist()
    if any(row != of_ranks[0] for row in of_ranks) and any(beside):
        raise ValueError(
            f"backward: the ranks have losses of different tasks in step {step_number()}, expected process_group= to "
            "be the DistributedDataParallel module, which knows the heads of tasks that are absent"
        )
    return Agreed(list(of_ranks), common_dtype(of_dtypes))


def agree_on_settings(ranks: Ranks, settings: Mapping[str, object] | None, device: torch.device) -> None:
    """Compares the arguments that are checked once the losses are known.

    Args:
        ranks: the ranks, all of which call it.
        settings: the value of each of `SETTINGS`; None if an argument does not fit. The caller then raises its own
            error. The value of a tensor on a GPU is not compared, because the host would wait for it.
        device: that of the shared parameters.

    Raises:
        ValueError: another rank failed, or has another setting.

    Cost: one small all-gather.
    """
    own = None if settings is None else [crc32(_text(settings[name]).encode()) for name in SETTINGS]
    _compared(ranks, own, SETTINGS, len(SETTINGS), device)


def _text(value: object) -> str:
    if isinstance(value, Tensor):
        return repr(float(value)) if value.device.type == "cpu" else "a tensor"  # host: a CPU tensor
    return repr(float(value)) if isinstance(value, int | float) else repr(value)


def _compared(
    ranks: Ranks, own: Sequence[int] | None, compared: Sequence[str], count: int, device: torch.device
) -> list[list[int]]:
    """All ranks' numbers, of which the first ones must be equal.

    Args:
        ranks: the ranks, all of which call it.
        own: the numbers of this rank; None if it failed.
        compared: what errors call those that must be equal.
        count: how many numbers there are.
        device: that of the shared parameters.

    Raises:
        ValueError: another rank failed, or a number differs. Not on a rank that failed itself.
    """
    numbers = [FAILED] * (count + 1) if own is None else [FITS, *own]
    given = torch.tensor(numbers, device=ranks.host_device(device))
    everyone = ranks.gather("the comparison of the ranks' arguments", given).tolist()
    if own is None:
        return []
    for rank, (fits, *_) in enumerate(everyone):
        if fits == FAILED:
            raise ValueError(
                f"backward: rank {rank} has an error in step {step_number()}, expected all ranks to take it"
            )
    for rank, (_, *got) in enumerate(everyone):
        for what, one, expected in zip(compared, got, everyone[0][1:], strict=False):
            if one != expected:
                raise ValueError(
                    f"backward: rank {rank} has another {what} than rank 0 in step {step_number()}, expected the same "
                    "on all"
                )
    return [got for _, *got in everyone]
