"""Which parameters the tasks reach on any rank, and the refusal of gradients that are not dense, on all ranks alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mtlfast.distributed._ranks import Ranks

NONE, DENSE, OTHER = 0, 1, 2


def kind_of(gradient: Tensor | None) -> int:
    """What the ranks tell each other about a gradient."""
    return NONE if gradient is None else DENSE if gradient.layout == torch.strided else OTHER


def if_dense(gradient: Tensor | None) -> Tensor | None:
    """The gradient, or None in place of one that cannot be reduced."""
    return gradient if kind_of(gradient) == DENSE else None


def reached_on_a_rank(
    ranks: Ranks, what: str, kinds: Sequence[Sequence[int]], device: torch.device, name: Callable[[int], str]
) -> list[list[bool]]:
    """For each row and column whether some rank has a gradient.

    Args:
        ranks: the ranks, all of which call it.
        what: what errors call the comparison.
        kinds: [R][T] from `kind_of`.
        device: that of the gradients.
        name: the name of a column for errors.

    Raises:
        ValueError: a gradient on some rank is sparse.
    """
    own = torch.tensor(kinds, dtype=torch.uint8, device=ranks.host_device(device))
    most = ranks.gather(what, own).amax(dim=0).tolist()
    for row in most:
        if OTHER in row:
            raise ValueError(
                f"backward: the gradient of {name(row.index(OTHER))} is sparse, expected dense ones over several "
                "ranks; make its table sparse=False"
            )
    return [[kind != NONE for kind in row] for row in most]
