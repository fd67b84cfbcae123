"""What closures may be and return, and what is refused of them."""

import functools

import pytest
import torch
from elementwise import METHODS as ELEMENTWISE
from torch import nn
from ways_of_net import Net

import mtlfast
from mtlfast.aggregation import Sum, UPGrad


def test_closures_of_every_kind():
    class Task(nn.Module):
        def __init__(self, net, task):
            super().__init__()
            self.net, self.task = net, task

        def forward(self):
            return self.net.loss(self.task)

    net, expected = Net(2), None
    kinds = {
        "functions": [lambda: net.loss(0), lambda: net.loss(1)],
        "partial": net.closures(),
        "modules": [Task(net, 0), Task(net, 1)],
        "bound methods": [Task(net, 0).forward, Task(net, 1).forward],
        "a module list": nn.ModuleList([Task(net, 0), Task(net, 1)]),
        "a generator": (closure for closure in net.closures()),
        "a dict": {1: net.closures()[0], (2, 3): net.closures()[1]},
    }
    for given in kinds.values():
        net.zero_grad()
        result = mtlfast.backward(given, UPGrad(), shared=net.trunk)
        expected = result.weights if expected is None else expected
        assert torch.equal(result.weights, expected)
    assert result.names == ("1", "(2, 3)")


NET = Net(2)
WRONG = {
    "a number": ([NET.closures()[0], lambda: 1.0], TypeError, "backward: loss 1 is a float, expected a scalar Tensor"),
    "None": (
        {"a": lambda: None},
        TypeError,
        "backward: the closure of loss a returned None, expected a scalar Tensor (is a return missing?)",
    ),
    "no scalar": (
        [NET.closures()[0], NET.features],
        ValueError,
        "backward: loss 1 has shape [4, 6], expected a scalar",
    ),
    "nothing reached": (
        [lambda: torch.ones(())],
        ValueError,
        "backward: loss 0 does not require grad, expected one that depends on parameters",
    ),
    "a tensor first": (
        [NET.loss(0), NET.closures()[1]],
        TypeError,
        "backward: loss 0 and loss 1 are a tensor and a function, expected one kind for all",
    ),
    "a function first": (
        [NET.closures()[0], NET.loss(1)],
        TypeError,
        "backward: loss 0 and loss 1 are a function and a tensor, expected one kind for all",
    ),
    "not in a list": (NET.closures()[0], TypeError, "backward: losses is a partial, expected a list of scalars"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_closures_may_not_be_or_return(what):
    given, error, sentence = WRONG[what]
    with pytest.raises(error) as raised:
        mtlfast.backward(given, UPGrad(), shared=NET.trunk)
    assert str(raised.value) == sentence
    assert all(p.grad is None for p in NET.parameters())


@pytest.mark.parametrize("where", ["losses", "shared"])
def test_an_error_inside_a_generator_is_passed_on(where):
    def fails():
        yield NET.loss(0) if where == "losses" else NET.trunk
        raise TypeError("the user's own")

    arguments = {"losses": NET.losses(), "shared": NET.trunk} | {where: fails()}
    with pytest.raises(TypeError, match="the user's own"):
        mtlfast.backward(arguments["losses"], Sum(), shared=arguments["shared"])


def test_closures_of_one_graph_need_it_kept():
    net, twin = Net(), Net()
    features = net.features()
    given = [functools.partial(net.loss, task, features) for task in range(3)]
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        mtlfast.backward(given, UPGrad(), shared=net.shared)
    assert all(p.grad is None for p in net.parameters())
    features = net.features()
    given = [functools.partial(net.loss, task, features) for task in range(3)]
    mtlfast.backward(given, UPGrad(), shared=net.shared, retain_graph=True)
    mtlfast.backward(twin.losses(), UPGrad(), shared=twin.shared)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-12)


def test_one_closure_and_no_shared_parameters_is_refused_before_it_runs():
    with pytest.raises(ValueError, match="no parameter is reached by more than one of the losses, expected shared="):
        mtlfast.backward([lambda: pytest.fail("the closure ran"), None], UPGrad())


def test_what_a_method_refuses_of_parameters_that_closures_reach():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2).double())
    given = [lambda: (a.double() * b).sum(), lambda: (2 * a.double() * b).sum()]
    expected = r"Median: needs .* but the shared parameters are of torch\.float32 and torch\.float64, expected one"
    with pytest.raises(TypeError, match=expected):
        mtlfast.backward(given, ELEMENTWISE["Median"].make())
    assert a.grad is b.grad is None
