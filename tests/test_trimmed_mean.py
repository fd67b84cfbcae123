"""trimmed_mean against float64: it sums in double and rounds once to the output."""

import numpy as np
import pytest
import torch
from cases import DTYPES, LAYOUTS, SHAPES, TASKS, draw, draw_rows, laid_out, wide

from mtlfast import TaskGradients, ops, reference


def assert_trimmed(grads: TaskGradients, result, trim_number: int) -> None:
    """Checks that `result` is the trimmed mean, up to double sums and one rounding."""
    exact = reference.trimmed_mean(wide(grads), trim_number)
    info = torch.finfo(grads.dtype)
    for x, want, column in zip(result, exact, map(grads.column, range(len(grads.shapes))), strict=True):
        assert (x is None) == (want is None)
        if x is None:
            continue
        assert x.dtype == grads.dtype
        assert x.device == grads.device
        largest = torch.stack([torch.zeros_like(want) if g is None else g.cpu().double().abs() for g in column]).amax(0)
        sums = grads.num_tasks * torch.finfo(torch.float64).eps * largest
        assert ((x.cpu().double() - want).abs() <= want.abs() * info.eps + sums + info.smallest_normal).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("num_tasks", [1, 3, 8])
def test_shapes(num_tasks, missing, shapes, dtype, device):
    grads = draw(num_tasks, shapes, dtype, missing=missing, device=device)
    assert_trimmed(grads, ops.trimmed_mean(grads, (num_tasks - 1) // 2), (num_tasks - 1) // 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [*TASKS, 31, 32, 33, 64, 65])
def test_numbers_of_tasks(num_tasks, dtype, device):
    grads = draw(num_tasks, [*SHAPES["mixed"], (9001,)], dtype, missing=0.1, device=device)
    for trim_number in {0, 1, (num_tasks - 1) // 4, (num_tasks - 1) // 2}:
        if 2 * trim_number < num_tasks:
            assert_trimmed(grads, ops.trimmed_mean(grads, trim_number), trim_number)


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 6])
def test_the_median_is_numpys(num_tasks):
    matrix = torch.randn(num_tasks, 1000)
    (x,) = ops.trimmed_mean(TaskGradients.from_matrix(matrix), (num_tasks - 1) // 2)
    assert np.array_equal(x.numpy(), np.median(matrix.double().numpy(), axis=0).astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_kept(layout, dtype, device):
    grads = draw(4, [(5, 7, 3, 3), (65, 33), (129,)], dtype, layout, 0.2, device)
    result = ops.trimmed_mean(grads, 1)
    assert_trimmed(grads, result, 1)
    for x, example in zip(result, grads.examples(), strict=True):
        assert example is None or x.stride() == example.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 2, 5, 9])
def test_in_place_over_any_task(num_tasks, dtype, device):
    for own in range(num_tasks):
        grads = draw(num_tasks, [(5000,), (3,), (8, 9), (0,)], dtype, device=device)
        fresh = ops.trimmed_mean(grads, (num_tasks - 1) // 2)
        result = ops.trimmed_mean(grads, (num_tasks - 1) // 2, grads.rows[own])
        for x, want, target in zip(result, fresh, grads.rows[own], strict=True):
            assert x is target
            assert torch.equal(x, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_is_written_and_none_beside_it(dtype, device):
    grads = draw(5, SHAPES["borders"], dtype, device=device)
    rooms = [torch.full((2 + shape.numel(),), torch.nan, dtype=dtype, device=device) for shape in grads.shapes]
    ops.trimmed_mean(grads, 2, [room[1:-1] for room in rooms])
    assert all(room.isnan().sum() == 2 for room in rooms)


@pytest.mark.parametrize("num_tasks", [3, 8, 17, 65])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_makes_nan_also_where_it_is_left_out(value, num_tasks, device):
    grads = draw(num_tasks, [(100,)], device=device)
    grads.rows[1][0][37] = value
    (x,) = ops.trimmed_mean(grads, 1)
    assert x.isnan().nonzero().tolist() == [[37]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes(dtype, device):
    # The sum of the largest numbers of float16 or float32 is beyond them; that of double ones is infinite.
    most = torch.finfo(dtype).max
    grads = TaskGradients.from_rows([[torch.full((20,), most, dtype=dtype, device=device)]] * 5)
    (x,) = ops.trimmed_mean(grads, 1 if dtype != torch.float64 else 2)
    assert (x == most).all()


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [7, 20])
def test_bitwise_equal_over_repeats_schedules_and_addresses(num_tasks, dtype, device, schedules):
    # And over orders of the tasks.
    rows = draw_rows(num_tasks, [(70_001,), (3, 5), (8193,), (1,)], dtype, missing=0.1, device=device)
    elsewhere = [[None if g is None else laid_out(g, "misaligned") for g in row] for row in rows]
    results = [
        ops.trimmed_mean(TaskGradients.from_rows(same), 2) for _ in schedules for same in (rows, elsewhere, rows[::-1])
    ]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
