"""The arguments and special values of a step count in the implicit way as in the stored one."""

import pytest
import torch
from torch import Tensor, nn
from zoo import Model, assert_gradients_close, assert_gram_close, randn, step, three_losses, with_losses
from zoo_products import weights

from mtlfast.aggregation import Constant, PCGrad
from mtlfast.weighting import UW
from mtlfast.weighting import Constant as Weighted

pytestmark = pytest.mark.native


def plain(**settings: object) -> Model:
    return with_losses(nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 10)), randn(3, 8), **settings)


def absent_task() -> Model:
    model = plain()
    first, second, third = model.losses()
    model.losses = lambda: {"a": first, "b": None, "c": second, "d": third}
    return model


def existing_gradients() -> Model:
    model = plain()
    for parameter in model.shared.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def found_by_features() -> Model:
    model = plain()
    x, features = randn(3, 8), []

    def losses() -> list[Tensor]:
        features.append(model.shared(x))
        return three_losses(features[0])

    return Model(model.shared, losses, settings={"shared": None, "features": features})


def found_by_the_walk() -> Model:
    """The input is a shared parameter as well, in the other operand of the first product."""
    model = plain()
    x = nn.Parameter(randn(2, 8))
    return Model(model.shared, lambda: three_losses(model.shared(x)), [nn.ParameterList([x])], {"shared": None})


def with_nan() -> Model:
    """The third sample's loss alone is NaN, but its row of the input is in the products of all tasks."""
    model, x = plain(), randn(3, 8)
    x[2, 1] = torch.nan

    def losses() -> list[Tensor]:
        y = model.shared(x)
        return [y[0].sin().sum(), y[:2].square().sum(), y.exp().sum()]

    return Model(model.shared, losses)


def nan_in_one_loss() -> Model:
    model = plain()
    first, second, third = model.losses()
    return Model(model.shared, lambda: [first, second * torch.nan, third])


def same_loss_twice() -> Model:
    model = plain()
    first, second, _ = model.losses()
    return Model(model.shared, lambda: [first, first, second])


def step_of_an_optimizer_in_a_hook() -> Model:
    """Hooks change each parameter in place once it has its gradient. `w1` is a factor of the gradient of `w2`."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, parameter: Tensor) -> None:
        seen[name] = parameter.grad.clone()
        with torch.no_grad():
            parameter.sub_(parameter.grad)

    model = weights(lambda x, u, v, w: x @ (u @ (v @ w)), randn(3, 9), (9, 2), (2, 9), (9, 8))
    for name, parameter in model.shared.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: keep(name, p))
    model.gradients = lambda: seen  # type: ignore[method-assign]
    return model


MODELS = {
    "absent task": absent_task,
    "existing .grad": existing_gradients,
    "features": found_by_features,
    "no shared parameters given": found_by_the_walk,
    "NaN in a sample": with_nan,
    "NaN in a loss": nan_in_one_loss,
    "a loss weight of 0": lambda: plain(weighting=Weighted(torch.tensor([1.0, 0.0, 2.0]))),
    "learned loss weights": lambda: plain(weighting=UW(3)),
    "groups of tensors": lambda: plain(groups="tensor"),
    "groups of modules": lambda: plain(groups="module"),
    "groups across layers": lambda: plain(groups={"a": ["0.weight", "2.bias"], "b": ["2.weight", "0.bias"]}),
    "storage_dtype": lambda: plain(storage_dtype=torch.float64),
    "loss_scale": lambda: plain(loss_scale=64.0),
    "the same loss twice": same_loss_twice,
    "a hook that changes parameters": step_of_an_optimizer_in_a_hook,
    "exact": lambda: plain(precision="exact"),
    "fast": lambda: plain(precision="fast"),
}


@pytest.mark.whole
@pytest.mark.parametrize("method", ["Constant", "PCGrad"])
@pytest.mark.parametrize("name", MODELS)
def test_the_settings_of_a_step_count_in_the_implicit_way_too(name, method):
    def aggregator() -> PCGrad | Constant:
        num_tasks = 4 if name == "absent task" else 3
        return PCGrad(order="fixed") if method == "PCGrad" else Constant([1.0, 2.0, -0.5, 3.0][:num_tasks])

    stored, expected = step(MODELS[name], "stored", aggregator())
    implicit, got = step(MODELS[name], "implicit", aggregator())
    assert implicit.plan.way == "implicit"
    assert_gram_close(implicit.gram, stored.gram)
    assert_gradients_close(got, expected)
    assert implicit.tasks == stored.tasks
    torch.testing.assert_close(implicit.weights, stored.weights, rtol=1e-11, atol=1e-11, equal_nan=True)
