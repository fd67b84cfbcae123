"""MetaBalance."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast._by_task import put, take
from mtlfast._settings import Real, Whole
from mtlfast.aggregation._fixed import masked
from mtlfast.aggregation._grouped_state import GroupedState
from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._reads import Reads
from mtlfast.aggregation._solved import grown
from mtlfast.aggregation._step import Step, check_one_of_all


class MetaBalance(GroupedState):
    """Brings auxiliary tasks' gradients nearer to the length of the main task's, and adds all up.

    With the moving averages n of the norms the weights are w_i = relax n_main / n_i + 1 - relax, and w_main = 1. He et
    al., "MetaBalance: Improving Multi-Task Recommendations via Adapting Gradient Magnitudes of Auxiliary Tasks" (WWW
    2022), which balances each parameter tensor by itself: pass `groups="tensor"` to `mtlfast.backward`.

    Args:
        relax: how far the lengths are brought together, from 0 (the plain sum) to 1 (equal average lengths).
        beta: how much of the old averages a step keeps.
        main_task: the index of the main task.

    Raises:
        ValueError: an argument is outside of its range.

    State: the averages and their weight, 2 n float64 numbers for each group, without `loss_scale`. A step that is not
    finite changes nothing, nor does an absent task's step change its average. Where the main task's average is not
    known yet, or a task's is 0, the weights are those of relax = 0. Cost: two reads of K * P, one for the norms alone,
    and one write of P. Scale-free, but for `loss_scale`: pass it if it changes.
    """

    paper = "He et al., WWW 2022"
    keeps = "2 n averages of norms"
    reads = Reads.NORMS
    relax = Real(0, 1)
    beta = Real(0, 1, most_itself=False)
    main_task = Whole(0)

    def __init__(self, relax: float = 0.7, beta: float = 0.9, main_task: int = 0) -> None:
        super().__init__()
        self.relax = relax
        self.beta = beta
        self.main_task = main_task

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Raises if all tasks are there and the main one is none of them."""
        super().check(step, jacobian)
        check_one_of_all("MetaBalance", self.main_task, step)

    def solve(self, gram: Tensor, step: Step) -> Tensor:
        """The weights, [..., K] float64."""
        norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        norms = norms if step.loss_scale is None else norms / step.loss_scale
        if step.groups is not None:
            self.keep_groups(step)
        known = max(max(step.present, default=-1), self.main_task) + 1
        if self.state is not None:
            known = max(known, self.state.shape[-1])
        state = grown(self, self.state, gram.shape[:-2], (2, known), 0.0, gram.device)
        old = take(state, step.present)
        taking = torch.ones_like(norms, dtype=torch.bool) if step.mask is None else step.mask
        both = taking.unsqueeze(-1) & taking.unsqueeze(-2)
        finite = gram.where(both, 0).isfinite().all(dim=-1).all(dim=-1, keepdim=True)
        moved = (taking & finite).unsqueeze(-2)
        new = torch.stack([norms, torch.ones_like(norms)], dim=-2)
        averages = torch.where(moved, self.beta * old + (1 - self.beta) * new, old)
        after = state.clone()
        put(after, step.present, averages)
        if step.training:
            self.state = after
        mean = after[..., 0, :] / after[..., 1, :]  # NaN where a task has not been there yet
        ratio = mean[..., self.main_task : self.main_task + 1] / take(mean, step.present)
        weights = torch.where(ratio.isfinite(), self.relax * ratio + 1 - self.relax, 1)
        if self.main_task in step.present:
            weights[..., step.present.index(self.main_task)] = 1
        return masked(torch.where(finite, weights, torch.nan), step)

    def extra_repr(self) -> str:
        return f"relax={self.relax}, beta={self.beta}, main_task={self.main_task}"
