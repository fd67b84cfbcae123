"""Task gradients from graphs that are not alive at the same time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtlfast import _grad
from mtlfast._arguments import Columns, found_parameters, trained
from mtlfast._losses import Present, scalar
from mtlfast._sharded import refuse_sharded
from mtlfast.jacobian._graph import Reached, reached_by
from mtlfast.jacobian._overwriting import Overwriting
from mtlfast.jacobian._sparse import stored
from mtlfast.task_gradients import Rows


class Collected:
    """The gradients of every leaf that the tasks reach, kept apart by task, and summed over a task's passes.

    Args:
        caller: the name that errors begin with.
        shared: all parameters that were given as shared, also those that do not require grad now; None: the parameters
            that more than one task has reached in the end.
        storage_dtype: the dtype in which the gradients of shared parameters are kept; None: their own.

    Attributes:
        in_part: whether a call of `run` failed after it had added some of its tasks' gradients.

    Memory: one gradient for each leaf and each task that reaches it, and one task's gradients while they are added.
    """

    def __init__(self, caller: str, shared: Columns | None, storage_dtype: torch.dtype | None = None) -> None:
        self.storage_dtype = storage_dtype
        self._caller, self._shared = caller, shared
        self.in_part = False
        # By the leaf itself, so that a deep copy belongs to the copied leaves: its gradients by task, and the tasks
        # whose gradient is a sum, in memory of its own.
        self._own = set() if shared is None else set(shared.parameters)
        self._gradients: dict[Tensor, dict[int, Tensor]] = {}
        self._sums: dict[Tensor, set[int]] = {}

    def run(self, present: Present, retain_graph: bool) -> list[Tensor]:
        """Runs the present tasks' backward passes, adds their gradients, and returns the losses' values.

        A closure's graph is freed before the next closure runs, unless `retain_graph` is set.
        """
        values = []
        leaves: list[Tensor] = []
        overwriting = None
        if present.losses:
            reached = self._reached_by(present.losses, retain_graph)
            leaves, overwriting = reached.leaves, Overwriting(reached, present.losses)
        for k, task in enumerate(present.tasks):
            keep = retain_graph
            if present.closures:
                with torch.inference_mode(False), torch.enable_grad():
                    returned = present.closures[k]()
                if returned is None:
                    raise TypeError(
                        f"{self._caller}: the closure of {present.labels[k]} returned None, expected a scalar Tensor "
                        "(is a return missing?)"
                    )
                loss = scalar(returned, self._caller, present.labels[k])
                del returned
                leaves = self._reached_by([loss], retain_graph).leaves
            else:
                loss = present.losses[k]
                keep = retain_graph or k + 1 < len(present.losses)
            gradients = torch.autograd.grad(loss, leaves, retain_graph=keep, allow_unused=True)
            if overwriting is not None:
                overwriting.check(self._caller, last=k + 1 == len(present.losses))
            values.append(loss.detach())
            del loss  # with its graph
            self.in_part = True
            self._add_all(task, leaves, gradients)
            del gradients  # which are sums elsewhere, and would take memory in the next task's passes
        self.in_part = False
        return values

    def _reached_by(self, losses: Sequence[Tensor], retain_graph: bool) -> Reached:
        """The leaves that the losses reach. Raises if autograd makes no gradient for some."""
        reached = reached_by(losses)
        shared = Columns([], []) if self._shared is None else self._shared
        others = [leaf for leaf in reached.leaves if leaf not in self._own]
        refuse_sharded(self._caller, shared.names, shared.parameters, others)
        reached.check(self._caller, retain_graph)
        return reached

    @torch.inference_mode(False)
    @torch.no_grad()
    def _add_all(self, task: int, leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                self._add(task, leaf, gradient)

    def _add(self, task: int, leaf: Tensor, gradient: Tensor) -> None:
        """Adds a task's gradient of a leaf, in the storage dtype as soon as the leaf is known to be shared."""
        of_leaf, sums = self._gradients.setdefault(leaf, {}), self._sums.setdefault(leaf, set())
        if leaf in self._own or (self._shared is None and of_leaf.keys() - {task}):
            gradient = stored(gradient, self.storage_dtype)
            for other, kept in of_leaf.items():
                of_leaf[other] = stored(kept, self.storage_dtype)
        before = of_leaf.get(task)
        if before is None:
            of_leaf[task] = gradient
        elif task in sums and before.layout == gradient.layout == torch.strided:
            before.add_(gradient)
        else:
            of_leaf[task] = _grad.plus(before, gradient)
            sums.add(task)

    def shared(self) -> Columns:
        """The shared parameters that require grad now, as they were given or as they were found.

        Raises:
            ValueError: no parameter is shared, or no task reaches one.
        """
        if self._shared is None:
            several = [leaf for leaf, of_leaf in self._gradients.items() if len(of_leaf) > 1 and leaf.requires_grad]
            return found_parameters(several)
        wanted = trained(self._shared)
        if not any(parameter in self._gradients for parameter in wanted.parameters):
            raise ValueError(
                f"backward: the losses reach none of the {len(wanted.parameters)} shared parameters, expected at least "
                "one"
            )
        return wanted

    def take_rows(self, parameters: Sequence[Tensor], tasks: Sequence[int]) -> Rows:
        """The tasks' gradients of the parameters, [K][T], which are no longer kept here."""
        columns = [self._gradients.pop(parameter, {}) for parameter in parameters]
        return tuple(tuple(column.get(task) for column in columns) for task in tasks)

    def take_plain(self, tasks: Sequence[int], apart: bool) -> _grad.PlainGradients:
        """The gradients of all leaves that are still kept here, summed over the tasks unless `apart`.

        A leaf that does not require grad any more is left out.
        """
        leaves = [leaf for leaf in self._gradients if leaf.requires_grad]
        plain = _grad.PlainGradients(leaves, apart)
        for k, row in enumerate(self.take_rows(leaves, tasks)):
            plain.collect(k, row)
        return plain

    def by_name(self, caller: str, parameters: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
        """Copies of all gradients by their parameter's name and by task.

        Raises:
            ValueError: `parameters`, by name, lack one that has a gradient.
        """
        names = {parameter: name for name, parameter in parameters.items()}
        for leaf in self._gradients:
            if leaf not in names:
                raise ValueError(
                    f"{caller}: the losses reach a parameter of shape {list(leaf.shape)}, expected one of the model's"
                )
        return {
            names[leaf]: {task: gradient.clone() for task, gradient in of_leaf.items()}
            for leaf, of_leaf in self._gradients.items()
        }

    def load(
        self, caller: str, gradients: Mapping[str, Mapping[int, Tensor]], parameters: Mapping[str, Tensor]
    ) -> None:
        """Takes copies of gradients that `by_name` returned, in the dtypes in which gradients are kept here.

        Raises:
            ValueError: a parameter of that name does not exist or has another shape, or the shared parameters are none
                of `parameters`.
        """
        if self._own and self._own.isdisjoint(parameters.values()):
            raise ValueError(f"{caller}: none of the {len(self._own)} shared parameters is in the model, expected all")
        for name, of_leaf in gradients.items():
            parameter = parameters.get(name)
            for task, gradient in of_leaf.items():
                if parameter is None or parameter.shape != gradient.shape:
                    got = "is not there" if parameter is None else f"has shape {list(parameter.shape)}"
                    raise ValueError(
                        f"{caller}: parameter {name} of the model {got}, expected shape {list(gradient.shape)} as in "
                        "the state"
                    )
                own = _grad.dtype_of(parameter)
                dtype = gradient.dtype if gradient.dtype in (own, self.storage_dtype) else own
                self._add(task, parameter, gradient.to(parameter.device, dtype, copy=True))
                self._sums[parameter].add(task)
