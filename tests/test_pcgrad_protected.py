"""One-sided PCGrad: protected tasks keep their gradients, and the others lose their conflicts with those."""

import copy

import pytest
import torch
from torch import Tensor

import mtlfast
from mtlfast.aggregation import PCGrad


def one_sided(J: Tensor, protected: list[int]) -> Tensor:
    """The projected gradients, written out."""
    rows = []
    for i, g in enumerate(J):
        for p in [] if i in protected else protected:
            product = g @ J[p]
            if product < 0:
                g = g - product / (J[p] @ J[p]) * J[p]
        rows.append(g)
    return torch.stack(rows)


def test_by_hand(device):
    # (-1, 1) loses its component along (1, 0), which stays.
    J = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64, device=device)
    assert PCGrad(protected=[0])(J).tolist() == [1, 1]
    assert PCGrad(protected=[1])(J).tolist() == [-0.5, 1.5]
    assert PCGrad(protected=[0, 1])(J).tolist() == [0, 1]
    assert PCGrad(reduction="mean", protected=[0])(J).tolist() == [0.5, 0.5]


def test_one_protected_task_is_a_gem(device):
    # Equation 11 of A-GEM projects the step of the new task, if it conflicts with the memory's gradient.
    for _ in range(20):
        new, memory = torch.randn(2, 5, dtype=torch.float64)
        product = new @ memory
        projected = new if product >= 0 else new - product / (memory @ memory) * memory
        direction = PCGrad(protected=[1])(torch.stack([new, memory]).to(device)).cpu() - memory
        assert torch.allclose(direction, projected, atol=1e-12)


@pytest.mark.parametrize("protected", [[0], [4, 1], [1, 4], [2, 0, 1]])
def test_in_the_given_order(protected, device):
    J = torch.randn(6, 4, dtype=torch.float64)
    aggregator = PCGrad(protected=protected)
    assert torch.allclose(aggregator(J.to(device)).cpu(), one_sided(J, protected).sum(0), atol=1e-12)
    several = torch.randn(3, 6, 8, dtype=torch.float64)
    weights = aggregator.weights((several @ several.mT).to(device)).cpu()
    for J, w in zip(several, weights, strict=True):
        assert torch.allclose(w @ J, one_sided(J, protected).sum(0), atol=1e-12)


def test_the_order_matters():
    J = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [-0.5, -1.0]], dtype=torch.float64)
    assert not torch.allclose(PCGrad(protected=[0, 1])(J), PCGrad(protected=[1, 0])(J))


def test_no_random_number_is_drawn():
    generator = torch.Generator().manual_seed(3)
    aggregator, gram = PCGrad(generator=generator, protected=[1]), torch.eye(3, dtype=torch.float64)
    before, own = torch.get_rng_state(), generator.get_state()
    aggregator.weights(gram)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(generator.get_state(), own)
    aggregator.protected = None
    aggregator.weights(gram)
    assert not torch.equal(generator.get_state(), own)


def test_absent_tasks_are_passed_over(device):
    J = torch.randn(6, 4, dtype=torch.float64)
    aggregator = PCGrad(protected=[5, 1])
    for tasks, protected in (((0, 1, 3), [1]), ((1, 2, 5), [2, 0]), ((0, 2, 3), []), ((0, 1, 2, 3, 4, 5), [5, 1])):
        rows = J[list(tasks)]
        weights = aggregator.weights((rows @ rows.mT).to(device), tasks=tasks).cpu()
        assert torch.allclose(weights @ rows, one_sided(rows, protected).sum(0), atol=1e-12)
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64, device=device))
    given = [(p * g.to(device)).sum() for g in J]
    given[1] = None
    mtlfast.backward(given, aggregator, shared=[p])
    rest = J[[0, 2, 3, 4, 5]]
    assert torch.allclose(p.grad.cpu(), one_sided(rest, [4]).sum(0), atol=1e-12)


def test_copies_protect_the_same_tasks(device):
    J = torch.randn(4, 3, dtype=torch.float64, device=device)
    aggregator = PCGrad(order="fixed", protected=torch.tensor([2, 0]))
    assert aggregator.protected == (2, 0)
    assert repr(aggregator) == "PCGrad(reduction='sum', order='fixed', protected=(2, 0))"
    wanted = aggregator(J)
    assert torch.equal(copy.deepcopy(aggregator).half()(J), wanted)
    restored = PCGrad(order="fixed", protected=[2, 0])
    restored.load_state_dict(PCGrad(order="fixed").state_dict())  # the setting is the constructor's
    assert torch.equal(restored(J), wanted)


@pytest.mark.parametrize("wrong", [[], [0, 0], [-1], [0.5], [True], 0, "01", {0: 1}, torch.tensor(1)], ids=repr)
def test_what_is_no_list_of_tasks_is_refused(wrong):
    with pytest.raises(ValueError, match=r"PCGrad: protected is .*, expected different indices of tasks, or None$"):
        PCGrad(protected=wrong)
    with pytest.raises(ValueError, match="PCGrad: got 3 tasks, expected task 3 among them"):
        PCGrad(protected=[3, 0]).weights(torch.eye(3, dtype=torch.float64))
