"""The CUDA kernels that work element by element or on state, compiled for the CPU, against the CPU's and float64.

MTLFAST_EMULATE=all (make emu) runs the whole grid; without it each kernel, dtype and regime takes a seeded sample.
"""

import pytest
import torch
from cases import DTYPES, SHAPES, draw, laid_out
from emulate import Emulator
from grids import EMULATED_SHAPES, TASKS, assert_every_kernel_ran, grid, shapes_for
from test_advance import NAMES, assert_advanced
from test_grad_drop import assert_kept
from test_scale import copy_of
from test_trimmed_mean import assert_trimmed

from mtlfast import TaskGradients, ops, reference
from mtlfast.ops.grad_drop import wide_dtype

# The sample is made below, and the last test looks at what all the others ran.
pytestmark = pytest.mark.whole

DROP_CASES = grid(
    DTYPES, [False, True], TASKS, list(EMULATED_SHAPES), ["contiguous", "misaligned"], [0, 1], per=2, take=4
)


@pytest.mark.parametrize(("dtype", "leaking", "num_tasks", "shapes", "layout", "misaligned"), DROP_CASES, ids=str)
def test_grad_drop(emulator: Emulator, dtype, leaking, num_tasks, shapes, layout, misaligned):
    grads = draw(num_tasks, shapes_for(shapes, num_tasks), dtype, layout, missing=0.15)
    numbers = ops.unflatten(torch.rand(grads.numel(), dtype=wide_dtype(grads)), grads)
    numbers = [None if x is None else laid_out(x, layout) for x in numbers]
    arguments = {"leak": torch.rand(num_tasks)} if leaking else {}
    drawn = {"seed": torch.tensor([num_tasks - 2**62]), **arguments}
    for given in (drawn, {**drawn, "thresholds": numbers}, {"uniform": numbers, **arguments}, arguments):
        result = emulator.grad_drop(grads, **given, misaligned=misaligned)
        assert_kept(grads, result, **given)
        # Both devices draw the same numbers, decide alike and round alike. What a factor multiplies may be fused.
        if not leaking and len(given) > 0:
            for x, want in zip(result, ops.grad_drop(grads, **given), strict=True):
                assert x is want is None or torch.equal(x, want)
    for x, want in zip(emulator.grad_drop(grads, purity=True), ops.sign_purity(grads), strict=True):
        assert x is want is None or torch.equal(x, want)


