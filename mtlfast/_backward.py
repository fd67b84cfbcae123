"""`mtlfast.backward`: K backward passes, surgery on the shared parameters, plain gradients for everything else."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtlfast import _grad
from mtlfast._arguments import Shared, check_methods, norm_layers
from mtlfast._groups import GroupsArgument, partition
from mtlfast._loss_scale import plain_number
from mtlfast._losses import Losses
from mtlfast._step_result import StepResult
from mtlfast.aggregation import Aggregator, GramAggregator, Reads, Step
from mtlfast.distributed import over_ranks, stored_over_ranks
from mtlfast.jacobian import Jacobian, TaskGradientAccumulator
from mtlfast.jacobian._choose import jacobian_of
from mtlfast.jacobian._features import Features
from mtlfast.weighting import LossWeighting
from mtlfast.weighting._step import StepWeights


def backward(
    losses: Losses | TaskGradientAccumulator,
    aggregator: Aggregator,
    *,
    shared: Shared | None = None,
    features: Features | None = None,
    at: Features | None = None,
    weighting: LossWeighting | None = None,
    loss_scale: float | Tensor | None = None,
    retain_graph: bool = False,
    diagnostics: bool = False,
    allow_local: bool = False,
    precision: str | None = None,
    storage_dtype: torch.dtype | None = None,
    second: Losses | None = None,
    groups: GroupsArgument | None = None,
    jacobian: str | None = None,
    memory_budget: int | None = None,
    mixing: Tensor | None = None,
    process_group: object = None,
) -> StepResult:
    """Computes each task's gradient, aggregates those of the shared parameters, and adds the results to `.grad`.

    Call it in place of `sum(losses).backward()`. Each shared parameter gets the aggregated gradient. Every other
    parameter that the losses reach, such as those of a task's head, gets its plain gradient, summed over the tasks.
    Parameters that are frozen or that no task reaches are left alone. Gradients are added to an existing `.grad`, as
    `.backward()` does. The call counts as a training step even if the aggregator or the weighting is in eval mode.

    There are four ways to compute the task gradients. The first three give the same
    result, for the same losses, micro-batches of one size, and no BatchNorm or dropout:

    - losses of one forward pass: one backward pass for each task;
    - closures that return the losses: a forward and a backward pass for each task, whose graph is freed before the next
      task's forward pass, as for tasks with a data loader each;
    - a `TaskGradientAccumulator`: task gradients added up over micro-batches;
    - `at=features`: the gradients of features in place of those of parameters, and one backward pass below them.

    An error leaves every `.grad` and the state of the aggregator and the weighting as they were, but for what the
    backward pass below `at=` updates by itself. An aggregator refuses what it cannot work with before the first
    backward pass.

    Tensor hooks (`register_hook`) of a parameter see each task's gradient, and what they return counts. Hooks of
    `register_post_accumulate_grad_hook` see the final gradient, once, after everything else: they may step an optimizer
    and set `.grad` to None. An error in one of them comes after the step, which stays. At and below `at=` all hooks run
    in the one backward pass, and an error there undoes the step.

    A task whose loss is None is absent from the step. A task is left out of the shared update if the weighting gives
    its loss a weight of exactly 0, or if it reaches none of the shared parameters. Its weight is then 0, and the other
    tasks get the weights of a step without it. On the CPU a loss weight of 0 saves the task's backward pass. On a GPU
    the host cannot read the loss weight without waiting, so the backward pass runs: the task's head gets zeros where
    `.grad` would have stayed None, and a NaN in its loss or gradients still reaches `.grad`. `StepResult.tasks` lists
    the task on both.

    Losses may be computed on several CUDA streams. Their gradients are dropped when the step has been queued, so what
    such a stream runs next must wait for the current one (`wait_stream`), as it must anyway to read new parameters.

    Args:
        losses: K scalar losses of one forward pass, as a list, a tuple, a generator, a dict by name or a tensor [K]; or
            K closures in such a form, functions without arguments that return a scalar loss, which are called with
            gradients on; or a `TaskGradientAccumulator`. An entry of None stands for an absent task. The names of a
            dict appear in errors and in `StepResult.names`.
        aggregator: the method that makes one gradient of the shared parameters' K gradients.
        shared: the parameters that the tasks share: a module, its parameters, or a list of both. They must be leaf
            tensors and may be of several dtypes and on several devices: G is then the sum over all, on the device of
            the first. Those that do not require grad are skipped. The gradients of an embedding with `sparse=True` stay
            sparse. They are held by the indices that at least one task touches, and so is `.grad`. On a GPU the host
            waits for the device, which alone knows how many these are. None: the leaf tensors that more than one loss
            of this step reaches, which one walk of the graph finds. Those are the parameters that the tasks share, and
            an input that requires grad. One task alone shares none.
        features: the tensors that the trunk computed for the heads, as a tensor, a list or a dict, in place of
            `shared`. All parameters behind them are shared.
        at: such features, at which surgery takes place. The weights follow from the K gradients of the features, and
            their weighted sum goes through the trunk in one ordinary backward pass. That costs one backward pass of
            the trunk in place of K, and works where its parameters have no `.grad`, such as embedding tables that
            update themselves in the backward pass. It approximates: the Gram matrix of the features' gradients stands
            in for that of the parameters' gradients, as in MGDA-UB. The two agree on conflicts only as far as the
            trunk's Jacobian keeps angles and lengths. Element-wise methods work on the features' gradients.
        weighting: a loss weighting, which makes one weighted loss of the K losses. Each task's gradients are multiplied
            by the derivative of the weighted loss with respect to its loss. So the aggregator and the heads see
            weighted losses. Parameters that the weighting learns get the gradient of the weighted loss. A
            weighting that reads the norms of the task gradients gets those of this step's backward passes, for one more
            read of the gradients. The gradients of heads are then kept apart by task until the end.
        loss_scale: the factor above 0 by which the losses were multiplied: the scale of a GradScaler, 1/N when the
            gradients of N micro-batches are aggregated one by one and added in `.grad`, or the product of both. Methods
            whose weights depend on the size of the gradients need it. The weighting sees the losses without it.
        retain_graph: keep the graph for another backward pass. By default the last task's backward pass frees it.
            Closures that share a part of their graphs need it.
        diagnostics: compute the Gram matrix for the result even if the aggregator does not need it.
        precision: how the Gram matrix of float32, bfloat16 and float16 gradients is summed: "exact" or "fast", as in
            `mtlfast.ops.gram`. None chooses "exact" if the method decides about ranks, convex hulls or
            feasibility, or K <= 4, or there are at most 4 * 2**20 shared elements; otherwise "fast".
        storage_dtype: the dtype in which the K gradients of the shared parameters are stored, from the end of each
            task's backward pass on: float32, float64, bfloat16 or float16. With torch.bfloat16 those of float32
            parameters take K * P * 2 bytes in place of K * P * 4. Each stored element is rounded, by up to 2**-9 of its
            size in bfloat16. The Gram matrix is that of the rounded gradients, and decisions about ranks take the
            precision of this dtype. `.grad` keeps the dtype of its parameter. float16 overflows above 65504. None: the
            dtype of each parameter.
        second: the losses of another, independent batch, in the same form and for the same tasks, for methods whose
            weights come from the products of two batches' gradients (MoDo, SDMGrad). Shared parameters get the weighted
            sum of the mean of the two batches' gradients, other parameters the mean of their plain gradients.
            `StepResult.losses` and what a weighting sees are the means of the losses.
        groups: a partition of the shared parameters, each part of which gets weights of its own, from its own Gram
            matrix; for methods with weights. One of:

            - "tensor": each parameter; "module": the parameters of each module; "lora": LoRA's A, its B and the rest;
            - a depth: the modules so many levels below `shared`, as names with dots count them;
            - a list of module names and classes;
            - an optimizer: its parameter groups;
            - a dict of groups by name: names, parameters or modules each;
            - a function that returns the name of a parameter's group for the parameter's name.

            All but "tensor", an optimizer and parameters need names: give `shared` as a module, or as
            `dict(module.named_parameters())`. A task that reaches nothing of a group is absent in it. A gradient that
            is NaN in some parameters makes the update of their groups NaN, and leaves the updates of the other groups
            as they are without it. State that a method keeps belongs to the groups by name, so keep the order of
            parameters that have no names. Decisions about ranks take the precision of the coarsest dtype in any group.
            None: one surgery for all shared parameters.
        jacobian: how the gradients of the shared parameters are computed, for losses of one forward pass. None:
            "auto" on a CPU without `storage_dtype`, and beside `mixing` or `memory_budget`; else "stored", because
            "auto" is not yet measured on a GPU.

            - "stored": one backward pass for each task, whose K gradients are all kept.
            - "implicit": of linear layers and embeddings no task's gradient is computed. The backward passes stop at
              the gradients at their outputs, from which the Gram matrix and the update follow exactly, as from the
              stored gradients but for rounding. That takes less time and memory where a layer sees few rows (samples
              times tokens) beside its width. A layer for which it would take more FLOPs, and every parameter of
              another kind, is stored. Element-wise methods are refused.
            - "auto": "implicit" where that saves at least 5 % of the weight gradients' FLOPs. "stored" otherwise, for
              element-wise methods, and where all tasks' gradients together have fewer than 2**20 elements. Closures,
              accumulators, `at` and `second` have ways of their own.
            - "mixing": one backward pass for all tasks, beside `mixing` alone.

            `print(result.plan)` says for each layer what was chosen and why. With the environment variable
            MTLFAST_CHECK=1 each update of "implicit" or "mixing" is compared with an ordinary backward pass of the
            weighted losses.
        memory_budget: with "implicit" or "auto", the most bytes that the K gradients and what stands in place of them
            may take. Layers then take the way of less memory until all keep to it. With "mixing" the layers are
            computed in blocks, a pass each. A budget that cannot be kept, such as one below a single layer of a
            mixture, is refused, and "auto" runs K passes if these keep to it. A budget makes "auto" plan for small
            models too. None: no limit.
        mixing: tasks that are mixtures of the losses of samples, L_k = sum_s A[k, s] l_s. `losses` are then those of
            the samples, a tensor [S], and `mixing` is A, a tensor [K, S] of any real dtype that does not require grad,
            or [S] integers: each sample's task, or -1 for a sample of none; K is then the largest task plus 1. A task
            without samples keeps its place with a gradient of zero, with which MGDA's update is 0. One backward pass
            then holds the gradients of all tasks, if no sample's loss depends on another sample, as it does through a
            BatchNorm in training.
            `jacobian` None or "auto" takes that way where it pays and a probe finds that it is exact, and else K
            passes, with the reason in the plan. "mixing" refuses instead, and "implicit" and "stored" run K passes.
            `StepResult.losses` are those of the tasks.
        allow_local: permit several ranks of a process group to aggregate each its own gradients. These differ from
            rank to rank, so that the replicas drift apart.
        process_group: the ranks that train replicas of the parameters together, as a
            `torch.distributed.ProcessGroup`, or the DistributedDataParallel module, which also says what the replicas
            are. `shared` may be such a module as well. The step is then that of the mean of the ranks' losses: task
            gradients are averaged before surgery, all ranks compute the same weights, and `.grad` is the same on all.
            DistributedDataParallel's own reduction does not run. A task may be absent on some ranks, where it counts as
            a loss of 0. `docs/distributed.md` says more.

    Returns:
        StepResult: weights, Gram matrix, norms, cosines and losses of this step, as tensors on the gradients' device.

    Raises:
        ValueError, TypeError: an argument does not fit, a parameter is sharded over processes or hidden by a reentrant
            checkpoint that is not below `at=`, a method refuses the step, or ranks disagree about it.
        RuntimeError: several ranks are initialised, and neither `process_group` nor `allow_local` is given; or a rank
            does not take part in a collective.

    Memory of "stored": the K gradients of the shared parameters, or 2 K of them with `second`. Where `.grad` is None
    and autograd's own tensors can become `.grad`, nothing else of that size is allocated. With a `storage_dtype`: the K
    stored gradients, and one task's gradients, then the result, in the parameters' dtype. Sparse gradients: K times the
    places that any task touches. With `at`: the K gradients of the features, and a copy of each `.grad` that exists
    below them.

    Cost: K backward passes, of which "implicit" leaves parts out and for which "mixing" has one, and the aggregator's
    cost. The weights of up to 8192 tasks on the CPU and 512 on a GPU are
    computed natively. With more tasks the plain-PyTorch reference computes them, on a GPU with a warning.

    Example:
        Two tasks share the parameter `w`; their gradients, (1, 0) and (-1, 1), conflict.

        >>> import torch, mtlfast
        >>> from mtlfast.aggregation import PCGrad
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> losses = [w[0], w[1] - w[0]]
        >>> step = mtlfast.backward(losses, PCGrad(), shared=[w])
        >>> w.grad
        tensor([0.5000, 1.5000])
        >>> step.weights
        tensor([2.0000, 1.5000], dtype=torch.float64)
    """
    over, shared = over_ranks(shared, process_group, allow_local)
    with nullcontext() if over is None else over.together():
        check_methods(aggregator, weighting)
        if over is not None:
            jacobian = stored_over_ranks(jacobian, mixing)
        if jacobian is None and not (mixing is None and memory_budget is None):
            jacobian = "auto"
        whole = jacobian in (None, "auto") and aggregator.reads in (Reads.ROWS, Reads.STATE)
        if whole:
            if memory_budget is not None:
                raise ValueError(
                    f"backward: got memory_budget= beside {type(aggregator).__name__}, which needs the gradients of "
                    "all tasks in memory, expected None"
                )
            jacobian = "stored"
        arguments: dict[str, Any] = {
            "shared": shared,
            "features": features,
            "at": at,
            "retain_graph": retain_graph,
            "weighting": weighting,
            "second": second,
            "storage_dtype": storage_dtype,
            "way": jacobian,
            "memory_budget": memory_budget,
            "mixing": mixing,
        }
        J = jacobian_of(losses, **arguments) if over is None else over.jacobian(losses, aggregator, arguments)
        alike = nullcontext if over is None else partial(over.same_random_numbers, J.device)
        losses_known = J.losses is not None  # not before the closures run
        weigh_later = not losses_known or (weighting is not None and weighting.reads_norms)
        layers = norm_layers(weighting, J.parameters)
        J.groups = partition(groups, shared, J)
        step = Step(
            J.num_tasks,
            J.losses if losses_known else torch.zeros(J.num_tasks),  # the check does not read the values
            plain_number(loss_scale),
            J.present.places,
            precision=precision,
            groups=J.groups,
        )
        aggregator.check(step, J)
        if over is not None:
            over.same_settings(
                {
                    "loss_scale": step.loss_scale,
                    "precision": precision,
                    "diagnostics": diagnostics,
                    "storage_dtype": storage_dtype,
                    "groups": J.groups,
                }
            )

    with alike(weighting):
        weighed = None if weigh_later else _weigh(weighting, step)
    with nullcontext() if over is None else over.without_reduction():
        J.obtain(None if weighed is None else weighed.loss_weights)
    assert J.losses is not None
    if not losses_known:
        step = step._replace(losses=J.losses)
        layers = norm_layers(weighting, J.parameters)  # which may have been found only now
        J.groups = partition(groups, shared, J)
        step = step._replace(groups=J.groups)
        aggregator.check(step, J)
    if weigh_later:
        with alike(weighting):
            weighed = _weigh(weighting, step, J, layers)
        if weighed is not None:
            J.weigh(weighed.loss_weights)
    if weighed is not None:  # the aggregator sees weighted losses, as it sees their gradients
        step = step._replace(losses=J.losses * weighed.loss_weights)
    learned = [] if weighed is None else weighed.learned
    bring_back = aggregator.snapshot()
    try:
        with torch.no_grad(), alike(aggregator):
            pending = _grad.prepared_pairs(learned)
            if isinstance(aggregator, GramAggregator):
                weights, gram = aggregator.weigh(J, step, need_gram=diagnostics)
                J.write(weights)
            else:
                weights, gram = None, J.gram(precision) if diagnostics else None
                step = step._replace(rtol=J.num_tasks * J.product_rtol(precision), mask=J.mask)
                aggregator.check(step, J)  # whether gradients are sparse is known only now
                rows, step = aggregator.among_taking_part(J, step)
                direction = aggregator.targets(rows)
                finish = aggregator.prepare(rows, step, direction)
                del rows
                J.put(direction, finish=finish)
            _grad.commit(pending)
            if weighed is not None:
                weighed.commit()
    except BaseException:
        bring_back()
        raise
    _grad.call_hooks([*J.written, *(parameter for parameter, _ in learned)])
    plan = J.plan
    if whole and plan.way == "stored":
        plan = replace(plan, reason=f"{type(aggregator).__name__} needs the task gradients themselves")
    return StepResult(
        losses=J.losses,
        tasks=J.present.tasks,
        weights=weights,
        gram=gram,
        loss_weights=None if weighed is None else weighed.loss_weights,
        names=J.present.names,
        plan=plan,
        groups=None if J.groups is None else J.groups.names,
    )


def _weigh(
    weighting: LossWeighting | None,
    step: Step,
    J: Jacobian | None = None,
    layers: Sequence[Tensor] | None = None,
) -> StepWeights | None:
    """The loss weights of this step; None without a weighting. They may need norms, at `layers`, of the Jacobian."""
    if weighting is None:
        return None
    assert step.losses is not None
    norms = None
    if weighting.reads_norms:
        assert J is not None
        norms = J.norms_at(layers, weighting.norm_order) / (1.0 if step.loss_scale is None else step.loss_scale)
    return weighting.step_weights(step.losses, tasks=step.tasks, loss_scale=step.loss_scale, norms=norms)
