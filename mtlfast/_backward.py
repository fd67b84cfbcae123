"""`mtlfast.backward`: K backward passes, surgery on the shared parameters, plain gradients for everything else."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast import _grad
from mtlfast._arguments import Losses, Shared, check_methods, present_losses, refuse_ranks, shared_parameters
from mtlfast._step_result import StepResult
from mtlfast.aggregation import Aggregator, GramAggregator, Step
from mtlfast.aggregation._step import plain_number
from mtlfast.jacobian import StoredJacobian
from mtlfast.weighting import LossWeighting


def backward(
    losses: Losses,
    aggregator: Aggregator,
    *,
    shared: Shared,
    weighting: LossWeighting | None = None,
    loss_scale: float | Tensor | None = None,
    retain_graph: bool = False,
    diagnostics: bool = False,
    allow_local: bool = False,
    precision: str | None = None,
) -> StepResult:
    """Computes each task's gradient, aggregates those of the shared parameters, and adds the results to `.grad`.

    Call it in place of `sum(losses).backward()`. Each shared parameter gets the aggregated gradient. Every other
    parameter that the losses reach, such as those of a task's head, gets its plain gradient, summed over the tasks.
    Parameters that are frozen or that no task reaches are left alone. Gradients are added to an existing `.grad`, as
    `.backward()` does. The call counts as a training step even if the aggregator or the weighting is in eval mode.

    An error leaves every `.grad` and the state of the aggregator and the weighting as they were. An aggregator refuses
    what it cannot work with before the first backward pass.

    A task whose loss is None is absent from the step. A task is left out of the shared update if the weighting gives
    its loss a weight of exactly 0, or if it reaches none of the shared parameters. Its weight is then 0, and the other
    tasks get the weights of a step without it. On the CPU a loss weight of 0 saves the task's backward pass. On a GPU
    the host cannot read the loss weight without waiting, so the backward pass runs: the task's head gets zeros where
    `.grad` would have stayed None, and a NaN in its loss or gradients still reaches `.grad`. `StepResult.tasks` lists
    the task on both.

    To accumulate over N micro-batches, divide each loss by N and pass `loss_scale=1 / N`. Each micro-batch is then
    aggregated by itself, and `.grad` holds the sum of the N aggregated gradients.

    Losses may be computed on several CUDA streams. Their gradients are dropped when the step has been queued, so what
    such a stream runs next must wait for the current one (`wait_stream`), as it must anyway to read new parameters.

    Args:
        losses: K scalar losses of one forward pass, as a list, a tuple, a generator, a dict by name or a tensor [K].
            An entry of None stands for an absent task.
        aggregator: the method that makes one gradient of the shared parameters' K gradients.
        shared: the parameters that the tasks share: a module, its parameters, or a list of both. They must be leaf
            tensors and may have several dtypes. Those that do not require grad are skipped.
        weighting: a loss weighting, which makes one weighted loss of the K losses. Each task's loss is multiplied by
            the derivative of the weighted loss with respect to it, before its backward pass. So the aggregator and the
            heads see weighted losses. Parameters that the weighting learns get the gradient of the weighted loss.
        loss_scale: the factor above 0 by which the losses were multiplied: the scale of a GradScaler, 1/N when
            gradients are accumulated over N micro-batches, or the product of both. Methods whose weights depend on the
            size of the gradients need it. The weighting sees the losses without it.
        retain_graph: keep the graph for another backward pass. By default the last task's backward pass frees it.
        diagnostics: compute the Gram matrix for the result even if the aggregator does not need it.
        precision: how the Gram matrix of float32, bfloat16 and float16 gradients is summed: "exact" or "fast", as in
            `mtlfast.ops.gram`. None chooses "exact" if the method decides about ranks, convex hulls or
            feasibility, or K <= 4, or there are at most 4 * 2**20 shared elements; otherwise "fast".
        allow_local: permit several ranks of a process group to aggregate each its own gradients. These differ from
            rank to rank, so that the replicas drift apart.

    Returns:
        StepResult: weights, Gram matrix, norms, cosines and losses of this step, as tensors on the gradients' device.

    Raises:
        ValueError, TypeError: a loss or a parameter does not fit, a shared parameter's gradient is sparse, a parameter
            is sharded over processes or hidden by a reentrant checkpoint, or a method refuses the step.
        RuntimeError: a process group of several ranks is initialised and `allow_local` is False.

    Memory: the K gradients of the shared parameters. Where `.grad` is None and autograd's own tensors can become
    `.grad`, nothing else of that size is allocated. Cost: K backward passes and the aggregator's cost. The weights of
    up to 8192 tasks on the CPU and 512 on a GPU are computed natively. With more tasks the plain-PyTorch reference
    computes them, on a GPU with a warning.

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
    check_methods(aggregator, weighting)
    refuse_ranks("backward", allow_local)
    number, tasks, values = present_losses(losses)
    jacobian = StoredJacobian(values, shared_parameters(shared), retain_graph)
    stacked = torch.stack([loss.detach() for loss in values])
    present = None if len(tasks) == number else tasks
    step = Step(len(values), stacked, plain_number(loss_scale), present, precision=precision)
    aggregator.check(step, jacobian)

    weighed = (
        None if weighting is None else weighting.step_weights(stacked, tasks=step.tasks, loss_scale=step.loss_scale)
    )
    loss_weights = None if weighed is None else weighed.loss_weights
    jacobian.obtain(loss_weights)
    learned = [] if weighed is None else _grad.prepared_pairs(weighed.learned)
    bring_back = aggregator.snapshot()
    try:
        with torch.no_grad():
            if isinstance(aggregator, GramAggregator):
                weights, gram = aggregator.weigh(jacobian, step, need_gram=diagnostics)
                jacobian.write(weights)
            else:
                weights, gram = None, jacobian.gram(precision) if diagnostics else None
                step = step._replace(rtol=jacobian.num_tasks * jacobian.product_rtol(precision), mask=jacobian.mask)
                jacobian.put(aggregator.direction(jacobian.rows(), step))
            if weighed is not None:
                _grad.commit(learned)
                weighed.commit()
    except BaseException:
        bring_back()
        raise
    return StepResult(
        losses=stacked, tasks=tasks, weights=weights, gram=gram, loss_weights=loss_weights, plan=jacobian.plan
    )
