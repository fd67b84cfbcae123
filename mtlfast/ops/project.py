"""PCGrad's projected gradients."""

import torch
from torch import Tensor

from mtlfast.ops._check import check_grads
from mtlfast.ops.combine import combine
from mtlfast.ops.gram import gram
from mtlfast.ops.solve import solve
from mtlfast.task_gradients import TaskGradients


def project(grads: TaskGradients, order: Tensor | None = None) -> TaskGradients:
    """Removes from each task's gradient its conflicts with the other tasks, as PCGrad does (Yu et al., NeurIPS 2020).

    Each gradient is compared with the other tasks' original gradients one after another. Where the dot product is
    negative, the gradient loses its component along the other one. The sum of the results is PCGrad's update.

    Args:
        grads: K tasks x T tensors, P elements for each task.
        order: int64 [K, K-1] on the gradients' device. Row i names the other tasks in the order in which gradient i is
            compared with them. None: ascending.

    Returns:
        TaskGradients: the K projected gradients, in new memory.

    Raises:
        ValueError, TypeError: an argument does not fit. Whether each row of `order` names every other task once is
            checked on the CPU only, because on a GPU the check would wait for the device.

    Cost: two reads of K * P, one write of K * P. Deterministic.
    """
    check_grads("project", grads)
    keys = {} if order is None else {"keys": keys_of_order(order, grads)}
    coefficients = solve(gram(grads), "pcgrad_coefficients", inputs=keys)
    stacked = combine(grads, coefficients)
    columns = [(None,) * grads.num_tasks if x is None else x.unbind(0) for x in stacked]
    rows = list(zip(*columns, strict=True)) if columns else [()] * grads.num_tasks
    return TaskGradients.from_rows(rows)


def keys_of_order(order: Tensor, grads: TaskGradients) -> Tensor:
    """Sorting keys [K, K] with `keys[i, order[i, n]] = n`."""
    K = grads.num_tasks
    if not isinstance(order, Tensor) or order.dtype != torch.int64:
        raise TypeError(f"project: order is {getattr(order, 'dtype', type(order).__name__)}, expected an int64 Tensor")
    if order.shape != (K, K - 1):
        raise ValueError(f"project: order has shape {list(order.shape)}, expected {[K, K - 1]}")
    if order.device != grads.device:
        raise ValueError(f"project: order is on {order.device}, expected {grads.device} as the task gradients")
    if order.device.type == "cpu":
        for i, row in enumerate(order.tolist()):  # host: a CPU tensor
            if sorted(row) != [j for j in range(K) if j != i]:
                raise ValueError(f"project: order row {i} is {row}, expected each task but {i} once")
    keys = torch.zeros(K, K, dtype=torch.float64, device=order.device)
    turns = torch.arange(K - 1, dtype=torch.float64, device=order.device).expand(K, K - 1)
    return keys.scatter_(1, order, turns)
