"""Every Gram aggregator: its twin, its promises, hard gradients, groups, state. The rows are in methods.py."""

import copy
from collections.abc import Callable

import pytest
import torch
from methods import (
    EQUIVARIANT,
    LINEAR,
    METHODS,
    NON_CONFLICT,
    SCALE_FREE,
    STATIONARY,
    losses,
    numbers_of_tasks,
    products,
    weigh,
)
from torch import Tensor

import mtlfast
from mtlfast import _native, ops, reference
from mtlfast.aggregation import Step
from mtlfast.aggregation._solved import SolvedAggregator

# Their references, which serve more than 512 tasks on a GPU and builds without the extension, take minutes there.
SLOW_TWINS = ("PCGrad", "GradVac", "MGDA, ", "CAG", "UPG", "DualProj, ", "PCD", "Multi", "ConFIG, ", "CR", "Compose")
NATIVE = _native.C is not None
every_method = pytest.mark.parametrize("name", METHODS)
STATEFUL = [name for name, method in METHODS.items() if getattr(method.make(), "state_shape", lambda n: ())(2) != ()]
STATEFUL.append("CRMOGM")


def promising(promise: str):
    return pytest.mark.parametrize("name", [name for name, method in METHODS.items() if promise in method.promises])


def jacobian(*lead: int, num_tasks: int, rank: int | None = None) -> Tensor:
    """Random normal gradients that conflict; [..., K, P]."""
    J = torch.randn(*lead, num_tasks, 2 * num_tasks, dtype=torch.float64)
    return J if rank is None else torch.randn(*lead, num_tasks, rank, dtype=torch.float64) @ J[..., :rank, :]


def both_ways(aggregator: SolvedAggregator, gram: Tensor, J: Tensor, **context) -> tuple[Tensor, Tensor]:
    """The weights of the solver, and of its twin on the K x P matrix with the same arguments and state."""
    arguments = aggregator.solve_arguments(gram, Step(len(J), losses(len(J), gram.device), **context))
    _, solver, params, inputs, state, tasks, _ = arguments
    twin_state = None if state is None else state.cpu().clone().view(-1)
    weights = ops.solve(*arguments).cpu()
    wide = {name: x.cpu().double() for name, x in inputs.items()}
    group = reference.Group(J, params, wide, twin_state, tasks, gram.cpu())
    twin = reference.SOLVERS[solver].run(group)
    if state is not None and "unconverged" not in aggregator.counts:  # a count that is the solver's own
        assert torch.allclose(state.cpu().view(-1), twin_state, rtol=1e-7, atol=1e-9, equal_nan=True)
    return weights, twin


def sizes(*wanted: int, of: Callable[[str], bool] = lambda name: True):
    return pytest.mark.parametrize(
        ("name", "num_tasks"),
        [(name, K) for name, method in METHODS.items() if of(name) for K in numbers_of_tasks(method, *wanted)],
    )


@pytest.mark.native
@sizes(1, 2, 3, 8, 20, of=lambda name: isinstance(METHODS[name].make(), SolvedAggregator))
def test_solver_agrees_with_the_twin_on_the_matrix(name, num_tasks, device):
    method = METHODS[name]
    aggregator = method.make()
    for _ in range(12 if num_tasks <= 8 else 3):
        J = jacobian(num_tasks=num_tasks)
        gram = products(method, J)
        weights, twin = both_ways(aggregator, gram.to(device), J, rtol=1e-12)
        assert torch.allclose(weights, twin, rtol=0, atol=method.tolerance * float(twin.abs().max()))
    assert not any(aggregator.diagnostics().values())


@sizes(1, 2, 3, 8, 40, 128, 130)
def test_any_number_of_tasks(name, num_tasks, device):
    method = METHODS[name]
    served = 8 if not NATIVE else 512 if device == "cuda" else 8192
    if num_tasks > served and name.startswith(SLOW_TWINS):
        pytest.skip("the twin, which serves here, takes too long for a test")
    aggregator = method.make()
    gram = products(method, jacobian(num_tasks=num_tasks)).to(device)
    weights = weigh(aggregator, gram)
    assert weights.shape == (num_tasks,)
    assert weights.dtype == torch.float64
    assert weights.isfinite().all()
    assert not any(aggregator.diagnostics().values())


@promising(EQUIVARIANT)
def test_another_order_of_the_tasks_gives_the_same_direction(name, device):
    method = METHODS[name]
    for num_tasks in numbers_of_tasks(method, 2, 3, 8, 20):
        J = jacobian(num_tasks=num_tasks).to(device)
        order = torch.randperm(num_tasks)
        direction = weigh(method.make(), J @ J.mT) @ J
        permuted = weigh(method.make(), J[order] @ J[order].mT) @ J[order]
        assert torch.allclose(permuted, direction, rtol=0, atol=1e-9 * float(J.norm()))


