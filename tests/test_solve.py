"""The solve op, its twins, and project."""

import pytest
import torch
from cases import draw, matrix

from mtlfast import ops, reference
from mtlfast.aggregation import PCGrad


def random_order(num_tasks: int) -> torch.Tensor:
    """int64 [K, K-1]."""
    others = [[j for j in range(num_tasks) if j != i] for i in range(num_tasks)]
    shuffled = [[row[n] for n in torch.randperm(num_tasks - 1)] for row in others]
    return torch.tensor(shuffled, dtype=torch.int64).reshape(num_tasks, num_tasks - 1)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_project_is_the_papers_algorithm_on_the_matrix(dtype, ordered, num_tasks, device):
    grads = draw(num_tasks, [(4, 3), (0,), (5,)], dtype, missing=0.1, device=device)
    order = random_order(num_tasks) if ordered else None
    on_device = None if order is None else order.to(grads.device)
    projected = ops.project(grads, on_device)
    literal = reference.pcgrad(matrix(grads), order)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert torch.allclose(matrix(projected), literal, rtol=tolerance, atol=tolerance)
    assert torch.allclose(matrix(reference.project(grads, on_device)), literal, rtol=tolerance, atol=tolerance)
    assert projected.shapes == grads.shapes
    assert projected.device == grads.device


@pytest.mark.native
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 40])
def test_coefficients_agree_with_their_twin(num_tasks, device):
    J = torch.randn(5, num_tasks, 2 * num_tasks, dtype=torch.float64)
    gram, keys = J @ J.mT, torch.rand(5, num_tasks, num_tasks, dtype=torch.float64)
    for inputs in ([], [keys]):
        native = ops.solve(gram.to(device), "pcgrad_coefficients", [], [x.to(device) for x in inputs]).cpu()
        assert torch.allclose(native, reference.solve(gram, "pcgrad_coefficients", [], inputs), rtol=1e-8, atol=1e-9)


def test_ties_among_keys_go_by_index(device):
    gram = torch.tensor([[2.0, -1, -1], [-1, 2, 0.5], [-1, 0.5, 2]], dtype=torch.float64, device=device)
    ascending = ops.solve(gram, "pcgrad_coefficients")
    assert torch.equal(ops.solve(gram, "pcgrad_coefficients", inputs=[torch.zeros(3, 3, device=device)]), ascending)


def test_pcgrad_by_hand(device):
    # g0 = (1, 0), g1 = (-1, 1): each loses its component along the other.
    gram = torch.tensor([[1.0, -1.0], [-1.0, 2.0]], dtype=torch.float64, device=device)
    expected = torch.tensor([[1.0, 0.5], [1.0, 1.0]], dtype=torch.float64, device=device)
    assert torch.allclose(ops.solve(gram, "pcgrad_coefficients"), expected)
    assert torch.allclose(ops.solve(gram, "pcgrad", [0.0, 0.0]), expected.sum(0))
    assert torch.allclose(ops.solve(gram, "pcgrad", [1.0, 0.0]), expected.mean(0))


def test_groups_are_solved_alone_and_a_sick_one_harms_no_other(device):
    J = torch.randn(2, 3, 4, 6, dtype=torch.float64, device=device)
    gram = J @ J.mT
    healthy = ops.solve(gram, "pcgrad", [0.0, 0.0])
    assert healthy.shape == (2, 3, 4)
    assert torch.allclose(healthy[1, 2], ops.solve(gram[1, 2], "pcgrad", [0.0, 0.0]))
    gram[0, 1, 2, 2] = torch.inf
    sick = ops.solve(gram, "pcgrad", [0.0, 0.0])
    assert sick[0, 1].isnan().all()
    sick[0, 1] = healthy[0, 1]
    assert torch.equal(sick, healthy)


def test_zero_and_opposite_gradients(device):
    zero = torch.zeros(3, 3, dtype=torch.float64, device=device)
    assert ops.solve(zero, "pcgrad", [0.0, 0.0]).tolist() == [1.0, 1.0, 1.0]
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64, device=device)
    w = ops.solve(opposite, "pcgrad", [0.0, 0.0])
    assert (w @ opposite @ w).item() == 0.0


def test_more_tasks_than_the_solver_takes(device):
    J = torch.randn(130, 300, dtype=torch.float64)
    w = PCGrad(order="fixed").weights((J @ J.T).to(device))
    assert torch.allclose(w.cpu() @ J, reference.pcgrad(J).sum(0), atol=1e-8)


@pytest.mark.parametrize(
    ("gram", "method", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), "pcgrad", r"gram is \[2, 3\] torch.float64"),
        (torch.zeros(2, 2), "pcgrad", r"expected \[..., K, K\] torch.float64"),
        (torch.zeros(2, 2, dtype=torch.float64), "unheard", "method is 'unheard', expected one of aligned_mtl, cagrad"),
    ],
)
def test_bad_input(gram, method, message):
    with pytest.raises(ValueError, match=message):
        ops.solve(gram, method)


@pytest.mark.native
@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("pcgrad", {}, "solve: pcgrad got 0 params, expected 2"),
        ("mgda", {"params": [0.0, 1.0, 2.0]}, "solve: mgda got no input, expected one"),
        ("krum", {"params": [0.0, 1.0], "inputs": [torch.ones(3)]}, "solve: krum got 1 inputs, expected none"),
        (
            "upgrad",
            {"params": [0.0], "inputs": [torch.ones(2)]},
            "solve: upgrad got an input of 2 elements a group, expected 3",
        ),
        (
            "gradvac",
            {"params": [0.5, 0.0]},
            "solve: gradvac got a state of 0 elements a group, expected at least 9",
        ),
        (
            "modo",
            {"params": [0.1, 0.1], "state": torch.zeros(3, dtype=torch.float64), "tasks": [0, 1, 5]},
            "solve: modo got a state of 3 elements a group, expected at least 6",
        ),
        ("pcgrad", {"params": [0.0, 0.0], "tasks": [0, 1]}, "solve: got 2 tasks, expected 3 as gram has"),
        ("pcgrad", {"params": [0.0, 0.0], "tasks": [0, 1, -1]}, "solve: task -1, expected an index"),
        ("pcgrad", {"params": [0.0, 0.0], "tasks": [0, 1, 0]}, "solve: task 0 is there twice, expected each once"),
    ],
)
def test_arguments_that_a_solver_would_read_beyond(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.solve(torch.eye(3, dtype=torch.float64), method, **arguments)
