"""The element-wise ops in plain PyTorch: trimmed means, and gradients kept by their sign."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mtlfast.task_gradients import TaskGradients

LOW = 0xFFFFFFFF


def trimmed_mean(
    grads: TaskGradients, trim_number: int, out: Sequence[Tensor | None] | None = None
) -> list[Tensor | None]:
    """The mean of each element's K gradients without the `trim_number` least and largest; NaN if one is not finite."""

    def of(column: Tensor, t: int) -> Tensor:
        kept = column.sort(dim=0).values[trim_number : len(column) - trim_number]
        return kept.mean(dim=0).where(column.isfinite().all(dim=0), torch.nan)

    return _each(grads, of, out)


def sign_purity(grads: TaskGradients, round_each: bool = False) -> list[Tensor | None]:
    """(1 + sum g / sum |g|) / 2; 0.5 where all gradients are 0, NaN where one is not finite.

    With `round_each` it is computed in the gradients' dtype, and NaN where all are 0.
    """

    if round_each:
        return _each(grads, lambda column, t: _rounded_purity(column), dtype=grads.dtype, computed_in=grads.dtype)
    wide = torch.float64 if grads.dtype == torch.float64 else torch.float32
    return _each(grads, lambda column, t: _purity(column), dtype=wide)


def _purity(column: Tensor) -> Tensor:
    size = column.abs().sum(dim=0)
    return torch.where(size == 0, 0.5, (1 + column.sum(dim=0) / size) / 2)


def _rounded_purity(column: Tensor) -> Tensor:
    return 0.5 * (torch.ones_like(column[0]) + column.sum(dim=0) / column.abs().sum(dim=0))


def grad_drop(
    grads: TaskGradients,
    seed: Tensor | None = None,
    uniform: Sequence[Tensor] | None = None,
    thresholds: Sequence[Tensor] | None = None,
    leak: Tensor | None = None,
    round_each: bool = False,
    out: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    """GradDrop with random numbers from a seed, with given ones, or, without either, what is kept on average."""
    dtype = grads.dtype if round_each else torch.float64
    share = torch.zeros(grads.num_tasks, dtype=dtype, device=grads.device) if leak is None else leak.to(dtype)
    first, examples = _first_columns(grads), grads.examples()

    def rounding_each(column: Tensor, t: int) -> Tensor:
        p = _rounded_purity(column) if thresholds is None else thresholds[t]
        assert uniform is not None
        total = torch.zeros_like(column[0])
        for row, of_row in zip(column, share, strict=True):
            kept = (p > uniform[t]) * (row > 0) + (p < uniform[t]) * (row < 0)
            total += (of_row + (1 - of_row) * kept) * row
        return total

    def of(column: Tensor, t: int) -> Tensor:
        p = _purity(column) if thresholds is None else thresholds[t].double()
        if uniform is None and seed is None:
            positive = p.clamp(0, 1)
            negative = 1 - positive
        else:
            u = _drawn_like(seed, first[t], examples[t]) if uniform is None else uniform[t]
            positive, negative = (p > u).double(), (p < u).double()
        leaked = share.reshape(-1, *(1,) * (column.dim() - 1))
        kept = torch.where(column > 0, positive, torch.where(column < 0, negative, 0.0))
        total = ((leaked + (1 - leaked) * kept) * column).sum(dim=0)
        return total.where(column.isfinite().all(dim=0), torch.nan)

    return _each(grads, rounding_each if round_each else of, out, computed_in=dtype)


def _first_columns(grads: TaskGradients) -> list[int]:
    """For each tensor the number of elements before it."""
    first = [0]
    for shape in grads.shapes:
        first.append(first[-1] + (0 if shape is None else shape.numel()))
    return first


def _drawn_like(seed: Tensor | None, first: int, like: Tensor | None) -> Tensor:
    """The uniform numbers of the elements from column `first` on, in the order of memory, in the strides of `like`."""
    assert seed is not None
    assert like is not None
    numbers = drawn(seed, torch.arange(first, first + like.numel(), device=like.device))
    return numbers.as_strided(like.shape, like.stride())


def drawn(seed: Tensor, columns: Tensor) -> Tensor:
    """The uniform numbers, float64, of the elements at these places among all P, int64 of any shape."""
    words = torch.stack(philox(seed.reshape(()), columns // 4))
    bits = words.gather(0, (columns % 4)[None])[0]
    return (2 * (bits >> 9) + 1).double() * 2.0**-24


def philox(key: Tensor, counters: Tensor) -> list[Tensor]:
    """The four 32-bit numbers of Philox4x32-10 for each counter, as int64, with the key's 64 bits and 64-bit counters.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    c = [counters & LOW, counters >> 32 & LOW, torch.zeros_like(counters), torch.zeros_like(counters)]
    keys = [key & LOW, key >> 32 & LOW]
    for _ in range(10):
        high0, low0 = _product(c[0], 0xD2511F53)
        high1, low1 = _product(c[2], 0xCD9E8D57)
        c = [high1 ^ c[1] ^ keys[0], low1, high0 ^ c[3] ^ keys[1], low0]
        keys = [keys[0] + 0x9E3779B9 & LOW, keys[1] + 0xBB67AE85 & LOW]
    return c


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of the products of 32-bit numbers; int64 holds each half of `a` times `b`."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    return high + (low >> 16) >> 16, (low + (high << 16)) & LOW


def _each(
    grads: TaskGradients,
    of: Callable[[Tensor, int], Tensor],
    out: Sequence[Tensor | None] | None = None,
    dtype: torch.dtype | None = None,
    computed_in: torch.dtype = torch.float64,
) -> list[Tensor | None]:
    """What `of` makes of each tensor's gradients [K, *shape] and its index, in `out` or in new tensors of `dtype`."""
    result: list[Tensor | None] = []
    with torch.no_grad():
        for t, example in enumerate(grads.examples()):
            if example is None:
                result.append(None)
                continue
            zeros = torch.zeros(example.shape, dtype=computed_in, device=grads.device)
            column = torch.stack([zeros if g is None else g.detach().to(computed_in) for g in grads.column(t)])
            target = None if out is None else out[t]
            target = torch.empty_like(example, dtype=dtype, requires_grad=False) if target is None else target
            result.append(target.copy_(of(column, t)))
    return result
