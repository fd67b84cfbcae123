"""The Jacobian of parameters that are DTensors, whose gradients arrive in `.grad` and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mtlfast import _grad
from mtlfast._arguments import Columns, Shared, found_parameters, given_parameters, trained
from mtlfast._losses import Present
from mtlfast._sharded import fully_sharded_modules
from mtlfast.jacobian._graph import reached_by
from mtlfast.jacobian._rows import StoredRows


def sharded_parameters() -> dict[int, Tensor]:
    """The sharded parameter of each parameter that a module under `fully_shard` holds, sharded or gathered, by its id.

    While a module's parameters are gathered, the graph and `module.parameters()` know plain tensors in their place.
    """
    found: dict[int, Tensor] = {}
    for module in fully_sharded_modules():
        for group in module._get_fsdp_state()._fsdp_param_groups:
            for parameter in group.fsdp_params:
                sharded = parameter.sharded_param
                found[id(sharded)] = found[id(getattr(parameter, "_unsharded_param", sharded))] = sharded
    return found


class FullyShardedJacobian(StoredRows):
    """A Jacobian whose rows come from one ordinary backward pass for each task, and are this rank's shards.

    Between two passes each `.grad` is taken and set to None. Hooks of `register_post_accumulate_grad_hook` do not run
    in these passes.

    Args:
        present: the K present tasks.
        shared: the shared parameters, sharded or gathered; None: those that more than one loss reaches.
        sharded: what `sharded_parameters` returned.
        retain_graph: keep the graph.
        loss_weights_later: whether `weigh` or `write` will be given loss weights.

    Raises:
        ValueError: a shared parameter is no DTensor, or its gradient has other placements.
    """

    way: ClassVar[str] = "stored"

    def __init__(
        self,
        present: Present,
        shared: Shared | None,
        sharded: Mapping[int, Tensor],
        retain_graph: bool,
        loss_weights_later: bool,
    ) -> None:
        reached = reached_by(present.losses)
        if shared is None:
            columns = found_parameters([sharded.get(id(leaf), leaf) for leaf in reached.several])
        else:
            given = given_parameters(shared)
            columns = trained(Columns(given.names, [sharded.get(id(p), p) for p in given.parameters]))
        for name, parameter in zip(*columns, strict=True):
            if not isinstance(parameter, DTensor):
                raise ValueError(
                    f"backward: {name} is whole on every rank beside shared parameters that are sharded, expected all "
                    "to be DTensors"
                )
            if any(placement.is_partial() for placement in parameter.placements):
                raise ValueError(
                    f"backward: {name} has the placements {parameter.placements}, expected none to be Partial"
                )
        super().__init__(present, columns)
        if present.losses:
            self.losses = torch.stack([loss.detach().to(self.device) for loss in present.losses])
        own = {id(p) for p in columns.parameters}
        leaves = {id(p): p for leaf in reached.leaves if (p := sharded.get(id(leaf), leaf)) is not None}
        leaves |= {id(p): p for p in sharded.values() if p.requires_grad}
        others = [leaf for leaf in leaves.values() if id(leaf) not in own]
        self._others = _grad.PlainGradients(others, loss_weights_later)
        self._retain_graph = retain_graph

    def obtain(self, loss_weights: Tensor | None = None) -> None:
        """Runs the passes and holds this rank's shards."""
        rows: list[Sequence[Tensor | None]] = [(None,) * len(self.parameters)] * self.num_tasks
        self.obtain_into(rows.__setitem__, loss_weights)
        self.hold(tuple(map(tuple, rows)))

    def obtain_into(
        self, receive: Callable[[int, Sequence[Tensor | None]], None], loss_weights: Tensor | None = None
    ) -> None:
        """Hands over this rank's shards of each row as soon as its backward pass has made them."""
        leaves, T = [*self.parameters, *self._others.leaves], len(self.parameters)
        losses: list[Tensor] = []
        with _grad.set_apart(leaves):
            for k, loss in enumerate(self._losses()):
                losses.append(loss.detach().to(self.device))
                weight = None if loss_weights is None else loss_weights[k].to(loss.dtype)
                keep = self._retain_graph or (not self.present.closures and k + 1 < self.num_tasks)
                torch.autograd.backward([loss], [weight], retain_graph=keep)
                del loss
                gradients = [self._own(t, g, leaves[t]) for t, g in enumerate(_grad.forget(leaves))]
                self._others.collect(k, gradients[T:])
                receive(k, gradients[:T])
        if self.losses is None:
            self.losses = torch.stack(losses)

    def _losses(self) -> Iterator[Tensor]:
        yield from self.present.losses
        for closure in self.present.closures:
            with torch.inference_mode(False), torch.enable_grad():
                loss = closure()
            yield loss

    def _own(self, t: int, gradient: Tensor | None, leaf: Any) -> Tensor | None:
        """This rank's part of a gradient."""
        if gradient is None or not isinstance(gradient, DTensor):
            return gradient
        if gradient.placements != leaf.placements:
            name = self._names[t] if t < len(self._names) else f"a parameter of shape {list(leaf.shape)}"
            raise ValueError(
                f"backward: the gradient of {name} has the placements {gradient.placements}, expected "
                f"{leaf.placements} as the parameter"
            )
        own: Tensor = gradient.to_local()
        return own
