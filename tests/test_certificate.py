"""MTLFAST_CHECK=1 where a model computes in several dtypes: no false alarm, and a wrong update is seen."""

import pytest
import torch
from implicit_steps import Tasks, mlp
from torch import nn

import mtlfast
from mtlfast.aggregation import UPGrad
from mtlfast.jacobian._factored import FactoredPart
from mtlfast.jacobian._mixed import MixedPart

pytestmark = pytest.mark.native

WIDTH, ROWS = 32, 6


def step(way: str, kind: str, seed: int) -> nn.Module:
    """A step of a model under autocast, or of one whose heads are coarser than its trunk."""
    torch.manual_seed(seed)
    model, x = Tasks(mlp(WIDTH, 3), WIDTH, 3), torch.randn(ROWS, WIDTH)
    if kind == "float64 trunk, float32 heads":
        model.trunk.double()
        features = model.trunk(x.double()).float()
        out = torch.cat([head(features) for head in model.heads], 1)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            features = model.trunk(x)
            out = torch.cat([head(features) for head in model.heads], 1)
    squares = (out.float() - torch.arange(3)).square()
    if way == "mixing":
        losses, mixing = squares.mean(1), torch.randn(3, ROWS)
    else:
        losses, mixing = list(squares.mean(0)), None
    result = mtlfast.backward(losses, UPGrad(), shared=model.trunk, jacobian=way, mixing=mixing)
    assert result.plan.way == way
    return model


KINDS = ["bfloat16 by autocast", "float64 trunk, float32 heads"]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["implicit", "mixing"])
def test_rounding_is_no_fault(way, kind, seed, monkeypatch):
    monkeypatch.setenv("MTLFAST_CHECK", "1")
    step(way, kind, seed)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("way", "part"), [("implicit", FactoredPart), ("mixing", MixedPart)])
def test_a_wrong_update_is_seen(way, part, kind, seed, monkeypatch):
    monkeypatch.setenv("MTLFAST_CHECK", "1")
    made = part.combined
    monkeypatch.setattr(part, "combined", lambda *given: [None if x is None else 1.5 * x for x in made(*given)])
    with pytest.raises(RuntimeError, match=r"MTLFAST_CHECK found an update of .* expected at most"):
        step(way, kind, seed)
