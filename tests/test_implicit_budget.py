"""Where no memory budget can be kept, one is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mtlfast
from mtlfast.aggregation import GradDrop, MoDo, Sum


def losses_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    return [y.square().mean(), y.sin().mean()]


def of_closures(model: nn.Module, x: Tensor) -> None:
    closures = [lambda k=k: losses_of(model, x)[k] for k in range(2)]
    mtlfast.backward(closures, Sum(), shared=model, jacobian="auto", memory_budget=2**20)


def of_an_accumulator(model: nn.Module, x: Tensor) -> None:
    accumulator = mtlfast.TaskGradientAccumulator(model)
    accumulator.add(losses_of(model, x))
    mtlfast.backward(accumulator, Sum(), jacobian="auto", memory_budget=2**20)


def of_features(model: nn.Module, x: Tensor) -> None:
    y = model(x)
    losses = [y.square().mean(), y.sin().mean()]
    mtlfast.backward(losses, Sum(), at=y, jacobian="auto", memory_budget=2**20)


def of_two_batches(model: nn.Module, x: Tensor) -> None:
    second = losses_of(model, x + 1)
    mtlfast.backward(losses_of(model, x), MoDo(), shared=model, second=second, jacobian="auto", memory_budget=2**20)


def of_all_gradients(model: nn.Module, x: Tensor) -> None:
    mtlfast.backward(losses_of(model, x), GradDrop(), shared=model, jacobian="auto", memory_budget=2**20)


BESIDE = {
    "closures": of_closures,
    "an accumulator": of_an_accumulator,
    "at": of_features,
    "second": of_two_batches,
    "GradDrop, which needs the gradients of all tasks in memory": of_all_gradients,
}


@pytest.mark.parametrize("kind", BESIDE)
def test_a_budget_that_cannot_be_kept_is_refused(kind):
    model, x = nn.Linear(4, 4), torch.randn(3, 4)
    run: Callable[[nn.Module, Tensor], None] = BESIDE[kind]
    with pytest.raises(ValueError, match=rf"got memory_budget= beside {kind}, expected"):
        run(model, x)
    assert all(p.grad is None for p in model.parameters())
