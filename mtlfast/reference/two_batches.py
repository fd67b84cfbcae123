"""MoDo (Chen et al., NeurIPS 2023) and SDMGrad (Xiao et al., NeurIPS 2023): weights from A = J_1 J_2^T."""

import torch
from torch import Tensor

from mtlfast.reference.group import Group
from mtlfast.reference.nonnegative import project_onto_simplex


def modo(group: Group) -> Tensor:
    """Weights [K]; state: each task's weight."""
    gamma, rho = group.params["gamma"], group.params["rho"]
    assert group.cross is not None
    w = _kept(group)
    w = project_onto_simplex(w - gamma * (group.cross @ w + rho * w))
    return _keep(group, w)


def sdmgrad(group: Group) -> Tensor:
    """Weights [K]; state: each task's weight."""
    lr, momentum, n_iter, lambda_ = (group.params[name] for name in ("lr", "momentum", "n_iter", "lambda_"))
    assert group.cross is not None
    norm = group.cross.diagonal().clamp(min=0).sqrt().mean()
    A = group.cross / norm**2 if norm > 0 else torch.zeros_like(group.cross)
    w, preferred = _kept(group), group.preferences()
    v = torch.zeros_like(w)
    for _ in range(int(n_iter)):
        v = momentum * v + A @ (w + lambda_ * preferred)
        w = project_onto_simplex(w - lr * v)
    return (_keep(group, w) + lambda_ * preferred) / (1 + lambda_)


def _kept(group: Group) -> Tensor:
    assert group.state is not None
    return torch.stack([group.state[task] for task in group.present]).nan_to_num(nan=1 / group.num_tasks)


def _keep(group: Group, w: Tensor) -> Tensor:
    assert group.state is not None
    for task, weight in zip(group.present, w, strict=True):
        group.state[task] = weight
    return w
