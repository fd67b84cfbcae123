"""Evaluation changes neither state nor generators, a step changes them, and a failed step restores them."""

import copy

import pytest
import torch
from methods import METHODS, losses, numbers_of_tasks, products
from passes import Breaks
from torch import Tensor, nn

import mtlfast
from mtlfast import _grad
from mtlfast.aggregation import CRMOGM, Compose, GradVac, NormBalance, PCGrad, Random
from mtlfast.weighting import DWA, FAMO, Constant

every_method = pytest.mark.parametrize("name", METHODS)
OWN_GENERATOR = {
    "PCGrad, own generator": lambda: PCGrad(generator=torch.Generator().manual_seed(1)),
    "GradVac, own generator": lambda: GradVac(generator=torch.Generator().manual_seed(1)),
    "Random, own generator": lambda: Random(torch.Generator().manual_seed(1)),
    "CRMOGM of both": lambda: CRMOGM(Compose(NormBalance(), GradVac(generator=torch.Generator().manual_seed(1)))),
}
MAKERS = {**{name: method.make for name, method in METHODS.items() if not method.cross}, **OWN_GENERATOR}


def same_state(before: dict, made: nn.Module) -> bool:
    after = made.state_dict()
    return before.keys() == after.keys() and all(
        torch.equal(x.double().nan_to_num(7.0), after[key].double().nan_to_num(7.0)) for key, x in before.items()
    )


def gram_for(name: str) -> tuple[Tensor, int]:
    method = METHODS.get(name)
    (num_tasks, *_) = [4] if method is None else numbers_of_tasks(method, 4)
    J = torch.randn(num_tasks, 9, dtype=torch.float64)
    return (J @ J.T if method is None else products(method, J)), num_tasks


@pytest.mark.parametrize("name", [*METHODS, *OWN_GENERATOR])
@pytest.mark.parametrize("trained", [False, True])
def test_evaluation_moves_nothing(name, trained):
    made = METHODS[name].make() if name in METHODS else OWN_GENERATOR[name]()
    gram, num_tasks = gram_for(name)
    of_tasks = losses(num_tasks)
    if trained:
        made.weights(gram, losses=of_tasks)
    before, drawn = copy.deepcopy(made.state_dict()), torch.get_rng_state()
    made.eval()
    weights = [made.weights(gram, losses=of_tasks) for _ in range(2)]
    assert torch.equal(weights[0], weights[1])
    assert weights[0].isfinite().all()
    assert same_state(before, made)
    assert torch.equal(drawn, torch.get_rng_state())
    made.train()
    assert made.weights(gram, losses=of_tasks).isfinite().all()


def test_random_numbers_have_expected_values_in_evaluation():
    gram = torch.eye(4, dtype=torch.float64) - 0.2
    assert Random().eval().weights(gram).tolist() == [0.25] * 4
    fixed = PCGrad(order="fixed").weights(gram)
    assert torch.equal(PCGrad().eval().weights(gram), fixed)
    assert torch.equal(CRMOGM(PCGrad()).eval().weights(gram), fixed)


class Net(nn.Module):
    """A trunk and as many heads as asked for."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(num_tasks))

    def losses(self) -> list[Tensor]:
        features = self.trunk(torch.ones(2, 4)).tanh()
        return [(head(features) - k).square().mean() + 0.1 for k, head in enumerate(self.heads)]


@pytest.mark.parametrize("name", MAKERS)
def test_backward_is_a_step_in_either_mode(name):
    results = []
    for training in (True, False):
        torch.manual_seed(0)
        _, num_tasks = gram_for(name)
        net, made = Net(num_tasks), MAKERS[name]()
        made.train(training)
        torch.manual_seed(1)
        for _ in range(2):
            step = mtlfast.backward(net.losses(), made, shared=net.trunk)
        results.append((step.weights, made.state_dict(), torch.get_rng_state()))
        assert made.training == training
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][2], results[1][2])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1].values(), results[1][1].values(), strict=True))


WEIGHTINGS = {
    "none": lambda n: None,
    "Constant": lambda n: Constant(torch.ones(n)),
    "FAMO": lambda n: FAMO(n),
    "DWA": lambda n: DWA(n, window=1),
}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("where", ["backward pass", "solve", "write"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_step_that_fails_leaves_everything_as_it_was(name, where, weighting, monkeypatch):
    if weighting != "none" and name not in ("GradVac", "CRMOGM", "MGDA"):
        pytest.skip("one stateful method of each kind is enough with every weighting")
    _, num_tasks = gram_for(name)
    net, made, of_losses = Net(num_tasks), MAKERS[name](), WEIGHTINGS[weighting](num_tasks)
    mtlfast.backward(net.losses(), made, shared=net.trunk, weighting=of_losses)
    before = copy.deepcopy(made.state_dict())
    weighting_before = {} if of_losses is None else copy.deepcopy(of_losses.state_dict())
    grads = [p.grad.clone() for p in net.parameters()]
    failing = net.losses()
    with monkeypatch.context() as patch:
        if where == "backward pass":
            failing[-1] = Breaks.apply(failing[-1])
        elif where == "solve":
            solve = type(made).solve

            def moves_then_breaks(self, gram, step):
                solve(self, gram, step)
                raise RuntimeError("planted")

            patch.setattr(type(made), "solve", moves_then_breaks)
        else:

            def breaks(*args, **kwargs):
                raise RuntimeError("planted")

            patch.setattr(_grad, "weighted", breaks)
        with pytest.raises(RuntimeError, match="planted"):
            mtlfast.backward(failing, made, shared=net.trunk, weighting=of_losses)
    assert same_state(before, made)
    assert of_losses is None or same_state(weighting_before, of_losses)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
    mtlfast.backward(net.losses(), made, shared=net.trunk, weighting=of_losses)


def test_the_table_moves_something():
    # Otherwise the tests above would pass for methods that remember nothing.
    moving = set()
    for name, make in MAKERS.items():
        gram, num_tasks = gram_for(name)
        made = make()
        made.weights(gram, losses=losses(num_tasks))
        before = copy.deepcopy(made.state_dict())
        made.weights(gram, losses=losses(num_tasks))
        if not same_state(before, made):
            moving.add(name)
    assert {"GradVac", "NashMTL", "PCD", *OWN_GENERATOR} <= moving
