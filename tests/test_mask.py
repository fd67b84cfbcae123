"""A mask leaves tasks out of a solve as if they had not been given. Their rows are never read."""

import pytest
import torch
from methods import METHODS, losses, numbers_of_tasks, products
from torch import Tensor

from mtlfast import TaskGradients, ops, reference
from mtlfast.aggregation import Step
from mtlfast.aggregation._jacobian import RowsJacobian
from mtlfast.aggregation._solved import SolvedAggregator

SOLVED = [name for name, method in METHODS.items() if isinstance(method.make(), SolvedAggregator)]
BY_HAND = [name for name in METHODS if name not in SOLVED]


def masks(name: str, num_tasks: int) -> Tensor:
    """[4, K]: different tasks in each group, in the last one as few as the method works with."""
    method = METHODS[name]
    mask = torch.ones(4, num_tasks, dtype=torch.bool)
    if method.any_tasks and num_tasks > max(2, method.least_tasks):
        mask[1, 0] = mask[2, num_tasks // 2] = False
        mask[3, method.least_tasks :] = False
    return mask


def hidden(gram: Tensor, mask: Tensor) -> Tensor:
    """NaN in the rows and columns that the mask leaves out."""
    return gram.where(mask.unsqueeze(-1) & mask.unsqueeze(-2), torch.nan)


def among(x: Tensor, places: Tensor, num_tasks: int) -> Tensor:
    """One group's part of an input for some of the tasks."""
    if x.numel() == num_tasks**2:
        return x.view(num_tasks, num_tasks)[places][:, places]
    return x.view(-1)[places] if x.numel() == num_tasks else x


@pytest.mark.parametrize("solve", [ops.solve, reference.solve])
@pytest.mark.parametrize("name", SOLVED)
def test_the_solver_sees_the_others_alone(name, solve):
    method = METHODS[name]
    (num_tasks,) = numbers_of_tasks(method, 6)
    mask, tasks = masks(name, num_tasks), tuple(range(1, num_tasks + 1)) if method.any_tasks else None
    aggregator = method.make()
    clean = products(method, torch.randn(4, num_tasks, num_tasks + 4, dtype=torch.float64))
    step = Step(num_tasks, losses(num_tasks), 3.0, tasks, rtol=num_tasks * 1e-9, mask=mask)
    _, solver, params, inputs, state, _, _ = aggregator.solve_arguments(clean, step)
    if solve is reference.solve:
        inputs = [inputs.get(n) for n in reference.SOLVERS[solver].inputs]
        params = [params[n] for n in reference.SOLVERS[solver].params]
    each = [None if state is None else state[i].clone() for i in range(4)]
    result = solve(hidden(clean, mask), solver, params, inputs, state, tasks, mask)
    assert not result.isnan().any()
    for i, row in enumerate(mask):
        places = row.nonzero().flatten()
        some = [None if x is None else among(x[i], places, num_tasks) for x in _values(inputs)]
        some = dict(zip(inputs, some, strict=True)) if isinstance(inputs, dict) else some
        of_some = {n: v * (len(places) / num_tasks) if n == "rtol" else v for n, v in _named(params, solver).items()}
        of_some = of_some if isinstance(params, dict) else list(of_some.values())
        present = [(tasks or range(num_tasks))[place] for place in places.tolist()]
        matrix = clean[i][places][:, places].contiguous()
        expected = torch.zeros(num_tasks, dtype=torch.float64)
        expected[places] = solve(matrix, solver, of_some, some, each[i], present)
        assert torch.equal(result[i], expected)
        if state is not None:
            assert torch.equal(state[i].nan_to_num(7), each[i].nan_to_num(7))


def _values(inputs):
    return inputs.values() if isinstance(inputs, dict) else inputs


def _named(params, solver: str) -> dict[str, float]:
    return params if isinstance(params, dict) else dict(zip(reference.SOLVERS[solver].params, params, strict=True))


def test_coefficients_of_the_others_are_zeros():
    gram = products(METHODS["PCGrad"], torch.randn(5, 9, dtype=torch.float64))
    mask = torch.tensor([True, False, True, True, False])
    for solve in (ops.solve, reference.solve):
        result = solve(hidden(gram, mask), "pcgrad_coefficients", mask=mask)
        places = mask.nonzero().flatten()
        expected = torch.zeros(5, 5, dtype=torch.float64)
        expected[places[:, None], places] = solve(gram[places][:, places].contiguous(), "pcgrad_coefficients")
        assert torch.equal(result, expected)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("steps", [1, 3])
def test_every_method_takes_it(name, steps):
    method = METHODS[name]
    (num_tasks,) = numbers_of_tasks(method, 5)
    mask = masks(name, num_tasks)[2]
    places = mask.nonzero().flatten()
    masked, without = method.make().eval(), method.make().eval()
    for aggregator in (masked, without):  # random draws are of other shapes: those alone are not compared
        aggregator.train(steps > 1 and not name.startswith(("PCGrad", "GradVac", "Random", "Compose")))
    for _ in range(steps):
        gram = products(method, torch.randn(num_tasks, num_tasks + 4, dtype=torch.float64))
        given = losses(num_tasks)
        weights = masked.weights(hidden(gram, mask), losses=given, mask=mask)
        some = {} if mask.all() else {"tasks": places.tolist()}
        expected = without.weights(gram[places][:, places].contiguous(), losses=given[places], **some)
        assert torch.allclose(weights[places], expected, rtol=1e-9, atol=1e-12)
        assert not weights[~mask].any()
    for one, other in zip(masked.state_dict().values(), without.state_dict().values(), strict=True):
        known = tuple(slice(size) for size in other.shape)  # the last task may never have been seen without the mask
        assert torch.allclose(one[known].double(), other.double(), rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", METHODS)
def test_with_no_task_left_all_weights_are_zero(name):
    method = METHODS[name]
    (num_tasks,) = numbers_of_tasks(method, 5)
    aggregator = method.make()
    gram = torch.full((num_tasks, num_tasks), torch.nan, dtype=torch.float64)
    weights = aggregator.weights(gram, losses=losses(num_tasks), mask=torch.zeros(num_tasks, dtype=torch.bool))
    assert weights.tolist() == [0] * num_tasks
    assert not any(aggregator.diagnostics().values())


def test_random_weights_are_of_the_others():
    aggregator = METHODS["Random"].make()
    mask = torch.tensor([True, False, True])
    weights = aggregator.weights(torch.eye(3, dtype=torch.float64), mask=mask)
    assert weights[1] == 0
    assert torch.allclose(weights.sum(), torch.ones((), dtype=torch.float64))


def test_a_jacobian_that_only_a_device_can_read_gives_its_mask():
    class OnDevice(RowsJacobian):
        mask = torch.tensor([True, True, False])

    rows = [[torch.tensor([1.0, 0.0])], [torch.tensor([-0.5, 1.0])], [torch.tensor([0.0, 0.0])]]
    aggregator = METHODS["MGDA, unit norms"].make() if "MGDA, unit norms" in METHODS else METHODS["UPGrad"].make()
    weights, _ = aggregator.weigh(OnDevice(TaskGradients.from_rows(rows)), Step(3))
    expected, _ = aggregator.weigh(RowsJacobian(TaskGradients.from_rows(rows[:2])), Step(2))
    assert torch.equal(weights, torch.cat([expected, torch.zeros(1, dtype=torch.float64)]))


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (torch.ones(2, dtype=torch.bool), "solve: mask is .2. torch.bool on cpu, expected .3. torch.bool on cpu"),
        (torch.ones(3), "solve: mask is .3. torch.float32 on cpu, expected .3. torch.bool on cpu"),
    ],
)
def test_what_is_no_mask_is_refused(mask, sentence):
    with pytest.raises(ValueError, match=sentence):
        ops.solve(torch.eye(3, dtype=torch.float64), "imtlg", {"rtol": 1e-9}, mask=mask)
