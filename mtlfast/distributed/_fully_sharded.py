"""The Jacobian of parameters that are DTensors, whose gradients arrive in `.grad` and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


def refuse_unreduced(parameters: Iterable[Tensor]) -> None:
    """Raises if a backward pass would not leave the reduced gradient of one of these parameters alone in `.grad`.

    Raises:
        ValueError: its reduction is switched off, or a pass before this step left a gradient that is not reduced yet.
    """
    wanted = {id(parameter) for parameter in parameters}
    for module in fully_sharded_modules():
        for group in module._get_fsdp_state()._fsdp_param_groups:
            if not any(id(parameter.sharded_param) in wanted for parameter in group.fsdp_params):
                continue
            if not (group.reduce_grads and group.all_reduce_grads):
                raise ValueError(
                    "backward: a sharded module does not reduce its gradients, expected "
                    "set_requires_gradient_sync(True) and set_requires_all_reduce(True), as surgery needs reduced ones"
                )
            if group._partial_reduce_output is not None or any(map(_has_unreduced, group.fsdp_params)):
                raise ValueError(
                    "backward: a sharded module holds gradients of an earlier pass that are not reduced yet, expected "
                    "none, as this step would count them as those of its first task"
                )


def _has_unreduced(parameter: Any) -> bool:
    """Whether a parameter under `fully_shard` has a gradient that waits for its reduction."""
    gathered = getattr(parameter, "_unsharded_param", None)
    return parameter.unsharded_accumulated_grad is not None or (gathered is not None and _grad.is_there(gathered))


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
        ValueError: a shared parameter is no DTensor, its gradient has other placements, or a module does not reduce
            its gradients.
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
        refuse_unreduced([*columns.parameters, *leaves.values()])
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
        wanted = range(self.num_tasks) if loss_weights is None else self._tasks_with_weight(loss_weights)
        losses: list[Tensor] = []
        with _grad.set_apart(leaves):
            for k, loss in enumerate(self._losses()):
                losses.append(loss.detach().to(self.device))
                if k not in wanted:
                    continue
                weight = None if loss_weights is None else loss_weights[k].to(loss.dtype)
                keep = self._retain_graph or (not self.present.closures and k != wanted[-1])
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
