"""Models for the implicit way beside the stored one: what a construction is, and how steps on it are compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import mtlfast
from mtlfast.aggregation import Aggregator, Constant

WEIGHTS = (1.0, 2.0, -0.5)
TOLERANCE = 1e-12


@dataclass
class Model:
    """What a construction makes.

    Attributes:
        shared: the module whose parameters the tasks share.
        losses: computes the losses. Each call is a forward pass.
        others: modules beside the shared one, whose gradients are compared as well.
        settings: arguments of `mtlfast.backward`.
    """

    shared: nn.Module
    losses: Callable[[], Sequence[Tensor | None] | dict[str, Tensor | None]]
    others: Sequence[nn.Module] = ()
    settings: dict[str, object] = field(default_factory=dict)

    def gradients(self) -> dict[str, Tensor | None]:
        """The gradients of all parameters, by name."""
        modules = {"shared": self.shared} | {f"other {i}": module for i, module in enumerate(self.others)}
        return {f"{of} {name}": p.grad for of, module in modules.items() for name, p in module.named_parameters()}


@dataclass(frozen=True)
class Construction:
    """A way to build a model, and what the plan of the implicit way must say of it.

    Attributes:
        make: builds the model, always the same one after the same seed.
        implicit: the names of the shared parameters that take the implicit way.
        reasons: for parameters that take the ordinary way, by name, what the reason must contain.
        sweep: "batched" or "sequential"; "" if the test does not ask.
    """

    make: Callable[[], Model]
    implicit: frozenset[str]
    reasons: dict[str, str]
    sweep: str


CONSTRUCTIONS: dict[str, Construction] = {}


def construction(implicit: str = "", sweep: str = "", **reasons: str) -> Callable[[Callable[[], Model]], object]:
    """Adds a function that builds a model to `CONSTRUCTIONS`.

    Args:
        implicit: the names of the parameters that take the implicit way, with spaces between them.
        sweep: as in `Construction`.
        reasons: as in `Construction`, with two underscores in place of each dot of a name.
    """

    def add(make: Callable[[], Model]) -> Callable[[], Model]:
        by_name = {name.replace("__", "."): reason for name, reason in reasons.items()}
        CONSTRUCTIONS[make.__name__] = Construction(make, frozenset(implicit.split()), by_name, sweep)
        return make

    return add


def three_losses(features: Tensor) -> list[Tensor]:
    """Three losses of one tensor without parameters, whose gradients have no simple relation."""
    features = features.flatten(1) if features.dim() > 1 else features[None]
    return [features.sin().sum(), (features - 0.5).square().mean(), features.logsumexp(1).sum()]


def with_losses(shared: nn.Module, x: Tensor, **settings: object) -> Model:
    """A module as the trunk of three losses without parameters."""
    return Model(shared.double(), lambda: three_losses(shared(x)), settings=settings)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def step(
    construct: Callable[[], Model], way: str, aggregator: Aggregator | None = None, seed: int = 0, **more: object
) -> tuple[mtlfast.StepResult, dict[str, Tensor | None]]:
    """One step on a new model, and all its gradients."""
    torch.manual_seed(seed)
    model = construct()
    losses = model.losses()
    settings = {"shared": model.shared, "diagnostics": True, **model.settings, **more}
    if way == "stored":
        settings.pop("memory_budget", None)
    if aggregator is None:
        aggregator = Constant(list(WEIGHTS[: len(losses)]))
    result = mtlfast.backward(losses, aggregator, jacobian=way, **settings)
    return result, model.gradients()


def assert_gram_close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Each product is as exact as the norms of the two gradients allow. NaN stands where NaN is expected."""
    assert torch.equal(got.isnan(), expected.isnan())
    norms = expected.diagonal(dim1=-2, dim2=-1).nan_to_num().clamp(min=0).sqrt()
    limit = tolerance * norms.unsqueeze(-1) * norms.unsqueeze(-2)
    assert ((got - expected).nan_to_num().abs() <= limit).all(), (got - expected).abs().max()


def assert_gradients_close(
    got: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float = TOLERANCE
) -> None:
    """All gradients together differ by no more than their norm allows, and have the same dtypes and shapes."""
    assert got.keys() == expected.keys()
    distance = norm = 0.0
    for name, gradient in expected.items():
        ours = got[name]
        assert (ours is None) == (gradient is None), name
        if gradient is None or ours is None:
            continue
        kinds = [(x.dtype, x.shape, x.layout) for x in (ours, gradient)]
        assert kinds[0] == kinds[1], name
        ours, gradient = ours.to_dense(), gradient.to_dense()
        assert torch.equal(ours.isnan(), gradient.isnan()), name
        distance += float((ours - gradient).nan_to_num().double().square().sum())
        norm += float(gradient.nan_to_num().double().square().sum())
    assert distance**0.5 <= tolerance * norm**0.5, f"{distance**0.5} of {norm**0.5}"


def assert_planned(construction: Construction, result: mtlfast.StepResult) -> None:
    """The plan takes the implicit way for the named parameters alone, and says why not of the others."""
    layers = {layer.name: layer for layer in result.plan.layers}
    found = {name for name, layer in layers.items() if layer.way == "implicit"}
    assert found == construction.implicit, str(result.plan)
    assert result.plan.way == ("implicit" if found else "stored")
    assert all(layer.reason for layer in layers.values())
    for name, reason in construction.reasons.items():
        assert reason in layers[name].reason, str(result.plan)
    assert construction.sweep in ("", result.plan.sweep), str(result.plan)
