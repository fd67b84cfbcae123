"""Shared parameters on several devices: one G, and each `.grad` on its parameter's device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils import backend_registration
from unusual import METHODS, check_step

import mtlfast
from mtlfast.aggregation import Sum

TESTS = Path(__file__).parent


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="needs a torch in which Python can register a device",
)
def test_a_device_made_in_python():
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "MTLFAST_REQUIRE_NATIVE": "0"}  # no kernels for this device
    done = subprocess.run(
        [sys.executable, TESTS / "second_device.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "6 checks passed\n"


@pytest.mark.cuda
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8])
@pytest.mark.parametrize("name", METHODS)
def test_a_gpu_and_the_cpu(name, num_tasks, sparse):
    table, layer = nn.Embedding(50, 3, sparse=sparse).double(), nn.Linear(3, 3).double().cuda()
    losses = [(layer(table(torch.randint(0, 50, (5,))).cuda()) - k).square().mean() for k in range(num_tasks)]
    for shared in ([table.weight, *layer.parameters()], [*layer.parameters(), table.weight]):
        result = check_step(METHODS[name], losses, shared, 1e-9, diagnostics=True)
        assert result.gram.device == result.weights.device == result.losses.device == shared[0].device


def test_meta_is_no_device_beside_another():
    shared = {"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2, device="meta"))}
    with pytest.raises(ValueError, match="backward: b is on meta, expected cpu as a"):
        mtlfast.backward([shared["a"].sum()], Sum(), shared=shared)
    assert shared["a"].grad is None
