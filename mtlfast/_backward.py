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
    """Puts the aggregated gradient in `.grad` of the shared parameters; call it in place of `loss.backward()`.

    Every other leaf that the losses reach (heads, most often) gets its own plain gradient, the sum over the tasks.
    Gradients are added to an existing `.grad`, as `.backward()` does. An error leaves every `.grad`, the aggregator and
    the weighting as they were; what a method cannot work with it refuses before the first backward pass. Frozen
    parameters, and those that no task reaches, are left alone. It is a training step, whatever mode the methods are in.

    A task is absent from the step if its loss is None. It is absent from the shared update if its loss weight is
    exactly 0, or if it reaches none of the shared parameters: then its weight is 0 and the others' are those of a step
    without it. On the CPU that saves the task's backward pass. On a GPU a loss weight cannot be read without waiting:
    there its pass is made, its heads get zeros where `.grad` would stay None, and a NaN in its loss or gradients still
    reaches `.grad`. `StepResult.tasks` names it on both.

    To accumulate over N micro-batches, divide each loss by N and say `loss_scale=1 / N`. Each micro-batch then has its
    own surgery, and the weighted sum of all is in `.grad`.

    Args:
        losses: K scalar losses of one forward pass: a list, tuple, generator, dict of names or [K] tensor. None: that
            task is absent.
        aggregator: how the shared parameters' K gradients become one.
        shared: the parameters that tasks share: a module, its parameters, or a list of both. Leaf tensors, of one dtype
            or several; those that do not require grad are passed over.
        weighting: each loss is multiplied by its derivative of the weighted loss before its backward pass, so that the
            aggregator, and the heads, see weighted losses; parameters that the weighting learns get its own gradient.
        loss_scale: what the losses were multiplied by, above 0: a GradScaler's scale, 1/N of an accumulation over N
            micro-batches, or their product. Methods with an absolute norm need it, and the weighting sees the losses
            without it.
        retain_graph: keep the graph for another backward pass; else it is freed with the last task.
        diagnostics: compute the Gram matrix for the result even if the aggregator does not need it.
        precision: of the Gram matrix's sums of float32, bfloat16 and float16 products: "exact" or "fast", as in
            `mtlfast.ops.gram`. None: exact for a method that decides about ranks, hulls or feasibility, for K <= 4 and
            for up to 4 million elements; fast for others.
        allow_local: let each rank of a process group aggregate its own gradients, which differ from rank to rank.

    Returns:
        StepResult: weights, Gram matrix, norms, cosines and losses of this step, as device tensors.

    Raises:
        ValueError, TypeError: a loss or parameter does not fit, a shared parameter's gradient is sparse, a parameter is
            sharded over processes or hidden by a reentrant checkpoint, or a method refuses the step.
        RuntimeError: a process group of several ranks is initialised, and `allow_local` is not set.

    Memory: the K gradients of the shared parameters, and nothing of their size beside them where `.grad` is None and
    autograd's own tensors can become it. Cost: K backward passes, then the aggregator's. Weights of up to 8192 tasks on
    the CPU and 512 on a GPU are computed natively; beyond, the plain-PyTorch reference serves with a warning.
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
