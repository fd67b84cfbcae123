"""flatten and unflatten: exact copies."""

import pytest
import torch
from cases import DTYPES, LAYOUTS, SHAPES, draw, matrix

from mtlfast import TaskGradients, ops, reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_shapes_and_dtypes(shapes, to, dtype, device):
    grads = draw(3, shapes, dtype, missing=0.3, device=device)
    J = ops.flatten(grads, to)
    assert J.dtype == (to or grads.dtype)
    assert J.device == grads.device
    assert torch.equal(J.cpu(), matrix(grads).to(dtype).to(J.dtype))
    assert torch.equal(J, reference.flatten(grads, to))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_elements_come_in_the_order_of_their_indices(layout, device):
    grads = draw(2, [(5, 7, 3, 3), (65, 33)], torch.float32, layout, device=device)
    assert torch.equal(ops.flatten(grads).cpu(), matrix(grads).float())


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("to", DTYPES, ids=str)
def test_conversion_rounds_as_torch_does(source, to, device):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = bits.view(torch.float16).to(source) if source != torch.bfloat16 else bits.view(torch.bfloat16)
    if source in (torch.float32, torch.float64):
        values = torch.cat([values, torch.randn(10_000, dtype=source) * 1e-6, torch.randn(10_000, dtype=source) * 1e5])
    values = values[~values.isnan()]
    J = ops.flatten(TaskGradients.from_rows([[values.to(device)]]), to)
    # A double goes to 16 bits through float, as torch does it.
    assert torch.equal(J[0].cpu(), values.to(to))


def test_nan_stays_nan(device):
    for source in DTYPES:
        grads = draw(1, [(5,)], source, device=device)
        grads.rows[0][0][3] = torch.nan
        for to in DTYPES:
            assert ops.flatten(grads, to)[0].isnan().tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unflatten_is_the_inverse_and_views(layout, device):
    grads = draw(2, [(5, 7, 3, 3), (65, 33), (), (0, 4)], torch.float32, layout, 0.2, device)
    J = ops.flatten(grads)
    for k in range(2):
        views = ops.unflatten(J[k], grads)
        for view, g, shape in zip(views, grads.rows[k], grads.shapes, strict=True):
            if shape is None:
                assert view is None
            else:
                assert view.shape == shape
                assert torch.equal(view, torch.zeros_like(view) if g is None else g)
                assert view.numel() == 0 or view.untyped_storage().data_ptr() == J.untyped_storage().data_ptr()


def test_unflatten_like_parameters_and_its_gradient(device):
    parameters = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in [(2, 3), (4,)]]
    vector = torch.arange(10.0, device=device, requires_grad=True)
    a, b = ops.unflatten(vector, parameters)
    (a.sum() * 2 + b.sum() * 3).backward()
    assert vector.grad.tolist() == [2.0] * 6 + [3.0] * 4
