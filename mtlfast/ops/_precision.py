"""How exact the sums of the Gram matrix are."""

import torch

from mtlfast.task_gradients import TaskGradients

# With so many tasks memory is slower than exact sums. With so many elements a task exact sums take little time.
EXACT_TASKS, EXACT_ELEMENTS = 4, 4 * 2**20
DOUBLE_EPS = torch.finfo(torch.float64).eps
OF_ROUNDING = {dtype: torch.finfo(dtype).eps ** 2 for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def check_precision(caller: str, precision: str | None) -> None:
    """Raises unless `precision` is "exact", "fast" or None."""
    if precision not in (None, "exact", "fast"):
        raise ValueError(f"{caller}: precision is {precision!r}, expected 'exact', 'fast' or None")


def exact_sums(op: str, grads: TaskGradients, precision: str | None = None) -> bool:
    """Whether the products of these gradients are summed exactly.

    Args:
        op: the name that an error begins with.
        grads: the task gradients. Their K, P and dtype decide, and never their device.
        precision: "exact", "fast", or None, which is exact for K <= 4 or P <= 4 * 2**20. float64 gradients are always
            summed in float64.

    Raises:
        ValueError: `precision` is none of these.
    """
    check_precision(op, precision)
    if precision is not None and grads.dtype != torch.float64:
        return precision == "exact"
    return grads.dtype == torch.float64 or grads.num_tasks <= EXACT_TASKS or grads.whole_numel() <= EXACT_ELEMENTS


def sum_rtol(dtype: torch.dtype, exact: bool) -> float:
    """The largest error of an entry of G at P = 1e9, relative to the sum of |a_i b_i|.

    Args:
        dtype: the dtype of the gradients.
        exact: whether their products are summed exactly (`exact_sums`).
    """
    return 1e-13 if exact or dtype == torch.float64 else 1e-6


def product_rtol(grads: TaskGradients, precision: str | None = None) -> float:
    """The relative precision of the dot product of two of these gradients.

    It covers the error of the sum and the rounding of the gradients themselves. A gradient that is a rounded sum of
    others differs from their span by an eigenvalue of about four times the square of the unit roundoff.
    """
    if grads.dtype == torch.float64:
        return DOUBLE_EPS
    return max(sum_rtol(grads.dtype, exact_sums("gram", grads, precision)), OF_ROUNDING[grads.dtype])