@promising(SCALE_FREE)
def test_a_constant_factor_changes_no_weight(name, device):
    method = METHODS[name]
    for num_tasks in numbers_of_tasks(method, 1, 3, 8):
        gram = products(method, jacobian(num_tasks=num_tasks)).to(device)
        weights = [weigh(method.make(), gram * factor) for factor in (1.0, 2.0**-40, 2.0**32)]
        for scaled in weights[1:]:
            assert torch.allclose(scaled, weights[0], rtol=1e-12, atol=1e-14)


@promising(LINEAR)
def test_direction_is_linear_in_each_gradients_length(name, device):
    method = METHODS[name]
    for num_tasks in numbers_of_tasks(method, 2, 3, 8):
        J = jacobian(num_tasks=num_tasks)
        a, b = torch.rand(2, num_tasks, 1, dtype=torch.float64) + 0.1

        def direction(lengths: Tensor, J: Tensor = J) -> Tensor:
            scaled = lengths * J
            return weigh(method.make(), (scaled @ scaled.mT).to(device)).cpu() @ scaled

        assert torch.allclose(direction(a + b), direction(a) + direction(b), atol=1e-8 * float(J.norm()))


@promising(NON_CONFLICT)
def test_no_task_is_harmed(name, device):
    method = METHODS[name]
    for num_tasks in numbers_of_tasks(method, 1, 2, 3, 8, 20):
        for rank in (None, max(1, num_tasks // 2)):
            J = jacobian(num_tasks=num_tasks, rank=rank)
            direction = weigh(method.make(), (J @ J.mT).to(device)).cpu() @ J
            assert (J @ direction).min() > -1e-9 * float(J.norm() ** 2)


@promising(STATIONARY)
def test_zero_at_a_stationary_point(name, device):
    method = METHODS[name]
    for num_tasks in numbers_of_tasks(method, 2, 3, 8):
        J = jacobian(num_tasks=num_tasks)
        positive = torch.rand(num_tasks, dtype=torch.float64) + 0.2
        J[-1] = -(positive[:-1] @ J[:-1]) / positive[-1]
        direction = weigh(method.make(), (J @ J.mT).to(device)).cpu() @ J
        assert direction.norm() < 1e-6 * float(J.norm())
        # and elsewhere it is not zero
        elsewhere = jacobian(num_tasks=num_tasks) + 1
        assert (weigh(method.make(), (elsewhere @ elsewhere.mT).to(device)).cpu() @ elsewhere).norm() > 1e-2


def hard_gradients(num_tasks: int) -> dict[str, Tensor]:
    """Jacobians on which solvers break down, by name."""
    J = jacobian(num_tasks=num_tasks)
    opposite, zero_row, same, ratio, nearly = (J.clone() for _ in range(5))
    opposite[1] = -opposite[0]
    zero_row[0] = 0
    same[1:] = same[0]
    ratio[0] *= 1e12
    nearly[1] = nearly[0] + 1e-9 * nearly[1]
    return {
        "half the rank": jacobian(num_tasks=num_tasks, rank=max(1, num_tasks // 2)),
        "rank one": jacobian(num_tasks=num_tasks, rank=1),
        "opposite": opposite,
        "a zero": zero_row,
        "all zero": torch.zeros_like(J),
        "all the same": same,
        "nearly the same": nearly,
        "a ratio of 1e12": ratio,
        "tiny": J * 1e-150,
        "huge": J * 1e150,
        "float32's rounding": (J[:, :1] @ J[:1, :]).float().double(),
    }


@every_method
def test_hard_gradients(name, device):
    method = METHODS[name]
    for num_tasks in numbers_of_tasks(method, 3, 8, 40):
        for kind, J in hard_gradients(num_tasks).items():
            aggregator = method.make()
            for step in range(2):
                gram = products(method, J)
                if kind == "float32's rounding":  # G itself as float32 gradients would give it: slightly indefinite
                    noise = torch.randn_like(gram) * 1e-7 * gram.diagonal().mean()
                    gram = gram + noise + noise.mT
                weights = weigh(aggregator, gram.to(device), seed=step)
                assert weights.isfinite().all(), (kind, num_tasks)
            converged = not aggregator.diagnostics().get("unconverged")
            assert converged or not method.always, (kind, num_tasks)


@every_method
def test_groups_are_solved_as_alone(name, device):
    method = METHODS[name]
    for num_tasks in numbers_of_tasks(method, 3, 8):
        gram = products(method, jacobian(2, 3, num_tasks=num_tasks)).to(device)
        together, alone = method.make(), [[method.make() for _ in range(3)] for _ in range(2)]
        if isinstance(together, mtlfast.aggregation.Random) or getattr(together, "order", "fixed") == "random":
            pytest.skip("draws numbers of its own for each group")
        for _ in range(2):
            weights = weigh(together, gram)
            assert weights.shape == (2, 3, num_tasks)
            for i in range(2):
                for j in range(3):
                    assert torch.equal(weights[i, j], weigh(alone[i][j], gram[i, j]))


@every_method
def test_not_finite_in_not_finite_out_and_the_state_stays(name, device):
    method = METHODS[name]
    for num_tasks in numbers_of_tasks(method, 3, 8):
        aggregator = method.make()
        if not aggregator.reads:
            pytest.skip("reads no gradients: its weights are finite, their sum with a NaN gradient is not")
        J = jacobian(num_tasks=num_tasks).to(device)
        weigh(aggregator, products(method, J))
        before = copy.deepcopy(aggregator.state_dict())
        for bad in (torch.nan, torch.inf, -torch.inf):
            gram = products(method, J)
            gram[1, 0] = gram[0, 1] = bad
            assert weigh(aggregator, gram).isnan().all()
        assert_same_state(aggregator.state_dict(), before)
        if name == "MGDA, loss+":
            broken = losses(num_tasks, device)
            broken[1] = torch.nan
            assert aggregator.weights(products(method, J), losses=broken).isnan().all()


def assert_same_state(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, Tensor):
            assert torch.equal(value.nan_to_num(nan=-7), other[key].nan_to_num(nan=-7)), key


@pytest.mark.parametrize("name", STATEFUL)
def test_state_survives_saving_moving_and_growing(name, device):
    method = METHODS[name]
    (num_tasks,) = numbers_of_tasks(method, 4)
    J = jacobian(num_tasks=num_tasks).to(device)
    first = method.make()
    for step in range(2):
        weigh(first, products(method, J), seed=step)
    second = method.make().to(device)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    third = copy.deepcopy(first).half().to(torch.float32)
    gram = products(method, J)
    wanted = weigh(first, gram)
    assert torch.equal(weigh(second, gram), wanted)
    assert torch.equal(weigh(third, gram), wanted)
    first.reset()
    assert torch.equal(weigh(first, gram), weigh(method.make(), gram))
    fresh = method.make()
    second.load_state_dict(fresh.state_dict())
    assert torch.equal(weigh(second, gram), weigh(fresh, gram))


@pytest.mark.parametrize("name", [name for name in STATEFUL if METHODS[name].any_tasks])
def test_an_absent_tasks_state_does_not_move(name, device):
    # Tasks 0, 2, 5 have the weights that they have where no others exist.
    method = METHODS[name]
    among_six, alone = method.make(), method.make()
    everyone = jacobian(num_tasks=6).to(device)
    for step in range(3):
        gram = products(method, everyone[[0, 2, 5]] + 0.3 * step)
        weights = weigh(among_six, gram, seed=step, tasks=(0, 2, 5))
        assert torch.equal(weights, weigh(alone, gram, seed=step))
    # And what the others left stays, in rows and, where pairs have a state, in columns.
    weigh(among_six, products(method, everyone))
    before = among_six.state.clone()
    weigh(among_six, products(method, everyone[[0, 2, 5]]), tasks=(0, 2, 5))
    first = before.shape[0] - 6  # PCD and GradVac count in a row of its own
    for absent in (1, 3, 4) if before.shape[0] >= 6 else ():
        assert torch.equal(among_six.state[first + absent], before[first + absent])
        if name.startswith("GradVac"):
            assert torch.equal(among_six.state[:, absent], before[:, absent])
    if before.shape[0] >= 6:
        assert not torch.equal(among_six.state, before)


def test_state_refuses_other_groups():
    aggregator = mtlfast.aggregation.PCD()
    J = jacobian(2, num_tasks=3)
    weigh(aggregator, J @ J.mT)
    with pytest.raises(ValueError, match=r"PCD: gram has groups \[\], expected \[2\] as the state has \(reset\(\)"):
        weigh(aggregator, J[0] @ J[0].mT)


@every_method
def test_step_of_training(name, device):
    method = METHODS[name]
    if method.cross:
        with pytest.raises(TypeError, match="got the gradients of one batch, expected those of two"):
            method.make()(torch.ones(3, 4, device=device))
        return
    (num_tasks,) = numbers_of_tasks(method, 4)
    p = torch.nn.Parameter(torch.linspace(-1, 1, 7, device=device))
    task_losses = [(p - k).square().sum() + (k + 1) for k in range(num_tasks)]
    result = mtlfast.backward(task_losses, method.make().to(device), shared=[p])
    rows = torch.stack([2 * (p.detach() - k) for k in range(num_tasks)])
    assert torch.allclose(p.grad, (result.weights.float() @ rows), atol=1e-4)
