"""Trainings with a `SurgeryOptimizer` and by hand, for the tests that compare them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

import mtlfast
from mtlfast.aggregation import PCGrad

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


class Model(nn.Module):
    """Three tasks whose gradients of the trunk conflict."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(3))
        self.to(device)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.trunk(x)
        return [(head(features) + (-2) ** k * x[:, :1]).square().mean() for k, head in enumerate(self.heads)]


class Run:
    """A training, with a SurgeryOptimizer or by hand. Both draw the same numbers."""

    def __init__(self, wrapped: bool, make: Callable[..., Optimizer], device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.wrapped, self.device = wrapped, device
        self.model, self.aggregator = Model(device), PCGrad(generator=torch.Generator(device).manual_seed(1))
        self.data = torch.randn(20, 16, 4, device=device)
        self.bare = make(self.model.parameters())
        self.optimizer = self.bare
        if wrapped:
            self.optimizer = mtlfast.SurgeryOptimizer(self.bare, self.aggregator, shared=self.model.trunk)

    def backward(self, losses: Any, **options: Any) -> mtlfast.StepResult:
        if self.wrapped:
            return self.optimizer.backward(losses, **options)
        return mtlfast.backward(losses, self.aggregator, shared=self.model.trunk, **options)

    def train(self, steps: range = range(20), scheduler: Any = None) -> "Run":
        for step in steps:
            self.optimizer.zero_grad()
            result = self.backward(self.model(self.data[step]))
            self.optimizer.step()
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(result.losses.sum())
            elif scheduler is not None:
                scheduler.step()
        return self

    def train_scaled(self, scaler: torch.amp.GradScaler, unscale: bool) -> "Run":
        for x in self.data:
            self.optimizer.zero_grad()
            with torch.autocast(self.device, dtype=torch.float16):
                losses = self.model(x)
            scale = scaler.scale(torch.ones((), device=self.device))
            self.backward([scaler.scale(loss) for loss in losses], loss_scale=scale)
            if unscale:
                scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=0.5)
            scaler.step(self.optimizer)
            scaler.update()
        return self


def assert_equal(one: Any, other: Any) -> None:
    """Bitwise, through dicts and lists."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def assert_same_end(one: Run, other: Run) -> None:
    assert_equal(one.model.state_dict(), other.model.state_dict())
    assert_equal(one.optimizer.state_dict(), other.optimizer.state_dict())
    start = Run(False, torch.optim.SGD, one.device).model
    assert not torch.equal(one.model.trunk[0].weight, start.trunk[0].weight)


def both(make: Callable[..., Optimizer], device: str = "cpu") -> tuple[Run, Run]:
    return Run(True, make, device), Run(False, make, device)


def surgery(optimizer: Optimizer, **given: Any) -> mtlfast.SurgeryOptimizer:
    return mtlfast.SurgeryOptimizer(optimizer, PCGrad(), **given)


def sgd(**given: Any) -> Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, **given)
