"""The methods that keep state for each parameter, written from their papers on a Jacobian [K, P] in float64.

Each object makes the steps of one run. All n tasks are present, unless `tasks` says which; then J has their rows alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlfast.reference.conflict_free import config
from mtlfast.reference.group import Group


class MoCo:
    """Fernando et al., "Mitigating Gradient Bias in Multi-objective Learning" (ICLR 2023), in its authors' form."""

    def __init__(self, num_tasks: int, numel: int, beta: float, gamma: float, rho: float, sigma: float = 0.5) -> None:
        self.beta, self.gamma, self.rho, self.sigma = beta, gamma, rho, sigma
        self.means = torch.zeros(num_tasks, numel, dtype=torch.float64)
        self.weights = torch.full((num_tasks,), torch.nan, dtype=torch.float64)
        self.steps = torch.zeros(num_tasks, dtype=torch.float64)

    def step(self, jacobian: Tensor, losses: Tensor, tasks: Sequence[int]) -> Tensor:
        """The direction [P]."""
        at, K = list(tasks), len(tasks)
        self.steps[at] += 1
        decay = self.steps[at] ** -self.sigma
        norms = jacobian.norm(dim=1, keepdim=True)
        scaled = torch.where(norms > 0, jacobian / norms * losses[:, None], 0.0)
        self.means[at] -= (self.beta * decay)[:, None] * (self.means[at] - scaled)
        before = torch.where(self.weights[at].isnan(), 1 / K, self.weights[at])
        products = self.means[at] @ self.means[at].T + self.rho * torch.eye(K, dtype=torch.float64)
        self.weights[at] = (before - self.gamma * decay * (products @ before)).softmax(dim=0)
        return self.weights[at] @ self.means[at]


class DBMTL:
    """Lin et al., "Dual-Balancing for Multi-Task Learning" (2023)."""

    def __init__(self, num_tasks: int, numel: int, beta: float, sigma: float) -> None:
        self.beta, self.sigma = beta, sigma
        self.means = torch.zeros(num_tasks, numel, dtype=torch.float64)
        self.steps = torch.zeros(num_tasks, dtype=torch.float64)

    def step(self, jacobian: Tensor, losses: Tensor, tasks: Sequence[int]) -> Tensor:
        """The direction [P]."""
        at = list(tasks)
        self.steps[at] += 1
        of_logs = jacobian / losses[:, None]
        decay = self.beta * self.steps[at] ** -self.sigma
        self.means[at] = of_logs + decay[:, None] * (self.means[at] - of_logs)
        norms = self.means[at].norm(dim=1)
        return torch.where(norms > 0, norms.max() / norms, 0.0) @ self.means[at]


class ExcessMTL:
    """He et al., "Robust Multi-Task Learning with Excess Risks" (ICML 2024), in TorchJD's form without its epsilons."""

    def __init__(self, num_tasks: int, numel: int, robust_step_size: float, n_warmup_steps: int) -> None:
        self.eta, self.warmup = robust_step_size, n_warmup_steps
        self.squares = torch.zeros(num_tasks, numel, dtype=torch.float64)
        self.weights = torch.full((num_tasks,), torch.nan, dtype=torch.float64)
        self.sums, self.base = torch.zeros(num_tasks, dtype=torch.float64), [0.0] * num_tasks
        self.steps = [0] * num_tasks

    def step(self, jacobian: Tensor, losses: Tensor, tasks: Sequence[int]) -> Tensor:
        """The direction [P]."""
        moved = []
        for row, task in zip(jacobian, tasks, strict=True):
            self.squares[task] += row.square()
            risk = (row.square() / self.squares[task].sqrt()).nan_to_num(0.0).sum()
            weight = risk.new_tensor(1 / len(tasks)) if self.weights[task].isnan() else self.weights[task]
            if self.steps[task] < self.warmup:
                self.sums[task] += risk
                relative = torch.zeros((), dtype=torch.float64)
            else:
                if self.steps[task] == self.warmup and self.warmup:
                    self.base[task] = float(self.sums[task] / self.warmup)
                if self.base[task] == 0:
                    self.base[task], relative = float(risk), risk
                else:
                    relative = risk / self.base[task]
            self.steps[task] += 1
            moved.append(weight.log() + self.eta * relative)
        self.weights[list(tasks)] = torch.stack(moved).softmax(dim=0)
        return self.weights[list(tasks)] @ jacobian


class PseudoMomentum:
    """Liu et al., "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks" (ICLR 2025)."""

    def __init__(self, num_tasks: int, numel: int, beta_1: float, beta_2: float) -> None:
        self.beta_1, self.beta_2 = beta_1, beta_2
        self.means = torch.zeros(num_tasks, numel, dtype=torch.float64)
        self.moment, self.before = torch.zeros(2, numel, dtype=torch.float64)
        self.steps = torch.zeros(num_tasks, dtype=torch.float64)
        self.calls = 0

    def step(self, jacobian: Tensor, losses: Tensor, tasks: Sequence[int]) -> Tensor:
        """The direction [P]."""
        at, (b1, b2) = list(tasks), (self.beta_1, self.beta_2)
        self.steps[at] += 1
        self.means[at] = b1 * self.means[at] + (1 - b1) * jacobian
        if not self.steps.all():
            return torch.zeros_like(self.moment)
        self.calls += 1
        unbiased = self.means / (1 - b1**self.steps)[:, None]
        group = Group(unbiased, {"length": -1, "task": 0, "rtol": len(unbiased) * 1e-13}, {}, None, None)
        direction = config(group) @ unbiased
        now = direction * (1 - b1**self.calls)
        pseudo = (now - b1 * self.before) / (1 - b1)
        self.before = now
        self.moment = b2 * self.moment + (1 - b2) * pseudo.square()
        root = (self.moment / (1 - b2**self.calls)).sqrt()
        eps = 1e-8 * direction.norm() / len(direction) ** 0.5
        return direction / (root + eps) if direction.any() else direction


class Bloop:
    """Hsieh et al., "Careful with that Scalpel: Improving Gradient Surgery with an EMA" (ICML 2024)."""

    def __init__(self, num_tasks: int, numel: int, lambda_: float, ema: float, main_task: int) -> None:
        self.lambda_, self.ema, self.main_task = lambda_, ema, main_task
        self.mean: Tensor | None = None

    def step(self, jacobian: Tensor, losses: Tensor, tasks: Sequence[int]) -> Tensor:
        """The direction [P]."""
        direction = torch.zeros_like(jacobian[0])
        for row, task in zip(jacobian, tasks, strict=True):
            if task == self.main_task:
                direction = row.clone()
                self.mean = row.clone() if self.mean is None else self.mean + self.ema * (row - self.mean)
        for row, task in zip(jacobian, tasks, strict=True):
            if task != self.main_task:
                mean = torch.zeros_like(row) if self.mean is None else self.mean
                square = mean @ mean
                along = (row @ mean / square) * mean if square > 0 else mean
                direction = direction + self.lambda_ * (row - along)
        return direction
