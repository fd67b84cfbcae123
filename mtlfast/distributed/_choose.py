"""Makes the Jacobian of several ranks for the arguments of `mtlfast.backward`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mtlfast._arguments import shared_parameters
from mtlfast._losses import Losses, Present, present_losses
from mtlfast.aggregation import Aggregator, Reads
from mtlfast.distributed._absent import NoTasks
from mtlfast.distributed._agreement import Offer, agree, agree_on_settings, description
from mtlfast.distributed._all_reduced import AllReduced
from mtlfast.distributed._features import FeaturesOfRanks
from mtlfast.distributed._jacobian import RankedJacobian
from mtlfast.distributed._random_numbers import draws, same_random_numbers
from mtlfast.distributed._ranks import Ranks, begin_step, step_number
from mtlfast.distributed._reduction import Reduction
from mtlfast.distributed._scattered import Scattered
from mtlfast.jacobian import FeaturesJacobian, Jacobian, TaskGradientAccumulator, TwoBatchesJacobian
from mtlfast.jacobian._choose import jacobian_of
from mtlfast.jacobian._rows import StoredRows
from mtlfast.ops._check import check_dtype
from mtlfast.weighting import LossWeighting


class Over:
    """Over which ranks a step is taken, and which parameters they hold replicas of.

    Args:
        ranks: the ranks.
        module: the module whose parameters are the same on all ranks; None if it is not known.
        sharded: the sharded parameters by the ids of what modules and graphs show of them; None if none is sharded.
    """

    def __init__(
        self, ranks: Ranks, module: DistributedDataParallel | None, sharded: Mapping[int, Tensor] | None = None
    ) -> None:
        self.ranks, self._module, self.sharded = ranks, module, sharded
        self._replicas = None if module is None else list(module.module.parameters())
        self._device = _device()
        # What the other ranks wait for until this one has told them that its arguments fit.
        self._awaited: Callable[[Ranks, None, torch.device], object] | None = agree

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within it the arguments of a step are checked. An error of this rank is told to the others, which raise too.

        `jacobian` and then `same_settings` must be called within it.
        """
        begin_step()
        try:
            yield
        except Exception:
            if self._awaited is not None and not self.ranks.failed:
                self._awaited(self.ranks, None, self._device)
            raise

    def same_settings(self, settings: Mapping[str, object]) -> None:
        """Compares the settings of the ranks, which have checked them.

        Raises:
            ValueError: another rank has other settings, or an error.
        """
        self._awaited = None
        agree_on_settings(self.ranks, settings, self._device)

    def jacobian(
        self,
        losses: Losses | TaskGradientAccumulator,
        aggregator: Aggregator,
        arguments: Mapping[str, Any],
    ) -> Jacobian:
        """The Jacobian of the mean of all ranks' losses.

        Args:
            losses: those of this rank, which may all be None.
            aggregator: the method, which decides whether the gradients may stay in parts.
            arguments: what `jacobian_of` takes besides the losses.

        Raises:
            ValueError, TypeError: an argument does not fit, or not to those of the other ranks.
            RuntimeError: a rank does not take part.
        """
        ranks = self.ranks
        losses, names = _readable(losses)
        local = self._local(losses, arguments)
        rows = local._joint if isinstance(local, TwoBatchesJacobian) else local
        if not isinstance(rows, StoredRows):
            raise TypeError(f"backward: got a {type(rows).__name__}, expected one that holds its rows")
        if isinstance(local, TwoBatchesJacobian) and len(local.present.tasks) < local.present.number:
            raise ValueError("backward: a task is absent beside second= on several ranks, expected all tasks")
        if not rows.parameters:
            raise ValueError(
                "backward: shared is None, expected the shared parameters beside closures on several ranks"
            )
        if _needs_whole(aggregator) and (self.sharded is not None or isinstance(rows, FeaturesJacobian)):
            raise TypeError(
                f"{type(aggregator).__name__}: needs the task gradients as a whole, but each rank holds a part of "
                "them; expected a method with weights, or one that sets by_element"
            )
        offer = Offer(
            [task in rows.present.tasks for task in range(rows.present.number)],
            names,
            "" if isinstance(rows, FeaturesJacobian) else _kinds(rows.parameters),
            _kinds(self._others(rows) or ()),
            description([aggregator, arguments["weighting"]]),
            bool(rows.present.closures) if rows.present.tasks else None,
            None if rows.losses is None else rows.losses.dtype,
            self._beside(rows),
        )
        self._awaited, self._device = None, rows.device
        of_ranks, loss_dtype = agree(ranks, offer, rows.device)
        self._awaited = agree_on_settings
        there = [any(of_task) for of_task in zip(*of_ranks, strict=True)]
        if self.sharded is not None and any(of_rank != of_ranks[0] for of_rank in of_ranks):
            raise ValueError(
                f"backward: the ranks have losses of different tasks in step {step_number()}, expected a loss of "
                "each task on each rank, such as 0 times the output, as fully_shard gathers parameters in each pass"
            )
        tasks = tuple(task for task, of_any in enumerate(there) if of_any)
        if not tasks:
            raise ValueError(
                f"backward: got {len(there)} losses, none of them present on any rank, expected at least one"
            )
        labels = [f"loss {task if names is None else names[task]}" for task in tasks]
        of_tasks = None if names is None else tuple(names[task] for task in tasks)
        present = Present(len(there), tasks, of_tasks, labels, [], [])
        others = self._others(rows)
        if isinstance(rows, FeaturesJacobian):
            return FeaturesOfRanks(rows, ranks, present, others, loss_dtype, self.sharded or {})
        storage_dtype = arguments["storage_dtype"]
        reduction = self._reduction(rows, aggregator, storage_dtype)
        joint = RankedJacobian(rows, ranks, present, reduction, others, storage_dtype, loss_dtype)
        return TwoBatchesJacobian(joint, local.present) if isinstance(local, TwoBatchesJacobian) else joint

    def same_random_numbers(
        self, device: torch.device, method: Aggregator | LossWeighting | None
    ) -> AbstractContextManager[object]:
        """Within it all ranks draw the same random numbers, if the method draws any."""
        return nullcontext() if method is None or not draws(method) else same_random_numbers(self.ranks, method, device)

    @contextmanager
    def without_reduction(self) -> Iterator[None]:
        """Within it backward passes do not start DistributedDataParallel's own reduction.

        `torch.autograd.grad` does not run the hooks that start it. With `static_graph=True` the first pass does so
        nevertheless, unless the module remembers that one did, and would record that no parameter gets a gradient.
        """
        module: Any = self._module
        if module is None or not module.static_graph:
            yield
            return
        before = module._static_graph_delay_allreduce_enqueued
        module._static_graph_delay_allreduce_enqueued = True
        try:
            yield
        finally:
            module._static_graph_delay_allreduce_enqueued = before

    def _local(self, losses: Losses | TaskGradientAccumulator, arguments: Mapping[str, Any]) -> Jacobian:
        """The Jacobian of this rank's losses. The gradients are stored in another dtype only when they are reduced."""
        shared = arguments["shared"]
        if arguments["storage_dtype"] is not None:
            check_dtype("backward", arguments["storage_dtype"], "storage_dtype is")
        if self.sharded is not None and arguments["at"] is None:
            return self._of_sharded(losses, arguments)
        if arguments["at"] is None and not isinstance(losses, TaskGradientAccumulator):  # which refuse it
            arguments = {**arguments, "storage_dtype": None}
        if isinstance(losses, TaskGradientAccumulator | Tensor):
            return jacobian_of(losses, **arguments)
        entries = list(losses.values() if isinstance(losses, Mapping) else losses)
        if any(entry is not None for entry in entries):
            return jacobian_of(losses, **arguments)
        if shared is None:
            raise ValueError("backward: no task is present on this rank, expected shared= to say what the ranks share")
        return NoTasks(len(entries), shared_parameters(shared))

    def _of_sharded(self, losses: Losses | TaskGradientAccumulator, arguments: Mapping[str, Any]) -> Jacobian:
        """This rank's Jacobian of sharded parameters."""
        from mtlfast.distributed._fully_sharded import FullyShardedJacobian

        assert self.sharded is not None
        if isinstance(losses, TaskGradientAccumulator):
            raise ValueError("backward: got an accumulator of sharded parameters, expected losses of one forward pass")
        for name in ("features", "second"):
            if arguments[name] is not None:
                raise ValueError(f"backward: got {name}= beside sharded parameters, expected shared= and one batch")
        weighting = arguments["weighting"]
        present = present_losses(losses, may_be_closures=True)
        later = weighting is not None and (weighting.reads_norms or bool(present.closures))
        return FullyShardedJacobian(present, arguments["shared"], self.sharded, arguments["retain_graph"], later)

    def _beside(self, rows: StoredRows) -> int:
        """How many parameters the losses reach that this rank finds in its own graph alone."""
        if self.sharded is not None:
            return 0  # all ranks must have all tasks
        known = {id(parameter) for parameter in self._replicas or ()}
        return sum(isinstance(leaf, nn.Parameter) and id(leaf) not in known for leaf in rows.other_leaves)

    def _others(self, rows: StoredRows) -> list[Tensor] | None:
        """The parameters that are not shared and whose plain gradients are averaged; None if they are not known."""
        if self._replicas is None:
            return None
        known = {id(p) for p in (rows.below if isinstance(rows, FeaturesJacobian) else rows.parameters)}
        return [p for p in self._replicas if p.requires_grad and id(p) not in known]

    def _reduction(self, rows: StoredRows, aggregator: Aggregator, storage_dtype: torch.dtype | None) -> Reduction:
        """Pieces, unless the method needs whole gradients or decides about the gradients of one dtype alone."""
        if self.sharded is not None:
            from mtlfast.distributed._placed import Placed

            return Placed(rows.parameters, storage_dtype)
        of = AllReduced if _needs_whole(aggregator) else Scattered
        return of(self.ranks, rows.parameters, storage_dtype)


def _needs_whole(aggregator: Aggregator) -> bool:
    """Whether the method reads the gradients themselves, and not element by element."""
    return aggregator.reads in (Reads.ROWS, Reads.STATE) and not aggregator.by_element


def _kinds(parameters: Sequence[Tensor]) -> str:
    return repr([(*parameter.shape, parameter.dtype) for parameter in parameters])


def _readable(
    losses: Losses | TaskGradientAccumulator,
) -> tuple[Losses | TaskGradientAccumulator, tuple[str, ...] | None]:
    """The losses in a form that can be read twice, and the names of all tasks if they have any."""
    if isinstance(losses, TaskGradientAccumulator):
        return losses, None
    if isinstance(losses, Mapping):
        return losses, tuple(map(str, losses))
    return list(losses) if isinstance(losses, Iterable) and not isinstance(losses, Tensor) else losses, None


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
