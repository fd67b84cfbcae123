"""Training and testing: the loop to copy is in `train`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from architectures import width_of
from sharing import MultiTaskNetwork
from workload import Workload

import mtlfast
from mtlfast.aggregation import Aggregator

LEARNING_RATE = 1e-2


def train(
    architecture: type[MultiTaskNetwork],
    workload: Workload,
    tasks: Sequence[int],
    aggregator: Aggregator,
    seed: int,
    steps: int,
    grouped: bool = False,
) -> list[float]:
    """Trains a new network and tests it.

    Args:
        architecture: of the network, which is as wide as the workload's number of parameters allows.
        workload: what it learns.
        tasks: which of the workload's tasks; with one alone this is single-task training, whatever the aggregator.
        aggregator: how the gradients of what several tasks share become one.
        seed: of the initial weights and of the batches.
        steps: how many. The learning rate falls to 0 along a line.
        grouped: a surgery for each set of tasks that share something.

    Returns:
        The test metric of each of the tasks.
    """
    torch.manual_seed(seed)
    chosen = [workload.tasks[k] for k in tasks]
    outputs = [task.outputs for task in chosen]
    network = architecture(
        workload.inputs, outputs, width_of(architecture, workload.inputs, outputs, workload.parameters)
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    shared, groups = network.shared(), network.groups() if grouped else None
    for _, batch in zip(range(steps), workload.batches(seed), strict=False):
        results = zip(chosen, network(batch.inputs), strict=True)
        losses = [task.loss(output, batch.targets) for task, output in results]
        optimizer.zero_grad()
        if shared:
            mtlfast.backward(losses, aggregator, shared=shared, groups=groups)
        else:  # one task alone
            losses[0].backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        results = zip(chosen, network(workload.test.inputs), strict=True)
        return [task.metric(output, workload.test.targets).item() for task, output in results]
