"""Trains in a forked child process after the parent has started the threads of the native ops; a program of its own.

Each tensor of the model is so small that plain torch works on one thread, whose child processes therefore never wait.
All of them together are enough for several threads of the native ops.
"""

import os
import signal
import sys

import torch
from torch import Tensor, nn

import mtlfast
from mtlfast.aggregation import MGDA, GradVac


def steps(way: str) -> Tensor:
    """All parameters after three steps, and the weights of many groups, [P + groups * K]."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(12, 12) for _ in range(70)))
    aggregator, optimizer = GradVac(generator=torch.Generator().manual_seed(1)), torch.optim.SGD(net.parameters(), 0.1)
    accumulator = mtlfast.TaskGradientAccumulator(net)
    for x in torch.randn(3, 2, 8, 12):
        optimizer.zero_grad()
        losses = [[lambda k=k, part=part: net(part)[:, k].square().mean() for k in range(3)] for part in x]
        if way == "closures":
            mtlfast.backward(losses[0], aggregator, shared=net)
        elif way == "stored":
            mtlfast.backward([loss() for loss in losses[0]], aggregator, shared=net)
        else:
            for part in losses:
                accumulator.add(part)
            mtlfast.backward(accumulator, aggregator)
        optimizer.step()
    J = torch.randn(64, 3, 5, dtype=torch.float64)
    numbers = [MGDA().weights(J @ J.mT), *(p.detach().double() for p in net.parameters())]
    return torch.cat([x.flatten() for x in numbers])


if __name__ == "__main__":
    way, file = sys.argv[1:]
    torch.set_num_threads(4)
    wanted = steps(way)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends the process if it waits
        torch.save(steps(way), file)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status != 0:
        sys.exit(f"the child ended with the signal {os.WTERMSIG(status)}")
    if not torch.equal(torch.load(file), wanted):
        sys.exit("the child's steps are not those of the parent")
