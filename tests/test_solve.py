"""The solve op, its twins, and project."""

import pytest
import torch
from cases import draw, matrix

from mtlfast import _native, ops, reference
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


def test_params_and_inputs_go_by_name_or_in_the_headers_order(device):
    J = torch.randn(2, 3, 5, dtype=torch.float64, device=device)
    gram, keys = J @ J.mT, torch.rand(2, 3, 3, device=device)
    expected = ops.solve(gram, "pcgrad", [1.0, 0.0], [keys])
    assert not torch.equal(expected, ops.solve(gram, "pcgrad", [0.0, 1.0], [keys]))
    for params in ({"mean": 1.0, "itself": 0.0}, {"itself": 0.0, "mean": 1.0}):
        assert torch.equal(ops.solve(gram, "pcgrad", params, {"keys": keys}), expected)


@pytest.mark.native
def test_the_references_names_and_sizes_are_those_of_the_headers():
    for num_tasks in (1, 3, 8):
        facts = {
            name: (
                ", ".join(solver.params),
                ", ".join(solver.inputs),
                [num_tasks ** reference.DIMENSIONS[name] for name in solver.inputs],
                0 if solver.state is None else solver.state(num_tasks),
                solver.square,
            )
            for name, solver in reference.SOLVERS.items()
        }
        assert _native.C.solver_facts(num_tasks) == facts


@pytest.fixture(params=[pytest.param("native", marks=pytest.mark.native), "reference"])
def served(request, monkeypatch) -> str:
    """Who solves: the compiled op, or its twin."""
    if request.param == "reference":
        monkeypatch.setattr(_native, "serves", lambda device: False)
    return request.param


