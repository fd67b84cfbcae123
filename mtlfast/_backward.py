"""`mtlfast.backward`: K backward passes, surgery on the shared parameters, plain gradients for everything else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mtlfast import _native, ops
from mtlfast._step_result import StepResult
from mtlfast.aggregation import Aggregator, GramAggregator, RowsJacobian, Step
from mtlfast.jacobian._graph import reached_leaves
from mtlfast.ops.combine import write
from mtlfast.task_gradients import Rows, TaskGradients
from mtlfast.weighting import LossWeighting


def backward(
    losses: Sequence[Tensor | None] | Tensor,
    aggregator: Aggregator,
    *,
    shared: Iterable[Tensor],
    weighting: LossWeighting | None = None,
    loss_scale: float | Tensor | None = None,
    retain_graph: bool = False,
    diagnostics: bool = False,
    allow_local: bool = False,
) -> StepResult:
    """Puts the aggregated gradient in `.grad` of the shared parameters; call it in place of `loss.backward()`.

    Every other leaf that the losses reach (heads, most often) gets its own plain gradient, the sum over the tasks.
    Gradients are added to an existing `.grad`, as `.backward()` does. All are held back until the last backward pass
    and the aggregation have succeeded: an error leaves every `.grad` as it was. Frozen parameters, and those that no
    task reaches, are left alone.

    Args:
        losses: K scalar losses of one forward pass (list, tuple or a [K] tensor). None: that task is absent.
        aggregator: how the shared parameters' K gradients become one.
        shared: the parameters that tasks share, leaf tensors; those that do not require grad are passed over.
        weighting: each loss is multiplied by its derivative of the weighted loss before its backward pass, so that the
            aggregator, and the heads, see weighted losses; parameters that the weighting learns get its own gradient.
        loss_scale: what the losses were multiplied by (a GradScaler's scale, 1/N of an accumulation over N
            micro-batches, or their product), for methods with an absolute norm and for the weighting, which sees the
            losses without it.
        retain_graph: keep the graph for another backward pass; else it is freed with the last task.
        diagnostics: compute the Gram matrix for the result even if the aggregator does not need it.
        allow_local: let each rank of a process group aggregate its own gradients, which differ from rank to rank.

    Returns:
        StepResult: weights, Gram matrix, norms, cosines and losses of this step, as device tensors.

    Raises:
        ValueError, TypeError: a loss or parameter does not fit.
        RuntimeError: a process group of several ranks is initialised, and `allow_local` is not set.

    Memory: the K gradients of the shared parameters, and nothing of their size beside them where `.grad` is None and
    autograd's own tensors can become it. Cost: K backward passes, then the aggregator's.
    """
    if not isinstance(aggregator, Aggregator):
        raise TypeError(
            f"backward: aggregator is a {type(aggregator).__name__}, expected a mtlfast.aggregation.Aggregator"
        )
    if weighting is not None and not isinstance(weighting, LossWeighting):
        raise TypeError(
            f"backward: weighting is a {type(weighting).__name__}, expected a mtlfast.weighting.LossWeighting"
        )
    _refuse_ranks(allow_local)
    present = _present_losses(losses)
    parameters = _shared_parameters(shared)
    tasks, values = tuple(present), list(present.values())

    leaves = reached_leaves(values)
    reached = {id(leaf) for leaf in leaves}
    trunk = [parameter for parameter in parameters if id(parameter) in reached]
    if not trunk:
        raise ValueError(
            f"backward: the losses reach none of the {len(parameters)} shared parameters, expected at least one"
        )
    shared_ids = {id(parameter) for parameter in trunk}
    others = [leaf for leaf in leaves if id(leaf) not in shared_ids]

    stacked = torch.stack([loss.detach() for loss in values])
    loss_weights: Tensor | None = None
    learned: list[tuple[Tensor, Tensor]] = []
    if weighting is not None:
        loss_weights, learned = _weigh_losses(weighting, stacked, tasks, len(losses), loss_scale)
    rows, plain = _task_rows(values, trunk, others, retain_graph, loss_weights)
    step = Step(len(values), stacked, loss_scale, None if len(tasks) == len(losses) else tasks)
    with torch.no_grad():
        mine = _exclusive(rows)
        plain_ready = _ready(others, plain, _exclusive((plain,)))
        grads = TaskGradients.from_rows(rows)
        if isinstance(aggregator, GramAggregator):
            weights, gram = aggregator.weigh(RowsJacobian(grads), step, need_gram=diagnostics)
            write_combined(trunk, grads, weights, mine)
        else:
            weights, gram = None, ops.gram(grads) if diagnostics else None
            directions = aggregator.direction(grads, step)
            plain_ready += _ready(trunk, directions, [False] * len(trunk))
        for parameter, gradient in [*plain_ready, *learned]:
            _add(parameter, gradient)
    return StepResult(losses=stacked, tasks=tasks, weights=weights, gram=gram, loss_weights=loss_weights)


def _refuse_ranks(allow_local: bool) -> None:
    distributed = torch.distributed
    if allow_local or not (distributed.is_available() and distributed.is_initialized()):
        return
    if (ranks := distributed.get_world_size()) > 1:
        raise RuntimeError(
            f"backward: {ranks} ranks are initialised, and surgery on each rank's own gradients lets replicas drift "
            "apart; expected one rank, or allow_local=True"
        )


def _present_losses(losses: Sequence[Tensor | None] | Tensor) -> dict[int, Tensor]:
    """Task index -> loss, for the tasks that are there."""
    if isinstance(losses, Tensor) and losses.dim() != 1:
        raise ValueError(
            f"backward: losses is a tensor of shape {list(losses.shape)}, expected [K] or a list of scalars"
        )
    present: dict[int, Tensor] = {}
    for k, loss in enumerate(losses):
        if loss is None:
            continue
        if not isinstance(loss, Tensor):
            raise TypeError(f"backward: loss {k} is a {type(loss).__name__}, expected a scalar Tensor or None")
        if loss.numel() != 1:
            raise ValueError(f"backward: loss {k} has shape {list(loss.shape)}, expected a scalar")
        if not loss.requires_grad:
            raise ValueError(f"backward: loss {k} does not require grad, expected one that depends on parameters")
        present[k] = loss.reshape(()) if loss.dim() else loss
    if not present:
        raise ValueError(f"backward: got {len(losses)} losses, none of them present, expected at least one")
    return present


def _shared_parameters(shared: Iterable[Tensor]) -> list[Tensor]:
    """The shared parameters that want a gradient."""
    if isinstance(shared, Tensor):
        raise TypeError("backward: shared is a Tensor, expected a list of parameters")
    everything = list(shared)
    seen: dict[int, int] = {}
    for i, parameter in enumerate(everything):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"backward: shared {i} is a {type(parameter).__name__}, expected a parameter")
        if not parameter.is_leaf:
            raise ValueError(
                f"backward: shared {i} is the result of an operation, expected a parameter (a leaf tensor)"
            )
        if (earlier := seen.setdefault(id(parameter), i)) != i:
            raise ValueError(f"backward: shared {i} is shared {earlier} again, expected each parameter once")
    wanted = [parameter for parameter in everything if parameter.requires_grad]
    if not wanted:
        raise ValueError(
            f"backward: shared has {len(everything)} parameters, none that requires grad, expected at least one "
            "(a generator is empty after its first use)"
        )
    return wanted


def _weigh_losses(
    weighting: LossWeighting, losses: Tensor, tasks: tuple[int, ...], number: int, loss_scale: float | Tensor | None
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The derivative of the weighted loss by each task's, [K]; and the gradients of what the weighting learns."""
    scale = 1.0 if loss_scale is None else loss_scale
    with torch.enable_grad():
        values = (losses / scale).requires_grad_()
        total = weighting(values, tasks=None if len(tasks) == number else tasks)
        parameters: list[Tensor] = [p for p in weighting.parameters() if p.requires_grad]
        weights, *gradients = torch.autograd.grad(total, [values, *parameters], allow_unused=True)
    learned = [(p, scale * g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
    return (torch.zeros_like(losses) if weights is None else weights), learned


def _task_rows(
    losses: Sequence[Tensor],
    trunk: Sequence[Tensor],
    others: Sequence[Tensor],
    retain_graph: bool,
    loss_weights: Tensor | None,
) -> tuple[Rows, list[Tensor | None]]:
    """K backward passes: each task's gradients of the trunk, and the other leaves' gradients summed over the tasks."""
    rows = []
    plain: list[Tensor | None] = [None] * len(others)
    inputs, T = [*trunk, *others], len(trunk)
    for k, loss in enumerate(losses):
        last = k == len(losses) - 1
        weight = None if loss_weights is None else loss_weights[k].to(loss.dtype)
        gradients = torch.autograd.grad(loss, inputs, weight, retain_graph=retain_graph or not last, allow_unused=True)
        rows.append(gradients[:T])
        _add_each(plain, gradients[T:])
        del gradients  # what is held twice cannot become a .grad
    return tuple(rows), plain


def _add_each(totals: list[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    for i, gradient in enumerate(gradients):
        before = totals[i]
        if gradient is not None:
            totals[i] = gradient if before is None else before + gradient


def _exclusive(rows: Sequence[Sequence[Tensor | None]]) -> list[bool]:
    """For each tensor: may its gradients be kept and written to, because nothing but `rows` holds them?"""
    native = _native.module()
    if native is None:
        return [False] * len(rows[0])
    alone: list[bool] = native.exclusive(rows)
    return alone


def write_combined(trunk: Sequence[Tensor], grads: TaskGradients, weights: Tensor, mine: Sequence[bool]) -> None:
    """`.grad` += w J for the shared parameters; where it is None, a task's own tensors become it if they may."""
    examples = [example for example in grads.examples() if example is not None]
    current = [parameter.grad for parameter in trunk if parameter.grad is not None]
    if len(current) == len(trunk) and all(map(_lies_as, examples, current)):
        ops.combine(grads, weights, out=current, accumulate=True)
        return
    out = None
    if not current:
        out = [example if alone else torch.empty_like(example) for example, alone in zip(examples, mine, strict=True)]
    directions = write(grads, weights, out) if out is not None else ops.combine(grads, weights)
    for parameter, gradient in _ready(trunk, directions, [True] * len(trunk)):
        _add(parameter, gradient)


def _ready(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], mine: Sequence[bool]
) -> list[tuple[Tensor, Tensor]]:
    """Each parameter with a gradient that can become its `.grad`: memory of its own, laid out as the parameter."""
    ready = []
    for parameter, gradient, alone in zip(parameters, gradients, mine, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None and not (alone and _lies_as(gradient, parameter)):
            gradient = torch.empty_like(parameter, requires_grad=False).copy_(gradient)
        ready.append((parameter, gradient))
    return ready


def _add(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)


def _lies_as(gradient: Tensor, other: Tensor) -> bool:
    """Have the two tensors one layout, ignoring dimensions of one element?"""
    triples = zip(gradient.shape, gradient.stride(), other.stride(), strict=True)
    return gradient.dtype == other.dtype and all(size <= 1 or a == b for size, a, b in triples)
