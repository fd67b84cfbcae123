"""Krum and Multi-Krum: Blanchard et al., "Machine Learning with Adversaries" (NeurIPS 2017), on the K x P matrix."""

import torch
from torch import Tensor

from mtlfast.reference.group import Group


def krum(group: Group) -> Tensor:
    """Weights [K]. Distances are added, not their squares."""
    matrix, K = group.matrix, group.num_tasks
    nearest, selected = K - int(group.params["n_byzantine"]) - 2, int(group.params["n_selected"])
    scores = []
    for i in range(K):
        others = torch.stack([(matrix[i] - matrix[j]).norm() for j in range(K) if j != i])
        scores.append(others.sort().values[:nearest].sum())
    chosen = torch.stack(scores).argsort(stable=True)[:selected]
    return torch.zeros_like(matrix[:, 0]).index_fill(0, chosen, 1 / selected)
