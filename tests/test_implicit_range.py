"""float32 layers whose products leave float32's range although their gradients do not."""

import pytest
import torch
from torch import nn

import mtlfast
from mtlfast.aggregation import Constant

SIZES = [(1e20, 1e-20), (1e25, 1e-15), (1e15, 1e10), (1e-25, 1.0), (1e-20, 1e-10)]


@pytest.mark.native
@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize(("of_input", "of_loss"), SIZES)
def test_the_gram_matrix_is_right(of_input, of_loss, mixing):
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 10, bias=False), torch.randn(4, 12) * of_input
    factors = torch.randn(3, 10) * of_loss  # which are the gradients at the output
    matrix = torch.randn(3, 4)
    found = []
    for way, dtype in (("stored", torch.float64), ("mixing" if mixing else "implicit", torch.float32)):
        layer.to(dtype).zero_grad()
        y = layer(x.to(dtype))
        losses = (y * factors[0].to(dtype)).sum(1) if mixing else [(y * f.to(dtype)).sum() for f in factors]
        given = {"mixing": matrix} if mixing else {}
        step = mtlfast.backward(
            losses, Constant([1.0, 2.0, -0.5]), shared=layer, jacobian=way, diagnostics=True, **given
        )
        found.append(step.gram)
    expected, got = found
    lengths = expected.diagonal().sqrt()
    assert ((got - expected).abs() / lengths.outer(lengths)).max() < 1e-6
