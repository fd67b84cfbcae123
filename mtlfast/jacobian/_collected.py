"""Task gradients from graphs that are not alive at the same time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtlfast import _grad
from mtlfast._arguments import Columns, found_parameters
from mtlfast._losses import Present, scalar
from mtlfast._sharded import refuse_sharded
from mtlfast.jacobian._graph import reached_by
from mtlfast.jacobian._sparse import stored
from mtlfast.task_gradients import Rows


class Collected:
    """The gradients of every leaf that the tasks reach, kept apart by task, and summed over a task's passes.

    Args:
        caller: the name that errors begin with.
        shared: the shared parameters; None: the parameters that more than one task has reached in the end.
        storage_dtype: the dtype in which the gradients of shared parameters are kept; None: their own.

    Memory: one gradient for each leaf and each task that reaches it, and one task's gradients while they are added.
    """

    def __init__(self, caller: str, shared: Columns | None, storage_dtype: torch.dtype | None = None) -> None:
        self.storage_dtype = storage_dtype
        self._caller, self._shared = caller, shared
        self._own = set() if shared is None else {id(parameter) for parameter in shared.parameters}
        self._leaves: dict[int, Tensor] = {}
        self._gradients: dict[int, dict[int, Tensor]] = {}  # by leaf, then by task
        self._sums: set[tuple[int, int]] = set()  # leaves and tasks whose gradient is a sum, in memory of its own

    def run(self, present: Present, retain_graph: bool) -> list[Tensor]:
        """Runs the present tasks' backward passes, adds their gradients, and returns the losses' values.

        A closure's graph is freed before the next closure runs, unless `retain_graph` is set.
        """
        values = []
        leaves = self._leaves_of(present.losses, retain_graph) if present.losses else []
        for k, task in enumerate(present.tasks):
            keep = retain_graph
            if present.closures:
                with torch.enable_grad():
                    loss = scalar(present.closures[k](), self._caller, present.labels[k])
                leaves = self._leaves_of([loss], retain_graph)
            else:
                loss = present.losses[k]
                keep = retain_graph or k + 1 < len(present.losses)
            gradients = torch.autograd.grad(loss, leaves, retain_graph=keep, allow_unused=True)
            values.append(loss.detach())
            del loss  # with its graph
            with torch.no_grad():
                for leaf, gradient in zip(leaves, gradients, strict=True):
                    if gradient is not None:
                        self._add(task, leaf, gradient)
        return values

    def _leaves_of(self, losses: Sequence[Tensor], retain_graph: bool) -> list[Tensor]:
        """The leaves that the losses reach. Raises if autograd makes no gradient for some."""
        reached = reached_by(losses)
        shared = Columns([], []) if self._shared is None else self._shared
        others = [leaf for leaf in reached.leaves if id(leaf) not in self._own]
        refuse_sharded(self._caller, shared.names, shared.parameters, others)
        reached.check(self._caller, retain_graph)
        return reached.leaves

    def _add(self, task: int, leaf: Tensor, gradient: Tensor) -> None:
        """Adds a task's gradient of a leaf, in the storage dtype as soon as the leaf is known to be shared."""
        self._leaves[id(leaf)] = leaf
        of_leaf = self._gradients.setdefault(id(leaf), {})
        place = (id(leaf), task)
        if id(leaf) in self._own or (self._shared is None and of_leaf.keys() - {task}):
            gradient = stored(gradient, self.storage_dtype)
            for other, kept in of_leaf.items():
                of_leaf[other] = stored(kept, self.storage_dtype)
        before = of_leaf.get(task)
        if before is None:
            of_leaf[task] = gradient
        elif place in self._sums and before.layout == gradient.layout == torch.strided:
            before.add_(gradient)
        else:
            of_leaf[task] = _grad.plus(before, gradient)
            self._sums.add(place)

    def shared(self) -> Columns:
        """The shared parameters, as they were given or as they were found.

        Raises:
            ValueError: no parameter is shared, or no task reaches one.
        """
        if self._shared is None:
            several = [leaf for key, leaf in self._leaves.items() if len(self._gradients[key]) > 1]
            return found_parameters(several)
        if not any(id(parameter) in self._gradients for parameter in self._shared.parameters):
            raise ValueError(
                f"backward: the losses reach none of the {len(self._shared.parameters)} shared parameters, expected at "
                "least one"
            )
        return self._shared

    def take_rows(self, parameters: Sequence[Tensor], tasks: Sequence[int]) -> Rows:
        """The tasks' gradients of the parameters, [K][T], which are no longer kept here."""
        columns = [self._gradients.pop(id(parameter), {}) for parameter in parameters]
        return tuple(tuple(column.get(task) for column in columns) for task in tasks)

    def take_plain(self, tasks: Sequence[int], apart: bool) -> _grad.PlainGradients:
        """The gradients of all leaves that are still kept here, summed over the tasks unless `apart`."""
        leaves = [self._leaves[key] for key in self._gradients]
        plain = _grad.PlainGradients(leaves, apart)
        for k, row in enumerate(self.take_rows(leaves, tasks)):
            plain.collect(k, row)
        return plain

    def by_name(self, caller: str, parameters: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
        """Copies of all gradients by their parameter's name and by task.

        Raises:
            ValueError: `parameters`, by name, lack one that has a gradient.
        """
        names = {id(parameter): name for name, parameter in parameters.items()}
        for key, leaf in self._leaves.items():
            if key not in names:
                raise ValueError(
                    f"{caller}: the losses reach a parameter of shape {list(leaf.shape)}, expected one of the model's"
                )
        return {
            names[key]: {task: gradient.clone() for task, gradient in of_leaf.items()}
            for key, of_leaf in self._gradients.items()
        }

    def load(
        self, caller: str, gradients: Mapping[str, Mapping[int, Tensor]], parameters: Mapping[str, Tensor]
    ) -> None:
        """Takes copies of gradients that `by_name` returned.

        Raises:
            ValueError: a parameter of that name does not exist or has another shape.
        """
        for name, of_leaf in gradients.items():
            parameter = parameters.get(name)
            for task, gradient in of_leaf.items():
                if parameter is None or parameter.shape != gradient.shape:
                    got = "no such parameter" if parameter is None else f"shape {list(parameter.shape)}"
                    raise ValueError(
                        f"{caller}: {name} has {got} in the model, expected {list(gradient.shape)} as in the state"
                    )
                self._leaves[id(parameter)] = parameter
                copy = gradient.to(parameter.device, copy=True)
                self._gradients.setdefault(id(parameter), {})[task] = copy
                self._sums.add((id(parameter), task))