@pytest.mark.parametrize("leaking", [False, True])
@pytest.mark.parametrize("num_tasks", [1, 8, 16, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_grad_drop_that_rounds_each_operation(emulator: Emulator, dtype, num_tasks, leaking):
    grads = draw(num_tasks, [*SHAPES["mixed"], (4099,)], dtype, missing=0.15)
    numbers = ops.unflatten(torch.rand(grads.numel(), dtype=dtype), grads)
    given = {"uniform": numbers, "leak": torch.rand(num_tasks) if leaking else None, "round_each": True}
    for thresholds in (None, [None if x is None else 1 - x for x in numbers]):
        result = emulator.grad_drop(grads, thresholds=thresholds, **given)
        for x, want in zip(result, ops.grad_drop(grads, thresholds=thresholds, **given), strict=True):
            assert x is want is None or torch.equal(x, want)
    purities = ops.sign_purity(grads, round_each=True)
    for x, want in zip(emulator.grad_drop(grads, round_each=True, purity=True), purities, strict=True):
        assert x is want is None or torch.equal(x.nan_to_num(7), want.nan_to_num(7))


TRIM_CASES = grid(DTYPES, [*TASKS[:-1], 5, 40], list(EMULATED_SHAPES), ["contiguous", "misaligned"], [0, 1], per=2)


@pytest.mark.parametrize(("dtype", "num_tasks", "shapes", "layout", "misaligned"), TRIM_CASES, ids=str)
def test_trimmed_mean(emulator: Emulator, dtype, num_tasks, shapes, layout, misaligned):
    grads = draw(num_tasks, shapes_for(shapes, num_tasks), dtype, layout, missing=0.15)
    for trim_number in {0, (num_tasks - 1) // 2}:
        result = emulator.trimmed_mean(grads, trim_number, misaligned=misaligned, seed=1)
        assert_trimmed(grads, result, trim_number)
        for x, want in zip(result, ops.trimmed_mean(grads, trim_number), strict=True):
            assert x is want is None or torch.equal(x, want)


def test_element_by_element_over_any_task_and_what_is_not_finite(emulator: Emulator):
    for own in range(3):
        grads = draw(3, [(4100,), (3,), (0,)])
        grads.rows[1][0][7], grads.rows[0][1][2] = torch.inf, torch.nan
        seed = torch.tensor([3])
        for run in (emulator.grad_drop, emulator.trimmed_mean):
            argument = seed if run == emulator.grad_drop else 1
            fresh = run(grads, argument)
            assert [x.isnan().nonzero().flatten().tolist() for x in fresh] == [[7], [2], []]
            copy = TaskGradients.from_rows([[g.clone() for g in row] for row in grads.rows])
            for x, want in zip(run(copy, argument, out=copy.rows[own]), fresh, strict=True):
                assert torch.equal(x.nan_to_num(9), want.nan_to_num(9))


def test_grad_drop_of_as_many_tasks_as_a_table_holds(emulator: Emulator):
    grads = TaskGradients.from_rows([[torch.ones(3)]] * 4074)
    assert emulator.grad_drop(grads)[0].tolist() == [4074] * 3
    with pytest.raises(RuntimeError, match="no room for that many tasks"):
        emulator.grad_drop(TaskGradients.from_rows([*grads.rows, [torch.ones(3)]]))


STATE_CASES = grid(DTYPES, DTYPES, TASKS, list(EMULATED_SHAPES), [False, True], DTYPES, [0, 1], per=2, take=3)


@pytest.mark.parametrize(("dtype", "state_dtype", "num_tasks", "shapes", "square", "to", "misaligned"), STATE_CASES)
def test_advance(emulator: Emulator, dtype, state_dtype, num_tasks, shapes, square, to, misaligned):
    layout = "misaligned" if misaligned else "contiguous"
    shapes = shapes_for(shapes, num_tasks)
    grads, state = (draw(num_tasks, shapes, x, layout, missing=0.15) for x in (dtype, state_dtype))
    before, coefficients = copy_of(state), torch.randn(4, num_tasks)
    result = emulator.advance_(grads, state, coefficients, square, None, to, misaligned, seed=1)
    given = dict(zip(NAMES, coefficients, strict=True))
    assert_advanced(grads, before, given, square, state, result, to)

    coefficients[num_tasks % 4, num_tasks // 2] = torch.nan
    before = copy_of(state)
    for x in emulator.advance_(grads, state, coefficients, square, None, to, misaligned, seed=1):
        assert x is None or x.isnan().all()
    for x, was in zip(state.flat(), before.flat(), strict=True):
        assert x is None or torch.equal(x, was)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_advance_writes_its_sum_over_any_task(emulator: Emulator, dtype):
    shapes, coefficients = [(4100,), (3,), (0,)], torch.randn(4, 3)
    for own in range(3):
        grads, state = draw(3, shapes, dtype), draw(3, shapes, torch.bfloat16)
        wanted = emulator.advance_(grads, copy_of(state), coefficients)
        result = emulator.advance_(grads, state, coefficients, out=grads.rows[own], seed=2)
        assert all(torch.equal(x, want) for x, want in zip(result, wanted, strict=True))


RISKS_CASES = grid(DTYPES, DTYPES, TASKS, list(EMULATED_SHAPES), ["contiguous", "misaligned"], per=2, take=3)


@pytest.mark.parametrize(("dtype", "sums_dtype", "num_tasks", "shapes", "layout"), RISKS_CASES, ids=str)
def test_excess_risks(emulator: Emulator, dtype, sums_dtype, num_tasks, shapes, layout):
    shapes = shapes_for(shapes, num_tasks)
    grads, sums = (draw(num_tasks, shapes, x, layout, missing=0.15) for x in (dtype, sums_dtype))
    for entry in sums.flat():
        if entry is not None:
            entry.abs_()
    factors = torch.randn(num_tasks)
    risks = emulator.excess_risks(grads, sums, 1e-7, factors, seed=1)
    assert torch.allclose(risks, reference.excess_risks(grads, sums, 1e-7, factors), rtol=1e-12, atol=0)
    # Neither the order of blocks and threads nor addresses change a bit.
    moved = copy_of(grads), copy_of(sums)
    assert torch.equal(emulator.excess_risks(*moved, 1e-7, factors, seed=0), risks)


def test_every_kernel_ran(emulator: Emulator):
    # This test is last in the file, because it looks at what ran above.
    assert_every_kernel_ran(emulator, "test_elementwise_kernels")
