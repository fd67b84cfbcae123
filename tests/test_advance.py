"""advance_: state for each task and parameter, moved and summed in one pass."""

import pytest
import torch
from cases import DTYPES, LAYOUTS, SHAPES, TASKS, draw, draw_rows, laid_out, wide
from test_scale import copy_of

from mtlfast import TaskGradients, ops, reference

NAMES = ("keep", "take", "of_state", "of_grads")


def coefficients(num_tasks: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    return {name: torch.randn(num_tasks, device=device) for name in NAMES}


def draw_both(
    num_tasks, shapes, dtype, state_dtype, layout="contiguous", missing=0.0, device="cpu"
) -> tuple[TaskGradients, TaskGradients]:
    """Gradients and state, whose absent entries are not the same ones."""
    return tuple(draw(num_tasks, shapes, d, layout, missing, device) for d in (dtype, state_dtype))


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 in `dtype`, as torch rounds it."""
    return x.to(dtype)


def assert_advanced(grads, before, given, square, state, result, dtype=None) -> None:
    """Checks the new state and the sums against float64, up to double sums and one rounding."""
    dtype = dtype or grads.dtype
    given = {name: None if x is None else x.cpu() for name, x in given.items()}
    new = wide(before)
    exact = reference.advance_(wide(grads), new, **given, square=square)
    sizes = [TaskGradients.from_rows(_abs(x)) for x in (grads, before)]
    most = reference.advance_(
        *sizes, **{name: None if x is None else x.abs() for name, x in given.items()}, square=square
    )
    terms = (4 * grads.num_tasks + 4) * torch.finfo(torch.float64).eps
    for t, shape in enumerate(grads.shapes):
        for k in range(grads.num_tasks):
            x, want, largest = state.rows[k][t], new.rows[k][t], sizes[1].rows[k][t]
            assert (x is None) == (before.rows[k][t] is None)
            if x is None:
                continue
            if shape is None:
                assert torch.equal(x, before.rows[k][t])
            assert_near(x, want, largest, terms, state.dtype)
        assert (result[t] is None) == (shape is None)
        if shape is not None:
            assert result[t].device == grads.device
            assert_near(result[t], exact[t], most[t], terms, dtype)


def assert_near(x, want, largest, terms, dtype) -> None:
    assert x.dtype == dtype
    info = torch.finfo(dtype)
    x, most = x.cpu().double(), info.max * (1 - info.eps)
    bound = want.abs() * info.eps + largest * terms + info.smallest_normal
    assert ((x - want).abs() <= bound).logical_or(want.abs() > most).all()


def _abs(grads):
    return [[None if g is None else g.cpu().double().abs() for g in row] for row in grads.rows]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_shapes(missing, square, shapes, state_dtype, dtype, device):
    grads, state = draw_both(3, shapes, dtype, state_dtype, missing=missing, device=device)
    before, given = copy_of(state), coefficients(3, device)
    result = ops.advance_(grads, state, **given, square=square)
    assert_advanced(grads, before, given, square, state, result)


@pytest.mark.parametrize("num_tasks", [*TASKS, 33])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_of_tasks(state_dtype, num_tasks, device):
    grads, state = draw_both(num_tasks, [(700,), (9001,)], torch.float32, state_dtype, missing=0.1, device=device)
    before, given = copy_of(state), coefficients(num_tasks, device)
    assert_advanced(grads, before, given, False, state, ops.advance_(grads, state, **given))


@pytest.mark.parametrize("left_out", [("of_state",), ("of_grads",), ("of_state", "of_grads")], ids=str)
def test_absent_coefficients_are_zeros(left_out, device):
    grads, state = draw_both(3, SHAPES["mixed"], torch.float32, torch.float32, device=device)
    given = coefficients(3, device)
    zeros = {name: torch.zeros(3, device=device) if name in left_out else x for name, x in given.items()}
    other = copy_of(state)
    wanted = ops.advance_(grads, other, **zeros)
    result = ops.advance_(grads, state, **{name: x for name, x in given.items() if name not in left_out})
    assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state.flat(), other.flat(), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_are_kept(dtype, layout, device):
    grads, state = draw_both(4, [(5, 7, 3, 3), (65, 33), (129,)], dtype, torch.bfloat16, layout, device=device)
    before, given = copy_of(state), coefficients(4, device)
    result = ops.advance_(grads, state, **given)
    assert_advanced(grads, before, given, False, state, result)
    for x, example in zip(result, grads.examples(), strict=True):
        assert x.stride() == example.stride()


@pytest.mark.parametrize("to", DTYPES, ids=str)
def test_outputs_of_any_dtype(to, device):
    grads, state = draw_both(3, SHAPES["borders"], torch.float32, torch.float16, missing=0.2, device=device)
    before, given = copy_of(state), coefficients(3, device)
    out = [None if x is None else torch.full_like(x, torch.nan, dtype=to) for x in grads.examples()]
    result = ops.advance_(grads, state, **given, out=out)
    assert all(x is target for x, target in zip(result, out, strict=True))
    assert_advanced(grads, before, given, False, state, result, to)


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_the_sum_may_go_over_any_tasks_gradients(num_tasks, device):
    for own in range(num_tasks):
        grads, state = draw_both(num_tasks, [(5000,), (3,), (0,)], torch.float32, torch.bfloat16, device=device)
        given, other = coefficients(num_tasks, device), copy_of(state)
        wanted = ops.advance_(grads, other, **given)
        result = ops.advance_(grads, state, **given, out=grads.rows[own])
        assert all(x is target for x, target in zip(result, grads.rows[own], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(state.flat(), other.flat(), strict=True))


@pytest.mark.parametrize("advance_", [ops.advance_, reference.advance_])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("task", [0, 4])
def test_a_coefficient_that_is_not_finite_leaves_the_state(task, value, name, advance_, device):
    grads, state = draw_both(5, [(5000,), (3, 4)], torch.float32, torch.bfloat16, missing=0.2, device=device)
    if state.rows[0][1] is not None:
        state.rows[0][1][1, 2] = torch.nan
    before, given = copy_of(state), coefficients(5, device)
    given[name][task] = value
    for x in advance_(grads, state, **given):
        assert x is None or x.isnan().all()
    for x, was in zip(state.flat(), before.flat(), strict=True):
        assert x is None or torch.equal(x.view(torch.int16), was.view(torch.int16))


def test_what_is_not_finite_in_a_gradient_reaches_its_own_places_alone(device):
    grads, state = draw_both(2, [(100,)], torch.float32, torch.float32, device=device)
    grads.rows[0][0][37] = torch.inf
    ones = torch.ones(2, device=device)
    (x,) = ops.advance_(grads, state, ones, ones, ones)
    assert x.isfinite().sum() == state.rows[0][0].isfinite().sum() == 99
    assert not x[37].isfinite()
    # A task without state counts by of_grads alone.
    alone = TaskGradients.from_rows([[None], state.rows[1]])
    (x,) = ops.advance_(grads, alone, ones, 0 * ones, ones, ones)
    assert x[37].isinf()


def test_the_sum_takes_the_state_before_it_is_rounded(device):
    grads = TaskGradients.from_matrix(torch.full((1, 100), 2.0**-10, device=device))
    state = TaskGradients.from_matrix(torch.ones(1, 100, dtype=torch.bfloat16, device=device))
    ones = torch.ones(1, device=device)
    (x,) = ops.advance_(grads, state, ones, ones, ones)
    assert x.unique().tolist() == [1 + 2.0**-10]
    assert state.rows[0][0].unique().tolist() == [1.0]


def test_what_terms_that_cancel_leave_is_kept(device):
    gradient = torch.randn(9001, device=device)
    grads = TaskGradients.from_rows([[gradient]])
    state = TaskGradients.from_rows([[gradient.clone()]])
    before, one = copy_of(state), torch.ones(1, dtype=torch.float64, device=device)
    given = {"keep": one, "take": 1e-9 * one, "of_state": one, "of_grads": -one}
    (x,) = ops.advance_(grads, state, **given)
    assert torch.allclose(x, 1e-9 * gradient, rtol=1e-6, atol=0)
    assert torch.equal(state.rows[0][0], before.rows[0][0])


def test_a_tensor_that_no_task_reaches_keeps_its_state(device):
    grads = TaskGradients.from_rows([[torch.ones(3, device=device), None], [None, None]])
    state = TaskGradients.from_rows([[torch.ones(3, device=device), torch.ones(4, device=device)]] * 1 + [[None, None]])
    half = torch.full((2,), 0.5, device=device)
    x, none = ops.advance_(grads, state, half, half, half)
    assert none is None
    assert x.tolist() == [0.5] * 3
    assert state.rows[0][1].tolist() == [1] * 4


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_equal_over_repeats_schedules_and_addresses(dtype, device, schedules):
    rows, states = (
        draw_rows(5, [(70_001,), (3, 5), (8193,), (1,)], d, missing=0.1, device=device) for d in (dtype, torch.bfloat16)
    )
    given, results = coefficients(5, device), []
    for _ in schedules:
        for layout in ("contiguous", "misaligned"):
            grads, state = (
                TaskGradients.from_rows(
                    [[None if g is None else laid_out(g.clone(), layout) for g in row] for row in x]
                )
                for x in (rows, states)
            )
            results.append([*ops.advance_(grads, state, **given), *state.flat()])
    for result in results[1:]:
        assert all(a is b if a is None else torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("copied", ["state before", "state after", "gradient"])
def test_a_lazy_copy_is_not_written(copied, device):
    first, gradient = torch.ones(10, device=device), torch.full((10,), 2.0, device=device)
    other = None
    if copied == "state before":
        entry, other = torch._lazy_clone(first), first
    elif copied == "gradient":
        entry, other = torch._lazy_clone(gradient), gradient
    else:
        entry = first
    state, grads = TaskGradients.from_rows([[entry]]), TaskGradients.from_rows([[gradient]])
    other = torch._lazy_clone(first) if other is None else other
    was, before = other[0].item(), entry[0].item()
    half = torch.full((1,), 0.5, device=device)
    (x,) = ops.advance_(grads, state, half, half, half)
    assert state.rows[0][0].unique().item() == 0.5 * before + 1
    assert x.unique().item() == 0.25 * before + 0.5
    assert other.unique().item() == was


def test_coefficients_that_lie_in_the_state_are_read_before_it_moves(device):
    state = torch.tensor([0.5, 0.25], dtype=torch.float64, device=device)
    grads = TaskGradients.from_rows([[torch.ones(2, device=device)]] * 2)
    both = TaskGradients.from_rows([[state], [torch.zeros(2, dtype=torch.float64, device=device)]])
    ops.advance_(grads, both, keep=state, take=torch.zeros(2, device=device))
    assert state.tolist() == [0.25, 0.125]
