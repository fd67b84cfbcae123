"""Looks whether compiled backward passes overwrite what a later pass reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from mtlfast.jacobian._graph import Reached

COMPILED = "CompiledFunctionBackward"  # the node of a function that torch.compile compiled
_seen: WeakSet[Any] = WeakSet()  # the compiled functions that were looked at


class Overwriting:
    """Looks at what torch.compile'd functions saved, between the backward passes of the first step through them.

    `Reached.check` refuses what is known to overwrite. But the keys of torch's cache of compiled code leave out whether
    buffers are donated (seen in torch 2.13), so that it returns code which overwrites, compiled for an earlier program,
    although `donated_buffer` is False. Every pass after the first would then give wrong gradients.

    Args:
        reached: what a walk of the losses' graph found.
        losses: the losses, each of which has a backward pass.

    Cost: nothing for functions that were looked at before. Otherwise K reads of what they saved, and on a GPU as many
    times the host waits.
    """

    def __init__(self, reached: Reached, losses: Sequence[Tensor]) -> None:
        self._saved: list[tuple[Any, list[Tensor], list[Tensor]]] = []
        functions = {
            kind: getattr(kind, "_forward_cls", None) for kind in reached.functions if kind.__name__ == COMPILED
        }
        new = {kind: function for kind, function in functions.items() if function is not None and function not in _seen}
        if not new or len(losses) < 2:
            return
        for node in _nodes_behind(losses):
            if type(node) in new:
                tensors = [x.detach() for x in node.saved_tensors if x is not None and _is_summed(x)]
                self._saved.append((new[type(node)], tensors, [_sum(x) for x in tensors]))

    def check(self, caller: str, last: bool) -> None:
        """Raises if a function has overwritten what it saved. It is called after each backward pass.

        Args:
            caller: the name that the error begins with.
            last: whether no other pass follows, so that nothing is read again.
        """
        for function, tensors, before in self._saved:
            if last:
                _seen.add(function)
            elif not all(
                torch.allclose(_sum(x), was, rtol=0.0, atol=0.0, equal_nan=True)
                for x, was in zip(tensors, before, strict=True)
            ):
                raise ValueError(
                    f"{caller}: the backward pass of a torch.compile'd function has overwritten what the next task's "
                    "pass reads, as code does that torch's cache holds from a run with donated buffers; expected "
                    "TORCHINDUCTOR_CACHE_DIR to name an empty directory, or closures, each with a forward pass of its "
                    "own"
                )


def _is_summed(x: Tensor) -> bool:
    """Whether torch sums such a tensor: not one in 8-bit floating point, for example."""
    return x.layout is torch.strided and not (x.is_floating_point() and x.element_size() == 1)


def _sum(x: Tensor) -> Tensor:
    return (torch.view_as_real(x) if x.is_complex() else x).sum(dtype=torch.float64)


def _nodes_behind(losses: Sequence[Tensor]) -> Iterator[Any]:
    """All nodes of the graph, each once."""
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn for loss in losses]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(next_node for next_node, _ in node.next_functions)
            yield node
