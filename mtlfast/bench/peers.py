"""Whole surgery steps beside an installed TorchJD: from the task gradients to `.grad` of the parameters."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mtlfast import ops
from mtlfast.aggregation import PCGrad
from mtlfast.bench.baselines import read_streams
from mtlfast.bench.section import Section
from mtlfast.bench.timing import take_turns
from mtlfast.bench.workload import scattered
from mtlfast.task_gradients import TaskGradients

TASKS = (4, 8)


def installed() -> bool:
    """Is there a TorchJD to run against?"""
    return importlib.util.find_spec("torchjd") is not None


def surgery(rows: tuple[tuple[Tensor | None, ...], ...], parameters: list[nn.Parameter]) -> Callable[[], None]:
    """mtlfast's step on K rows of gradients."""
    aggregator = PCGrad()

    def run() -> None:
        grads = TaskGradients.from_rows(rows)
        weights, _ = aggregator.weigh(grads)
        for parameter, gradient in zip(parameters, ops.combine(grads, weights), strict=True):
            parameter.grad = gradient

    return run


def torchjd_surgery(jacobians: list[Tensor], parameters: list[nn.Parameter], optimize: bool) -> Callable[[], None]:
    """TorchJD's step on the same numbers, as its `.jac` fields hold them."""
    from torchjd import autojac
    from torchjd.aggregation import PCGrad as TorchJDPCGrad

    aggregator = TorchJDPCGrad()

    def run() -> None:
        for parameter, jacobian in zip(parameters, jacobians, strict=True):
            parameter.grad = None
            parameter.jac = jacobian  # type: ignore[attr-defined]
        autojac.jac_to_grad(parameters, aggregator, optimize_gramian_computation=optimize)

    return run


def measure(elements: int, rounds: int) -> Section:
    """Times a PCGrad step of each.

    Args:
        elements: P.
        rounds: alternating rounds.
    """
    section = Section(
        "peers",
        "A whole PCGrad step, from the task gradients to .grad, beside TorchJD",
        f"Medians of {rounds} alternating rounds, on a wide screen with quartiles. The floor: reading the K gradients "
        "twice and writing one, at one-stream speed. Gramian: optimize_gramian_computation=True.",
    )
    for K in TASKS:
        grads = scattered(K, elements)
        mine, theirs = ([nn.Parameter(torch.zeros(shape or ())) for shape in grads.shapes] for _ in range(2))
        jacobians = [torch.stack([g for g in grads.column(t) if g is not None]) for t in range(len(grads.shapes))]
        times = take_turns(
            {
                "read": read_streams(grads, 1),
                "mtlfast": surgery(grads.rows, mine),
                "TorchJD, Gramian": torchjd_surgery(jacobians, theirs, optimize=True),
                "TorchJD, default": torchjd_surgery(jacobians, theirs, optimize=False),
            },
            rounds,
        )
        floor = (2 * K + 1) / K  # of the time that reading J once takes
        row: dict[str, Any] = {
            "K": K,
            "mtlfast, ms": times["mtlfast"].median * 1e3,
            "of the floor": [ratio / floor for ratio in times["mtlfast"].ratio_to(times["read"])],
        }
        for name in ("TorchJD, Gramian", "TorchJD, default"):
            row[f"{name}, ms"] = times[name].median * 1e3
            row[f"{name}: times faster"] = list(times[name].ratio_to(times["mtlfast"]))
        section.rows.append(row)
    return section
