"""flatten and unflatten: exact copies."""

import pytest
import torch
from cases import DTYPES, LAYOUTS, SHAPES, draw, matrix

from mtlfast import ops, reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_shapes_and_dtypes(shapes, to, dtype):
    grads = draw(3, shapes, dtype, missing=0.3)
    J = ops.flatten(grads, to)
    assert J.dtype == (to or grads.dtype)
    assert torch.equal(J, matrix(grads).to(dtype).to(J.dtype))
    assert torch.equal(J, reference.flatten(grads, to))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_elements_come_in_the_order_of_their_indices(layout):
    grads = draw(2, [(5, 7, 3, 3), (65, 33)], torch.float32, layout)
    assert torch.equal(ops.flatten(grads), matrix(grads).float())


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("to", DTYPES, ids=str)
def test_conversion_rounds_as_torch_does(source, to):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = bits.view(torch.float16).to(source) if source != torch.bfloat16 else bits.view(torch.bfloat16)
    if source in (torch.float32, torch.float64):
        values = torch.cat([values, torch.randn(10_000, dtype=source) * 1e-6, torch.randn(10_000, dtype=source) * 1e5])
    values = values[~values.isnan()]
    grads = ops.flatten(draw(1, [(1,)]).__class__.from_rows([[values]]), to)
    # A double goes to 16 bits through float, as torch does it.
    assert torch.equal(grads[0], values.to(to))


def test_nan_stays_nan():
    for source in DTYPES:
        grads = draw(1, [(5,)], source)
        grads.rows[0][0][3] = torch.nan
        for to in DTYPES:
            assert ops.flatten(grads, to)[0].isnan().tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unflatten_is_the_inverse_and_views(layout):
    grads = draw(2, [(5, 7, 3, 3), (65, 33), (), (0, 4)], torch.float32, layout, missing=0.2)
    J = ops.flatten(grads)
    for k in range(2):
        views = ops.unflatten(J[k], grads)
        for view, g, shape in zip(views, grads.rows[k], grads.shapes, strict=True):
            if shape is None:
                assert view is None
            else:
                assert view.shape == shape
                assert torch.equal(view, torch.zeros(shape) if g is None else g)
                assert view.numel() == 0 or view.untyped_storage().data_ptr() == J.untyped_storage().data_ptr()


def test_unflatten_like_parameters_and_its_gradient():
    parameters = [torch.nn.Parameter(torch.randn(2, 3)), torch.nn.Parameter(torch.randn(4))]
    vector = torch.arange(10.0, requires_grad=True)
    a, b = ops.unflatten(vector, parameters)
    (a.sum() * 2 + b.sum() * 3).backward()
    assert vector.grad.tolist() == [2.0] * 6 + [3.0] * 4
