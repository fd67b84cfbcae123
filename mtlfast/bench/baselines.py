"""What the ops are measured against: the machine's read bandwidth, and the plain-PyTorch way."""

from collections.abc import Callable

import torch
from torch import Tensor

from mtlfast import _native
from mtlfast.task_gradients import TaskGradients


def read_streams(grads: TaskGradients, streams: int) -> Callable[[], object]:
    """Reads every tensor once and keeps nothing: the bandwidth that percentages refer to.

    Args:
        grads: what is read, where it lies.
        streams: 1, one tensor after another as `torch.sum` reads, or 4, four tasks side by side.

    Returns:
        The call. Without the extension, and on a GPU, it is `torch.sum` of each tensor, whatever `streams`.
    """
    if grads.device.type == "cpu" and _native.serves(grads.device):
        return lambda: grads.run(lambda C, table: C.read(table, streams), lambda ops: None)
    return lambda: [g.sum() for g in grads.flat() if g is not None]


def plain_gram(grads: TaskGradients, other: TaskGradients | None = None) -> Callable[[], Tensor]:
    """`cat` each task's tensors, `stack` the tasks, J @ J.T: what one writes without this package.

    With a second batch `other` the product is that of the two matrices.
    """

    def run() -> Tensor:
        J, *others = [
            torch.stack([torch.cat([g.reshape(-1) for g in row if g is not None]) for row in batch.rows])
            for batch in (grads, other)
            if batch is not None
        ]
        return J @ (others[0] if others else J).T

    return run


def plain_norms(grads: TaskGradients) -> Callable[[], Tensor]:
    """Each task's norm from its tensors' norms."""

    def run() -> Tensor:
        return torch.stack(
            [torch.stack(torch._foreach_norm([g for g in row if g is not None])).norm() for row in grads.rows]
        )

    return run


def plain_combine(grads: TaskGradients, weights: Tensor) -> Callable[[], list[Tensor]]:
    """The weighted sum with torch's multi-tensor ops."""
    weight_list = weights.tolist()

    def run() -> list[Tensor]:
        total: list[Tensor] = list(torch._foreach_mul([g for g in grads.rows[0] if g is not None], weight_list[0]))
        for row, weight in zip(grads.rows[1:], weight_list[1:], strict=True):
            torch._foreach_add_(total, [g for g in row if g is not None], alpha=weight)
        return total

    return run


def plain_flatten(grads: TaskGradients) -> Callable[[], Tensor]:
    """`cat` and `stack`."""
    return lambda: torch.stack([torch.cat([g.reshape(-1) for g in row if g is not None]) for row in grads.rows])


def plain_scale(grads: TaskGradients, factors: Tensor) -> Callable[[], None]:
    """Each task's tensors times its factor, with torch's multi-tensor op."""
    values = factors.tolist()

    def run() -> None:
        for row, value in zip(grads.rows, values, strict=True):
            torch._foreach_mul_([g for g in row if g is not None], value)

    return run


def plain_grad_drop(grads: TaskGradients) -> Callable[[], Tensor]:
    """GradDrop as public implementations write it: flatten, a random number for each column, then K masked sums."""

    def run() -> Tensor:
        J = torch.stack([torch.cat([g.reshape(-1) for g in row if g is not None]) for row in grads.rows])
        purity = 0.5 * (1 + J.sum(dim=0) / J.abs().sum(dim=0))
        drawn = torch.rand_like(purity)
        total = torch.zeros_like(purity)
        for row in J:
            total += ((purity > drawn) * (row > 0) + (purity < drawn) * (row < 0)) * row
        return total

    return run


def plain_trimmed_mean(grads: TaskGradients, trim_number: int) -> Callable[[], Tensor]:
    """Flatten, sort and average."""

    def run() -> Tensor:
        J = torch.stack([torch.cat([g.reshape(-1) for g in row if g is not None]) for row in grads.rows])
        return J.sort(dim=0).values[trim_number : len(J) - trim_number].mean(dim=0)

    return run


