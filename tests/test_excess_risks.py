"""excess_risks against its definition in float64."""

import pytest
import torch
from cases import DTYPES, LAYOUTS, SHAPES, TASKS, draw, laid_out, wide
from test_scale import copy_of

from mtlfast import TaskGradients, ops, reference


def draw_both(num_tasks, shapes, dtype, sums_dtype, layout="contiguous", missing=0.0, device="cpu"):
    """Gradients, and sums that are not negative, of which others are absent."""
    grads, sums = (draw(num_tasks, shapes, d, layout, missing, device) for d in (dtype, sums_dtype))
    for entry in sums.flat():
        if entry is not None:
            entry.abs_()
    return grads, sums


def assert_risks(risks, grads, sums, eps=1e-7, factors=None) -> None:
    factors = None if factors is None else factors.cpu()
    assert risks.dtype == torch.float64
    assert risks.device == grads.device
    assert torch.allclose(
        risks.cpu(), reference.excess_risks(wide(grads), wide(sums), eps, factors), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sums_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_shapes(missing, shapes, sums_dtype, dtype, device):
    grads, sums = draw_both(3, shapes, dtype, sums_dtype, missing=missing, device=device)
    before = copy_of(grads), copy_of(sums)
    assert_risks(ops.excess_risks(grads, sums), grads, sums)
    for given, was in zip((grads, sums), before, strict=True):
        assert all(a is b if a is None else torch.equal(a, b) for a, b in zip(given.flat(), was.flat(), strict=True))


@pytest.mark.parametrize("num_tasks", [*TASKS, 33])
def test_numbers_of_tasks_factors_and_eps(num_tasks, device):
    grads, sums = draw_both(num_tasks, [(700,), (9001,)], torch.float32, torch.bfloat16, missing=0.1, device=device)
    factors = torch.randn(num_tasks, device=device)
    assert_risks(ops.excess_risks(grads, sums, 0.5, factors), grads, sums, 0.5, factors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    grads, sums = draw_both(4, [(5, 7, 3, 3), (65, 33), (129,)], torch.float32, torch.float16, layout, 0.2, device)
    assert_risks(ops.excess_risks(grads, sums), grads, sums)


def test_the_definition_by_hand(device):
    grads = TaskGradients.from_rows(
        [[torch.tensor([3.0, 0.0], device=device)], [torch.tensor([4.0, 2.0], device=device)]]
    )
    sums = TaskGradients.from_rows([[torch.tensor([7.0, 9.0], device=device)], [None]])
    factors = torch.tensor([1.0, 0.5], device=device)
    risks = ops.excess_risks(grads, sums, 9.0, factors).tolist()
    assert risks == pytest.approx([9 / 25**0.5, 4 / 13**0.5 + 1 / 10**0.5], rel=1e-15)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_comes_out(value, device):
    grads, sums = draw_both(2, [(100,)], torch.float32, torch.float32, device=device)
    grads.rows[1][0][37] = value
    assert ops.excess_risks(grads, sums).isnan().tolist() == [False, True]


def test_sums_that_overflowed_leave_nothing(device):
    grads = TaskGradients.from_matrix(torch.ones(1, 100, device=device))
    sums = TaskGradients.from_matrix(torch.full((1, 100), torch.inf, dtype=torch.float16, device=device))
    sums.rows[0][0][::2] = 3
    assert ops.excess_risks(grads, sums, 1e-30).item() == pytest.approx(25, rel=1e-14)


def test_sizes_that_float32_cannot_hold(device):
    grads = TaskGradients.from_matrix(torch.full((1, 1000), 1e-30, device=device))
    sums = TaskGradients.from_matrix(torch.zeros(1, 1000, device=device))
    assert torch.allclose(ops.excess_risks(grads, sums, 1e-80), torch.tensor(1000 * 1e-30, dtype=torch.float64))


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_equal_over_repeats_schedules_and_addresses(dtype, device, schedules):
    both = draw_both(5, [(70_001,), (3, 5), (8193,), (1,)], dtype, torch.float32, missing=0.1, device=device)
    results = []
    for _ in schedules:
        for layout in ("contiguous", "misaligned"):
            moved = [[[None if g is None else laid_out(g, layout) for g in row] for row in x.rows] for x in both]
            results.append(ops.excess_risks(*map(TaskGradients.from_rows, moved)))
    assert all(torch.equal(result, results[0]) for result in results)
