"""How exact the sums of the Gram matrix are."""

import torch

from mtlfast.task_gradients import TaskGradients

# Exact sums hide behind memory for so many tasks, and take little time for so many elements a task.
EXACT_TASKS, EXACT_ELEMENTS = 4, 4 * 2**20


def exact_sums(op: str, grads: TaskGradients, precision: str | None = None) -> bool:
    """Are the products of these gradients summed exactly?

    Args:
        op: for the error.
        grads: the task gradients; what counts is their K, P and dtype, never the device.
        precision: "exact", "fast", or None: exact for K <= 4 or P <= 4 * 2**20. float64 gradients know one way alone.

    Raises:
        ValueError: another precision.
    """
    if precision not in (None, "exact", "fast"):
        raise ValueError(f"{op}: precision is {precision!r}, expected 'exact', 'fast' or None")
    if precision is not None and grads.dtype != torch.float64:
        return precision == "exact"
    return grads.dtype == torch.float64 or grads.num_tasks <= EXACT_TASKS or grads.numel() <= EXACT_ELEMENTS


def sum_rtol(dtype: torch.dtype, exact: bool) -> float:
    """The most that an entry of G errs by at P = 1e9, relative to its sum of |a b|.

    Args:
        dtype: of the gradients.
        exact: are their products summed exactly (`exact_sums`)?
    """
    return 1e-13 if exact or dtype == torch.float64 else 1e-6
