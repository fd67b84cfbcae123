"""`Groups`: a partition of the columns of the Jacobian, each part of which gets weights of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """A partition of the T columns into G groups.

    Attributes:
        names: the G groups' names.
        of_column: for each column, the index of its group.
    """

    names: tuple[str, ...]
    of_column: tuple[int, ...]

    @classmethod
    def by_name(cls, names: Sequence[str]) -> Groups:
        """The groups in the order of their first columns, for the name of each column's group."""
        places = {name: place for place, name in enumerate(dict.fromkeys(names))}
        return cls(tuple(places), tuple(places[name] for name in names))

    def at(self, columns: Sequence[int]) -> list[int]:
        """The groups of some columns."""
        return [self.of_column[t] for t in columns]


@lru_cache(maxsize=64)
def mask_of(reached: tuple[tuple[bool, ...], ...], device: torch.device) -> Tensor:
    """The mask [G, K] on a device. It is kept, because a copy from the host waits for a GPU."""
    return torch.tensor(reached, device=device)
