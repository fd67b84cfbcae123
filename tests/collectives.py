"""Records the collectives of torch.distributed, whoever starts them: this package, DistributedDataParallel or FSDP2."""

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# The operators of torch.distributed, and which argument holds what a rank puts in.
KINDS = {
    "allreduce_": ("all-reduce", 0),
    "_allgather_base_": ("all-gather", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "broadcast_": ("broadcast", 0),
}


class Collective(NamedTuple):
    """One collective.

    Attributes:
        kind: its name.
        elements: how many elements a rank puts in.
    """

    kind: str
    elements: int


class Collectives(TorchDispatchMode):
    """Within it all collectives of this process are recorded in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind, place = KINDS.get(func._schema.name.split("::")[1], (func._schema.name, 0))
            given = [args[place]] if isinstance(args[place], Tensor) else args[place]
            self.seen.append(Collective(kind, sum(tensor.numel() for tensor in given)))
        return func(*args, **(kwargs or {}))

    def elements(self, kind: str, most: int = 0) -> list[int]:
        """The sizes of the collectives of one kind that have more elements than `most`."""
        return [seen.elements for seen in self.seen if seen.kind == kind and seen.elements > most]

    def small(self, most: int) -> int:
        """The number of collectives of at most so many elements."""
        return sum(seen.elements <= most for seen in self.seen)
