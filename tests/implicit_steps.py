"""Steps by the stored and the implicit way, and how far their results are apart."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

import mtlfast
from mtlfast import StepResult
from mtlfast.aggregation import Aggregator, Constant

WEIGHTS = [1.0, 2.0, -0.5, 0.25, -1.5, 0.75, 0.5, -0.25]


class Tasks(nn.Module):
    """A trunk, and a head for each of K tasks on its result."""

    def __init__(self, trunk: nn.Module, width: int, num_tasks: int) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleList(nn.Linear(width, 1) for _ in range(num_tasks))

    def losses(self, x: Tensor) -> list[Tensor]:
        features = self.trunk(x)
        return [head(features).square().mean() for head in self.heads]


def mlp(width: int, depth: int, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width, bias=bias), nn.Tanh())))


def step(
    losses: Callable[[], Sequence[Tensor]],
    model: nn.Module,
    jacobian: str,
    aggregator: Aggregator | None = None,
    shared: nn.Module | None = None,
    **options: object,
) -> tuple[StepResult, list[Tensor | None]]:
    """One step from no `.grad`: its result, and the `.grad` of each of the model's parameters."""
    model.zero_grad()
    values = losses()
    method = Constant(WEIGHTS[: len(values)]) if aggregator is None else aggregator
    options = {"diagnostics": True, "shared": model if shared is None else shared, **options}
    result = mtlfast.backward(values, method, jacobian=jacobian, **options)
    return result, [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def error_of(gram: Tensor, exact: Tensor) -> float:
    """The largest difference of two Gram matrices, relative to the norms of the two tasks' gradients."""
    norms = exact.diagonal().sqrt()
    return float(((gram - exact).abs() / norms.outer(norms)).max())


def assert_exact(
    losses: Callable[[], Sequence[Tensor]],
    model: nn.Module,
    jacobian: str = "implicit",
    shared: nn.Module | None = None,
    **options: object,
) -> StepResult:
    """A step in float64 whose Gram matrix and update are those of the stored way, and its result."""
    stored, expected = step(losses, model, "stored", shared=shared)
    result, got = step(losses, model, jacobian, shared=shared, **options)
    assert error_of(result.gram, stored.gram) < 1e-12
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert float((a - b).abs().max()) <= 1e-12 * max(float(b.abs().max()), 1e-12)
    return result
