"""The drop-in faces: the same code on the original library, and after the one line that changes."""

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mtlfast.bench import peers
from mtlfast.bench.section import Section
from mtlfast.bench.timing import Timing, take_turns
from mtlfast.bench.workload import scattered
from mtlfast.compat.pcgrad import PCGrad
from mtlfast.compat.torchjd import accelerate

TASKS = (4, 8)
CALLS = 20  # of a small model in one timing


def measure(elements: int, rounds: int) -> Section:
    """Times TorchJD with and without `accelerate()`, and Pytorch-PCGrad's way beside its face.

    Args:
        elements: P of the large model; the small one has 10,000 parameters.
        rounds: alternating rounds.
    """
    section = Section(
        "faces",
        "Code for other libraries, before and after its import is changed to mtlfast.compat",
        f"Large: the surgery alone, from task gradients of {elements / 1e6:g}M elements to .grad. Small: a whole step "
        "of a model of 10,000 parameters, forward and backward passes included.",
    )
    for K in TASKS:
        section.rows += _large(K, elements, rounds)
        section.rows += _small(K, rounds)
    return section


def _row(face: str, num_tasks: int, times: dict[str, Timing], calls: int = 1) -> dict[str, Any]:
    return {
        "library": face,
        "K": num_tasks,
        "before, ms": times["before"].median * 1e3 / calls,
        "after, ms": times["after"].median * 1e3 / calls,
        "times faster": list(times["before"].ratio_to(times["after"])),
    }


def _large(num_tasks: int, elements: int, rounds: int) -> list[dict[str, Any]]:
    grads = scattered(num_tasks, elements)
    rows = [[gradient for gradient in row if gradient is not None] for row in grads.rows]
    parameters = [nn.Parameter(torch.zeros(shape or ())) for shape in grads.shapes]
    face = PCGrad(torch.optim.SGD(parameters, lr=0.1))
    after = partial(face.surgery, rows, parameters, parameters)
    times = take_turns({"before": partial(plain_surgery, rows, parameters), "after": after}, rounds)
    found = [_row("Pytorch-PCGrad, large", num_tasks, times)]
    if peers.installed():
        jacobians = [torch.stack(column) for column in zip(*rows, strict=True)]
        for mode, optimize in (("Gramian", True), ("default", False)):
            step = peers.torchjd_surgery(jacobians, parameters, "UPGrad", optimize)
            times = take_turns({"before": step, "after": _accelerated(step)}, rounds)
            found.append(_row(f"TorchJD, {mode}, large", num_tasks, times))
    return found


def plain_rows(losses: Iterable[Tensor], parameters: Sequence[nn.Parameter]) -> Iterator[Sequence[Tensor | None]]:
    """Pytorch-PCGrad's backward passes, one for each row, which is not kept here."""
    for loss in losses:
        yield torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)


def plain_surgery(rows: Iterable[Sequence[Tensor | None]], parameters: Sequence[nn.Parameter]) -> None:
    """Pytorch-PCGrad's way on the same gradients: flat copies of each, K shuffles, K^2 walks."""
    flat, reached = [], []
    for row in rows:
        pairs = list(zip(row, parameters, strict=True))
        flat.append(torch.cat([(torch.zeros_like(p) if g is None else g.clone()).flatten() for g, p in pairs]))
        reached.append(
            torch.cat([(torch.zeros_like(p) if g is None else torch.ones_like(p)).flatten() for g, p in pairs])
        )
        del row, pairs  # the original has one task's gradients beside its flat copies
    shared = torch.stack(reached).prod(0).bool()
    projected, met = copy.deepcopy(flat), list(flat)
    for gradient in projected:
        random.shuffle(met)
        for other in met:
            product = torch.dot(gradient, other)
            if product < 0:
                gradient -= product * other / other.norm() ** 2
    merged = torch.zeros_like(flat[0])
    merged[shared] = torch.stack([gradient[shared] for gradient in projected]).mean(dim=0)
    merged[~shared] = torch.stack([gradient[~shared] for gradient in projected]).sum(dim=0)
    for parameter, gradient in zip(parameters, torch.split(merged, [p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.reshape(parameter.shape)


def _small(num_tasks: int, rounds: int) -> list[dict[str, Any]]:
    trunk = nn.Sequential(nn.Linear(32, 96), nn.Tanh(), nn.Linear(96, 64), nn.Tanh())
    heads = [nn.Linear(64, 10) for _ in range(num_tasks)]
    parameters = [*trunk.parameters(), *(p for head in heads for p in head.parameters())]
    x = torch.randn(32, 32)

    def losses() -> list[Tensor]:
        features = trunk(x)
        return [(head(features) - k).square().mean() for k, head in enumerate(heads)]

    def original() -> None:
        plain_surgery(plain_rows(losses(), parameters), parameters)

    face = PCGrad(torch.optim.SGD(parameters, lr=0.1))
    turns = {"before": _repeated(original), "after": _repeated(lambda: face.pc_backward(losses()))}
    times = take_turns(turns, rounds)
    found = [_row("Pytorch-PCGrad, small", num_tasks, times, CALLS)]
    if peers.installed():
        from torchjd.aggregation import UPGrad

        aggregator = UPGrad()
        for mode, optimize in (("Gramian", True), ("default", False)):

            def step(optimize: bool = optimize) -> None:
                for parameter in parameters:
                    parameter.grad = None
                features = trunk(x)
                found = [(head(features) - k).square().mean() for k, head in enumerate(heads)]
                peers.torchjd_backward(found, features, trunk.parameters(), aggregator, optimize)

            times = take_turns({"before": _repeated(step), "after": _accelerated(_repeated(step))}, rounds)
            found.append(_row(f"TorchJD, {mode}, small", num_tasks, times, CALLS))
    return found


def _repeated(run: Callable[[], None]) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(CALLS):
            run()

    return repeated


def _accelerated(run: Callable[[], None]) -> Callable[[], None]:
    def accelerated() -> None:
        with accelerate():
            run()

    return accelerated
