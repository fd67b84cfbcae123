"""The implicit way on random small graphs: whatever is shared, turned or hooked, it agrees with the stored one.

Seeded, so every run draws the same graphs; MTLFAST_EXAMPLES multiplies their number (`make fuzz`).
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, find, settings
from hypothesis import strategies as st
from test_properties import holds_for
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import Model, assert_gradients_close, assert_gram_close, randn, step

from mtlfast import StepResult
from mtlfast.aggregation import Constant

pytestmark = pytest.mark.native
WIDTH, ENTRIES = 12, 7
WEIGHTS = (1.0, 2.0, -0.5, 0.75)


class Operands(NamedTuple):
    """What an operation takes: two earlier results [rows, WIDTH], a weight [WIDTH, WIDTH], a bias, a table, indices."""

    x: Tensor
    y: Tensor
    weight: Tensor
    bias: Tensor
    table: Tensor
    indices: Tensor


def hooked(x: Tensor) -> Tensor:
    x = x * 1
    if x.requires_grad:
        x.register_hook(lambda g: g.sin())
    return x


OPERATIONS: dict[str, Callable[[Operands], Tensor]] = {
    "linear": lambda of: F.linear(of.x, of.weight, of.bias),
    "linear without bias": lambda of: F.linear(of.x, of.weight),
    "linear of three dimensions": lambda of: F.linear(of.x.unflatten(0, (-1, 1)), of.weight, of.bias).flatten(0, 1),
    "linear of a turned input": lambda of: F.linear(of.x.t().contiguous().t(), of.weight),
    "linear of one row": lambda of: F.linear(of.x[:1], of.weight, of.bias).expand_as(of.x),
    "linear of both": lambda of: sum(F.linear(torch.cat([of.x, of.y]), of.weight).split(len(of.x))),
    "x w": lambda of: of.x @ of.weight,
    "w x": lambda of: (of.weight @ of.x.T).T,
    "turned w x": lambda of: (of.weight.T @ of.x.T).T,
    "w turned twice": lambda of: of.x @ of.weight.t().transpose(-2, -1),
    "added in place": lambda of: of.x.clone().addmm_(of.y, of.weight),
    "einsum": lambda of: torch.einsum("ni,oi->no", of.x, of.weight),
    "scaled weight": lambda of: of.x @ (0.5 * of.weight),
    "part of a weight": lambda of: F.pad(of.x @ of.weight[:, 2:], (1, 1)),
    "embedding": lambda of: F.embedding(of.indices, of.table),
    "embedding with padding": lambda of: F.embedding(of.indices, of.table, padding_idx=2),
    "table as weight": lambda of: F.pad(F.linear(of.x, of.table), (0, WIDTH - ENTRIES)),
    "sum": lambda of: of.x + of.y,
    "product": lambda of: of.x * of.y,
    "shuffled": lambda of: torch.cat([of.x, of.y], dim=1)[:, 1::2].flip(0),
    "product of results": lambda of: of.x @ (of.y.T @ of.x),
    "detached": lambda of: of.x.detach() + of.y,
    "hook": lambda of: hooked(of.x),
    "in place": lambda of: of.x.clone().mul_(2).relu_(),
    "checkpoint": lambda of: checkpoint(lambda x: F.linear(x, of.weight, of.bias).tanh(), of.x, use_reentrant=False),
}


class Graph(NamedTuple):
    """A random model: short to print, where the tensors are not.

    Attributes:
        rows: of every result.
        weights: the number of weights.
        operations: of each its name, the earlier results that it takes, counted backwards, and its weight.
        losses: for each the results of which it is the sum, counted backwards.
        reads_weights: the losses that have a penalty on the first weight.
        seed: of the tensors.
    """

    rows: int
    weights: int
    operations: list[tuple[str, int, int, int]]
    losses: list[list[int]]
    reads_weights: set[int]
    seed: int

    def __call__(self) -> Model:
        shared = nn.Module()
        shared.weights = nn.ParameterList(randn(WIDTH, WIDTH) / 3 for _ in range(self.weights))
        shared.biases = nn.ParameterList(randn(WIDTH) for _ in range(self.weights))
        shared.table = nn.Parameter(randn(ENTRIES, WIDTH))
        return Model(shared, lambda: self.compute(shared))

    def compute(self, shared: nn.Module) -> list[Tensor]:
        results = [randn(self.rows, WIDTH)]
        for name, first, second, which in self.operations:
            operands = Operands(
                results[-1 - first % len(results)],
                results[-1 - second % len(results)],
                shared.weights[which % self.weights],
                shared.biases[which % self.weights],
                shared.table,
                torch.randint(ENTRIES, (self.rows,)),
            )
            results.append(OPERATIONS[name](operands).tanh())
        losses = []
        for k, chosen in enumerate(self.losses):
            loss = sum((results[-1 - i % len(results)] - 0.3 * k).square().mean() * (k + 1) for i in chosen)
            losses.append(
                loss + shared.weights[0].sin().sum() if k in self.reads_weights else loss + 0 * results[-1].sum()
            )
        return losses


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    back = st.one_of(st.just(0), st.integers(0, 5))
    operation = st.tuples(st.sampled_from(list(OPERATIONS)), back, back, st.integers(0, 3))
    operations = draw(st.lists(operation, min_size=1, max_size=9))
    # The last operation reaches a weight, so that each loss has a gradient.
    operations.append(
        (draw(st.sampled_from(["linear", "x w", "w x"])), draw(back), draw(back), draw(st.integers(0, 3)))
    )
    losses = draw(st.lists(st.lists(back, min_size=1, max_size=3), min_size=1, max_size=4))
    return Graph(
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        operations,
        losses,
        draw(st.sets(st.integers(0, 9), max_size=2)),
        draw(st.integers(0, 2**32 - 1)),
    )


def implicit_step(graph: Graph) -> StepResult:
    """The step of the implicit way, after it was compared with that of the stored one."""
    found = {}
    for way in ("stored", "implicit"):
        aggregator = Constant(list(WEIGHTS[: len(graph.losses)]))
        found[way] = step(graph, way, aggregator, seed=graph.seed)
    (stored, expected), (implicit, got) = found["stored"], found["implicit"]
    assert_gram_close(implicit.gram, stored.gram)
    assert_gradients_close(got, expected)
    return implicit


@holds_for(graphs())
def test_a_random_graph_has_the_gram_matrix_and_the_update_of_the_stored_way(graph):
    implicit_step(graph)


@pytest.mark.parametrize("sweep", ["batched", "sequential"])
def test_random_graphs_take_the_implicit_way(sweep):
    """Among the graphs are those for which the test above says something, with several layers of each way."""

    def has_all(graph: Graph) -> bool:
        plan = implicit_step(graph).plan
        ways = [layer.way for layer in plan.layers if layer.reason not in ("no task reaches it",)]
        return plan.sweep == sweep and ways.count("implicit") > 1 and ways.count("ordinary") > 1

    few = settings(max_examples=200, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    assert find(graphs(), has_all, settings=few)
