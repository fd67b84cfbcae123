"""How exact the sums of the Gram matrix are."""

import torch

from mtlfast.task_gradients import TaskGradients

# Exact sums hide behind memory for so many tasks, and take little time for so many elements a task.
EXACT_TASKS, EXACT_ELEMENTS = 4, 4 * 2**20
DOUBLE_EPS = torch.finfo(torch.float64).eps
OF_ROUNDING = {dtype: torch.finfo(dtype).eps ** 2 for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def check_precision(caller: str, precision: str | None) -> None:
    """One sentence if there is no such precision."""
    if precision not in (None, "exact", "fast"):
        raise ValueError(f"{caller}: precision is {precision!r}, expected 'exact', 'fast' or None")


def exact_sums(op: str, grads: TaskGradients, precision: str | None = None) -> bool:
    """Are the products of these gradients summed exactly?

    Args:
        op: for the error.
        grads: the task gradients; what counts is their K, P and dtype, never the device.
        precision: "exact", "fast", or None: exact for K <= 4 or P <= 4 * 2**20. float64 gradients know one way alone.

    Raises:
        ValueError: another precision.
    """
    check_precision(op, precision)
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


def product_rtol(grads: TaskGradients, precision: str | None = None) -> float:
    """The relative precision of a product of two of these gradients: of its sum, and of the gradients' own rounding.

    A gradient that is a sum of others, rounded, has its part beside them at four times the square of the unit roundoff.
    """
    if grads.dtype == torch.float64:
        return DOUBLE_EPS
    return max(sum_rtol(grads.dtype, exact_sums("gram", grads, precision)), OF_ROUNDING[grads.dtype])
