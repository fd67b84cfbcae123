"""The benchmark's own code: the peers that it times are the real ones, and its sections run."""

import random

import pytest
import torch
from torch import nn

from mtlfast.bench import faces, peers
from mtlfast.compat.pcgrad import PCGrad


def test_the_plain_way_is_what_the_face_does():
    torch.manual_seed(0)
    rows = [[torch.randn(4, 3), torch.randn(5)] for _ in range(4)]
    parameters = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(5))]
    random.seed(1)
    faces.plain_surgery(rows, parameters)
    wanted = [p.grad.clone() for p in parameters]
    random.seed(1)
    PCGrad(torch.optim.SGD(parameters, lr=0.1)).surgery(rows, parameters, parameters)
    for parameter, gradient in zip(parameters, wanted, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_faces_are_measured():
    section = faces.measure(elements=20_000, rounds=1)
    assert len(section.rows) == 2 * (2 + 4 * peers.installed())
    assert all(len(row["times faster"]) == 3 for row in section.rows)
    assert {row["K"] for row in section.rows} == {4, 8}
