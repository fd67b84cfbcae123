"""The CUDA kernels of the solvers, compiled for the CPU, against the solvers on the CPU.

MTLFAST_EMULATE=all (make emu) runs the whole grid; without it each kernel, dtype and regime takes a seeded sample.
"""

import pytest
import torch
from emulate import Emulator
from grids import ALL, TASKS, assert_every_kernel_ran, grid
from methods import METHODS, losses, products

from mtlfast import ops
from mtlfast.aggregation import Step
from mtlfast.aggregation._solved import SolvedAggregator

# The sample is made below, and the last test looks at what all the others ran.
pytestmark = pytest.mark.whole


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("num_tasks", [*TASKS, 128])
def test_coefficients(emulator: Emulator, num_tasks, keys):
    gram = conflicting(num_tasks)
    inputs = [torch.rand(gram.shape, dtype=torch.float64)] if keys else []
    result = emulator.solve(gram, "pcgrad_coefficients", [], inputs, seed=1)
    assert torch.allclose(result, ops.solve(gram, "pcgrad_coefficients", [], inputs), rtol=1e-9, atol=1e-12)


def conflicting(num_tasks: int, groups: int = 3) -> torch.Tensor:
    """Gram matrices of full rank."""
    J = torch.randn(groups, num_tasks, num_tasks + 10, dtype=torch.float64)
    return J @ J.mT


SOLVED = [name for name, method in METHODS.items() if isinstance(method.make(), SolvedAggregator)]
SOLVE_CASES = grid(SOLVED, [1, 2, 3, 8, 17, 40, 128] if ALL else [1, 2, 3, 8, 17], take=2)


@pytest.mark.parametrize(("name", "num_tasks"), SOLVE_CASES, ids=str)
def test_solve(emulator: Emulator, name, num_tasks):
    # The kernel gets what the aggregator passes to the solver. Both are one source, run by a block or by a thread.
    method = METHODS[name]
    num_tasks = num_tasks if method.any_tasks else 3
    num_tasks = min(max(num_tasks, method.least_tasks), method.most_tasks)
    aggregator = method.make()
    for tasks in (None, tuple(range(0, 2 * num_tasks, 2)) if method.any_tasks else None):
        gram = products(method, torch.randn(3, num_tasks, num_tasks + 10, dtype=torch.float64))
        gram[1, 0, 0] = torch.inf
        mask = None
        if tasks is not None and num_tasks > max(2, method.least_tasks):
            mask = torch.rand(3, num_tasks) < 0.7
            mask[:, : max(2, method.least_tasks)] = True
            gram[2] = gram[2].where(mask[2][:, None] & mask[2], torch.nan)
        step = Step(num_tasks, losses(num_tasks), 3.0, tasks, mask=mask)
        *arguments, state, present, mask = aggregator.solve_arguments(gram, step)
        emulated_state = None if state is None else state.clone()
        emulated = emulator.solve(*arguments, emulated_state, present, mask, seed=1)
        expected = ops.solve(*arguments, state, present, mask)
        assert emulated[1][:1].isnan().all()
        assert not emulated[2].isnan().any()
        assert torch.allclose(emulated, expected, rtol=1e-9, atol=1e-10, equal_nan=True)
        if state is not None:
            assert torch.allclose(emulated_state, state, rtol=1e-9, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("given", [(), ("loss_scale",), ("preferences",), ("loss_scale", "preferences")], ids=str)
def test_solve_with_two_inputs(emulator: Emulator, given):
    # An absent input is a null pointer, which must be neither offset nor read. Each result is checked for NaN.
    gram, params = conflicting(8), {"max_norm": 1.0, "update_weights_every": 1, "rtol": 1e-9}
    inputs = {"loss_scale": torch.tensor([2.0, 3.0, 4.0]), "preferences": torch.rand(3, 8) + 0.1}
    inputs = {name: inputs[name].double() for name in given}
    states = [torch.zeros(3, 11, dtype=torch.float64) for _ in range(2)]
    for x in (None, *inputs.values()):
        if x is not None:
            x.view(3, -1)[1, -1] = torch.nan
        emulated = emulator.solve(gram, "nash_mtl", params, inputs, states[0], seed=1)
        expected = ops.solve(gram, "nash_mtl", params, inputs, states[1])
        assert emulated[1].isnan().all() == (x is not None)
        assert torch.allclose(emulated, expected, rtol=1e-9, atol=1e-10, equal_nan=True)
        assert torch.allclose(*states, rtol=1e-9, atol=1e-10)
        if x is not None:
            x.view(3, -1)[1, -1] = 1


@pytest.mark.parametrize("method", ["mgda", "dualproj", "imtlg", "config"])
def test_solve_where_gradients_depend_on_each_other(emulator: Emulator, method):
    # A few of these 40 programs go on to the active set, which the blocks of changes do not end; and pseudo-inverses
    # need the spectrum.
    J = torch.randn(40, 8, 4, dtype=torch.float64)
    params = {"mgda": [0.0, 1.0, 0.0], "dualproj": [0.0, 0.0], "imtlg": [1e-10], "config": [-1.0, 0.0, 1e-10]}[method]
    counts, wanted = (torch.zeros(40, 2, dtype=torch.float64) for _ in range(2))
    emulated = emulator.solve(J @ J.mT, method, params, state=counts, seed=1)
    expected = ops.solve(J @ J.mT, method, params, state=wanted)
    assert torch.allclose(emulated.unsqueeze(1) @ J, expected.unsqueeze(1) @ J, rtol=0, atol=1e-8)
    assert torch.equal(counts, wanted)
    assert torch.equal(counts[:, 1], torch.full((40,), float(method in ("imtlg", "config")), dtype=torch.float64))


def test_every_kernel_ran(emulator: Emulator):
    # This test is last in the file, because it looks at what ran above.
    assert_every_kernel_ran(emulator, "test_solve_kernels")