def plain_advance(grads: TaskGradients, state: TaskGradients, half: Tensor, weights: Tensor) -> list[Tensor]:
    """The state's running mean of squared gradients and its weighted sum, with torch's multi-tensor ops."""
    total = [torch.zeros_like(g) for g in grads.rows[0] if g is not None]
    for row, state_row, share, weight in zip(grads.rows, state.rows, half.tolist(), weights.tolist(), strict=True):
        gradients = [g for g in row if g is not None]
        entries = [s for s in state_row if s is not None]
        torch._foreach_mul_(entries, 1 - share)
        torch._foreach_addcmul_(entries, gradients, gradients, value=share)
        torch._foreach_add_(total, entries, alpha=weight)
    return total


def plain_excess_risks(grads: TaskGradients, sums: TaskGradients) -> Tensor:
    """Each task's excess risk from its tensors', one after another."""
    risks = []
    for row, sums_row in zip(grads.rows, sums.rows, strict=True):
        squares = [(g * g, h) for g, h in zip(row, sums_row, strict=True) if g is not None and h is not None]
        risks.append(torch.stack([(x / (h + x + 1e-7).sqrt()).sum() for x, h in squares]).sum())
    return torch.stack(risks)


def plain_moco(grads: TaskGradients, losses: Tensor) -> Callable[[], Tensor]:
    """MoCo's step on a flat Jacobian and a matrix of averages, as one writes it from the paper."""
    kept: list[Tensor] = []  # the averages and the weights, which are as large as J: made at the first call
    flatten, values = plain_flatten(grads), losses.to(grads.dtype)

    def run() -> Tensor:
        J = flatten()
        J *= (values / J.norm(dim=1))[:, None]
        if not kept:
            kept.extend([torch.zeros_like(J), values / values.sum()])
        averages, weights = kept
        averages += 0.5 * (J - averages)
        kept[1] = (weights - 0.1 * (averages @ averages.T) @ weights).softmax(dim=0)
        return kept[1] @ averages

    return run


def plain_db_mtl(grads: TaskGradients, losses: Tensor) -> Callable[[], Tensor]:
    """DB-MTL's step on a flat Jacobian and a matrix of averages, as one writes it from the paper."""
    kept: list[Tensor] = []
    flatten, values = plain_flatten(grads), losses.to(grads.dtype)

    def run() -> Tensor:
        J = flatten()
        J /= values[:, None]
        if not kept:
            kept.append(torch.zeros_like(J))
        kept[0] = J + 0.9 * (kept[0] - J)
        norms = kept[0].norm(dim=1)
        total: Tensor = (norms.max() / norms) @ kept[0]
        return total

    return run


def plain_pcgrad(grads: TaskGradients) -> Callable[[], Tensor]:
    """PCGrad as public implementations write it: flatten, then K^2 walks over the gradients."""

    def run() -> Tensor:
        J = torch.stack([torch.cat([g.reshape(-1) for g in row if g is not None]) for row in grads.rows])
        total = torch.zeros_like(J[0])
        for i in range(len(J)):
            g = J[i].clone()
            for j in torch.randperm(len(J)).tolist():
                if j != i and (dot := g @ J[j]) < 0:
                    g -= dot / J[j].norm() ** 2 * J[j]
            total += g
        return total

    return run


def plain_pcgrad_by_tensor(grads: TaskGradients) -> Callable[[], list[Tensor]]:
    """PCGrad of each tensor by itself, as training programs write it: clones, and a host read for each pair."""

    def run() -> list[Tensor]:
        directions = []
        for column in zip(*grads.rows, strict=True):
            gradients = [g.clone() for g in column if g is not None]
            projected = [g.clone() for g in gradients]
            for i, g in enumerate(projected):
                for j in torch.randperm(len(gradients)).tolist():
                    dot = (g * gradients[j]).sum()
                    if j != i and dot.item() < 0:
                        g -= dot / gradients[j].square().sum() * gradients[j]
            directions.append(torch.stack(projected).sum(dim=0))
        return directions

    return run