def test_two_inputs_and_each_alone(served):
    # Orthogonal gradients of squared lengths g: g_i w_i = c_i / w_i; losses multiplied by 4 scale the update alone.
    g, p, scale = torch.tensor([4.0, 1.0, 0.25]).double(), torch.tensor([0.5, 2.0, 0.5]).double(), torch.tensor(4.0)
    params = {"max_norm": 0.0, "update_weights_every": 1, "rtol": 1e-6}

    def weights(factor: float = 1.0, **inputs: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(2, 6, dtype=torch.float64)
        gram = (g * factor**2).diag().expand(2, 3, 3)
        return ops.solve(gram, "nash_mtl", params, {name: x.expand(2, *x.shape) for name, x in inputs.items()}, state)

    fair, preferring = g**-0.5, (p / g) ** 0.5
    assert torch.allclose(weights(), fair.expand(2, 3))
    assert torch.allclose(weights(4.0, loss_scale=scale), fair.expand(2, 3))
    assert torch.allclose(weights(preferences=p), preferring.expand(2, 3))
    assert torch.allclose(weights(preferences=7 * p), preferring.expand(2, 3))
    assert torch.allclose(weights(4.0, preferences=p, loss_scale=scale), preferring.expand(2, 3))
    assert weights(preferences=p * torch.nan).isnan().all()


def test_accepted_alike(served):
    # By the number of elements a group: inputs of another shape, more state than the tasks need, no group at all.
    gram, keys = torch.tensor([[2.0, -1, -1], [-1, 2, 0.5], [-1, 0.5, 2]]).double(), torch.rand(3, 3)
    in_turn = ops.solve(gram, "pcgrad", [0.0, 0.0], [keys])
    assert torch.equal(ops.solve(gram, "pcgrad", [0.0, 0.0], [keys.view(9)]), in_turn)
    assert torch.equal(ops.solve(gram, "pcgrad", [0.0, 0.0], [None]), ops.solve(gram, "pcgrad", [0.0, 0.0]))
    for method, params, least in (("gradvac", [0.5, 0.0, 0.0], 12), ("pcd", [0.9, 0.0, 0.1, 1e-9], 8)):
        exact, more = torch.zeros(least, dtype=torch.float64), torch.zeros(least + 1, dtype=torch.float64)
        wanted = ops.solve(gram, method, params, state=exact)
        assert torch.allclose(ops.solve(gram, method, params, state=more), wanted)
        assert torch.equal(more[:least], exact)
    assert ops.solve(gram.new_empty(0, 3, 3), "pcgrad", [0.0, 0.0], [keys.new_empty(0, 3, 3)]).shape == (0, 3)
    assert ops.solve(gram.new_empty(0, 0), "pcgrad_coefficients").shape == (0, 0)
    assert ops.solve(gram, "mgda", [0.0, 1.0, 0.0], state=gram.new_empty(0)).shape == (3,)


def test_an_input_that_is_no_tensor(served):
    with pytest.raises(TypeError, match="solve: upgrad got preferences of type list, expected a Tensor"):
        ops.solve(torch.eye(2, dtype=torch.float64), "upgrad", [0.0, 0.0], {"preferences": [0.5, 0.5]})


def test_a_state_that_groups_do_not_share_equally(served):
    gram = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    with pytest.raises(ValueError, match=r"solve: modo got a state of 3\.5 elements a group, expected at least 3"):
        ops.solve(gram, "modo", [0.1, 0.1], state=torch.zeros(7, dtype=torch.float64))


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


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("pcgrad", {}, "solve: pcgrad got 0 params, expected 2"),
        ("mgda", {"params": [0.0, 1.0, 2.0]}, "solve: mgda got no input, expected one"),
        ("krum", {"params": [0.0, 1.0], "inputs": [torch.ones(3)]}, "solve: krum got 1 inputs, expected none"),
        (
            "upgrad",
            {"params": [0.0, 0.0], "inputs": [torch.ones(2)]},
            "solve: upgrad got an input of 2 elements a group, expected 3",
        ),
        (
            "gradvac",
            {"params": [0.5, 0.0, 0.0]},
            "solve: gradvac got a state of 0 elements a group, expected at least 12",
        ),
        (
            "modo",
            {"params": [0.1, 0.1], "state": torch.zeros(3, dtype=torch.float64), "tasks": [0, 1, 5]},
            "solve: modo got a state of 3 elements a group, expected at least 6",
        ),
        ("pcgrad", {"params": [0.0, 0.0], "tasks": [0, 1]}, "solve: got 2 tasks, expected 3 as gram has"),
        ("pcgrad", {"params": [0.0, 0.0], "tasks": [0, 1, -1]}, "solve: got task -1, expected an index of at least 0"),
        ("pcgrad", {"params": [0.0, 0.0], "tasks": [0, 1, 0]}, "solve: got task 0 twice, expected each index once"),
        ("pcgrad", {"params": {"mean": 0.0}}, "solve: pcgrad got 1 params, expected 2"),
        ("pcgrad", {"params": {"itself": 0.0}}, "solve: pcgrad got params itself, expected mean, itself"),
        (
            "pcgrad",
            {"params": {"mean": 0.0, "itself": 0.0, "eps": 0.0}},
            "solve: pcgrad got params mean, itself, eps, expected mean, itself",
        ),
        (
            "imtlg",
            {"params": {"rtol": 0.0}, "inputs": {"keys": torch.ones(3, 3)}},
            "imtlg got inputs keys, expected none",
        ),
        (
            "nash_mtl",
            {"params": [0.0, 1.0, 0.0], "inputs": {"losses": torch.ones(3)}},
            "solve: nash_mtl got inputs losses, expected loss_scale, preferences",
        ),
        (
            "nash_mtl",
            {"params": [0.0, 1.0, 0.0], "inputs": [None, None, None]},
            "solve: nash_mtl got 3 inputs, expected loss_scale, preferences",
        ),
        (
            "nash_mtl",
            {"params": [0.0, 1.0, 0.0], "inputs": {"preferences": torch.ones(1)}},
            "solve: nash_mtl got an input of 1 elements a group, expected 3: preferences",
        ),
        (
            "upgrad",
            {"params": [0.0, 0.0], "inputs": {"preferences": torch.ones(3, device="meta")}},
            "solve: an input is on meta, expected cpu as gram",
        ),
        (
            "mgda",
            {"params": {"epsilon": 0.0, "max_iters": 1, "norms": 3}},
            "solve: mgda got no input, expected one: losses",
        ),
        ("mgda", {"params": [0.0, 1.0, 2.0], "inputs": [None]}, "solve: mgda got no input, expected one: losses"),
        (
            "modo",
            {"params": [0.1, 0.1], "state": torch.zeros(3)},
            "state is torch.float32 on cpu, expected torch.float64",
        ),
        (
            "modo",
            {"params": [0.1, 0.1], "state": torch.zeros(6, dtype=torch.float64)[::2]},
            r"state has strides \[2\], expected it to be contiguous",
        ),
    ],
)
def test_arguments_that_a_solver_would_read_beyond(method, arguments, message, served):
    arguments = dict(arguments)
    state = arguments.get("state")
    before = None if state is None else state.clone()
    with pytest.raises(ValueError, match=message):
        ops.solve(torch.eye(3, dtype=torch.float64), method, **arguments)
    assert state is None or torch.equal(state, before)


@pytest.mark.native
@pytest.mark.parametrize(
    "arguments",
    [
        ("pcgrad", [0.0], [], None, None),
        ("mgda", [0.0, 1.0, 2.0], [], None, None),
        ("mgda", [0.0, 1.0, 2.0], [None], None, None),
        ("krum", [0.0, 1.0], [torch.ones(3)], None, None),
        ("nash_mtl", [0.0, 1.0, 0.0], [None, torch.ones(2)], torch.zeros(6, dtype=torch.float64), None),
        ("gradvac", [0.5, 0.0, 0.0], [], None, None),
        ("modo", [0.1, 0.1], [], torch.zeros(3), None),
        ("pcgrad", [0.0, 0.0], [], None, [0, 1, -1]),
    ],
)
def test_a_direct_call_reads_nothing_beyond_its_arguments(arguments):
    with pytest.raises(ValueError, match="solve: "):
        torch.ops.mtlfast.solve(torch.eye(3, dtype=torch.float64), *arguments)
