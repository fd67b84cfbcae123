"""Whole surgery steps beside an installed TorchJD: from the task gradients to `.grad` of the parameters."""

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtlfast.aggregation import Aggregator, Compose, ConFIG, GradDrop, NormBalance, PCGrad, TrimmedMean
from mtlfast.bench.baselines import read_streams
from mtlfast.bench.section import Section
from mtlfast.bench.timing import take_turns
from mtlfast.bench.workload import scattered
from mtlfast.task_gradients import TaskGradients

TASKS = (4, 8)
# Method -> ours, TorchJD's arguments, and how often it must read the K gradients.
METHODS: dict[str, tuple[Callable[[], Aggregator], tuple[int, ...], int]] = {
    "PCGrad": (PCGrad, (), 2),
    "ConFIG": (ConFIG, (), 2),
    "GradDrop": (GradDrop, (), 1),
    "TrimmedMean": (lambda: TrimmedMean(1), (1,), 1),
}


def installed() -> bool:
    """Is there a TorchJD to run against?"""
    return importlib.util.find_spec("torchjd") is not None


def surgery(
    rows: tuple[tuple[Tensor | None, ...], ...], parameters: list[nn.Parameter], aggregator: Aggregator
) -> Callable[[], None]:
    """mtlfast's step on K rows of gradients."""

    def run() -> None:
        grads = TaskGradients.from_rows(rows)
        for parameter, gradient in zip(parameters, aggregator(grads), strict=True):
            parameter.grad = gradient

    return run


def torchjd_surgery(
    jacobians: list[Tensor],
    parameters: list[nn.Parameter],
    method: str,
    optimize: bool,
    arguments: tuple[int, ...] = (),
) -> Callable[[], None]:
    """TorchJD's step on the same numbers, as its `.jac` fields hold them."""
    import torchjd.aggregation
    from torchjd import autojac

    aggregator = getattr(torchjd.aggregation, method)(*arguments)

    def run() -> None:
        for parameter, jacobian in zip(parameters, jacobians, strict=True):
            parameter.grad = None
            parameter.jac = jacobian  # type: ignore[attr-defined]
        autojac.jac_to_grad(parameters, aggregator, optimize_gramian_computation=optimize)

    return run


def torchjd_backward(
    losses: Sequence[Tensor],
    features: Tensor,
    parameters: Iterable[Tensor],
    aggregator: Any,
    optimize: bool,
    at_once: int | None = None,
    retain_graph: bool = False,
) -> None:
    """TorchJD's step from the losses of one forward pass to `.grad`.

    Args:
        losses: K scalars.
        features: what the heads share.
        parameters: those behind the features.
        aggregator: one of TorchJD's.
        optimize: its `optimize_gramian_computation`.
        at_once: how many backward passes through the trunk run at once; None: all K.
        retain_graph: keep the graph, as losses need that share a part of it above the features.
    """
    from torchjd import autojac

    autojac.mtl_backward(losses, features=features, parallel_chunk_size=at_once, retain_graph=retain_graph)
    autojac.jac_to_grad(parameters, aggregator, optimize_gramian_computation=optimize)


def measure(elements: int, rounds: int, quick: bool) -> Section:
    """Times a PCGrad step of each, and what norm balancing adds to it; and a step of each other method.

    Args:
        elements: P.
        rounds: alternating rounds.
        quick: PCGrad alone.
    """
    section = Section(
        "peers",
        "A whole step, from the task gradients to .grad, beside TorchJD",
        "The floor: reading the K gradients twice (once for GradDrop and TrimmedMean) and writing one, at one-stream "
        "speed. With NormBalance: "
        "Compose(NormBalance(), PCGrad()), beside PCGrad alone. TorchJD, Gramian: "
        "jac_to_grad(optimize_gramian_computation=True), which TorchJD's PCGrad alone takes of these.",
    )
    section.rows = [_row("PCGrad", K, elements, rounds) for K in TASKS]
    if not quick:
        section.rows += [_row(method, TASKS[-1], elements, rounds) for method in METHODS if method != "PCGrad"]
    return section


def _row(method: str, num_tasks: int, elements: int, rounds: int) -> dict[str, Any]:
    grads = scattered(num_tasks, elements)
    mine, theirs = ([nn.Parameter(torch.zeros(shape or ())) for shape in grads.shapes] for _ in range(2))
    jacobians = [torch.stack([g for g in grads.column(t) if g is not None]) for t in range(len(grads.shapes))]
    turns = {
        "read": read_streams(grads, 1),
        "mtlfast": surgery(grads.rows, mine, METHODS[method][0]()),
        "TorchJD, default": torchjd_surgery(jacobians, theirs, method, False, METHODS[method][1]),
    }
    if method == "PCGrad":
        turns["balanced"] = surgery(grads.rows, mine, Compose(NormBalance(), PCGrad()))
        turns["TorchJD, Gramian"] = torchjd_surgery(jacobians, theirs, method, optimize=True)
    times = take_turns(turns, rounds)
    floor = (METHODS[method][2] * num_tasks + 1) / num_tasks  # of the time that reading J once takes
    row: dict[str, Any] = {
        "method": method,
        "K": num_tasks,
        "mtlfast, ms": times["mtlfast"].median * 1e3,
        "times the floor": [ratio / floor for ratio in times["mtlfast"].ratio_to(times["read"])],
    }
    balanced = times.get("balanced")
    row["with NormBalance, times as long"] = balanced and list(balanced.ratio_to(times["mtlfast"]))
    for name in ("TorchJD, Gramian", "TorchJD, default"):
        row[f"{name}, ms"] = times[name].median * 1e3 if name in times else None
        row[f"{name}: times faster"] = list(times[name].ratio_to(times["mtlfast"])) if name in times else None
    return row
