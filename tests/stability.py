"""Gradients in positions where ranks and hulls are decided, and which updates of them are stable.

Stable: gradients moved by 3e-7 of their lengths, at random or within the span of the others, move the float64 update by
m < 1e-3 of its length. There an update of the same gradients in another way must be within 10 m + 1e-6 of it, beside
the rounding to the 16 bits of its own elements.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from methods import METHODS, losses, numbers_of_tasks
from sampling import GRID
from torch import Tensor

from mtlfast import TaskGradients
from mtlfast.ops._precision import product_rtol

MOVED, STABLE = 3e-7, 1e-3
TASKS, SIZES = range(2, 17), (20, 100, 1000, 10_000, 1_000_000)
KINDS = [
    "random",
    "zero in the hull",
    "duplicate",
    "parallel",
    "opposite",
    "sum of the others",
    "half the rank",
    "more tasks than parameters",
    "a zero row",
    "sizes 1e6 apart",
    "nearly parallel",
    "nearly opposite",
]
# Two parallel gradients have one update of IMTL-G's as dependent ones and another as independent ones, both stable: the
# last bits of the rounded gradients decide which one float64 takes.
TWO_ANSWERS = {("IMTLG", "parallel")}
SEVERAL = {name: method for name, method in METHODS.items() if not method.cross}

Update = Callable[[Tensor, Tensor], Tensor]  # a Jacobian [K, P] and its Gram matrix -> a direction [P]


@dataclass(frozen=True)
class Engine:
    """Whose Gram matrix and weighted sum make an update."""

    gram: Callable[[TaskGradients], Tensor]
    combine: Callable[[TaskGradients, Tensor], Any]


def gradients(kind: str, K: int, P: int, generator: torch.Generator) -> Tensor:
    """[K, P] float64 gradients, which float16 can hold."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    J = normal(K, P)
    if kind == "zero in the hull":
        shares = torch.rand(K - 1, generator=generator, dtype=torch.float64) + 0.3
        J[-1] = -(shares @ J[:-1])
    elif kind == "duplicate":
        J[-1] = J[0]
    elif kind == "parallel":
        J[-1] = 2.3 * J[0]
    elif kind == "opposite":
        J[-1] = -0.7 * J[0]
    elif kind == "sum of the others":
        J[-1] = J[:-1].sum(dim=0)
    elif kind == "half the rank":
        J = normal(K, max(1, K // 2)) @ normal(max(1, K // 2), P)
    elif kind == "a zero row":
        J[0] = 0
    elif kind == "sizes 1e6 apart":
        J *= torch.logspace(-2, 4, K, dtype=torch.float64)[:, None]
    elif kind == "nearly parallel":
        J[-1] = J[0] + 1e-3 * normal(P)
    elif kind == "nearly opposite":
        J[-1] = 3e-3 * normal(P) - J[0]
    return J


def moved(J: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Eight Jacobians nearby, half of them at random and half within the span of the other gradients."""
    for i in range(8):
        if i < 4:
            step = torch.randn(J.shape, generator=generator, dtype=torch.float64)
        else:
            shares = torch.randn(len(J), len(J), generator=generator, dtype=torch.float64)
            step = shares.fill_diagonal_(0) @ J
        lengths = step.norm(dim=1, keepdim=True)
        yield J + MOVED * J.norm(dim=1, keepdim=True) * step / torch.where(lengths > 0, lengths, 1)


@dataclass(frozen=True)
class Problem:
    """Gradients [K, P] of a dtype; the same numbers in float64, and eight others nearby, with their Gram matrices."""

    kind: str
    num_tasks: int
    numel: int
    seed: int
    rows: Tensor
    exact: tuple[Tensor, Tensor]
    nearby: list[tuple[Tensor, Tensor]]

    def __str__(self) -> str:
        return f"{self.kind}, K = {self.num_tasks}, P = {self.numel}, seed {self.seed}, {self.rows.dtype}"


def problems(kind: str, dtype: torch.dtype, sample: int, most: tuple[int, int]) -> Iterator[Problem]:
    """Those of a kind with at most so many tasks and columns: all with MTLFAST_GRID=all, else small ones.

    A sample is the same in every run.
    """
    if kind == "more tasks than parameters":
        sizes = {(K, P) for K in TASKS for P in (max(1, K // 2), K - 1)}
    else:
        sizes = {(K, P) for K in TASKS for P in SIZES}
    wanted = [(K, P) for K, P in sorted(sizes) if most[0] >= K and most[1] >= P]
    every = [(K, P, seed) for K, P in wanted for seed in range(2 if SIZES[-1] > P else 1)]
    few = [(K, P, seed) for K, P, seed in every if K * P <= 40_000]
    for K, P, seed in every if GRID == "all" else random.Random(f"{kind} {dtype}").sample(few, sample):
        generator = torch.Generator().manual_seed(1000 * seed + 17 * K + P)
        rows = gradients(kind, K, P, generator).to(dtype)
        J = rows.double()
        nearby = [(other, other @ other.mT) for other in moved(J, generator)]
        yield Problem(kind, K, P, seed, rows, (J, J @ J.mT), nearby)


@dataclass
class Tally:
    """How many updates there were, how many of them were stable, and which of those were wrong."""

    seen: int = 0
    stable: int = 0
    wrong: list[str] = field(default_factory=list)

    def judge(self, name: str, problem: Problem, update: Update, others: Mapping[str, Callable[[], Tensor]]) -> None:
        """Compares a method's float64 update, where it is stable, with those of the same numbers in other ways.

        Args:
            name: of the method.
            problem: the gradients.
            update: the method in float64.
            others: the way -> the direction [P].
        """
        self.seen += 1
        direction = update(*problem.exact)
        length = float(direction.norm())
        if not 0 < length < math.inf:
            return
        m = 0.0
        for nearby in problem.nearby:
            m = max(m, float((update(*nearby) - direction).norm()) / length)
            if not m < STABLE:
                return
        self.stable += 1
        for way, other in others.items():
            error = distance(other(), direction) / length
            if not error <= 10 * m + 1e-6:
                self.wrong.append(f"{name}, {way}: {problem}: off by {error:.2g}, m = {m:.2g}")

    def check(self) -> None:
        """A good part was stable, and none of it wrong."""
        assert self.stable >= 0.3 * self.seen
        assert not self.wrong, "\n".join(["wrong where float64 is stable:", *self.wrong])

    def __str__(self) -> str:
        return f"{self.stable} of {self.seen}"


def distance(found: Tensor, wanted: Tensor) -> float:
    """The length of found - wanted; of found elements of 16 bits, what exceeds their rounding and their range."""
    if found.dtype.itemsize > 2:
        return float((found.double() - wanted).norm())
    info = torch.finfo(found.dtype)
    error = (found.double().clamp(-info.max, info.max) - wanted.clamp(-info.max, info.max)).abs()
    return float((error - (wanted.abs() + info.smallest_normal) * info.eps / 2).clamp(min=0).norm())


def judge_every_method(tally: Tally, problem: Problem, engines: Mapping[str, Engine]) -> None:
    """Every method's update of float32 or 16-bit gradients, in their dtype, beside that of the same numbers in float64.

    Args:
        tally: where that counts.
        problem: the gradients.
        engines: whose -> what makes the Gram matrix, once for all methods, and the update by the weights.
    """
    grads = TaskGradients.from_matrix(problem.rows)
    K = problem.num_tasks
    rtol = K * product_rtol(grads, "exact")
    # Numbers of 16 bits were rounded to them, and by that ranks are decided, in float64 as well.
    exact_rtol = rtol if grads.dtype.itemsize == 2 else K * torch.finfo(torch.float64).eps
    grams = {whose: engine.gram(grads) for whose, engine in engines.items()}

    def weights(name: str, rtol: float, gram: Tensor) -> Tensor:
        torch.manual_seed(0)
        return SEVERAL[name].make().weights(gram, losses=losses(K), rtol=rtol)

    def update(name: str, J: Tensor, gram: Tensor) -> Tensor:
        return weights(name, exact_rtol, gram) @ J

    def combined(name: str, whose: str) -> Tensor:
        (direction,) = engines[whose].combine(grads, weights(name, rtol, grams[whose]))
        return direction

    for name, method in SEVERAL.items():
        if K in numbers_of_tasks(method, K) and (name, problem.kind) not in TWO_ANSWERS:
            others = {whose: partial(combined, name, whose) for whose in engines}
            tally.judge(name, problem, partial(update, name), others)
